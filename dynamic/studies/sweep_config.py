"""What a sweep may vary: an evaluation's settings, and those of the studies that take its place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ...exits.training.exit_heads import COMPARED
from ...kernels.api.ranges import check_ranges
from ..contract.bounds import BOUNDS
from ..contract.setting_path import PROBABILITIES
from .evaluate import EvaluateConfig

CONFORMAL = "conformal_risk_control"
METHODS = (*BOUNDS, CONFORMAL)


@dataclass(frozen=True, kw_only=True)
class ProbeStudyConfig:
    """Exits made for the study, in place of the model's own.

    Arguments:
        kind: of the probes: linear, mlp, each with " + previous", " + entropy" or both; null keeps the model's.
        steps: of training, for adapters and probes.
        exit_rows: positions of text that they learn from.
        served_prompts: prompts that the model continues, for them to learn from.
    """

    kind: str | None = None
    steps: int = 400
    exit_rows: int = 32_768
    served_prompts: int = 128

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in COMPARED:
            raise ValueError(f"probes.kind must be one of {', '.join(COMPARED)}, not {self.kind!r}")
        check_ranges(self, "steps", "exit_rows", "served_prompts", where="probes.", least=1)


@dataclass(frozen=True, kw_only=True)
class CalibrationStudyConfig:
    """A study of calibrations in place of an evaluation.

    Arguments:
        method: bound of learn-then-test (wsr, hoeffding_bentkus, exact_binomial) or conformal_risk_control; null
            evaluates. exact_binomial tosses a coin for each loss, since it is for losses of 0 and 1.
        alpha: level of risk.
        delta: probability with which a calibration may err; conformal_risk_control has none.
        size: requests of one calibration.
        resamples: calibrations that are drawn.
        probabilities: the path, as for dynamoe calibrate.
        keeps: expert_keep beside each of them; empty uses all experts.
    """

    method: str | None = None
    alpha: float = 0.05
    delta: float = 0.05
    size: int = 200
    resamples: int = 400
    probabilities: list[float] = field(default_factory=lambda: list(PROBABILITIES))
    keeps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.method is not None and self.method not in METHODS:
            raise ValueError(f"calibration.method must be one of {', '.join(METHODS)}, not {self.method!r}")
        check_ranges(self, "alpha", "delta", where="calibration.", above=0, below=1)
        check_ranges(self, "size", "resamples", where="calibration.", least=1)
        check_ranges(self, "probabilities", where="calibration.", least=0, most=1)
        check_ranges(self, "keeps", where="calibration.", above=0, most=1)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(EvaluateConfig):
    """``dynamoe sweep``. Every key takes several values: key=a,b,c.

    Arguments:
        output: directory of the sweep; the same command goes on where it was interrupted.
        compare: a key: pairs of jobs that differ in it alone are compared request by request.
        quality_metric: what the plots show against compute.
        objective: metrics that a job returns to a sweeper that searches (``hydra/sweeper=optuna``), in the order of its
            directions; empty returns ``quality_metric`` alone. A job that failed returns NaN.
    """

    FREE_TEXT: ClassVar[frozenset[str]] = frozenset()  # every key may take several values

    output: str = "runs/sweep"
    compare: str | None = None
    quality_metric: str = "agreement"
    objective: list[str] = field(default_factory=list)
    calibration: CalibrationStudyConfig = field(default_factory=CalibrationStudyConfig)
    probes: ProbeStudyConfig = field(default_factory=ProbeStudyConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.parallel.size > 1:
            raise ValueError(f"a sweep runs its jobs in one process each, not in {self.parallel.size}")
