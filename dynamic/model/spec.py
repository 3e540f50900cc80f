"""What a decoder is, as data: everything that its mathematics depends on, and nothing about where weights come from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...kernels.api.ranges import check_ranges
from ...kernels.api.uncommon import CAPS, UNGATED
from ...kernels.reference.operations import SQUARED_RELU
from .attention.kind import AttentionSpec
from .blocks import PRE_NORM, Block
from .moe_spec import MoESpec
from .norms import NORM_KINDS
from .rope import RopeSpec


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What may differ from layer to layer.

    Arguments:
        attention: of whichever kind.
        ffn_size: neurons of a dense FFN; unused where there is a mixture.
        moe: the mixture, or None for a dense FFN.
        blocks: what the layer is made of, in the order in which it runs.
        rope: how it rotates, where the model's layers differ in that; None: as the model.
    """

    attention: AttentionSpec
    ffn_size: int
    moe: MoESpec | None = None
    blocks: tuple[Block, ...] = PRE_NORM
    rope: RopeSpec | None = None

    @property
    def keys_alike(self) -> tuple[AttentionSpec, RopeSpec | None]:
        """What layers share whose keys and values are made at once: all of attention but windows."""
        return replace(self.attention, window=None), self.rope

    @property
    def window(self) -> int | None:
        """How many positions a row sees at most, its own included; None sees all."""
        return self.attention.reach


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A decoder-only transformer with rotary positions and gated FFNs.

    Arguments:
        family: ``model_type`` of the checkpoint.
        max_position: longest context, in tokens.
        norm: kind of the norms of the residual stream, see ``NORM_KINDS``.
        activation: see :func:`reference.activate`.
        embedding_scale, residual_scale: factors on the embeddings and on what a block adds to the residual stream.
        rounded_embedding_scale: that factor is rounded to the dtype that the model computes in.
        logits_divisor: the logits are divided by it.
        logits_cap: logits z become ``cap · tanh(z / cap)``.
        lm_head_bias: whether the LM head has a bias.
        tie_embeddings: the LM head is the embedding table.
        eos_token_ids: tokens that end a text; bos_token_id: the token that begins one, where there is one.
    """

    family: str
    vocab_size: int
    hidden_size: int
    max_position: int
    layers: tuple[LayerSpec, ...]
    rope: RopeSpec
    norm_eps: float
    norm: str = "rms"
    activation: str = "silu"
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    rounded_embedding_scale: bool = False
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    logits_cap: float | None = None
    lm_head_bias: bool = False
    tie_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "vocab_size", "hidden_size", "max_position", least=1)
        if not self.layers:
            raise ValueError("num_hidden_layers must be at least 1")
        if self.norm_eps < 0:
            raise ValueError(f"rms_norm_eps must be at least 0, not {self.norm_eps}")

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def ropes(self) -> list[RopeSpec]:
        """How every layer rotates."""
        return [layer.rope or self.rope for layer in self.layers]

    @property
    def distinct_ropes(self) -> list[RopeSpec]:
        """The ways in which layers rotate, the model's first."""
        return list(dict.fromkeys((self.rope, *self.ropes)))

    @property
    def uncommon(self) -> set[str]:
        """What the model computes that others do not, by the names that kernels have for it."""
        parts = {part for layer in self.layers for part in layer.attention.uncommon}
        parts |= {part for layer in self.layers if layer.moe is not None for part in layer.moe.uncommon}
        parts |= {UNGATED} if self.activation == SQUARED_RELU else set()
        return parts | NORM_KINDS[self.norm].uncommon | (set() if self.logits_cap is None else {CAPS})

    @property
    def longest_window(self) -> int | None:
        """How many positions a row sees at most in any layer, its own included; None where a layer sees all."""
        return self.page_windows[0]

    @property
    def page_windows(self) -> tuple[int | None, ...]:
        """How many positions a row sees at most in the layers that have pages of one kind: groups of layers by their
        number, those that see most first; None sees all."""
        found = {layer.window for layer in self.layers if layer.attention.keeps_keys}
        windows = sorted((window for window in found if window is not None), reverse=True)
        return (*([None] if None in found or not windows else []), *windows)

    @property
    def longest_context(self) -> str:
        """Of how many tokens, in words."""
        words = f"the model's maximum of {self.max_position} positions"
        if any(layer.attention.dense_positions == self.max_position for layer in self.layers):
            return f"{words}, its index_topk: attention that chooses among more is not supported"
        return words

    @property
    def has_states(self) -> bool:
        """Whether layers keep a recurrent state for each sequence instead of keys and values."""
        return any(layer.attention.state_shapes() for layer in self.layers)

    def layer_flops(self, layer: LayerSpec) -> int:
        """Floating-point operations of one layer for one token, without the part that grows with the context."""
        attention, moe = layer.attention.flops(self.hidden_size), layer.moe
        if moe is None:
            return attention + self._ffn_flops(self.hidden_size, layer.ffn_size)
        experts = (moe.router.top_k + moe.num_always_on) * self.expert_flops(moe)
        routers = 0 if moe.is_dense else moe.router.num_experts + moe.shared_gate
        beside = self._ffn_flops(self.hidden_size, moe.shared_size) + 2 * self.hidden_size * 2 * moe.latent_size
        return attention + experts + beside + 2 * self.hidden_size * routers

    def expert_flops(self, moe: MoESpec) -> int:
        """Of one expert of a mixture for one token."""
        return self._ffn_flops(moe.latent_size or self.hidden_size, moe.expert_size)

    def _ffn_flops(self, inputs: int, neurons: int) -> int:
        return 2 * inputs * neurons * (2 if self.activation == SQUARED_RELU else 3)

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
