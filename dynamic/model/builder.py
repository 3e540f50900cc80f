"""From a checkpoint's tensors to the layers of a decoder: converted for a backend, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, TypeVar

import torch

from ...exits.sidecar import ExitHeads
from ...kernels.api.format_join import concatenate, kind, stack_experts
from ...kernels.api.quantized_weight import QuantizedWeight
from ...kernels.api.router_spec import RouterSpec
from ...kernels.api.types import ExpertWeights, LinearWeights
from ...kernels.torch.backend import TorchBackend
from ...moe.contribution import LayerScales
from ..checkpoint.weights import CheckpointError, StoredCodes, run_together
from .attention.kind import AttentionLayout, AttentionWeights, LinearLayout
from .channel_order import in_order
from .decoder import Decoder
from .exits import pack_exits
from .expert_memory import ExpertMemory
from .layer_weights import LayerWeights, MtpWeights, packed_router_tensors
from .layout import EMBEDDING, FFNLayout, LayerLayout, Layout, expert_tensors
from .machine import release_free_memory
from .moe_spec import MoESpec
from .norms import TensorLayout
from .placement import Placement, Source, absent_linear
from .quantization import Method, Quantization
from .spec import LayerSpec, ModelSpec
from .weight_cache import WeightCache

_Weights = TypeVar("_Weights", LinearWeights, ExpertWeights)


@contextmanager
def _naming(tensor: str) -> Iterator[None]:
    """Errors about weights that do not go together name one of them."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{tensor!r} and what runs with it: {error}") from error


class Builder:
    """Converts a checkpoint for a backend, one layer at a time, and gives the pages read back after each."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: Layout,
        source: Source,
        backend: TorchBackend,
        scales: Sequence[LayerScales | None],
        quantization: Quantization,
        described: str,
        placement: Placement | None = None,
        cache: WeightCache | None = None,
        experts: ExpertMemory | None = None,
    ) -> None:
        self.spec, self.experts = spec, experts
        self.placement = placement
        self.scales = scales
        self.layout = layout
        self.source = source
        self.backend = backend
        self.quantization = quantization
        self.described = described
        self.cache = cache
        self.orders = {name: order for layer in layout.every_layer for name, order in layer.attention.orders().items()}

    def build(self, *, progress: bool, heads: ExitHeads | None) -> Decoder:
        from tqdm import tqdm

        held = range(self.spec.num_layers) if self.placement is None else self.placement.held
        ends = self._ends() if held.start == 0 else self._no_ends()
        layers = []
        for number in tqdm(held, desc="Loading weights", unit="layer", disable=not progress or None):
            layer = self._layer(self.layout.layers[number], self.spec.layers[number].moe, number)
            layers.append(layer if self.placement is None else self.placement.kept(number, layer, self.backend))
            self._release()
        spec, pool = self.spec, None
        if self.experts is not None:
            layers, pool = self.experts.finish(layers)
        if self.placement is not None:
            layers, spec = self.placement.all_layers(layers, self.source), self.placement.spec
        make = Decoder if self.placement is None else self.placement.make_decoder
        return make(
            replace(self.spec, tie_embeddings=ends["embedding_VD"] is None),
            self.backend,
            layers=layers,
            **ends,
            exits=pack_exits(heads, spec, layers, self.backend, held) if heads else {},
            expert_impacts={n: scales.impact for n, scales in enumerate(self.scales) if scales is not None},
            quantization=self.described,
            expert_pool=pool,
        )

    def mtp_layers(self, specs: Sequence[LayerSpec]) -> tuple[MtpWeights, ...]:
        """The layers that predict further tokens."""
        layers = []
        for spec, layout in zip(specs, self.layout.mtp, strict=True):
            head = self._own(layout.head, self.layout.lm_head or EMBEDDING)
            layers.append(
                MtpWeights(
                    spec=spec,
                    norms={name: self._tensor(tensor) for name, tensor in layout.norms.items()},
                    join=self._linear(layout.join, method=self.quantization.layers),
                    layer=self._layer(layout.layer, spec.moe),
                    embedding=self._embedding(name) if (name := self._own(layout.embedding, EMBEDDING)) else None,
                    head=self._linear(head, method=self.quantization.head) if head else None,
                )
            )
            self._release()
        return tuple(layers)

    def _own(self, name: str, model: str) -> str:
        """A tensor that is stored beside one of the model, where both are not the same; else nothing."""
        return name if name and not torch.equal(self.source.view(name), self.source.view(model)) else ""

    def _ends(self) -> dict[str, Any]:
        """What lies in front of the layers and behind them, as :class:`Decoder` takes it."""
        tied = not self.layout.lm_head
        if not tied and self.spec.tie_embeddings:
            tied = torch.equal(self.source.view(EMBEDDING), self.source.view(self.layout.lm_head))
        bias = (self.layout.lm_head_bias,) if self.layout.lm_head_bias else ()
        lm_head = self._linear(EMBEDDING if tied else self.layout.lm_head, method=self.quantization.head, bias=bias)
        self._release()
        embedding_VD = None if tied else self._embedding()
        norm = {name: self._tensor(tensor) for name, tensor in self.layout.final_norm.items()}
        return {
            **{"embedding_VD": embedding_VD, "lm_head": lm_head},
            **{"final_norm_D": norm["weight"], "final_norm_bias_D": norm.get("weight_bias")},
        }

    def _no_ends(self) -> dict[str, Any]:
        """Of a stage of a pipeline that is not the first."""
        lm_head = absent_linear(self.spec.vocab_size, self.spec.hidden_size)
        return {"embedding_VD": None, "final_norm_D": torch.empty(0), "lm_head": lm_head}

    def _release(self) -> None:
        """Give back the pages that were read and what was freed."""
        self.source.release()
        release_free_memory()

    def _embedding(self, name: str = EMBEDDING) -> torch.Tensor | QuantizedWeight:
        if (stored := self.source.quantized(name)) is not None:
            return stored.weight.to(self.backend.device)
        if self.quantization.head is None:
            return self._copy(name)
        source = self._source(name, method=self.quantization.head)
        return self.backend.quantize(self.quantization.head.quantize, source)

    def _linear(self, *names: str, method: Method | None = None, bias: tuple[str, ...] = ()) -> LinearWeights:
        """One layer of tensors whose outputs follow each other, as it is or quantised."""
        stored = [self._stored(name) for name in names]
        if not any(stored):
            bias_O = self._copy(*bias) if bias else None
            if self.cache is not None and (packed := self.cache.take(names[0])) is not None:
                return self.backend.packed_linear(packed, bias_O)
            weight_OI = self._source(*names, method=method)
            if method is None:
                return self.backend.pack_linear(weight_OI, bias_O)
            quantized = self._quantize(names[0], weight_OI, method)
            return self._kept(names[0], self.backend.pack_quantized_linear(quantized, bias_O, method.scheme))
        parts, first = [], 0
        for _, run in groupby(stored, lambda codes: None if codes is None else (kind(codes.weight), codes.scheme)):
            last = first + len(alike := list(run))
            parts.append(self._part(names[first:last], alike, bias[first:last]))
            first = last
        return self.backend.join_linear(*parts)

    def _part(
        self, names: Sequence[str], stored: Sequence[StoredCodes | None], bias: Sequence[str] = ()
    ) -> LinearWeights:
        """Tensors that are stored alike as one layer."""
        bias_O = self._copy(*bias) if bias else None
        codes = [part for part in stored if part is not None]
        if not codes:
            return self.backend.pack_linear(self._source(*names), bias_O)
        with _naming(names[0]):
            joined = concatenate([part.weight for part in codes])
            return self.backend.pack_quantized_linear(joined, bias_O, codes[0].scheme)

    def _view(self, name: str) -> torch.Tensor:
        return in_order(self.source.view(name), self.orders.get(name, ()))

    def _stored(self, name: str) -> StoredCodes | None:
        stored = self.source.quantized(name)
        if stored is None or name not in self.orders:
            return stored
        return replace(stored, weight=in_order(stored.weight, self.orders[name]))

    def _plain(self, name: str) -> LinearWeights:
        """A small layer that runs as it is; where it was stored quantised, it is dequantised."""
        return self.backend.pack_linear(self._source(name))

    def _router(self, layout: LayerLayout, rule: RouterSpec) -> dict[str, Any]:
        """The router and what its rule reads, as :class:`LayerWeights` takes them."""
        dtype = torch.float32 if rule.float32_logits else self.backend.dtype
        bias_E = self._copy(layout.router_bias, dtype=dtype) if layout.router_bias else None
        router = self.backend.pack_linear(self._copy(layout.router, dtype=dtype), bias_E, dtype)
        more = {field: self._copy(name, dtype=torch.float32) for field, name in layout.router_tensors.items()}
        return {"router": router, **packed_router_tensors(more, self.backend.device, self.backend.dtype)}

    def _quantize(self, name: str, weight: torch.Tensor, method: Method) -> QuantizedWeight:
        method = replace(method, quantize=partial(self.backend.quantize, method.quantize))
        return method.quantize(weight) if self.placement is None else self.placement.quantize(name, weight, method)

    def _copy(self, *names: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Tensors of equal width, one below the other, in memory of our own: the files may change or vanish later."""
        views = [self._view(name) for name in names]
        rows = sum(view.shape[0] for view in views)
        dtype = dtype or self.backend.dtype
        out = torch.empty((rows, *views[0].shape[1:]), dtype=dtype, device=self.backend.device)
        for part, view in zip(out.split([view.shape[0] for view in views]), views, strict=True):
            part.copy_(view)
        return out

    def _tensor(self, layout: TensorLayout) -> torch.Tensor:
        kept = self._copy(layout.name, dtype=layout.dtype(self.backend.dtype))
        return kept.add_(layout.offset) if layout.offset else kept

    def _source(self, *names: str, method: Method | None = None) -> torch.Tensor:
        """As :meth:`_copy`, for the backend to pack; one that copies reads the mapped file itself.

        What will be quantised comes as it was stored: rounding it to the backend's dtype before would move codes.
        """
        mapped = self._view(names[0])
        if len(names) == 1 and (
            self.backend.copies_weights or (method is not None and self.backend.device.type == "cpu")
        ):
            return mapped
        return self._copy(*names, dtype=None if method is None else mapped.dtype)

    def _layer(self, layout: LayerLayout, moe: MoESpec | None, number: int | None = None) -> LayerWeights:
        ffn, scales = partial(self._ffn, layout.ffn), None if number is None else self.scales[number]
        return LayerWeights(
            norms={name: self._tensor(tensor) for name, tensor in layout.norms.items()},
            attention=self._attention(layout.attention),
            ffn=ffn() if self.experts is None or number is None else self.experts.pack(number, ffn),
            **({} if moe is None else self._router(layout, moe.router)),
            shared=self._ffn(layout.shared) if layout.shared else None,
            shared_gate=self._plain(layout.shared_gate) if layout.shared_gate else None,
            **self._latents(layout.latents),
            contribution_scale_E=None if scales is None else scales.scale_E.to(self.backend.device),
        )

    def _attention(self, layout: AttentionLayout) -> AttentionWeights:
        parts: dict[str, LinearWeights | torch.Tensor] = {}
        for field, linear in layout.linears.items():
            parts[field] = self._linear(*linear.weights, method=self.quantization.layers, bias=linear.biases)
        for field, tensor in layout.tensors.items():
            parts[field] = self._tensor(tensor)
        return layout.kind.pack(parts, self.backend)

    def _latents(self, linears: Sequence[LinearLayout]) -> dict[str, Any]:
        """The projections to and from what experts read and give, as :class:`LayerWeights` takes them."""
        method, packed = self.quantization.layers, {}
        for field, linear in zip(("latent_in", "latent_out"), linears, strict=False):
            packed[field] = self._linear(*linear.weights, method=method, bias=linear.biases)
        return packed

    def _ffn(self, layout: FFNLayout) -> ExpertWeights:
        if not layout.num_experts:
            return ExpertWeights.none(self.spec.hidden_size, self.spec.activation)
        if not layout.gated:
            return self._ungated_ffn(layout)
        parts = [[self.source.quantized(name) for name in names] for names in (layout.gate, layout.up, layout.down)]
        if any(part for names in parts for part in names):
            return self._stored_ffn(layout, *parts)
        method, biases = self.quantization.layers, self._biases(layout)
        if self.cache is not None and (packed := self.cache.take(layout.down[0])) is not None:
            return self.backend.packed_experts(packed, self.spec.activation, *biases)
        gate_EFD, up_EFD, down_EDF = expert_tensors(layout, self.spec.hidden_size, partial(self._source, method=method))
        if method is None:
            return self.backend.pack_experts(gate_EFD, up_EFD, down_EDF, self.spec.activation, *biases)
        quantized = []
        names = (layout.gate_up or layout.gate[0], layout.gate_up or layout.up[0], layout.down[0])
        for name, weight in zip(names, (gate_EFD, up_EFD, down_EDF), strict=True):
            quantized.append(self._quantize(name, weight, method))
            self._release()
        weight = gate_EFD = up_EFD = down_EDF = None  # packing takes memory too
        gate, up, down = quantized
        activation = self.spec.activation
        experts = self.backend.pack_quantized_experts(gate, up, down, activation, *biases, scheme=method.scheme)
        return self._kept(layout.down[0], experts)

    def _kept(self, name: str, weights: _Weights) -> _Weights:
        """Weights that were quantised just now, which the cache has as well if there is one."""
        if self.cache is not None:
            self.cache.keep(name, self.backend.packed_weight(weights))
        return weights

    def _ungated_ffn(self, layout: FFNLayout) -> ExpertWeights:
        """Experts of two matrices, which run one by one."""
        up, down = (
            [
                self._linear(name, method=self.quantization.layers, bias=bias)
                for name, bias in zip(names, layout.named_biases(number), strict=True)
            ]
            for number, names in ((1, layout.up), (2, layout.down))
        )
        return self.backend.join_experts((), up, down, self.spec.activation)

    def _biases(self, layout: FFNLayout) -> list[torch.Tensor] | list[None]:
        """Of gate and up (E, F) and of down (E, D)."""
        return [self._copy(*names).view(len(names), -1) for names in layout.biases] or [None, None, None]

    def _stored_ffn(self, layout: FFNLayout, *parts: list[StoredCodes | None]) -> ExpertWeights:
        """Experts that were stored quantised, all or some of their projections, one by one; ``parts`` are emptied."""
        if len(layout.down) != layout.num_experts:
            raise CheckpointError(f"{layout.down[0]!r} is quantised; only experts that are stored one by one can be")
        codes = [[part for part in names if part is not None] for names in parts]
        biases = self._biases(layout)
        if all(len(names) == layout.num_experts for names in codes) and run_together(*codes):
            scheme, stacked = codes[0][0].scheme, []
            for names, stored in zip(codes, parts, strict=True):
                stacked.append(stack_experts([part.weight for part in names]))
                names.clear()  # a layer's codes are large, and packing takes memory too
                stored.clear()
            self._release()
            gate, up, down = stacked
            with _naming(layout.gate[0]):
                return self.backend.pack_quantized_experts(gate, up, down, self.spec.activation, *biases, scheme=scheme)
        gate, up, down = (
            [
                self._part([name], [part], bias)
                for name, part, bias in zip(names, stored, layout.named_biases(number), strict=True)
            ]
            for number, (names, stored) in enumerate(zip((layout.gate, layout.up, layout.down), parts, strict=True))
        )
        return self.backend.join_experts(gate, up, down, self.spec.activation)
