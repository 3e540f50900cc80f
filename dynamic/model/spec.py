"""What a decoder is, as data: everything that its mathematics depends on, and nothing about where weights come from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...kernels.api.router_spec import RouterSpec
from .rope import RopeSpec


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """The mixture of one layer.

    Arguments:
        router: the rule that chooses among the routed experts.
        expert_size: neurons of one expert.
        num_always_on: experts in front of the routed ones that every token uses with weight 1.
        shared_size: neurons of a shared expert beside the mixture; 0 is none.
        shared_gate: the shared expert's output is multiplied by the sigmoid of a gate.
    """

    router: RouterSpec
    expert_size: int
    num_always_on: int = 0
    shared_size: int = 0
    shared_gate: bool = False

    @property
    def num_experts(self) -> int:
        """Routed and always-on experts together."""
        return self.router.num_experts + self.num_always_on

    @property
    def is_dense(self) -> bool:
        """Every expert has weight 1 for every token, so that the router decides nothing."""
        return self.router.score == "constant" and self.router.top_k == self.router.num_experts


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What may differ from layer to layer.

    Arguments:
        ffn_size: neurons of a dense FFN; unused where there is a mixture.
        moe: the mixture, or None for a dense FFN.
        window: how many positions a row sees, its own included; None sees all.
    """

    ffn_size: int
    moe: MoESpec | None = None
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer with pre-norm blocks, rotary positions and gated FFNs.

    Arguments:
        family: ``model_type`` of the checkpoint.
        max_position: longest context, in tokens.
        activation: ``silu``, ``gelu`` or ``gelu_tanh``.
        qk_norm: RMS norm of queries and keys before rotation: ``none``, per ``head``, or over the ``full`` width.
        clip_qkv: queries, keys and values are clipped to ± this value.
        attention_scale: factor on the scores.
        embedding_scale, residual_scale: factors on the embeddings and on what a block adds to the residual stream.
        logits_divisor: the logits are divided by it.
        tie_embeddings: the LM head is the embedding table.
        eos_token_ids: tokens that end a text; bos_token_id: the token that begins one, where there is one.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    layers: tuple[LayerSpec, ...]
    rope: RopeSpec
    norm_eps: float
    activation: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"
    clip_qkv: float | None = None
    attention_scale: float
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    tie_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "max_position"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is no multiple of num_key_value_heads={self.num_kv_heads}"
            )
        if not self.layers:
            raise ValueError("num_hidden_layers must be at least 1")
        if self.qk_norm not in ("none", "head", "full"):
            raise ValueError(f"qk_norm must be none, head or full, not {self.qk_norm!r}")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def longest_window(self) -> int | None:
        """How many positions a row sees at most in any layer, its own included; None where a layer sees all."""
        windows = [layer.window for layer in self.layers]
        return None if None in windows else max(window for window in windows if window is not None)

    def layer_flops(self, layer: LayerSpec) -> int:
        """Floating-point operations of one layer for one token, without the part that grows with the context."""
        attention = 2 * self.head_dim * (self.num_heads + self.num_kv_heads)
        if layer.moe is None:
            return 2 * self.hidden_size * (attention + 3 * layer.ffn_size)
        moe = layer.moe
        neurons = (moe.router.top_k + moe.num_always_on) * moe.expert_size + moe.shared_size
        routers = 0 if moe.is_dense else moe.router.num_experts + moe.shared_gate
        return 2 * self.hidden_size * (attention + 3 * neurons + routers)

    @property
    def experts_by_layer(self) -> list[int]:
        """Routed experts of every layer; 0: it has none."""
        return [0 if layer.moe is None else layer.moe.num_experts for layer in self.layers]

    def experts_in(self, layers: range) -> int:
        """Experts that a row uses in some layers together: those that are chosen, and those that are always on."""
        moes = [self.layers[number].moe for number in layers]
        return sum(moe.router.top_k + moe.num_always_on for moe in moes if moe is not None)

    def with_experts_per_token(self, count: int) -> ModelSpec:
        """The same model with fewer routed experts per token, for studies of the trade-off.

        Raises:
            ValueError: when the model has no experts, or ``count`` is not between 1 and what the model was made for.
        """
        if not any(layer.moe for layer in self.layers):
            raise ValueError(f"experts_per_token={count}: this {self.family} model has no experts")
        return replace(self, layers=tuple(_with_top_k(layer, count) for layer in self.layers))


def _with_top_k(layer: LayerSpec, count: int) -> LayerSpec:
    if layer.moe is None:
        return layer
    router = layer.moe.router
    if not 1 <= count <= router.top_k:
        raise ValueError(f"experts_per_token must be between 1 and {router.top_k}, not {count}")
    return replace(layer, moe=replace(layer.moe, router=replace(router, top_k=count)))
