"""Pre-compiles the GPU kernels before the first request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..model.attention.gqa import GqaSpec
from .config import EngineConfig

if TYPE_CHECKING:
    import torch

    from ...kernels.triton.shapes import WarmUpShape
    from ..model.decoder import Decoder
    from ..model.exits import DecoderExit
    from ..model.spec import ModelSpec


def warm_up(decoder: Decoder, config: EngineConfig, max_model_len: int) -> None:
    """Compile what steps within the limits can launch; does nothing for backends that compile nothing."""
    from ...kernels.torch.backend import TorchBackend

    backend: TorchBackend = decoder.backend
    if backend.name != "triton":
        return
    from ...kernels.triton.backend import TritonBackend

    assert isinstance(backend, TritonBackend), "only the Triton backend carries this name"
    exits = decoder.exits.values()
    backend.warm_up(warm_up_shapes(decoder.spec, config, max_model_len, exits, decoder.kv_dtype))


def warm_up_shapes(
    spec: ModelSpec,
    config: EngineConfig,
    max_model_len: int,
    exits: Iterable[DecoderExit] = (),
    kv_dtype: torch.dtype | None = None,
) -> list[WarmUpShape]:
    """The distinct layers of a model with the limits of an engine."""
    from ...kernels.triton.shapes import WarmUpShape

    probes = [exit.probe for exit in exits if exit.probe is not None]
    kinds = {(p.bias_J.numel(), p.out_J is not None, p.previous, p.router_entropy) for p in probes}
    shapes = [
        WarmUpShape(
            hidden_size=spec.hidden_size,
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            page_size=config.block_size,
            max_tokens=config.max_num_batched_tokens,
            max_context=max_model_len,
            max_sequences=config.max_num_seqs,
            router=None if layer.moe is None or layer.moe.is_dense else layer.moe.router,
            expert_size=0 if layer.moe is None else layer.moe.expert_size,
            activation=spec.activation,
            always_on=0 if layer.moe is None else layer.moe.num_always_on,
            norm_widths=tuple(sorted(set(attention.norm_sizes or ()))),
            probes=tuple(sorted(kinds)),
            window=layer.window,
            sinks=attention.sinks,
            softcap=attention.softcap,
            kv_dtype=kv_dtype,
        )
        for layer in spec.layers
        if isinstance(attention := layer.attention, GqaSpec)  # others compile when they first run
    ]
    return list(dict.fromkeys(shapes))
