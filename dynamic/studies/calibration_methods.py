"""A study of calibration: the setting that each bound chooses, what it saves, and how often it breaks its promise.

The losses of every setting of a path are measured once, as ``dynamoe calibrate`` does. Then calibrations are drawn from
the pool of requests with replacement, so that the pool's mean is the true risk of a setting.

Shape suffixes: M settings, from the safest on; N requests of the pool.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock

from ..contract.bounds import BOUNDS, conformal_risk_control, learn_then_test
from ..contract.calibration_runs import PROBABILITIES, Measured, measure, path_through
from ..contract.intervals import Estimate, mean
from ..llm import LLM
from .evaluate import Evaluation
from .provenance import provenance
from .records import job_key
from .requests import built_in_requests, draw, read_requests

if TYPE_CHECKING:
    from .sweep import SweepConfig

CONFORMAL = "conformal_risk_control"
METHODS = (*BOUNDS, CONFORMAL)


@dataclass(kw_only=True)
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
        for name in ("alpha", "delta"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"calibration.{name} must be between 0 and 1, not {getattr(self, name)}")
        for name in ("size", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"calibration.{name} must be at least 1, not {getattr(self, name)}")


def compare_methods(config: SweepConfig) -> Evaluation:
    """Draw calibrations of one method at one level.

    Returns: over the draws: true risk of what was chosen, share of draws whose true risk exceeds alpha, layers that the
        choice executes, share of draws that found nothing but full compute.

    Raises:
        ValueError: for a model without exits, or too few prompts.
    """
    study = config.calibration
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    llm = LLM(
        config.model, dtype=config.dtype, device=config.device, backend=config.backend, progress=False,
        experts_per_token=config.moe.experts_per_token, max_num_seqs=config.engine.max_num_seqs,
        quantization=config.quantization, quantize_lm_head=config.quantize_lm_head,
        kv_cache_dtype=config.kv_cache_dtype,
    )  # fmt: skip
    source, measured = _pool(config, llm)
    losses_MN, layers_M = np.stack([m.losses_N for m in measured]), np.array([m.layers_share for m in measured])
    chosen = _draws(study, losses_MN, config.seed)
    # Full compute, the choice of a calibration that proves nothing, is behind the last setting: index -1.
    risk = np.append(losses_MN.mean(1), 0.0)[chosen]
    found: dict[str, Estimate] = {
        "true_risk": mean(risk),
        "violations": mean((risk > study.alpha).astype(float)),
        "layers_share": mean(np.append(layers_M, 1.0)[chosen]),
        "full_compute": mean((chosen < 0).astype(float)),
    }
    return Evaluation(
        metrics=found | {"agreement": mean(1 - risk)},
        by_request={},
        setting={"method": study.method, "alpha": study.alpha, "delta": study.delta},
        source={"prompts": source, "requests": losses_MN.shape[1], "resamples": study.resamples},
        provenance=provenance(llm),
    )


def _draws(study: CalibrationStudyConfig, losses_MN: np.ndarray, seed: int) -> np.ndarray:
    """The setting that each drawn calibration chooses; -1 is full compute."""
    generator = np.random.default_rng(seed)
    chosen = []
    for _ in range(study.resamples):
        drawn_MN = losses_MN[:, generator.integers(losses_MN.shape[1], size=study.size)]
        if study.method == CONFORMAL:
            place = conformal_risk_control(drawn_MN, study.alpha)
        else:
            if study.method == "exact_binomial":
                drawn_MN = (generator.random(drawn_MN.shape) < drawn_MN).astype(float)
            place = learn_then_test(drawn_MN, study.alpha, study.delta, str(study.method))
        chosen.append(-1 if place is None else place)
    return np.array(chosen)


def _pool(config: SweepConfig, llm: LLM) -> tuple[str, list[Measured]]:
    """Losses along the path, measured by the first job that needs them and read by the others."""
    if config.prompts is None:
        source, prompts = built_in_requests(llm.model)
    else:
        source, prompts = Path(config.prompts).name, read_requests(Path(config.prompts).expanduser(), llm.model)
    chosen = draw(prompts, config.requests, config.seed, source)
    probed = [exit.after_layers for exit in llm.model.decoder.exits.values() if exit.probe is not None]
    settings = path_through(probed, config.calibration.probabilities, config.calibration.keeps)
    folder = Path(config.output).expanduser() / "losses" / _losses_key(config)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    with FileLock(folder / ".lock"):
        for number, setting in enumerate(settings):
            file = folder / f"setting-{number:02}.json"
            found.append(measure(llm, chosen, setting, config.max_tokens, file, progress=False))
    return source, found


def _losses_key(config: SweepConfig) -> str:
    plain: dict[str, Any] = asdict(config)
    study = plain.pop("calibration")
    return job_key({**plain, "path": [study["probabilities"], study["keeps"]]})
