"""Layers and exits that run in one call of the C++ kernels (``cpu/stack.cpp``): nothing is spent between operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from ..api.kv_codes import SCALE_BYTES
from ..api.latents import entry_size
from ..api.router_spec import SCORES
from ..api.stack import (
    SharedGroup,
    StackAdd,
    StackAttention,
    StackBlock,
    StackExit,
    StackExperts,
    StackLatentAttention,
    StackMixer,
    StackNorm,
    StackOutNorm,
    StackRead,
    StackResult,
    StackScale,
    StackShape,
)
from ..api.stack_states import StackState
from ..api.types import AttentionBatch, ExpertBudget, ExpertWeights, KVLayer, KVLayers, LinearWeights, StateLayer
from .layout import activation_number
from .quantized import CpuQuantExperts

Tensors = dict[str, torch.Tensor | None]


class CpuStack:
    """See :class:`.stack.Stack`.

    Arguments:
        isa: number of the instruction set whose layout the weights have.
        dtype: of the weights.
        shape, layers, exits: the model, its layers' blocks in the order in which they run; exits rising.
    """

    def __init__(
        self,
        isa: int,
        dtype: torch.dtype,
        shape: StackShape,
        layers: Sequence[Sequence[StackBlock]],
        exits: Sequence[StackExit],
    ) -> None:
        self._handle: Any = torch.classes.dynamoe_cpu.Stack(
            isa, dtype, shape.hidden_size, shape.norm_eps, shape.residual_scale
        )
        self._mixers: list[StackMixer] = []  # of every layer
        self._counts: dict[int, torch.Tensor] = {}  # by rows
        for blocks in layers:
            self._mixers += [block for block in blocks if isinstance(block, StackMixer)]
            self._handle.add_layer([_native(block) for block in blocks])
        self.num_exits = len(exits)
        for exit in exits:
            self._add_exit(exit)

    def share(self, group: SharedGroup) -> None:
        self._handle.share(group.handle)

    def _add_exit(self, exit: StackExit) -> None:
        probe: tuple[Any, ...] = (None, None, None, None, False, False)
        if exit.probe is not None:
            p = exit.probe
            probe = (p.weight_JX, p.bias_J, p.out_J, p.out_bias, p.previous, p.router_entropy)
        pairs = [projection.kv.data for projection in exit.projections]
        biased = bool(pairs) and pairs[0].bias is not None
        self._handle.add_exit(
            exit.after_layers,
            exit.down.data.packed,
            exit.up.data.packed,
            exit.down.out_features,
            *probe,
            [pair.packed for pair in pairs],
            [pair.bias for pair in pairs] if biased else [],
            [list(pair.layout) for pair in pairs],
        )

    def run(
        self,
        layers: range,
        x_TD: torch.Tensor,
        kv: Sequence[KVLayer],
        tables: Sequence[torch.Tensor],
        batch: AttentionBatch,
        router_entropy_T: torch.Tensor | None = None,
        budget: ExpertBudget | None = None,
    ) -> torch.Tensor:
        places, limits = _places(batch), _limits(budget)
        states = batch.state_slots_S, batch.kept_slots_S
        return self._handle.run(
            x_TD, layers.start, layers.stop, self._cache(kv), list(tables), *places, router_entropy_T, *limits, *states
        )

    def run_with_exits(
        self,
        x_TD: torch.Tensor,
        kv: Sequence[KVLayer],
        tables: Sequence[torch.Tensor],
        batch: AttentionBatch,
        thresholds_NT: torch.Tensor,
        budget: ExpertBudget | None = None,
    ) -> StackResult:
        num_exits, rows = thresholds_NT.shape
        counts = self._counts.get(rows)
        if counts is None:
            counts = self._counts[rows] = torch.empty(rows + 3 * num_exits + 1, dtype=torch.int64)
        out_TD = self._handle.run_with_exits(
            x_TD, self._cache(kv), list(tables), *_places(batch), thresholds_NT, counts, *_limits(budget)
        )
        return StackResult(out_TD, counts)

    def _cache(self, kv: Sequence[KVLayer]) -> Any:
        """Checked once: with tens of layers that takes longer than a small layer."""
        native = kv.native if isinstance(kv, KVLayers) else None
        if native is None:
            if len(kv) != len(self._mixers):
                raise ValueError(f"there must be keys and values of every layer, not of {len(kv)}")
            pairs = [layer.keys_BGPC for layer in kv], [layer.values_BGPC for layer in kv]
            channels = [_channels(block, layer) for block, layer in zip(self._mixers, kv, strict=True)]
            states = [list(layer.states) if isinstance(layer, StateLayer) else [] for layer in kv]
            native = torch.classes.dynamoe_cpu.Cache(*pairs, channels, states, [layer.group for layer in kv])
            if isinstance(kv, KVLayers):
                kv.native = native
        return native


def _channels(block: StackMixer, layer: KVLayer) -> int:
    """Of a head in the cache, without the scale behind codes."""
    if isinstance(block, StackAttention):
        return block.head_dim
    if not isinstance(block, StackLatentAttention):
        return 0
    return entry_size(block.latent, block.rotated_dim, layer.keys_BGPC.dtype) - (SCALE_BYTES if layer.coded else 0)


def _limits(budget: ExpertBudget | None) -> tuple[torch.Tensor | None, ...]:
    return (None, None, None) if budget is None else (budget.keep_TL, budget.cap_TL, budget.skipped_T)


def _places(batch: AttentionBatch) -> tuple[torch.Tensor, ...]:
    slots, tables = batch.slots_T, batch.block_table_SM
    if batch.groups:
        slots = torch.stack((slots, *(pages.slots_T for pages in batch.groups)))
        tables = torch.stack((tables, *(pages.block_table_SM for pages in batch.groups)))
    return batch.positions_T, slots, batch.query_start_S1, batch.context_len_S, tables


def _native(block: StackBlock) -> Any:
    """A block as the C++ stack takes it: its kind, and tensors and numbers by name."""
    if isinstance(block, StackNorm):
        return _block("out_norm" if isinstance(block, StackOutNorm) else "norm", *_norm(block, ""))
    if isinstance(block, StackRead | StackAdd):
        return _block("read" if isinstance(block, StackRead) else "add", {})
    if isinstance(block, StackScale):
        return _block("scale", {"factor": block.factor})
    if isinstance(block, StackLatentAttention):
        return _latents(block)
    if isinstance(block, StackState):
        return _state(block)
    return _attention(block) if isinstance(block, StackAttention) else _experts(block)


def _norm(norm: StackNorm, prefix: str) -> tuple[Tensors, dict[str, int]]:
    tensors: Tensors = {f"{prefix}weight": norm.weight_D, f"{prefix}bias": norm.bias_D}
    return tensors, {f"{prefix}centred": True} if norm.centred else {}


def _attention(block: StackAttention) -> Any:
    heads = {"heads": block.num_heads, "kv_heads": block.num_kv_heads, "channels": block.head_dim}
    tensors = {
        **_linear("qkv", block.qkv),
        **_linear("o", block.o),
        "q_norm": block.q_norm,
        "k_norm": block.k_norm,
        "sinks": block.sinks_H,
        "value_norm": block.value_norm,
    }
    integers = {**heads, "norm_per_head": block.norm_per_head, "window": block.window or 0, "table": block.table}
    integers |= {"norm_after_rotation": block.norm_after_rotation, "values_are_keys": block.values_are_keys}
    integers["gated_queries"] = block.gated_queries
    integers |= {"chunk": block.chunk or 0, "values": block.values or block.head_dim}
    floats = {"scale": block.scale, "softcap": block.softcap or 0.0, "clip": block.clip or 0.0}
    floats["value_scale"] = block.value_scale
    layouts = {"qkv": list(block.qkv.data.layout), "o": list(block.o.data.layout)}
    if block.gate is not None:
        tensors |= _linear("gate", block.gate)
        layouts["gate"] = list(block.gate.data.layout)
    if block.growth is not None:
        integers |= {"growth_period": block.growth.period, "growth_offset": block.growth.offset}
        floats["growth_rate"] = block.growth.rate
    return _block("attention", tensors, integers, floats, layouts)


def _latents(block: StackLatentAttention) -> Any:
    linears = {"q_a": block.q_a, "q": block.q, "kv_a": block.kv_a, "o": block.o}
    present = {name: linear for name, linear in linears.items() if linear is not None}
    tensors: Tensors = {"q_norm": block.q_norm, "kv_norm": block.kv_norm}
    tensors |= {"key_up": block.key_up.data, "value_up": block.value_up.data}
    integers = {"heads": block.num_heads, "latent": block.latent, "plain": block.plain_dim, "values": block.value_dim}
    integers |= {"rotated": block.rotated_dim, "interleaved": block.interleaved, "window": block.window or 0}
    integers["table"] = block.table
    if block.q_a is not None:
        integers["rank"] = block.q_a.out_features
    for name, linear in present.items():
        tensors |= _linear(name, linear)
    layouts = {name: list(linear.data.layout) for name, linear in present.items()}
    return _block("latents", tensors, integers, {"eps": block.norm_eps, "scale": block.scale}, layouts)


def _state(block: StackState) -> Any:
    """All fields by their names; the C++ kind has that of the class."""
    values = {f.name: getattr(block, f.name) for f in fields(block)}
    linears = {name: value for name, value in values.items() if isinstance(value, LinearWeights)}
    tensors: Tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    for name, linear in linears.items():
        tensors |= _linear(name, linear)
    integers = {name: value for name, value in values.items() if isinstance(value, int)}
    floats = {name: value for name, value in values.items() if isinstance(value, float)}
    layouts = {name: list(linear.data.layout) for name, linear in linears.items()}
    return _block(type(block).__name__.removeprefix("Stack"), tensors, integers, floats, layouts)


def _experts(block: StackExperts) -> Any:
    rule, router, shared, gate = block.rule, block.router, block.shared, block.shared_gate
    tensors, integers, layouts = _ffn(block.ffn, "", routed=rule is not None)
    integers |= {"experts": block.ffn.num_experts, "hidden": block.ffn.hidden_size, "shared": shared is not None}
    integers["activation"] = activation_number(block.ffn.activation)
    floats = {"shared_scale": block.shared_scale}
    tensors["contribution_scale"] = block.contribution_scale_E
    if shared is not None:
        more = _ffn(shared, "shared_", routed=False)
        tensors, integers, layouts = tensors | more[0], integers | more[1], layouts | more[2]
    if gate is not None:
        tensors["shared_gate"] = gate.data.packed
    if router is None or rule is None:
        return _block("experts", tensors, integers, floats, layouts)
    tensors |= _linear("router", router)
    tensors |= {"selection_bias": block.selection_bias_E, "expert_scale": block.expert_scale_E}
    mixes = rule.score == "sparsemixer"
    integers |= {"top_k": rule.top_k, "score": 0 if mixes else SCORES.index(rule.score), "sparsemixer": mixes}
    integers |= {"softmax_after_topk": rule.softmax_after_topk, "float32_logits": rule.float32_logits}
    integers["renormalize"] = rule.renormalize
    integers |= {"groups": rule.num_groups, "top_groups": rule.top_groups, "top2_sum": rule.group_score == "top2_sum"}
    integers |= {"always_on": block.always_on, "weight_on_input": rule.weight_on_input}
    floats |= {"routing_scale": rule.scale, "norm_floor": rule.norm_floor, "norm_epsilon": rule.norm_epsilon}
    floats |= {"jitter": rule.jitter} if mixes else {}
    if (apart := block.apart) is not None:
        tensors["router_norm"], floats["router_eps"] = apart.router, apart.router_eps
        for name, norm in (("in", apart.mixture), ("out", apart.mixture_out), ("shared_out", apart.shared_out)):
            own = _norm(norm, f"{name}_norm_")
            tensors, integers = tensors | own[0], integers | own[1]
    return _block("experts", tensors, integers, floats, layouts)


def _ffn(weights: ExpertWeights, prefix: str, *, routed: bool) -> tuple[Tensors, dict[str, int], dict[str, list[int]]]:
    """Tensors, sizes and layouts of experts; where none is chosen their biases are one."""
    data = weights.data
    quantised = isinstance(data, CpuQuantExperts)
    tensors = {
        "gate_up": data.gate_up,
        "down": data.down,
        "gate_up_bias": data.gate_up_bias,
        "down_bias": data.down_bias if quantised or routed else data.down_bias_sum,
    }
    integers = {"width": weights.expert_size, "dense_down": 0 if quantised else data.shape[3]}
    layouts = {"gate_up": list(data.gate_up_layout), "down": list(data.down_layout)} if quantised else {}
    named = tuple({prefix + name: value for name, value in part.items()} for part in (tensors, integers, layouts))
    return named  # type: ignore[return-value]


def _linear(name: str, weights: LinearWeights) -> Tensors:
    return {name: weights.data.packed, f"{name}_bias": weights.data.bias}


def _block(
    kind: str,
    tensors: Tensors,
    integers: dict[str, int] | None = None,
    floats: dict[str, float] | None = None,
    layouts: dict[str, list[int]] | None = None,
) -> Any:
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    whole = {name: int(number) for name, number in (integers or {}).items()}
    return torch.classes.dynamoe_cpu.Block(kind, present, whole, floats or {}, layouts or {})
