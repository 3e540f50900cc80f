"""What requests cost, for ``usage.compute`` and the metrics: one way of adding up for both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..dynamic.outputs import Compute, RequestDelta, TokenCost
from ..dynamic.quality import ContractOutcome
from ..dynamic.spec import ModelSpec


def executed(spec: ModelSpec, computes: Iterable[Compute]) -> dict[str, int]:
    """What was executed, and the same with all layers and experts as ``full_…``; see :class:`.ComputeUsage`.

    Arguments:
        spec: of the model that ran.
        computes: of requests, or of an engine.
    """
    computes = list(computes)
    tokens = sum((compute.tokens for compute in computes), TokenCost())
    flops_by_layer = [spec.layer_flops(layer) for layer in spec.layers]
    head = 2 * spec.hidden_size * spec.vocab_size * tokens.count
    expert = max((6 * spec.hidden_size * layer.moe.expert_size for layer in spec.layers if layer.moe), default=0)
    projection = 4 * spec.hidden_size * spec.num_kv_heads * spec.head_dim
    flops, rows = head, 0
    for compute in computes:
        first = 0
        for layers, launched in zip(compute.segment_layers, compute.segment_rows, strict=True):
            flops += launched * sum(flops_by_layer[first : first + layers])
            first += layers
        flops += compute.projected_rows * projection - compute.skipped_experts * expert
        rows += compute.segment_rows[0]  # every row runs the first segment once
    return {
        "token_layers": tokens.layers,
        "token_experts": tokens.experts,
        "layer_rows": sum(compute.layer_rows for compute in computes),
        "full_layer_rows": rows * spec.num_layers,
        "expert_rows": sum(compute.expert_rows for compute in computes),
        "full_expert_rows": rows * spec.experts_in(range(spec.num_layers)),
        "flops": flops,
        "full_flops": head + rows * sum(flops_by_layer),
        "weight_bytes": tokens.weight_bytes,
        "full_weight_bytes": tokens.full_weight_bytes,
    }


@dataclass(slots=True)
class ComputeTally:
    """Adds up over a request's prompts as their deltas come.

    Arguments:
        spec: of the model that runs.
        uncertified: what the client asked for without a promise, in words; None: nothing.
    """

    spec: ModelSpec
    uncertified: str | None = None
    _computes: list[Compute] = field(default_factory=list)
    _contracts: list[ContractOutcome] = field(default_factory=list)

    def add(self, delta: RequestDelta) -> None:
        """Take in what a step said."""
        if delta.compute is not None:
            self._computes.append(delta.compute)
        if delta.contract is not None:
            self._contracts.append(delta.contract)

    def as_json(self) -> dict[str, Any] | None:
        """The ``compute`` object; None before any prompt has ended."""
        if not self._computes:
            return None
        work = executed(self.spec, self._computes)
        count = sum(compute.tokens.count for compute in self._computes)
        certificates = sorted({c.certificate for c in self._contracts if c.certificate is not None})
        quality = "bounded" if certificates else "uncertified" if self.uncertified else "exact"
        reasons = dict.fromkeys(c.reason for c in self._contracts)
        all_layers = range(self.spec.num_layers)
        return {
            "quality": quality,
            "certificates": certificates,
            "reason": "; ".join(reasons) or self.uncertified,
            "layers_per_token": work["token_layers"] / count if count else float(len(all_layers)),
            "experts_per_token": work["token_experts"] / count if count else float(self.spec.experts_in(all_layers)),
            **work,
        }
