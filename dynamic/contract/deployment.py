"""The deployment that a certificate is bound to: everything about a running model that its losses depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...exits.sidecar import JSON_FILE, TENSOR_FILE, backbone_hash
from ...moe.sidecar import JSON_FILE as CONTRIBUTIONS
from ..engine.plugins import Plugin, plugin_facts
from ..model.machine import processor
from .certificate import Scalar
from .model_check import logits_hash, spec_hash

if TYPE_CHECKING:
    from ..engine.exit_runner import ExitRunner
    from ..model.loaded import LoadedModel


def deployment(
    model: LoadedModel, exits: ExitRunner, plugins: Sequence[Plugin] = (), cache_plugins: Sequence[Plugin] = ()
) -> dict[str, Scalar]:
    """Names and values of the deployment; equal values mean equal tokens, as far as ``device`` is deterministic.

    Arguments:
        exits: of the engine that serves the model.
        plugins: logits processors of the engine; cache_plugins: its cache policy.
    """
    decoder = model.decoder
    device = torch.device(decoder.device)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    isa = getattr(decoder.backend, "isa", None)
    experts = {layer.moe.router.top_k + layer.moe.num_always_on for layer in model.spec.layers if layer.moe}
    kept = exits.kv[0].keys_BGPC.dtype
    evicted = f"evicted by {plugin_facts(cache_plugins)}" if cache_plugins else "nothing evicted"
    facts: dict[str, Scalar] = {
        "model": spec_hash(decoder.spec),
        "weights": backbone_hash(model.path),
        "quantisation": decoder.quantization,
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "experts_per_token": ",".join(str(count) for count in sorted(experts)),
        "keys_and_values": f"{kept}, {evicted}".removeprefix("torch."),
        "exits": _hash(model, JSON_FILE, TENSOR_FILE),
        "contributions": _hash(model, CONTRIBUTIONS),
        "backfill": "project",  # KV propagation, by the name that certificates know
        "batching": "each row leaves by its own state",
        "device": kind,
        "backend": decoder.backend.name + (f" {isa}" if isa else f", torch {torch.__version__}"),
        "kernels": decoder.backend.numerics(processor(), coded_cache=kept == torch.int8),
        "logits": logits_hash(decoder, exact=isa is not None),
    }
    if decoder.processes is not None:  # several processes sum in another order
        facts["processes"] = decoder.processes
    if plugins:
        facts["logits_processors"] = plugin_facts(plugins)
    return facts


def _hash(model: LoadedModel, *names: str) -> str:
    digest = hashlib.sha256()
    for name in names:
        file = model.path / name
        digest.update(file.read_bytes() if file.is_file() else b"none")
    return digest.hexdigest()
