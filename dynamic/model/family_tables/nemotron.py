"""Nemotron-H: each layer is one block, a state space, attention, an FFN or a mixture. FFNs have no gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....kernels.reference.operations import SQUARED_RELU
from ...checkpoint.config_reader import ConfigReader
from ..blocks import Attention, Block, FeedForward, Norm
from ..family import ExpertNames, Family, norm_of
from ..moe_spec import MoESpec
from .mixtures import DEEPSEEK_RULES, router
from .rules import FULL, flag_of, layer_type

_STATES, _MIXTURE, _FFN = "linear_attention", "moe", "mlp"
_LISTS, _PATTERN = ("layers_block_type", "layer_types"), "hybrid_override_pattern"
_LETTERS = {"M": _STATES, "E": _MIXTURE, "*": FULL, "-": _FFN}
_KINDS = {**{kind: kind for kind in _LETTERS.values()}, "mamba": _STATES, "attention": FULL}


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Published files say in letters what each layer is."""
    reader, said = ConfigReader(config), dict[str, list[str]]()
    for key in _LISTS:
        if (listed := config.get(key)) is None:
            continue
        if not isinstance(listed, list) or any(str(kind) not in _KINDS for kind in listed):
            raise reader.error(key, listed, f"a list of {', '.join(_KINDS)}")
        said[key] = [_KINDS[kind] for kind in listed]
    if (pattern := config.get(_PATTERN)) is not None:
        if not isinstance(pattern, str) or set(pattern) - set(_LETTERS):
            raise reader.error(_PATTERN, pattern, f"a text of the letters {' '.join(_LETTERS)}")
        said[_PATTERN] = [_LETTERS[letter] for letter in pattern]
    if not said:
        raise reader.lacks(_PATTERN)
    (first, kinds), *others = said.items()
    for key, same in others:
        if same != kinds:
            raise reader.error(key, config[key], f"what {first} says, {kinds}")
    if (count := reader.integer("num_hidden_layers", len(kinds))) != len(kinds):
        raise reader.error("num_hidden_layers", count, f"{len(kinds)}, as many as there are types of layers")
    kept = {key: value for key, value in config.items() if key not in (*_LISTS, _PATTERN)}
    return {**kept, _LISTS[0]: kinds, "num_hidden_layers": len(kinds)}


def _kind(config: ConfigReader, layer: int) -> str:
    return layer_type(config, layer, "", _LETTERS.values(), _LISTS[0])


def _attention(config: ConfigReader, layer: int) -> str:
    return {_STATES: "mamba2", FULL: "gqa"}.get(_kind(config, layer), "none")


def _blocks(config: ConfigReader, layer: int) -> tuple[Block, ...]:
    reads = _kind(config, layer) in (_STATES, FULL)
    return Norm("mixer"), Attention() if reads else FeedForward()


def _moe(config: ConfigReader, layer: int) -> MoESpec | None:
    mixture = MoESpec(
        router=router(config, layer),
        expert_size=config.integer("moe_intermediate_size"),
        shared_size=config.integer("moe_shared_expert_intermediate_size"),
        latent_size=config.integer("moe_latent_size", 0),
    )
    return mixture if _kind(config, layer) == _MIXTURE else None


def _state_parts(config: ConfigReader) -> dict[str, Any]:
    config.choice("mamba_hidden_act", {"silu": "silu"}, "silu")
    return {
        "num_groups": config.integer("n_groups", 8),
        "num_heads": config.integer("mamba_num_heads", 128),
        "head_channels": config.integer("mamba_head_dim", 64),
        "state_size": config.integer("ssm_state_size", 128),
        "taps": config.integer("conv_kernel", 4),
        "conv_bias": config.flag("use_conv_bias", True),
        "linear_bias": config.flag("use_bias", False),
    }


def _two_matrices(module: str) -> ExpertNames:
    return ExpertNames(up=f"{module}.up_proj.weight", down=f"{module}.down_proj.weight")


NEMOTRON: dict[str, Family] = {
    "nemotron_h": Family(
        kv_heads=8,
        head_dim=128,
        norm=norm_of("rms", "layer_norm_epsilon"),
        norm_eps=1e-5,
        settings=_settings,
        attention=_attention,
        state_parts=_state_parts,
        blocks=_blocks,
        norm_modules={"mixer": "norm"},
        rope=lambda config, layer: None,
        moe=_moe,
        activation=lambda config: config.choice("mlp_hidden_act", {"relu2": SQUARED_RELU}, "relu2"),
        mlp_bias=flag_of("mlp_bias", False),
        defaults={
            **{**DEEPSEEK_RULES, "n_routed_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 21504},
            **{"moe_intermediate_size": 7688, "moe_shared_expert_intermediate_size": 7688},
        },
        fixed={"n_shared_experts": (1,), "mamba_proj_bias": (False,)},
        # Of training, of layers for further tokens, or of how transformers computes: states are float32 here.
        ignored=frozenset(
            {
                *("time_step_min", "time_step_max", "time_step_floor", "rescale_prenorm_residual", "norm_eps"),
                *("residual_in_fp32", "mtp_layers_block_type", "mtp_hybrid_override_pattern", "chunk_size", "expand"),
                *("mamba_ssm_cache_dtype", "use_mamba_kernels", "num_logits_to_keep", "moe_shared_expert_overlap"),
                # Read where there are such layers.
                *("mamba_hidden_act", "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups"),
                *("conv_kernel", "use_conv_bias", "use_bias", "time_step_limit"),
            }
        ),
        names={
            r"^backbone\.": "model.",
            r"^model\.embeddings\.": "model.embed_tokens.",
            r"^model\.norm_f\.": "model.norm.",
            r"\.mixer\.([qkvo]_proj)\.": r".self_attn.\1.",
            r"\.mixer\.(in_proj|out_proj|conv1d|norm|A_log|D|dt_bias)\b": r".mamba.\1",
            r"\.mixer\.": ".mlp.",
        },
        dense=(_two_matrices("mlp"),),
        experts=(_two_matrices("mlp.experts.{e}"),),
        shared=(_two_matrices("mlp.shared_experts"),),
    ),
}
