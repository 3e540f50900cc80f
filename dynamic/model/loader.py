"""From a directory to a decoder that is ready to run: read, check, convert layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...exits.sidecar import load_heads
from ...kernels.api.kv_codes import KV_DTYPES
from ...kernels.select import select_backend
from ..checkpoint.weights import DTYPES
from .budgeted_layers import read_scales
from .builder import Builder
from .decoder import Decoder
from .dtype import choose_device, choose_dtype
from .expert_memory import ExpertMemory
from .generation_defaults import stop_tokens
from .kv_cache import check_kv_dtype
from .layout import EMBEDDING
from .load_config import LoadConfig
from .model_files import open_files
from .placement import Join
from .quantization import NONE, Quantization
from .weight_cache import open_cache

logger = logging.getLogger(__name__)

STORED = "as the checkpoint stores it"


def load_decoder(
    path: Path,
    config: LoadConfig | None = None,
    *,
    progress: bool = False,
    join: Join | None = None,
    experts_per_token: int | None = None,
    load_mtp: bool = False,
    stop_token_ids: Sequence[int] = (),
    **options: Any,
) -> Decoder:
    """Load the decoder of a directory, without its tokenizer.

    Every name and shape is checked from the files' headers before the first weight is read. Exits and calibrated
    contributions of the experts that lie beside the checkpoint come with it.

    Arguments:
        path: a directory in Hugging Face layout.
        config: how it is loaded.
        progress: show a progress bar.
        join: meets the other processes that share the model; None: there are none.
        experts_per_token: use fewer routed experts per token than the model was made for.
        load_mtp: load the layers that predict further tokens, if there are any, into :attr:`.Decoder.mtp`.
        stop_token_ids: tokens that end a text beside those that the checkpoint's configuration names.
        options: fields of :class:`LoadConfig` that differ from ``config``.

    Raises:
        ValueError: one clear message for whatever is wrong, before the first weight is read.
    """
    settings = replace(config or LoadConfig(), **options)
    wanted = Quantization(method=settings.quantization, lm_head=settings.quantize_lm_head)
    check_kv_dtype(settings.kv_cache_dtype)
    if load_mtp and join is not None:
        raise ValueError("load_mtp: layers that predict further tokens are loaded in one process")
    files = open_files(path, load_mtp)
    spec, checkpoint, layout, stored = files.spec, files.checkpoint, files.layout, files.stored
    if stored is not None and settings.quantization != NONE:
        raise ValueError(
            f"the weights in {path} are quantised already: leave quantization={settings.quantization} away"
        )
    checkpoint.admit(dequantize=settings.dequantize)
    spec = replace(spec, eos_token_ids=stop_tokens(path, (*spec.eos_token_ids, *stop_token_ids)))
    if experts_per_token is not None:
        spec = spec.with_experts_per_token(experts_per_token)
    if any(rope.longest for rope in spec.ropes):
        logger.warning(
            "contexts of up to %d tokens are served: longer ones rotate with other factors", spec.max_position
        )
    device, coded = choose_device(settings.device), stored is not None or settings.quantization != NONE
    torch_dtype = choose_dtype(settings.dtype, files.config, DTYPES[checkpoint[EMBEDDING].dtype], device, coded=coded)
    chosen = select_backend(device, torch_dtype, settings.backend)
    check_kv_dtype(settings.kv_cache_dtype, spec, chosen)
    described = str(wanted) if stored is None else STORED
    experts = ExpertMemory.of(settings, path, spec, chosen, described, shared=join is not None)
    heads, placement = load_heads(path), None
    if join is not None:
        placement = join(spec, path, chosen, wanted, stored, heads.exit_layers if heads else ())
        layout = placement.layout(layout)
        if wanted.layers is not None:
            placement.check_quantization(wanted.method, wanted.layers)
    source = checkpoint if placement is None else placement.checkpoint(checkpoint)
    # Experts on the disk are packed there already.
    cached = placement is None and experts is None
    cache = open_cache(settings.weight_cache, path, chosen, wanted, mtp=load_mtp) if cached else None
    kept = cache is not None and cache.read(chosen)
    builder = Builder(
        spec, layout, source, chosen, read_scales(path, spec), wanted, described, placement, cache, experts
    )
    decoder = builder.build(progress=progress, heads=heads)
    decoder.mtp = builder.mtp_layers(files.mtp)
    if cache is not None and not kept:
        cache.write()
    decoder.kv_dtype = KV_DTYPES[settings.kv_cache_dtype] or torch_dtype
    return decoder
