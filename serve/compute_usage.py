"""What a request cost, for ``usage.compute``: added up over its prompts and completions as their deltas come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..dynamic.flops import full_layer_flops, head_flops, layer_flops
from ..dynamic.outputs import Compute, RequestDelta
from ..dynamic.quality import ContractOutcome
from ..dynamic.spec import ModelSpec


@dataclass(slots=True)
class ComputeTally:
    """Arguments:
    spec: of the model that runs.
    """

    spec: ModelSpec
    _layers: int = 0  # in front of the read-outs of all tokens
    _tokens: int = 0
    _computes: list[Compute] = field(default_factory=list)
    _contracts: list[ContractOutcome] = field(default_factory=list)

    def add(self, delta: RequestDelta) -> None:
        """Take in what a step said."""
        for completion in delta.completions:
            self._layers += sum(completion.layers)
            self._tokens += len(completion.layers)
        if delta.compute is not None:
            self._computes.append(delta.compute)
        if delta.contract is not None:
            self._contracts.append(delta.contract)

    def as_json(self) -> dict[str, Any] | None:
        """The ``compute`` object; None before any prompt has ended."""
        if not self._computes:
            return None
        spec = self.spec
        head = head_flops(spec, self._tokens)
        rows = sum(compute.segment_rows[0] for compute in self._computes)  # every row runs the first segment once
        certificates = sorted({c.certificate for c in self._contracts if c.certificate is not None})
        return {
            "quality": "bounded" if certificates else "exact",
            "certificates": certificates,
            "reason": "; ".join(dict.fromkeys(c.reason for c in self._contracts)) or None,
            "layers_per_token": self._layers / self._tokens if self._tokens else float(spec.num_layers),
            "layer_rows": sum(compute.layer_rows for compute in self._computes),
            "full_layer_rows": rows * spec.num_layers,
            "expert_rows": sum(compute.expert_rows for compute in self._computes),
            "full_expert_rows": rows * spec.experts_in(range(spec.num_layers)),
            "flops": head + sum(layer_flops(spec, compute) for compute in self._computes),
            "full_flops": head + full_layer_flops(spec, rows),
        }
