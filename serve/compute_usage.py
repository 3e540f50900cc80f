"""Executed work of requests, summed the same way for ``usage.compute`` and the metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..dynamic.engine.outputs import RequestDelta
from ..dynamic.engine.quality import ContractOutcome
from ..dynamic.model.counters import Compute, TokenCost
from ..dynamic.model.flops import full_layer_flops, head_flops, layer_flops, projection_flops
from ..dynamic.model.spec import ModelSpec

QUALITY, QUALITY_REASON = "x-quality", "x-quality-reason"  # headers of answers to requests with a contract


def executed(spec: ModelSpec, computes: Iterable[Compute]) -> dict[str, int]:
    """What was executed, and the same with all layers and experts as ``full_…``; see :class:`.ComputeUsage`.

    Arguments:
        spec: of the model that ran.
        computes: of requests, or of an engine.
    """
    computes = list(computes)
    tokens = sum((compute.tokens for compute in computes), TokenCost())
    head = head_flops(spec, tokens.count)
    rows = sum(compute.segment_rows[0] for compute in computes)  # every row runs the first segment once
    flops = sum(layer_flops(spec, compute) + projection_flops(spec, compute) for compute in computes)
    return {
        "token_layers": tokens.layers,
        "token_experts": tokens.experts,
        "layer_rows": sum(compute.layer_rows for compute in computes),
        "full_layer_rows": rows * spec.num_layers,
        "expert_rows": sum(compute.expert_rows for compute in computes),
        "full_expert_rows": rows * spec.experts_in(range(spec.num_layers)),
        "flops": head + flops,
        "full_flops": head + full_layer_flops(spec, rows),
        "weight_bytes": tokens.weight_bytes,
        "full_weight_bytes": tokens.full_weight_bytes,
    }


def quality_headers(contracts: Sequence[ContractOutcome]) -> dict[str, str]:
    """What becomes of a request's contracts, for clients that do not read its usage; nothing where it has none."""
    if not contracts:
        return {}
    quality = "exact" if any(contract.certificate is None for contract in contracts) else "bounded"
    reasons = "; ".join(dict.fromkeys(contract.reason for contract in contracts))
    return {QUALITY: quality, QUALITY_REASON: reasons.encode("ascii", "replace").decode()[:500]}


@dataclass(slots=True)
class ComputeTally:
    """Accumulates the work of a request's prompts from their deltas.

    Arguments:
        spec: of the model that runs.
        uncertified: the uncertified setting that the client asked for, in words; None: nothing.
    """

    spec: ModelSpec
    uncertified: str | None = None
    _computes: list[Compute] = field(default_factory=list)
    _contracts: list[ContractOutcome] = field(default_factory=list)

    def add(self, delta: RequestDelta) -> None:
        """Add one delta."""
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
        covered = [c.certified_tokens for c in self._contracts if c.certified_tokens is not None]
        beyond = [c.exact_after for c in self._contracts if c.exact_after is not None]
        all_layers = range(self.spec.num_layers)
        return {
            "quality": quality,
            "certificates": certificates,
            "reason": "; ".join(reasons) or self.uncertified,
            "certified_tokens": min(covered, default=None),
            "exact_after": min(beyond, default=None),
            "layers_per_token": work["token_layers"] / count if count else float(len(all_layers)),
            "experts_per_token": work["token_experts"] / count if count else float(self.spec.experts_in(all_layers)),
            **work,
        }
