"""``dynamoe sweep``: one job per combination of settings, as a Hydra multirun; its table, plots and configurations.

A finished job is not run again, a failed one is; a failure is a row with its error.
"""

from __future__ import annotations

import logging
import math
import threading
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from ..studies.calibration_methods import compare_methods
from ..studies.evaluate import run
from ..studies.probe_kinds import with_probes
from ..studies.records import Records, job_key
from ..studies.sweep_config import SweepConfig
from .commands import JobFailed
from .config import schema

_POLL = 0.5  # seconds between two counts of finished jobs


def job(config: DictConfig) -> float | tuple[float, ...]:
    """One job of a sweep: measure it, skip it if it was measured before, or record why it failed.

    Arguments:
        config: as Hydra composed it.

    Returns: what a sweeper that searches optimises (``objective``); NaN for a job that failed.
    """
    number, records = HydraConfig.get().job.num, Records(Path(str(config.output)).expanduser())
    raw: Any = OmegaConf.to_container(config)
    key = f"invalid-{number}"
    try:
        typed = OmegaConf.merge(schema(SweepConfig), raw)
        settings: Any = OmegaConf.to_object(typed)
        raw = asdict(settings)
        key = job_key(raw)
        if not records.finished(key):
            logging.disable(logging.WARNING)  # refusals are in the row, log lines break the bar
            records.write(key, {**measure(settings), "job": number})
    except Exception as error:
        # One job's mistake, or bug, must not take the others down.
        why = str(error).strip().splitlines() or [type(error).__name__]
        record = {"config": raw, "error": f"{type(error).__name__}: {why[0]}", "traceback": traceback.format_exc()}
        records.write(key, {**record, "job": number})
    finally:
        logging.disable(logging.NOTSET)
    records.done(number, key)
    return _objective(records.read(key), list(config.objective), str(config.quality_metric))


def _objective(record: dict[str, Any], names: list[str], default: str) -> float | tuple[float, ...]:
    metrics = record.get("metrics")
    if metrics is not None and (unknown := [name for name in names if name not in metrics]):
        raise JobFailed(ValueError(f"objective={unknown[0]} was not measured; there are: {', '.join(metrics)}"))
    values: tuple[float, ...] = tuple(
        float(metrics[n]["value"]) if metrics and n in metrics else math.nan for n in names or [default]
    )
    return values if len(names) > 1 else values[0]


def measure(config: SweepConfig) -> dict[str, Any]:
    """The record of a job: an evaluation, or the result of another study."""
    if config.calibration.method is not None:
        result = compare_methods(config)
    else:
        result = run(with_probes(config) if config.probes.kind is not None else config, progress=False)
    return result.as_json(config)


class SweepCallback(Callback):
    """Follows a sweep in the launching process: a progress bar, then the report over all jobs."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Pickled without the thread: launchers send callbacks to worker processes."""
        return SweepCallback, ()

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Prepare the directory and start the progress bar."""
        records = Records(Path(str(config.output)).expanduser())
        try:
            records.begin()
        except OSError as error:
            raise JobFailed(error) from error
        self._watcher = threading.Thread(target=self._watch, args=(records, count_jobs(config)), daemon=True)
        self._watcher.start()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write the table, the plots and the configurations, and report failures."""
        from ..studies.report import write_report

        self._stop.set()
        if self._watcher is not None:
            self._watcher.join()
        output = Path(str(config.output)).expanduser()
        try:
            failures, total = write_report(output, Records(output).of_run(), config.compare, config.quality_metric)
        except Exception as error:
            # Hydra would turn it into a warning.
            raise JobFailed(error) from error
        if failures and len(failures) == total:
            raise JobFailed(ValueError(f"all {total} jobs failed; the first: {failures[0]}"))
        if failures:
            raise SystemExit(1)

    def _watch(self, records: Records, total: int | None) -> None:
        with tqdm(total=total, desc="sweep", unit="job", disable=None) as bar:
            running = True
            while running:
                running = not self._stop.wait(_POLL)
                if ended := records.count() - int(bar.n):
                    bar.update(ended)


def count_jobs(config: DictConfig) -> int | None:
    """How many jobs Hydra's sweeper makes of a configuration; None if it cannot be known beforehand."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    arguments = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    try:
        overrides = OverridesParser.create().parse_overrides(arguments)
        return sum(len(batch) for batch in BasicSweeper.split_arguments(overrides, None))
    except HydraException:
        return None
