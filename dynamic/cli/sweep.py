"""``dynamoe sweep``: one job per combination of settings, as a Hydra multirun; its table, plots and configurations.

A job that was finished before is not run again, one that failed is; a failure is a row with its error.
"""

from __future__ import annotations

import logging
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
from .config import schema
from .job import JobFailed

_LOOK = 0.5  # seconds between two looks at how many jobs have ended


def job(config: DictConfig) -> None:
    """One job of a sweep: measure, or find that it has been measured, or record why it cannot be.

    Arguments:
        config: as Hydra composed it.
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
            logging.disable(logging.WARNING)  # a refused certificate is in the row, and would tear the bar
            records.write(key, {**measure(settings), "job": number})
    except Exception as error:
        # One job's mistake, or bug, must not take the others down.
        why = str(error).strip().splitlines() or [type(error).__name__]
        record = {"config": raw, "error": f"{type(error).__name__}: {why[0]}", "traceback": traceback.format_exc()}
        records.write(key, {**record, "job": number})
    finally:
        logging.disable(logging.NOTSET)
    records.done(number, key)


def measure(config: SweepConfig) -> dict[str, Any]:
    """What a job records: an evaluation, or what one of the other studies found."""
    if config.calibration.method is not None:
        result = compare_methods(config)
    else:
        result = run(with_probes(config) if config.probes.kind is not None else config, progress=False)
    return result.as_json(config)


class SweepCallback(Callback):
    """Watches a sweep from the process that launched it: progress of the whole, then what all jobs together say."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Launchers with processes send it to them; the watching stays here."""
        return SweepCallback, ()

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Make room, and begin to watch."""
        records = Records(Path(str(config.output)).expanduser())
        try:
            records.begin()
        except OSError as error:
            raise _ended(error) from error
        self._watcher = threading.Thread(target=self._watch, args=(records, count_jobs(config)), daemon=True)
        self._watcher.start()

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write the table, the plots and the configurations, and say what failed."""
        from ..studies.report import write_report

        self._stop.set()
        if self._watcher is not None:
            self._watcher.join()
        output = Path(str(config.output)).expanduser()
        try:
            failures, total = write_report(output, Records(output).of_run(), config.compare, config.quality_metric)
        except Exception as error:
            # Hydra would turn it into a warning.
            raise _ended(error) from error
        if failures and len(failures) == total:
            raise _ended(ValueError(f"all {total} jobs failed; the first: {failures[0]}"))
        if failures:
            raise SystemExit(1)

    def _watch(self, records: Records, total: int | None) -> None:
        with tqdm(total=total, desc="sweep", unit="job") as bar:
            running = True
            while running:
                running = not self._stop.wait(_LOOK)
                if ended := records.count() - int(bar.n):
                    bar.update(ended)


def count_jobs(config: DictConfig) -> int | None:
    """How many jobs Hydra's sweeper makes of a configuration; None where only Hydra knows."""
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    arguments = [*(f"{key}={value}" for key, value in params.items()), *config.hydra.overrides.task]
    try:
        overrides = OverridesParser.create().parse_overrides(arguments)
        return sum(len(batch) for batch in BasicSweeper.split_arguments(overrides, None))
    except HydraException:
        return None


def _ended(error: Exception) -> SystemExit:
    return JobFailed(error)
