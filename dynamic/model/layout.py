"""Which tensors of a checkpoint make up which part of the decoder; names and shapes are checked before any is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..checkpoint.weights import DTYPES, Checkpoint, CheckpointError, TensorInfo
from .attention.kind import AttentionLayout, LinearLayout, linear_layout
from .blocks import Scale, has_ffn, norm_names
from .family import ExpertNames, Family
from .moe_spec import MoESpec
from .norms import TensorLayout, norm_tensors
from .spec import LayerSpec, ModelSpec

EMBEDDING, FINAL_NORM, LM_HEAD = "model.embed_tokens.weight", "model.norm", "lm_head.weight"
# Buffers that older libraries stored, and scales of a cache in 8 bits: ours has scales of its own.
HARMLESS_EXTRAS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias", ".k_scale", ".v_scale", ".kv_scale")

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FFNLayout:
    """The tensors of one FFN: E experts of F neurons; a dense FFN is one expert, and none is no FFN.

    Arguments:
        gate, up, down: one name per expert, or one name for all; gates may be missing.
        gate_up: the fused tensor instead of gate and up.
        transposed: fused tensors have their inputs in front of their outputs.
        biases: likewise, one name per expert, of gate, up and down, or none.
    """

    num_experts: int
    expert_size: int
    gate: tuple[str, ...] = ()
    up: tuple[str, ...] = ()
    down: tuple[str, ...] = ()
    gate_up: str = ""
    transposed: bool = False
    biases: tuple[tuple[str, ...], ...] = ()

    def named_biases(self, part: int) -> Sequence[tuple[str, ...]]:
        """For each expert, the name of the bias of its gate (0), up (1) or down (2), if it has one."""
        return [(name,) for name in self.biases[part]] if self.biases else [()] * self.num_experts

    @property
    def gated(self) -> bool:
        """Whether experts have gates."""
        return bool(self.gate or self.gate_up)

    def fused(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fused tensor as (E, O, I), as a view; the other way round where it was that already."""
        return tensor.transpose(1, 2) if self.transposed else tensor


def expert_tensors(
    layout: FFNLayout, hidden: int, read: Callable[..., torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gate and up (E, F, D) and down (E, D, F), whichever way they are stored; views of what was read.

    Arguments:
        hidden: D.
        read: tensors by name, one below the other.
    """
    count, size = layout.num_experts, layout.expert_size
    down = read(*layout.down)
    if layout.gate_up:
        gate_up_EXD = layout.fused(read(layout.gate_up))
        return gate_up_EXD[:, :size], gate_up_EXD[:, size:], layout.fused(down)
    gate_EFD, up_EFD = (read(*names).view(count, size, hidden) for names in (layout.gate, layout.up))
    if len(layout.down) == count:
        return gate_EFD, up_EFD, down.view(count, hidden, size)
    # Neurons side by side: a strided view, so that all experts together stay one dense matrix.
    return gate_EFD, up_EFD, down.view(hidden, count, size).transpose(0, 1)


@dataclass(frozen=True, kw_only=True)
class LayerLayout:
    """The tensors of one layer.

    Arguments:
        norms: by the names of :attr:`.LayerWeights.norms`.
        router, router_bias: of the linear layer that makes the logits.
        router_tensors: what else the router reads, by fields of :class:`.LayerWeights`.
        latents: the projections to and from what experts read and give, where that is not the hidden state.
    """

    norms: Mapping[str, TensorLayout]
    attention: AttentionLayout
    ffn: FFNLayout
    router: str
    shared: FFNLayout | None
    shared_gate: str
    router_bias: str = ""
    router_tensors: Mapping[str, str] = field(default_factory=dict)
    latents: tuple[LinearLayout, ...] = ()


@dataclass(frozen=True, kw_only=True)
class MtpLayout:
    """The tensors of a layer that predicts further tokens.

    Arguments:
        norms: ``embedding`` and ``hidden``, of what is joined, and maybe ``final``, behind the layer.
        join: of both, embedding first, to the layer's input.
        embedding, head: copies of the model's, empty where there are none.
    """

    norms: Mapping[str, TensorLayout]
    join: str
    layer: LayerLayout
    embedding: str
    head: str


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The tensors of a model. Without ``lm_head`` the embedding table takes its place.

    Arguments:
        final_norm: norm in front of the LM head, ``weight`` and maybe ``weight_bias``.
        lm_head_bias: empty where there is none.
        mtp: layers that predict further tokens, where they were asked for.
    """

    layers: tuple[LayerLayout, ...]
    final_norm: Mapping[str, TensorLayout]
    lm_head: str
    lm_head_bias: str
    mtp: tuple[MtpLayout, ...] = ()

    @property
    def every_layer(self) -> tuple[LayerLayout, ...]:
        """Those of the model, and those that predict further tokens."""
        return *self.layers, *(further.layer for further in self.mtp)


@dataclass
class _Claims:
    """Collects which tensor must have which shape."""

    available: Mapping[str, TensorInfo]
    shapes: dict[str, Shape] = field(default_factory=dict)

    def claim(self, name: str, *shape: int) -> str:
        self.shapes[name] = shape
        return name

    def claim_tensors(self, tensors: Mapping[str, TensorLayout]) -> Mapping[str, TensorLayout]:
        for tensor in tensors.values():
            self.claim(tensor.name, *tensor.shape)
        return tensors

    def first_present(self, names: Iterable[str]) -> str:
        """The first of several possible names that the checkpoint has; the first of all when it has none."""
        names = list(names)
        return next((name for name in names if name in self.available), names[0])


def plan_layout(
    spec: ModelSpec, family: Family, tensors: Mapping[str, TensorInfo], mtp: Sequence[LayerSpec] = ()
) -> Layout:
    """Find every tensor that the model needs and check its shape and dtype.

    Arguments:
        mtp: layers that predict further tokens, whose tensors are called as in :mod:`.mtp_layers`.

    Raises:
        CheckpointError: naming the first tensor that is missing or left over, or has a shape or dtype that does not
            fit.
    """
    _check_experts(spec, tensors)
    claims = _Claims(tensors)
    claims.claim(EMBEDDING, spec.vocab_size, spec.hidden_size)
    final_norm = claims.claim_tensors(norm_tensors(spec.norm, {"weight": FINAL_NORM}, spec.hidden_size))
    # Some tied checkpoints store the head as well; it may differ, so it is looked at.
    lm_head = "" if spec.tie_embeddings and LM_HEAD not in tensors else LM_HEAD
    if lm_head:
        claims.claim(lm_head, spec.vocab_size, spec.hidden_size)
    lm_head_bias = claims.claim(LM_HEAD.replace(".weight", ".bias"), spec.vocab_size) if spec.lm_head_bias else ""
    layers = tuple(
        _layer_layout(claims, spec, layer, family, f"model.layers.{number}.")
        for number, layer in enumerate(spec.layers)
    )
    further = tuple(_mtp_layout(claims, spec, layer, family, f"mtp.{number}.") for number, layer in enumerate(mtp))
    _check(claims.shapes, tensors)
    _refuse_extras(claims.shapes, tensors)
    return Layout(layers=layers, final_norm=final_norm, lm_head=lm_head, lm_head_bias=lm_head_bias, mtp=further)


def _layer_layout(claims: _Claims, spec: ModelSpec, layer: LayerSpec, family: Family, prefix: str) -> LayerLayout:
    hidden, moe = spec.hidden_size, layer.moe
    attention = layer.attention.layout(prefix, hidden, claims.available)
    modules = {name: prefix + family.norm_modules[name] for name in norm_names(layer.blocks)}
    norms = norm_tensors(spec.norm, modules, hidden)
    for scale in (block.weight for block in layer.blocks if isinstance(block, Scale)):
        norms[scale] = TensorLayout(name=prefix + family.norm_modules[scale], shape=(1,), float32=True)
    claims.claim_tensors(norms)
    for name, shape in attention.shapes():
        claims.claim(name, *shape)
    router = claims.first_present(prefix + name for name in family.router) if moe else ""
    if moe:
        claims.claim(router, moe.router.num_experts, hidden)
    return LayerLayout(
        norms=norms,
        attention=attention,
        ffn=_ffn_layout(claims, spec, layer, family, prefix),
        router=router,
        router_bias=claims.claim(bias_of(router), moe.router.num_experts) if moe and moe.router_bias else "",
        router_tensors=_router_tensors(claims, family, moe, hidden, prefix) if moe else {},
        latents=_latents(claims, spec, moe, family, prefix) if moe and moe.latent_size else (),
        shared=_dense_layout(claims, family.shared, spec, moe.shared_size, prefix) if moe and moe.shared_size else None,
        shared_gate=claims.claim(prefix + family.shared_gate, 1, hidden)
        if moe and moe.shared_size and moe.shared_gate
        else "",
    )


def _mtp_layout(claims: _Claims, spec: ModelSpec, layer: LayerSpec, family: Family, prefix: str) -> MtpLayout:
    modules = {"embedding": f"{prefix}embedding_norm", "hidden": f"{prefix}hidden_norm"}
    if f"{prefix}norm.weight" in claims.available:
        modules["final"] = f"{prefix}norm"
    copies = (f"{prefix}{name}.weight" for name in ("embed_tokens", "head"))
    embedding, head = (
        claims.claim(name, spec.vocab_size, spec.hidden_size) if name in claims.available else "" for name in copies
    )
    return MtpLayout(
        norms=claims.claim_tensors(norm_tensors(spec.norm, modules, spec.hidden_size)),
        join=claims.claim(f"{prefix}join.weight", spec.hidden_size, 2 * spec.hidden_size),
        layer=_layer_layout(claims, spec, layer, family, prefix),
        embedding=embedding,
        head=head,
    )


def _router_tensors(claims: _Claims, family: Family, moe: MoESpec, hidden: int, prefix: str) -> dict[str, str]:
    """What a routing rule reads beside the logits, and the scale of what the router reads."""
    rule, found = moe.router, {}
    for field_name, wanted, size in (
        ("selection_bias_E", rule.selection_bias, rule.num_experts),
        ("expert_scale_E", rule.expert_scale, rule.num_experts),
        ("router_norm_D", rule.input_norm_eps is not None, hidden),
    ):
        if wanted:
            name = claims.first_present(prefix + name for name in family.router_tensors[field_name])
            info = claims.available.get(name)
            # Some store a group of one in front.
            shape = (1, size) if info is not None and info.shape == (1, size) else (size,)
            found[field_name] = claims.claim(name, *shape)
    return found


def _ffn_layout(claims: _Claims, spec: ModelSpec, layer: LayerSpec, family: Family, prefix: str) -> FFNLayout:
    moe = layer.moe
    if not has_ffn(layer.blocks):
        return FFNLayout(num_experts=0, expert_size=0)
    if moe is None:
        return _dense_layout(claims, family.dense, spec, layer.ffn_size, prefix)
    hidden = moe.latent_size or spec.hidden_size
    layout = _expert_layout(claims, family.experts, hidden, moe.num_experts, moe.expert_size, prefix)
    return _biased(claims, layout, hidden, moe.expert_bias)


def _latents(
    claims: _Claims, spec: ModelSpec, moe: MoESpec, family: Family, prefix: str
) -> tuple[LinearLayout, LinearLayout]:
    sizes, (first, last) = (spec.hidden_size, moe.latent_size), family.latents
    into = linear_layout(prefix, sizes[0], {first: sizes[1]}, bias=spec.mlp_bias)
    out = linear_layout(prefix, sizes[1], {last: sizes[0]}, bias=spec.mlp_bias)
    for name, shape in (*into.shapes(), *out.shapes()):
        claims.claim(name, *shape)
    return into, out


def _dense_layout(
    claims: _Claims, options: tuple[ExpertNames, ...], spec: ModelSpec, size: int, prefix: str
) -> FFNLayout:
    layout = _expert_layout(claims, options, spec.hidden_size, 1, size, prefix)
    return _biased(claims, layout, spec.hidden_size, spec.mlp_bias)


def bias_of(weight: str) -> str:
    """The name of a weight's bias."""
    return weight.removesuffix("weight") + "bias"


def _biased(claims: _Claims, layout: FFNLayout, hidden: int, biased: bool) -> FFNLayout:
    """The layout with a bias beside each weight, if there are any."""
    if not biased:
        return layout
    if layout.gate_up:
        raise CheckpointError(f"{layout.gate_up!r}: biases of fused gates and ups are not supported")
    sizes = ((layout.gate, layout.expert_size), (layout.up, layout.expert_size), (layout.down, hidden))
    biases = tuple(tuple(claims.claim(bias_of(name), size) for name in names) for names, size in sizes)
    return replace(layout, biases=biases)


def _expert_layout(
    claims: _Claims, options: tuple[ExpertNames, ...], hidden: int, num_experts: int, size: int, prefix: str
) -> FFNLayout:
    found = [o for o in options if prefix + o.down.replace("{e}", "0") in claims.available]
    names = (*found, *options)[0]
    if names.gate_up:
        shapes = (2 * size, hidden), (hidden, size)
        gate_up, down = (
            claims.claim(prefix + name, num_experts, *(shape[::-1] if names.transposed else shape))
            for name, shape in zip((names.gate_up, names.down), shapes, strict=True)
        )
        return FFNLayout(
            num_experts=num_experts, expert_size=size, gate_up=gate_up, down=(down,), transposed=names.transposed
        )
    one_each = "{e}" in names.down
    # Of experts that are not there the first is missed: config.json alone may name 2³¹ of them.
    count, width = (num_experts if found else 1, size) if one_each else (1, num_experts * size)

    def claim(name: str, *shape: int) -> tuple[str, ...]:
        return tuple(claims.claim(prefix + name.replace("{e}", str(expert)), *shape) for expert in range(count))

    return FFNLayout(
        num_experts=num_experts,
        expert_size=size,
        gate=claim(names.gate, width, hidden) if names.gate else (),
        up=claim(names.up, width, hidden),
        down=claim(names.down, hidden, width),
    )


def _check(shapes: Mapping[str, Shape], tensors: Mapping[str, TensorInfo]) -> None:
    missing = [name for name in shapes if name not in tensors]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(f"the checkpoint lacks the tensor {missing[0]!r}{more}")
    for name, shape in shapes.items():
        info = tensors[name]
        if info.shape != shape:
            raise CheckpointError(f"tensor {name!r} in {info.file} has shape {info.shape}; config.json implies {shape}")
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {name!r} in {info.file} has dtype {info.dtype}; supported: {', '.join(DTYPES)}"
            )


def layers_in(names: Iterable[str]) -> int:
    """How many layers a checkpoint has tensors of, from the highest number."""
    found = (re.match(r"model\.layers\.(\d{1,6})\.", name) for name in names)
    return max((int(match[1]) for match in found if match), default=-1) + 1


def _check_experts(spec: ModelSpec, tensors: Iterable[str]) -> None:
    """Raises CheckpointError where config.json names more or fewer experts than the files hold one by one."""
    names = [name for name in tensors if ".experts." in name]
    held: dict[int, dict[int, str]] = {}
    for name in names:
        if match := re.match(r"model\.layers\.(\d{1,6})\..*\.experts\.(\d{1,6})\.", name):
            held.setdefault(int(match[1]), {})[int(match[2])] = name
    for number, layer in enumerate(spec.layers):
        wanted = 0 if layer.moe is None else layer.moe.num_experts
        if number in held and len(held[number]) != wanted:
            first = next(iter(held[number].values()))
            count = f"the files hold {len(held[number])} of it, as {first!r}"
            raise CheckpointError(f"config.json: layer {number} has {wanted} experts; {count}")


def _refuse_extras(shapes: Mapping[str, Shape], tensors: Mapping[str, TensorInfo]) -> None:
    extras = [name for name in tensors if name not in shapes and not name.endswith(HARMLESS_EXTRAS)]
    extras = [name for name in extras if not _adds_nothing(name, shapes, tensors)]
    if extras:
        more = f" (and {len(extras) - 1} more)" if len(extras) > 1 else ""
        raise CheckpointError(
            f"tensor {extras[0]!r} in {tensors[extras[0]].file}{more} belongs to no part of the model that config.json"
            " describes, and ignoring it could give wrong results"
        )


def _adds_nothing(name: str, shapes: Mapping[str, Shape], tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor is a bias of zeros, which some quantisers store with every layer."""
    module, _, part = name.rpartition(".")
    if part != "bias" or f"{module}.weight" not in shapes or not isinstance(tensors, Checkpoint):
        return False
    return tensors[name].dtype in DTYPES and not bool(tensors.view(name).count_nonzero())
