"""gpt-oss: attention with sinks, experts with biases and a clamped activation, in bfloat16 or MXFP4."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial

import torch

from ....kernels.reference.operations import CLAMPED_SWIGLU, SWIGLU_GAIN, SWIGLU_LIMIT
from ...checkpoint.config_reader import ConfigReader
from ...checkpoint.weights import Piece, TensorInfo
from ..family import Family
from ..moe_spec import MoESpec
from .mixtures import ONE_EACH, router
from .rules import FULL, SLIDING, flag_of, layer_type, positive_window

_FUSED = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)(_bias|_blocks|_scales)?")
_ENDINGS = {None: "weight", "_bias": "bias", "_blocks": "blocks", "_scales": "scales"}
_MOST_EXPERTS = 1 << 16


def _moe(config: ConfigReader, layer: int) -> MoESpec:
    size = config.integer("intermediate_size")
    return MoESpec(router=router(config, layer), expert_size=size, router_bias=True, expert_bias=True)


def _activation(config: ConfigReader) -> str:
    for key, wanted in (("swiglu_limit", SWIGLU_LIMIT), ("swiglu_alpha", SWIGLU_GAIN)):
        if (value := config.number(key, wanted)) != wanted:
            raise config.error(key, value, str(wanted))
    return CLAMPED_SWIGLU


def _window(config: ConfigReader, layer: int) -> int | None:
    """Every other layer, from the first on, unless ``layer_types`` says which."""
    size = positive_window(config, config.values.get("sliding_window", 128))
    config.get("sliding_window")
    if layer_type(config, layer, FULL if layer % 2 else SLIDING) == FULL:
        return None
    if size is None:
        raise config.error("sliding_window", size, f"a positive whole number where layer_types has {SLIDING}")
    return size


def _experts(tensors: Mapping[str, TensorInfo]) -> dict[str, Piece]:
    """Tensors of all experts as one of each expert; gate and up take turns in the outputs of ``gate_up_proj``."""
    pieces: dict[str, Piece] = {}
    for name, info in tensors.items():
        match = _FUSED.fullmatch(name)
        if match is None or len(info.shape) < 2 or not 1 <= info.shape[0] <= _MOST_EXPERTS:
            continue
        prefix, projection, kind = match.groups()
        for expert in range(info.shape[0]):
            for part, outputs in _parts(projection):
                shape = _shape(info.shape[1:], kind is None, outputs)
                take = partial(_take, expert=expert, transposed=kind is None, outputs=outputs)
                pieces[f"{prefix}{expert}.{part}.{_ENDINGS[kind]}"] = Piece(source=name, shape=shape, take=take)
    return pieces


def _parts(projection: str) -> Iterator[tuple[str, slice]]:
    if projection == "down_proj":
        yield "down_proj", slice(None)
    else:
        yield from (("gate_proj", slice(0, None, 2)), ("up_proj", slice(1, None, 2)))


def _shape(stored: tuple[int, ...], transposed: bool, outputs: slice) -> tuple[int, ...]:
    """Of one expert's part of a tensor."""
    first, *rest = reversed(stored) if transposed else stored
    return (len(range(first)[outputs]), *rest)


def _take(stored: torch.Tensor, expert: int, transposed: bool, outputs: slice) -> torch.Tensor:
    one = stored[expert]
    return (one.T if transposed else one)[outputs]


GPT_OSS: dict[str, Family] = {
    "gpt_oss": Family(
        kv_heads=8,
        head_dim=64,
        theta=150000.0,
        norm_eps=1e-5,
        moe=_moe,
        window=_window,
        qkv_bias=flag_of("attention_bias", True),
        o_bias=flag_of("attention_bias", True),
        attention_parts=lambda config, layer: {"sinks": True},
        activation=_activation,
        default_rope={
            **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
            "original_max_position_embeddings": 4096,
        },
        # The last two are there under other names as well.
        ignored=frozenset({"hidden_act", "initial_context_length", "experts_per_token"}),
        divide=_experts,
        experts=(ONE_EACH,),
        router=("mlp.router.weight",),
    ),
}
