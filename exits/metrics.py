"""How good a confidence is: calibration error, Brier score, risk and coverage; as a table and as a plot.

Arguments named ``confidence`` are probabilities (or, where only the order matters, any scores) that a row's early token
is the full model's; ``correct`` is 1 where it was. All (R,), R rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch


def expected_calibration_error(confidence: torch.Tensor, correct: torch.Tensor, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equally filled bins, weighted by their rows.

    Equally filled bins, unlike equally wide ones, keep the estimate stable where nearly all rows are confident.

    Raises:
        ValueError: for confidences outside 0 … 1, or no rows.
    """
    _check(confidence, correct)
    if confidence.min() < 0 or confidence.max() > 1:
        raise ValueError(f"confidences must be in 0…1, not {float(confidence.min())} … {float(confidence.max())}")
    order = confidence.argsort(stable=True)
    gap = 0.0
    for part in order.tensor_split(min(bins, order.numel())):
        gap += part.numel() * abs(float(confidence[part].double().mean() - correct[part].double().mean()))
    return gap / order.numel()


def brier_score(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    """Mean squared difference between confidence and outcome; 0 is perfect, 0.25 a fair coin (Brier 1950)."""
    _check(confidence, correct)
    return float((confidence.double() - correct.double()).square().mean())


def risk_coverage(confidence: torch.Tensor, correct: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The selective-risk curve: if the most confident share of rows exits, how many of these are wrong?

    Returns: coverage (share that exits) and risk (share of wrong ones among them), float64 (R,), coverage rising. Rows
    of equal confidence exit together: their points carry the risk of the whole group.
    """
    _check(confidence, correct)
    order = confidence.argsort(descending=True, stable=True)
    wrong = (1 - correct[order].double()).cumsum(0)
    count = torch.arange(1, order.numel() + 1, dtype=torch.float64)
    ordered = confidence[order]
    _, group, sizes = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    last = sizes.cumsum(0)[group] - 1
    return count / order.numel(), wrong[last] / count[last]


def aurc(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    """Area under the risk-coverage curve: mean selective risk over all coverages; lower is better (Geifman 2018)."""
    return float(risk_coverage(confidence, correct)[1].mean())


def coverage_at_risk(confidence: torch.Tensor, correct: torch.Tensor, risk: float) -> float:
    """The largest share of rows that may exit with at most that share of wrong ones among them; 0 if none."""
    coverage, risks = risk_coverage(confidence, correct)
    allowed = coverage[risks <= risk]
    return float(allowed.max()) if allowed.numel() else 0.0


@dataclass(frozen=True, kw_only=True)
class ProbeReport:
    """The numbers of one probe at one exit. ``ece`` and ``brier`` are None for scores that are no probabilities."""

    agreement: float
    ece: float | None
    brier: float | None
    aurc: float
    coverage_at_2_percent: float


def report(confidence: torch.Tensor, correct: torch.Tensor, *, probability: bool = True) -> ProbeReport:
    """All measures of one confidence. ``probability=False``: only its order means something."""
    return ProbeReport(
        agreement=float(correct.double().mean()),
        ece=expected_calibration_error(confidence, correct) if probability else None,
        brier=brier_score(confidence, correct) if probability else None,
        aurc=aurc(confidence, correct),
        coverage_at_2_percent=coverage_at_risk(confidence, correct, 0.02),
    )


def table(reports: Mapping[str, ProbeReport]) -> str:
    """A Markdown table, one row per name."""
    lines = ["| probe | agreement | ECE | Brier | AURC | coverage at 2 % risk |", "|---|---|---|---|---|---|"]
    for name, r in reports.items():
        ece, brier = ("-" if value is None else f"{value:.4f}" for value in (r.ece, r.brier))
        share = f"{r.coverage_at_2_percent:.1%}"
        lines.append(f"| {name} | {r.agreement:.1%} | {ece} | {brier} | {r.aurc:.4f} | {share} |")
    return "\n".join(lines)


def plot_risk_coverage(curves: Mapping[str, tuple[torch.Tensor, torch.Tensor]], path: Path) -> None:
    """Draw risk-coverage curves into a file whose suffix names the format.

    Arguments:
        curves: name → (confidence, correct).

    Raises:
        ValueError: when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plots need the package matplotlib (pip install matplotlib)") from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, (confidence, correct) in curves.items():
        coverage, risk = risk_coverage(confidence, correct)
        axes.plot(coverage.numpy(), risk.numpy(), label=name)
    axes.set(xlabel="share of rows that exit", ylabel="share of them that is wrong", xlim=(0, 1), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _check(confidence: torch.Tensor, correct: torch.Tensor) -> None:
    if confidence.shape != correct.shape or confidence.ndim != 1 or not confidence.numel():
        shapes = f"{tuple(confidence.shape)} and {tuple(correct.shape)}"
        raise ValueError(f"confidence and correct must be equally long, non-empty rows, not {shapes}")


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """What one threshold for all exits would do: who exits where, how often it is wrong, how many layers are cut.

    ``layers_cut`` is the share of layers that is not executed; keys and values of skipped layers are not counted.
    """

    threshold: float
    disagreement: float
    layers_cut: float
    leaves: dict[int, float]  # share of all rows, by exit


def operating_point(
    confidence: Mapping[int, torch.Tensor], correct: Mapping[int, torch.Tensor], num_layers: int, risk: float
) -> OperatingPoint:
    """The lowest threshold whose disagreement over all rows stays within a risk, on these rows.

    A row exits at the first one whose confidence reaches the threshold; rows that never do are right by definition.
    An estimate on given text: it certifies nothing, and choosing the threshold on the same rows makes it optimistic.

    Arguments:
        confidence, correct: by exit (layers executed), (R,) each over the same rows.
        risk: largest disagreement, as a share of all rows.
    """
    exits = sorted(confidence)
    scores_ER = torch.stack([confidence[e].double() for e in exits])
    wrong_ER = torch.stack([1 - correct[e].double() for e in exits])
    best = OperatingPoint(threshold=float("inf"), disagreement=0.0, layers_cut=0.0, leaves=dict.fromkeys(exits, 0.0))
    for threshold in torch.quantile(scores_ER.flatten()[:: max(1, scores_ER.numel() // 100_000)],
                                    torch.linspace(1, 0, 201, dtype=torch.float64)).tolist():  # fmt: skip
        reached_ER = scores_ER >= threshold
        first_ER = reached_ER & (reached_ER.cumsum(0) == 1)
        disagreement = float((wrong_ER * first_ER).sum(0).mean())
        if disagreement > risk:
            break
        shares = first_ER.double().mean(1).tolist()
        cut = sum(share * (num_layers - layer) / num_layers for share, layer in zip(shares, exits, strict=True))
        best = OperatingPoint(
            threshold=threshold,
            disagreement=disagreement,
            layers_cut=cut,
            leaves=dict(zip(exits, shares, strict=True)),
        )
    return best
