"""A study of calibration: the setting that each bound chooses, what it saves, and how often its risk exceeds alpha.

The losses of every setting of a path are measured once, as ``dynamoe calibrate`` does. Then calibrations are drawn from
the pool of requests with replacement, so that the pool's mean is the true risk of a setting.

Shape suffixes: M settings, from the safest on; N requests of the pool.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
from filelock import FileLock

from ..contract.bounds import conformal_risk_control, learn_then_test
from ..contract.calibration_runs import Measured, measure
from ..contract.intervals import Estimate, mean
from ..contract.setting_path import path_through
from ..engine.config import EngineConfig
from ..llm import LLM
from ..model.machine import use_threads
from .evaluate import Evaluation
from .records import job_key, provenance
from .requests import draw, requests_from
from .sweep_config import CONFORMAL, CalibrationStudyConfig, SweepConfig


def compare_methods(config: SweepConfig) -> Evaluation:
    """Draw calibrations of one method at one level.

    Returns: over the draws: true risk of what was chosen, share of draws whose true risk exceeds alpha, layers that the
        choice executes, share of draws that found nothing but full compute.

    Raises:
        ValueError: for a model without exits, or too few prompts.
    """
    study = config.calibration
    use_threads(config.threads)
    engine = EngineConfig(max_num_seqs=config.engine.max_num_seqs)
    llm = LLM.from_config(config.model, config, engine, progress=False, experts_per_token=config.moe.experts_per_token)
    source, measured = _pool(config, llm)
    losses_MN, layers_M = np.stack([m.losses_N for m in measured]), np.array([m.layers_share for m in measured])
    chosen = drawn_choices(study, losses_MN, config.seed)
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


def drawn_choices(study: CalibrationStudyConfig, losses_MN: np.ndarray, seed: int) -> np.ndarray:
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
    source, prompts = requests_from(config.prompts, llm.model)
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
    plain = asdict(config)
    study = plain.pop("calibration")
    return job_key({**plain, "path": [study["probabilities"], study["keeps"]]})
