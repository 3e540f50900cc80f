"""The engines of a calibration, one for each precision; among them the original model, which judges."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..contract.calibration_runs import Judge
from ..contract.setting_path import PROBABILITIES, Precision, Setting, all_settings, budget_path, path_through
from ..engine.config import EngineConfig
from ..llm import LLM
from ..model.load_config import LoadConfig

if TYPE_CHECKING:
    from ..contract.certificate import Scalar
    from .calibrate_config import CalibrateConfig

_DTYPES = ("float32", "bfloat16", "float16")
_ORIGINAL = ("weights", "quantisation", "dtype", "keys_and_values", "backend", "logits")
_AT_ONCE = 64  # sequences that run in one step


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a calibration is going to measure.

    Arguments:
        path: settings in the order in which they are tested, if it is given; else the pilot makes it.
        combinations: place on each axis (precision, exits, keeps, caps) → setting, for the pilot to order.
        pilot: requests that order them and are never used again.
    """

    path: list[Setting]
    combinations: dict[tuple[int, ...], Setting]
    pilot: int


class Engines:
    """Loads a model in one precision after the other; the reference stays, and one other beside it.

    Arguments:
        config: of the calibration.
        path: of the model.

    Raises:
        ValueError: for a precision that cannot be loaded, or several of them in several processes.
    """

    def __init__(self, config: CalibrateConfig, path: Path, *, progress: bool) -> None:
        self._config, self._path, self._progress = config, path, progress
        self.precisions = [
            Precision(dtype=config.dtype, quantization=quantization, kv_cache_dtype=cache)
            for quantization, cache in itertools.product(config.quantization, config.kv_cache_dtype)
        ]
        self.reference = _reference(config.reference, self.precisions[0])
        if self.several and config.parallel.size > 1:
            raise ValueError(f"several precisions are calibrated in one process, not in {config.parallel.size}")
        self._held: dict[Precision, LLM] = {}
        self._facts: dict[Precision, dict[str, Scalar]] = {}
        self.judge = Judge(self.of(None).model.decoder)

    @property
    def several(self) -> bool:
        """Whether anything but the reference serves."""
        return self.precisions != [self.reference]

    def of(self, precision: Precision | None) -> LLM:
        """The engine that serves at a precision; None is the reference's."""
        wanted = precision or self.reference
        if wanted not in self._held:
            for other in self._held.keys() - {self.reference}:
                del self._held[other]
            load = LoadConfig(**{f.name: getattr(self._config, f.name) for f in fields(LoadConfig)})
            load = replace(load, **vars(wanted))
            engine = EngineConfig(max_num_seqs=_AT_ONCE, logits_processors=self._config.logits_processors)
            parallel = self._config.parallel
            self._held[wanted] = LLM.from_config(self._path, load, engine, progress=self._progress, parallel=parallel)
            self._facts[wanted] = dict(self._held[wanted].certificates.running)
        return self._held[wanted]

    def facts(self, precision: Precision | None) -> dict[str, Scalar]:
        """The deployment of a precision."""
        if (precision or self.reference) not in self._facts:
            self.of(precision)
        return self._facts[precision or self.reference]

    def original(self, precision: Precision | None) -> dict[str, Scalar]:
        """What losses at a precision are measured against, if that is another deployment; else nothing."""
        if precision in (None, self.reference):
            return {}
        return {name: self._facts[self.reference][name] for name in _ORIGINAL}

    def plan(self) -> Plan:
        """The path, or what it is to be made of.

        Raises:
            ValueError: where there is nothing to calibrate, or an order is needed that nothing gives.
        """
        config, llm = self._config, self.of(None)
        exits = [exit.after_layers for exit in llm.model.decoder.exits.values() if exit.probe is not None]
        probabilities = config.probabilities if exits or config.probabilities != PROBABILITIES else ()
        if probabilities and not exits:
            path_through(exits, probabilities)  # says what is wrong
        open_ended = len(self.precisions) > 1 or bool(config.experts_per_token and (config.keeps or probabilities))
        pilot = config.pilot_requests
        if pilot is None:
            pilot = -(-config.requests // 5) if open_ended else 0
        if pilot:
            precisions = self.precisions if self.several else [None]
            axes = (precisions, exits, probabilities, config.keeps, config.experts_per_token)
            return Plan(path=[], combinations=all_settings(*axes), pilot=pilot)
        if open_ended:
            raise ValueError(
                "pilot_requests=0 leaves open which of these settings is safer: without a pilot only one of"
                " quantization, kv_cache_dtype and experts_per_token may vary"
            )
        path = self._alone() + (
            path_through(exits, probabilities, config.keeps)
            if probabilities
            else budget_path(config.keeps, config.experts_per_token)
        )
        precision = self.precisions[0] if self.several else None
        path = [replace(setting, precision=precision) for setting in path]
        if not path:
            raise ValueError(
                f"there is nothing to calibrate: {llm.model.name} has no exits; give keeps, experts_per_token, several"
                " values of quantization or kv_cache_dtype, or a reference"
            )
        return Plan(path=path, combinations={}, pilot=0)

    def _alone(self) -> list[Setting]:
        """Another precision than the reference's is a setting by itself, and the safest."""
        return [Setting(exit_thresholds={})] if self.several else []


def _reference(named: str | None, first: Precision) -> Precision:
    """The precision that losses are measured against.

    Arguments:
        named: a dtype or a quantisation; None takes the first that is calibrated.
    """
    if named is None:
        return first
    if named in _DTYPES:
        return Precision(dtype=named)
    return Precision(dtype=first.dtype, quantization=named)
