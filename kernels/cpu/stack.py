"""Layers and exits that run in one call of the C++ kernels (``cpu/stack.cpp``): nothing is spent between operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..api.router_spec import SCORES
from ..api.stack import StackExit, StackLayer, StackResult, StackShape
from ..api.types import AttentionBatch, ExpertBudget, KVLayer, KVLayers
from .quantized import CpuQuantExperts, layout_of

if TYPE_CHECKING:
    from .backend import CpuBackend
    from .shared_memory import CpuSharedGroup


class CpuStack:
    """See :class:`.stack.Stack`.

    Arguments:
        backend: whose layout the weights have.
        shape, layers, exits: the model; exits rising.
    """

    def __init__(
        self, backend: CpuBackend, shape: StackShape, layers: Sequence[StackLayer], exits: Sequence[StackExit]
    ) -> None:
        sizes = [shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.head_dim]
        self._handle: Any = torch.classes.dynamoe_cpu.Stack(
            backend.isa_number,
            backend.dtype,
            sizes,
            shape.norm_per_head,
            shape.norm_eps,
            shape.residual_scale,
            shape.attention_scale,
        )
        self._channels = shape.head_dim
        self._counts: dict[int, torch.Tensor] = {}  # by rows
        for layer in layers:
            self._add_layer(layer)
        for exit in exits:
            self._add_exit(exit)

    def share(self, group: CpuSharedGroup) -> None:
        self._handle.share(group.handle)

    def _add_layer(self, layer: StackLayer) -> None:
        experts, rule = layer.ffn.data, layer.rule
        quantised = isinstance(experts, CpuQuantExperts)
        self._handle.add_layer(
            layer.attention_norm_D,
            layer.qkv.data.packed,
            layer.qkv.data.bias,
            layer.q_norm,
            layer.k_norm,
            layer.o.data.packed,
            layer.o.data.bias,
            layer.ffn_norm_D,
            None if layer.router is None else layer.router.data.packed,
            experts.gate_up,
            experts.down,
            experts.gate_up_bias,
            experts.down_bias if quantised or rule is not None else experts.down_bias_sum,
            [*experts.shape[:3], 0, experts.shape[3]] if quantised else list(experts.shape),
            [] if rule is None else [rule.top_k, SCORES.index(rule.score), rule.softmax_after_topk, rule.renormalize],
            1.0 if rule is None else rule.scale,
            layer.contribution_scale_E,
            layer.window or 0,
            [
                layout_of(layer.qkv),
                layout_of(layer.o),
                list(experts.gate_up_layout) if quantised else [],
                list(experts.down_layout) if quantised else [],
            ],
        )

    def _add_exit(self, exit: StackExit) -> None:
        probe, pairs = exit.probe, [p.kv.data for p in exit.projections]
        biased = bool(pairs) and pairs[0].bias is not None
        self._handle.add_exit(
            exit.after_layers,
            exit.down.data.packed,
            exit.up.data.packed,
            exit.down.out_features,
            None if probe is None else probe.weight_JX,
            None if probe is None else probe.bias_J,
            None if probe is None else probe.out_J,
            None if probe is None else probe.out_bias,
            probe is not None and probe.previous,
            probe is not None and probe.router_entropy,
            [pair.packed for pair in pairs],
            [pair.bias for pair in pairs] if biased else [],
            [layout_of(projection.kv) for projection in exit.projections],
        )

    def run(
        self,
        layers: range,
        x_TD: torch.Tensor,
        kv: Sequence[KVLayer],
        cos_sin_LC: torch.Tensor,
        batch: AttentionBatch,
        router_entropy_T: torch.Tensor | None = None,
        budget: ExpertBudget | None = None,
    ) -> torch.Tensor:
        places, limits = _places(batch), _limits(budget)
        return self._handle.run(
            x_TD, layers.start, layers.stop, self._cache(kv), cos_sin_LC, *places, router_entropy_T, *limits
        )

    def run_with_exits(
        self,
        x_TD: torch.Tensor,
        kv: Sequence[KVLayer],
        cos_sin_LC: torch.Tensor,
        batch: AttentionBatch,
        thresholds_NT: torch.Tensor,
        budget: ExpertBudget | None = None,
    ) -> StackResult:
        num_exits, rows = thresholds_NT.shape
        counts = self._counts.get(rows)
        if counts is None:
            counts = self._counts[rows] = torch.empty(rows + 3 * num_exits + 1, dtype=torch.int64)
        out_TD = self._handle.run_with_exits(
            x_TD, self._cache(kv), cos_sin_LC, *_places(batch), thresholds_NT, counts, *_limits(budget)
        )
        return StackResult(out_TD, counts)

    def _cache(self, kv: Sequence[KVLayer]) -> Any:
        """Checked once: with tens of layers that takes longer than a small layer."""
        native = kv.native if isinstance(kv, KVLayers) else None
        if native is None:
            pairs = [layer.keys_BGPC for layer in kv], [layer.values_BGPC for layer in kv]
            native = torch.classes.dynamoe_cpu.Cache(*pairs, self._channels)
            if isinstance(kv, KVLayers):
                kv.native = native
        return native


def _limits(budget: ExpertBudget | None) -> tuple[torch.Tensor | None, ...]:
    return (None, None, None) if budget is None else (budget.keep_TL, budget.cap_TL, budget.skipped_T)


def _places(batch: AttentionBatch) -> tuple[torch.Tensor, ...]:
    return (batch.positions_T, batch.slots_T, batch.query_start_S1, batch.context_len_S, batch.block_table_SM)
