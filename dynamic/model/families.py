"""The table of model families: how a ``config.json`` becomes a :class:`ModelSpec`, and what tensors are called.

Rules and defaults are those of transformers 5.23, whose modelling code the tests compare with. A new family is a new
entry here, not a new model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ...kernels.api.router_spec import RouterSpec
from ...moe.router_specs import router_spec
from ..checkpoint.config_reader import IRRELEVANT_KEYS, ConfigReader
from ..checkpoint.weights import CheckpointError
from .attention.registry import attention_kind
from .family import QWEN_EXPERTS, ExpertNames, Family, WindowRule
from .moe_spec import MoESpec
from .rope_config import rope_spec
from .spec import LayerSpec, ModelSpec

MAX_LAYERS = 10_000  # a mistake beyond; how many there are is compared with the files later
ACTIVATIONS = {
    **{"silu": "silu", "swish": "silu", "gelu": "gelu"},
    **{"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
}


DENSE_FFN = ExpertNames(gate="mlp.gate_proj.weight", up="mlp.up_proj.weight", down="mlp.down_proj.weight")
SHARED_EXPERT = ExpertNames(
    gate="mlp.shared_expert.gate_proj.weight",
    up="mlp.shared_expert.up_proj.weight",
    down="mlp.shared_expert.down_proj.weight",
)
MIXTRAL_EXPERTS = (
    ExpertNames(
        gate="block_sparse_moe.experts.{e}.w1.weight",
        up="block_sparse_moe.experts.{e}.w3.weight",
        down="block_sparse_moe.experts.{e}.w2.weight",
    ),
    ExpertNames(gate_up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj"),
)
ONE_EACH = QWEN_EXPERTS[0]
GRANITE_EXPERTS = (
    ExpertNames(gate_up="block_sparse_moe.input_linear.weight", down="block_sparse_moe.output_linear.weight"),
    ExpertNames(gate_up="block_sparse_moe.experts.gate_up_proj", down="block_sparse_moe.experts.down_proj"),
    ONE_EACH,
)
DYNAMOE_EXPERTS = (DENSE_FFN, ONE_EACH)


def _router(config: ConfigReader, layer: int) -> RouterSpec:
    for key in ("num_experts", "num_local_experts", "num_experts_per_tok"):
        config.integer(key, 1)  # checks the type; the rule itself comes from the table of routers
    one, other = config.get("num_experts"), config.get("num_local_experts")
    if None not in (one, other) and one != other:
        raise config.error("num_experts", one, f"the same as num_local_experts, {other}")
    config.flag("norm_topk_prob", False)
    try:
        return router_spec(config.values, layer)
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error


def _every_layer(config: ConfigReader, layer: int) -> MoESpec:
    return MoESpec(router=_router(config, layer), expert_size=config.integer("intermediate_size"))


def _qwen_moe(config: ConfigReader, layer: int) -> MoESpec | None:
    step = config.integer("decoder_sparse_step", 1)
    if layer in config.integers("mlp_only_layers") or step < 1 or (layer + 1) % step:
        return None
    return MoESpec(router=_router(config, layer), expert_size=config.integer("moe_intermediate_size"))


def _qwen2_moe(config: ConfigReader, layer: int) -> MoESpec | None:
    moe = _qwen_moe(config, layer)
    if moe is None:
        return None
    shared_size = config.integer("shared_expert_intermediate_size", 5632)
    return MoESpec(router=moe.router, expert_size=moe.expert_size, shared_size=shared_size, shared_gate=True)


def _dynamoe(config: ConfigReader, layer: int) -> MoESpec:
    num_experts, always_on = config.integer("num_experts"), config.integer("num_always_on_experts", 0)
    if always_on >= num_experts:
        raise config.error("num_always_on_experts", always_on, f"less than num_experts={num_experts}")
    routed = num_experts - always_on
    top_k = config.integer("num_experts_per_tok", routed)
    if not 1 <= top_k <= routed:
        raise config.error("num_experts_per_tok", top_k, f"between 1 and {routed}, the experts that are not always on")
    router = RouterSpec(num_experts=routed, top_k=top_k, score="constant")
    return MoESpec(router=router, expert_size=config.integer("expert_size"), num_always_on=always_on)


def _window_everywhere(default: int | None) -> WindowRule:
    def rule(config: ConfigReader, layer: int) -> int | None:
        config.get("sliding_window")
        # Unlike elsewhere, a null here is a statement: no window.
        return _positive_window(config, config.values.get("sliding_window", default))

    return rule


def _qwen3_moe_window(config: ConfigReader, layer: int) -> int | None:
    if not config.flag("use_sliding_window", False):
        config.get("sliding_window")
        return None
    return _positive_window(config, config.get("sliding_window", 4096))


def _window_by_layer_type(slides: Callable[[int, int], bool]) -> WindowRule:
    """Qwen's rule: ``layer_types`` decides, or where it is missing ``slides(layer, max_window_layers)``."""

    def rule(config: ConfigReader, layer: int) -> int | None:
        size = config.get("sliding_window", 4096)
        last_full = config.integer("max_window_layers", 28)
        enabled = config.flag("use_sliding_window", False)
        kinds = config.get("layer_types")
        if kinds is None:
            kind = "sliding_attention" if enabled and slides(layer, last_full) else "full_attention"
        elif isinstance(kinds, list) and len(kinds) >= config.integer("num_hidden_layers"):
            kind = kinds[layer]
        else:
            raise config.error("layer_types", kinds, "a list with an entry for every layer")
        if kind == "full_attention":
            return None
        if kind != "sliding_attention" or not enabled:
            raise config.error("layer_types", kinds, "full_attention or, with use_sliding_window, sliding_attention")
        return _positive_window(config, size)

    return rule


def _positive_window(config: ConfigReader, size: Any) -> int | None:
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 2**31):
        raise config.error("sliding_window", size, "a positive whole number or null")
    return size


def _key(name: str, default: bool) -> Callable[[ConfigReader], bool]:
    return lambda config: config.flag(name, default)


def _granite_scales(config: ConfigReader) -> dict[str, float]:
    return {
        "embedding_scale": config.number("embedding_multiplier", 1.0),
        "residual_scale": config.number("residual_multiplier", 1.0),
        "logits_divisor": config.number("logits_scaling", 1.0),
    }


def _granite_attention(config: ConfigReader) -> dict[str, float]:
    return {"scale": config.number("attention_multiplier", 1.0)}


def _olmoe_attention(config: ConfigReader) -> dict[str, float]:
    return {} if config.get("clip_qkv") is None else {"clip": config.number("clip_qkv")}


_ATTENTION_BIAS = _key("attention_bias", False)
_QWEN_WINDOW = _window_by_layer_type(lambda layer, last_full: layer >= last_full)

FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias=_ATTENTION_BIAS, o_bias=_ATTENTION_BIAS, mlp_bias=_key("mlp_bias", False)),
    "mistral": Family(kv_heads=8, window=_window_everywhere(4096)),
    "qwen2": Family(
        window=_QWEN_WINDOW, qkv_bias=lambda config: True, ignored=frozenset({"attention_bias", "qkv_bias"})
    ),
    "qwen3": Family(
        head_dim=128, window=_QWEN_WINDOW, qkv_bias=_ATTENTION_BIAS, o_bias=_ATTENTION_BIAS, qk_norm="head"
    ),
    "mixtral": Family(
        kv_heads=8,
        theta=1e6,
        norm_eps=1e-5,
        moe=_every_layer,
        window=_window_everywhere(None),
        experts=MIXTRAL_EXPERTS,
        router=("block_sparse_moe.gate.weight", "mlp.gate.weight"),
    ),
    "qwen2_moe": Family(
        moe=_qwen2_moe,
        window=_window_by_layer_type(lambda layer, last_full: layer % 2 == 0 and layer < last_full),
        qkv_bias=_key("qkv_bias", True),
        ignored=frozenset({"attention_bias"}),
    ),
    "qwen3_moe": Family(
        kv_heads=4,
        moe=_qwen_moe,
        window=_qwen3_moe_window,
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        qk_norm="head",
    ),
    "olmoe": Family(
        norm_eps=1e-5,
        moe=_every_layer,
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        qk_norm="full",
        attention_numbers=_olmoe_attention,
    ),
    "granitemoe": Family(
        moe=_every_layer,
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        scales=_granite_scales,
        attention_numbers=_granite_attention,
        experts=GRANITE_EXPERTS,
        router=("block_sparse_moe.router.layer.weight", "block_sparse_moe.router.weight"),
    ),
    "dynamoe": Family(
        moe=_dynamoe,
        qkv_bias=_ATTENTION_BIAS,
        o_bias=_ATTENTION_BIAS,
        experts=DYNAMOE_EXPERTS,
        router=("mlp.router.weight",),
    ),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a configuration names.

    Raises:
        CheckpointError: when it names none or one that is not supported; the message lists those that are.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(f"model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def model_spec(config: Mapping[str, Any]) -> ModelSpec:
    """What the model described by a ``config.json`` computes.

    Arguments:
        config: the JSON object. Both the keys that transformers 5 writes (``rope_parameters``) and the older ones
            (``rope_theta``, ``rope_scaling``) are understood.

    Raises:
        CheckpointError: for an unsupported family, a missing or malformed value, or a key that would change the
            mathematics in a way that is not supported; the message names key and value.
    """
    family = family_of(config)
    reader = ConfigReader(config)
    try:
        spec = _model_spec(reader, family)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error
    reader.refuse_unread(IRRELEVANT_KEYS | family.ignored)
    return spec


def _model_spec(config: ConfigReader, family: Family) -> ModelSpec:
    max_position = config.integer("max_position_embeddings")
    num_layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
    layers = tuple(_layer_spec(config, family, layer) for layer in range(num_layers))
    if not layers:
        raise ValueError("num_hidden_layers must be at least 1")
    rope = rope_spec(config, layers[0].attention.rotary_channels, max_position, family.theta)
    if rope.rope_type == "yarn":
        max_position = max(max_position, int(rope.original_max_position * rope.factor))
    return ModelSpec(
        family=str(config.get("model_type")),
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        max_position=max_position,
        layers=layers,
        rope=rope,
        norm_eps=config.number("rms_norm_eps", family.norm_eps),
        activation=config.choice("hidden_act", ACTIVATIONS, "silu"),
        mlp_bias=family.mlp_bias(config),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        eos_token_ids=config.integers("eos_token_id"),
        bos_token_id=next(iter(config.integers("bos_token_id")), None),
        **family.scales(config),
    )


def _layer_spec(config: ConfigReader, family: Family, layer: int) -> LayerSpec:
    moe = family.moe(config, layer)
    ffn_size = config.integer("intermediate_size") if moe is None else 0
    attention = attention_kind(family.attention(config, layer)).from_config(config, family, layer)
    return LayerSpec(attention=attention, ffn_size=ffn_size, moe=moe)
