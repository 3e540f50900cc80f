"""What a model family is: its defaults, the rules for its layers, and what its tensors are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.config_reader import ConfigReader
from ..checkpoint.weights import Divide
from .blocks import PRE_NORM, Block
from .moe_spec import MoESpec


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """What the tensors of a layer's FFN are called, below the layer's prefix.

    ``{e}`` stands for an expert's number: one tensor per expert. Without it one tensor holds all experts: with
    ``gate_up``, (E, 2F, D) and (E, D, F); with ``gate`` and ``up``, neurons side by side, (E·F, D) and (D, E·F).
    With ``up`` alone FFNs have no gate; their experts are stored one by one.
    ``transposed``: (E, D, 2F) and (E, F, D).
    """

    down: str
    gate: str = ""
    up: str = ""
    gate_up: str = ""
    transposed: bool = False


DENSE_FFN = ExpertNames(gate="mlp.gate_proj.weight", up="mlp.up_proj.weight", down="mlp.down_proj.weight")
SHARED_EXPERT = ExpertNames(
    gate="mlp.shared_expert.gate_proj.weight",
    up="mlp.shared_expert.up_proj.weight",
    down="mlp.shared_expert.down_proj.weight",
)

QWEN_EXPERTS = (
    ExpertNames(
        gate="mlp.experts.{e}.gate_proj.weight",
        up="mlp.experts.{e}.up_proj.weight",
        down="mlp.experts.{e}.down_proj.weight",
    ),
    ExpertNames(gate_up="mlp.experts.gate_up_proj", down="mlp.experts.down_proj"),
)
ACTIVATIONS = {
    **{"silu": "silu", "swish": "silu", "gelu": "gelu"},
    **{"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
}
MoERule = Callable[[ConfigReader, int], MoESpec | None]
WindowRule = Callable[[ConfigReader, int], int | None]
RopeRule = Callable[[ConfigReader, int], str | None]


NormRule = Callable[[ConfigReader, float], tuple[str, float]]
LLAMA_NORMS = {"attention": "input_layernorm", "ffn": "post_attention_layernorm"}


def norm_of(kind: str, key: str = "rms_norm_eps") -> NormRule:
    """Norms of one kind, whose epsilon is under a key."""
    return lambda config, default: (kind, config.number(key, default))


def blocks_of(blocks: tuple[Block, ...]) -> Callable[[ConfigReader, int], tuple[Block, ...]]:
    """All layers are made of these."""
    return lambda config, layer: blocks


def _pre_norm(config: ConfigReader, layer: int) -> tuple[Block, ...]:
    return PRE_NORM


def _dense(config: ConfigReader, layer: int) -> None:
    return None


def _gqa(config: ConfigReader, layer: int) -> str:
    return "gqa"


def _one_rope(config: ConfigReader, layer: int) -> str:
    return ""


def _no_window(config: ConfigReader, layer: int) -> None:
    return None


def _no(config: ConfigReader) -> bool:
    return False


def _activation(config: ConfigReader) -> str:
    return config.choice("hidden_act", ACTIVATIONS, "silu")


def _dense_size(config: ConfigReader) -> int:
    return config.integer("intermediate_size")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets a family apart from Llama.

    Arguments:
        kv_heads: default of ``num_key_value_heads``; None means as many as query heads.
        head_dim: default of ``head_dim``; None means ``hidden_size / num_attention_heads``.
        theta, norm_eps: defaults of ``rope_theta`` and of the norms' epsilon.
        tie_embeddings: default of ``tie_word_embeddings``.
        norm: from the configuration and ``norm_eps`` to the norms' kind and epsilon.
        blocks: what a layer is made of.
        norm_modules: what the checkpoint calls the norms of the blocks, below a layer's prefix.
        rope: which of several sets of ``rope_parameters`` a layer rotates with, by name; empty is the only set, None a
            layer that does not rotate.
        rope_types: what this family calls types of ``rope_parameters``.
        rope_keys: of ``rope_parameters``, understood by this family alone.
        thetas: by set, the older key of its ``rope_theta``, which may be empty, and its default.
        layer_theta: takes the place of ``rope_theta`` in a layer; None: it does not.
        partial_rotary: default of ``partial_rotary_factor``, the part of a head's channels that is rotated; None: the
            family rotates all of them.
        rope_interleaved: neighbouring channels are rotated together, not those half a head apart.
        attention: the name of a layer's kind of attention, see :mod:`.attention.registry`.
        moe, window: the rules for a layer.
        qkv_bias, o_bias, mlp_bias: whether these projections have biases.
        qk_norm: see :class:`.GqaSpec`.
        scales, attention_parts: read what other families do not have, fields of :class:`.ModelSpec` and of a layer's
            attention.
        state_parts: reads the fields of a layer with recurrent states, where a family has keys of its own for them.
        settings: the configuration with the keys that are read here, of families that say the same in other words. What
            it has been done to once it leaves as it is.
        mtp: settings of layers that predict further tokens, in the place of the model's: for lists with an entry for
            every layer, what theirs are. None: they are not known.
        activation: of the FFNs, by our name for it.
        defaults: values of keys that a configuration may leave out.
        ignored: configuration keys without effect in this family.
        fixed: values that keys must have where they are there: the family's mathematics knows no others.
        dense_size: neurons of a dense FFN.
        dense, experts, shared: ways in which checkpoints store dense FFNs, experts and shared experts.
        shared_gate: name of the weight of the shared expert's gate.
        latents: modules of the projections to and from what experts read and give, see :attr:`.MoESpec.latent_size`.
        default_rope: ``rope_parameters`` where a configuration has none.
        divide: finds stored tensors that are read as several.
        names: parts of its tensors' names, as regular expressions, and what stands for them here.
        router: possible names of the router's weight.
        router_tensors: possible names of what else a router reads, by fields of :class:`.LayerWeights`.
    """

    kv_heads: int | None = None
    head_dim: int | None = None
    theta: float = 10000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    norm: NormRule = field(default_factory=lambda: norm_of("rms"))
    blocks: Callable[[ConfigReader, int], tuple[Block, ...]] = _pre_norm
    norm_modules: Mapping[str, str] = field(default_factory=lambda: LLAMA_NORMS)
    attention: Callable[[ConfigReader, int], str] = _gqa
    rope: RopeRule = _one_rope
    rope_types: Mapping[str, str] = field(default_factory=dict)
    rope_keys: frozenset[str] = frozenset()
    thetas: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    layer_theta: Callable[[ConfigReader, int], float | None] = field(default=lambda config, layer: None)
    partial_rotary: Callable[[ConfigReader], float] | None = None
    rope_interleaved: bool = False
    moe: MoERule = _dense
    window: WindowRule = _no_window
    qkv_bias: Callable[[ConfigReader], bool] = _no
    o_bias: Callable[[ConfigReader], bool] = _no
    mlp_bias: Callable[[ConfigReader], bool] = _no
    qk_norm: str = "none"
    scales: Callable[[ConfigReader], dict[str, Any]] = field(default=lambda config: {})
    defaults: Mapping[str, Any] = field(default_factory=dict)
    attention_parts: Callable[[ConfigReader, int], dict[str, Any]] = field(default=lambda config, layer: {})
    state_parts: Callable[[ConfigReader], dict[str, Any]] | None = None
    settings: Callable[[Mapping[str, Any]], Mapping[str, Any]] = field(default=lambda config: config)
    mtp: Mapping[str, Any] | None = None
    activation: Callable[[ConfigReader], str] = _activation
    default_rope: Mapping[str, Any] = field(default_factory=dict)
    divide: Divide | None = None
    ignored: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    dense_size: Callable[[ConfigReader], int] = _dense_size
    dense: tuple[ExpertNames, ...] = (DENSE_FFN,)
    names: Mapping[str, str] = field(default_factory=dict)
    experts: tuple[ExpertNames, ...] = QWEN_EXPERTS
    shared: tuple[ExpertNames, ...] = (SHARED_EXPERT,)
    shared_gate: str = "mlp.shared_expert_gate.weight"
    latents: tuple[str, str] = ("mlp.fc1_latent_proj", "mlp.fc2_latent_proj")
    router: tuple[str, ...] = ("mlp.gate.weight",)
    router_tensors: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"selection_bias_E": ("mlp.gate.e_score_correction_bias",)}
    )


def one_each(family: Family) -> ExpertNames:
    """What a family calls experts that are stored one by one."""
    return next(names for names in family.experts if "{e}" in names.down)
