"""Probes: small classifiers on the hidden state after a segment. Is the exit's token the full model's?

A probe reads the row's hidden state and, depending on its kind, the state at the previous exit and the entropy of
the routers since then. It never reads logits; the baselines that do are here for comparison.

Shape suffixes: R rows, D hidden size, J inner width of a probe, V tokens of a vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels.api.ranges import check_ranges
from ..kernels.api.types import ProbeWeights
from ..kernels.reference.exits import probe_logits

KINDS = ("linear", "mlp")
MAX_LAYER_SHARE = 0.01


@dataclass(frozen=True, kw_only=True)
class ProbeSpec:
    """The shape of a probe.

    Arguments:
        kind: ``linear``, or ``mlp``: one hidden layer of ``width`` units.
        width: J of an ``mlp``.
        previous: also read the state at the previous exit (at the first exit: the embedding).
        router_entropy: also read the mean entropy of the routers since the previous exit.

    Raises:
        ValueError: naming the field and the value that is out of range.
    """

    kind: str = "linear"
    width: int = 8
    previous: bool = False
    router_entropy: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"probe kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        check_ranges(self, "width", where="probe ", least=1)

    def features(self, hidden_size: int) -> int:
        """Inputs of the classifier."""
        return hidden_size * (2 if self.previous else 1) + (1 if self.router_entropy else 0)

    def flops_per_row(self, hidden_size: int) -> int:
        """Floating-point operations for one row: norms, products, activation."""
        norms = 3 * hidden_size * (2 if self.previous else 1)
        if self.kind == "linear":
            return norms + 2 * self.features(hidden_size)
        return norms + 2 * self.features(hidden_size) * self.width + 3 * self.width


def check_probe_cost(spec: ProbeSpec, hidden_size: int, layer_flops: int) -> float:
    """The probe's share of one layer's floating-point operations.

    Raises:
        ValueError: when it is more than 1 %.
    """
    share = spec.flops_per_row(hidden_size) / layer_flops
    if share > MAX_LAYER_SHARE:
        raise ValueError(
            f"a {spec.kind} probe of width {spec.width} on hidden size {hidden_size} costs {share:.2%} of a layer;"
            f" at most {MAX_LAYER_SHARE:.0%} is allowed"
        )
    return share


class Probe(nn.Module):
    """A classifier whose output is a logit: positive where agreement is more likely than not.

    Arguments:
        spec: its shape; hidden_size: D.
        generator: of the initial weights.
    """

    def __init__(self, spec: ProbeSpec, hidden_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.spec, self.hidden_size = spec, hidden_size
        features = spec.features(hidden_size)
        outputs = 1 if spec.kind == "linear" else spec.width
        self.weight_JX = nn.Parameter(torch.randn(outputs, features, generator=generator) * features**-0.5)
        self.bias_J = nn.Parameter(torch.zeros(outputs))
        if spec.kind == "mlp":
            self.out_J = nn.Parameter(torch.randn(outputs, generator=generator) * outputs**-0.5)
            self.out_bias = nn.Parameter(torch.zeros(()))

    def forward(
        self,
        hidden_RD: torch.Tensor,
        previous_RD: torch.Tensor | None = None,
        router_entropy_R: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits (R,), float32.

        Arguments:
            hidden_RD: residual stream at this exit.
            previous_RD: residual stream at the previous exit; needed if ``spec.previous``.
            router_entropy_R: mean router entropy in nats since then; needed if ``spec.router_entropy``.
        """
        return probe_logits(hidden_RD, self.weights(), previous_RD, router_entropy_R)

    def weights(self) -> ProbeWeights:
        """The parameters as the operations take them: float32, and still part of the graph."""
        mlp = self.spec.kind == "mlp"
        return ProbeWeights(
            weight_JX=self.weight_JX.float(),
            bias_J=self.bias_J.float(),
            out_J=self.out_J.float() if mlp else None,
            out_bias=self.out_bias.float() if mlp else None,
            previous=self.spec.previous,
            router_entropy=self.spec.router_entropy,
        )


def top_margin(logits_RV: torch.Tensor) -> torch.Tensor:
    """Baseline: probability of the best token minus that of the second, (R,) (Schuster et al. 2022, CALM).

    Arguments:
        logits_RV: over the whole vocabulary or a reduced one (:func:`frequent_tokens`).
    """
    best = logits_RV.float().softmax(-1).topk(2, -1).values
    return best[:, 0] - best[:, 1]


def saturation(hidden_RD: torch.Tensor, previous_RD: torch.Tensor) -> torch.Tensor:
    """Baseline: cosine between the states at this and at the previous exit, (R,) (CALM)."""
    return F.cosine_similarity(hidden_RD.float(), previous_RD.float(), dim=-1)


def frequent_tokens(stream: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` most frequent token ids of a text, int64, ties to the lower id: a reduced vocabulary.

    Arguments:
        stream: token ids of any integer type.
    """
    return torch.bincount(stream.long()).argsort(descending=True, stable=True)[:count]
