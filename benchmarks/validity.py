"""Do calibrations keep their guarantee? Repeats them on requests resampled from stored losses.

``python benchmarks/validity.py runs/calibration --name tiny`` reads the losses that ``dynamoe calibrate`` left in a
directory, keeps them in ``results/losses_NAME.npz``, and writes ``results/validity_NAME.json``. The requests are the
population: the mean loss of their whole outputs at a setting is its true risk, and each calibration sees as many of
them, drawn with replacement. Beside the levels that ship, alpha lies just below the true risk of each setting in turn,
where choosing it is barely wrong and as likely as it can be. Learn-then-Test guarantees that the chosen setting's true
risk exceeds alpha in a share of at most delta of the calibrations, and conformal risk control that it does not in the
mean.

Shape suffixes: M settings, safest first; N requests.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from dynamoe.dynamic.contract.calibration_runs import read_measured
from dynamoe.dynamic.studies.calibration_methods import drawn_choices
from dynamoe.dynamic.studies.sweep_config import CONFORMAL, CalibrationStudyConfig
from scipy.stats import binom

RESULTS = Path(__file__).parent / "results"
ALPHAS = (0.01, 0.02, 0.05, 0.1)
BOUNDS = ("wsr", "hoeffding_bentkus")


def read_losses(directory: Path) -> np.ndarray:
    """The losses of a finished calibration, (M, N).

    Raises:
        ValueError: when there are none, or not of the same requests.
    """
    files = sorted(directory.glob("setting-*.json"))
    losses = [read_measured(file).losses_N for file in files]
    if not losses or len({len(row) for row in losses}) != 1:
        raise ValueError(f"{directory} does not hold the settings of one finished calibration")
    return np.array(losses)


def resample(losses_MN: np.ndarray, alpha: float, delta: float, runs: int, seed: int) -> dict[str, Any]:
    """Many calibrations at one level.

    Returns: by method the share of violations, the mean true risk of what was chosen (full compute: 0), the mean number
        of the chosen setting (full compute: -1); and the number of violations that ``delta`` allows for within
        binomial error (its 99.9 % quantile).
    """
    chosen = {}
    for name, method in (*zip(BOUNDS, BOUNDS, strict=True), ("crc", CONFORMAL)):
        size = losses_MN.shape[1]
        study = CalibrationStudyConfig(method=method, alpha=alpha, delta=delta, size=size, resamples=runs)
        chosen[name] = drawn_choices(study, losses_MN, seed)
    reached = np.append(losses_MN.mean(1), 0.0)  # number -1 is full compute
    return {
        "alpha": alpha,
        "delta": delta,
        "runs": runs,
        "violations_allowed": int(binom.ppf(0.999, runs, delta)),
        "methods": {
            name: {
                "violations": int((reached[numbers] > alpha).sum()),
                "mean_risk": float(reached[numbers].mean()),
                "standard_error": float(reached[numbers].std() / runs**0.5),
                "mean_setting": float(np.mean(numbers)),
            }
            for name, numbers in chosen.items()
        },
    }


def holds(record: dict[str, Any]) -> bool:
    """Whether every method kept its guarantee in :func:`resample`."""
    crc = record["methods"]["crc"]
    return crc["mean_risk"] <= record["alpha"] + 2 * crc["standard_error"] and all(
        record["methods"][bound]["violations"] <= record["violations_allowed"] for bound in BOUNDS
    )


def hardest_levels(losses_MN: np.ndarray) -> list[float]:
    """Levels just below the true risk of each setting that is riskier than all before it."""
    risks_M = losses_MN.mean(1)
    risen = [m for m in range(len(risks_M)) if 0 < risks_M[m] < 1 and risks_M[m] > risks_M[:m].max(initial=0.0)]
    return [float(np.nextafter(risks_M[m], 0)) for m in risen]


def main() -> None:
    """Keep the losses, resample, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="output directory of a finished `dynamoe calibrate`")
    parser.add_argument("--name", default="tiny", help="of the model, for the files' names")
    parser.add_argument("--runs", type=int, default=1000, help="calibrations per level")
    parser.add_argument("--delta", type=float, default=0.05)
    options = parser.parse_args()
    losses_MN = read_losses(options.directory)
    np.savez_compressed(RESULTS / f"losses_{options.name}.npz", losses=losses_MN.astype(np.float32))
    records, hardest = (
        [resample(losses_MN, alpha, options.delta, options.runs, seed=0) for alpha in levels]
        for levels in (ALPHAS, hardest_levels(losses_MN))
    )
    shape = {"settings": losses_MN.shape[0], "requests": losses_MN.shape[1]}
    summary = {**shape, "levels": records, "just_below_a_setting": hardest}
    (RESULTS / f"validity_{options.name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    for record in (*records, *hardest):
        verdict = "holds" if holds(record) else "DOES NOT HOLD"
        print(f"alpha {record['alpha']:.4g}, delta {record['delta']:g}: {verdict}")
        for name, found in record["methods"].items():
            share = found["violations"] / record["runs"]
            print(f"  {name:18s} exceeds alpha in {share:6.1%}; mean risk {found['mean_risk']:.4f}")


if __name__ == "__main__":
    main()
