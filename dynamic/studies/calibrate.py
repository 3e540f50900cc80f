"""``dynamoe calibrate``: proves on requests which settings stay below a risk, and writes certificates.

Disjoint sets of prompts: those that order the settings, if nothing else does (the pilot); those that choose the setting
of every level; those that measure the chosen settings. The probes were trained on other text.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...kernels.api.sources import sources_hash
from ...moe.sidecar import JSON_FILE as CONTRIBUTIONS
from ..contract.bounds import conformal_risk_control, requests_needed
from ..contract.calibration_runs import Measured, measure, prompts_hash
from ..contract.catalog import CERTIFICATES
from ..contract.certificate import LOSSES, Certificate, save_certificate
from ..contract.setting_path import Setting, bolder, pareto_front
from ..convert.model_store import resolve_model
from ..llm import LLM
from ..model.machine import processor, use_threads
from ..text.prompt_file import read_prompts
from ..train.expert_scales import ExpertsConfig, make_expert_scales
from ..train.held_out import PROMPTS_FILE
from ..train.recipe import claim, plot_path
from .calibrate_config import CalibrateConfig
from .calibration_certificates import decode_speed, keep_losses, make_certificate, prove
from .calibration_engines import Engines
from .calibration_report import costs_of, plot, summary, table, write_report
from .ledger import LEDGER, enter
from .requests import draw

if TYPE_CHECKING:
    from ..contract.certificate import Scalar


def calibrate(config: CalibrateConfig, *, progress: bool = True, say: Callable[[str], None] = print) -> Path:
    """Certify levels of risk for a model on this deployment.

    Arguments:
        progress: show bars.

    Returns: the directory of the certificates.

    Raises:
        ValueError: for a model without anything to save, prompts that cannot be read, are too few or too long, or a
            directory that holds another run: other settings, prompts, code, deployment or processor.
    """
    use_threads(config.threads)
    path, output = resolve_model(config.model, progress=progress), Path(config.output).expanduser()
    if config.measure_experts and not (path / CONTRIBUTIONS).is_file():
        scales = ExpertsConfig(model=str(path), dtype=config.dtype, device=config.device, threads=config.threads)
        make_expert_scales(scales, progress=progress, say=say)
    engines = Engines(config, path, progress=progress)
    plan = engines.plan()
    for alpha in config.alphas:
        if config.requests < (least := requests_needed(alpha, config.delta)):
            say(f"alpha={alpha:g} needs at least {least} requests, even without any loss; there are {config.requests}")
    prompts = _prompts(config, path, engines.of(None), say, plan.pilot)
    kept = {
        k: v
        for k, v in asdict(config).items()
        if k not in ("output", "threads", "alphas", "delta", "method", "parallel", "logits_processors", "weight_cache")
    }
    made_by = {"code": sources_hash("kernels", "moe", "exits", "dynamic"), "processor": processor()}
    asked = {"prompts_hash": prompts.hash, "pilot_hash": prompts_hash(prompts.pilot)}
    claim(output, {**kept, "deployment": engines.facts(None), **asked, **made_by})
    spent: list[Mapping[str, float]] = []

    def measured_at(prompts: list[list[int]], setting: Setting, file: Path) -> Measured:
        llm, facts = engines.of(setting.precision), engines.facts(setting.precision)
        found = measure(
            llm, prompts, setting, config.max_tokens, file, temperature=config.temperature, progress=progress,
            judge=engines.judge, deployment=_hash(facts),
        )  # fmt: skip
        spent.append(found.work)
        return found

    settings = plan.path or _front(config, engines, plan.combinations, prompts.pilot, output, measured_at, say)
    measured, files = [], []
    for number, setting in enumerate(settings):
        files.append(output / f"setting-{number:02}.json")
        measured.append(measured_at(prompts.choose, setting, files[-1]))
        # The tests of every level stop before later ones.
        if measured[-1].cut_losses_KN.mean(1).max() > 1.5 * max(config.alphas):
            break
    full = decode_speed(
        engines.of(None), prompts.test, Setting(exit_thresholds={}), config.max_tokens, output / "speed-full.json"
    )
    say(table(settings, measured, config.temperature, full["weight_bytes"]))
    target = output / CERTIFICATES
    target.mkdir(exist_ok=True)
    for stale in target.glob("*.json"):
        stale.unlink()
    shutil.rmtree(target / LOSSES, ignore_errors=True)
    proved = {
        alpha: prove(settings, measured, alpha, config.delta, config.method) if measured else []
        for alpha in config.alphas
    }
    tested: dict[int, tuple[Measured, dict[str, Any]]] = {}
    for place in sorted({found.place for level in proved.values() for found in level}):
        setting = settings[place]
        held_out = measured_at(prompts.test, setting, output / f"test-{place:02}.json")
        # No name for the engine: it would keep its weights alive while the next one is loaded.
        speed = decode_speed(
            engines.of(setting.precision), prompts.test, setting, config.max_tokens, output / f"speed-{place:02}.json"
        )
        tested[place] = held_out, speed
    certificates: list[Certificate] = []
    for alpha, level in proved.items():
        expected = conformal_risk_control(np.stack([m.cut_losses_KN for m in measured]), alpha) if measured else None
        crc = f"in expectation only: {'none' if expected is None else settings[expected]}"
        if not level:
            say(
                f"alpha={alpha:g}: nothing but full compute, on {config.requests} requests"
                f"{_would_need(config, alpha, measured)}; {crc}"
            )
        ids = []
        for found in level:
            setting, (held_out, speed) = settings[found.place], tested[found.place]
            certificate = make_certificate(
                config, alpha, setting, found, held_out, (full, speed), (prompts.source, prompts.hash),
                engines.facts(setting.precision), engines.original(setting.precision),
                keep_losses(files[: found.place + 1], target),
            )  # fmt: skip
            save_certificate(certificate, target / f"alpha-{alpha:g}-{certificate.id}.json")
            certificates.append(certificate)
            ids.append(certificate.id)
            say(f"{summary(certificate, str(setting), held_out)}; {crc}")
        again = enter(target, _tried(config, alpha, settings, prompts.hash, engines.facts(None), ids))
        if again:
            say(f"alpha={alpha:g} was tried {again} times before, see {LEDGER}: delta holds for one calibration alone")
    if measured and (file := plot_path(output)):
        plot(measured, certificates, config, full["weight_bytes"], file.with_name("risk.svg"))
    costs = costs_of(spent)
    write_report(output, settings, measured, target, costs)
    say(costs["words"])
    say(f"{len(certificates)} certificates in {target}")
    return target


def _front(
    config: CalibrateConfig,
    engines: Engines,
    combinations: Mapping[tuple[int, ...], Setting],
    pilot: list[list[int]],
    output: Path,
    measured_at: Callable[[list[list[int]], Setting, Path], Measured],
    say: Callable[[str], None],
) -> list[Setting]:
    """The path that the pilot makes: settings that save something, none both dearer and worse than another.

    A combination as bold as one that already loses far more than any level allows, or bolder, is not tried.
    """
    say(f"{len(combinations)} combinations are tried on {len(pilot)} pilot requests")
    limit = 1.5 * max(config.alphas)
    hopeless: list[tuple[int, ...]] = []
    costs, losses, tried = [], [], []
    everything = Setting(exit_thresholds={}, precision=engines.reference if engines.several else None)
    full = measured_at(pilot, everything, output / "pilot-full.json")
    for number, (places, setting) in enumerate(combinations.items()):
        if setting == everything or any(bolder(places, than) for than in hopeless):
            continue
        found = measured_at(pilot, setting, output / f"pilot-{number:03}.json")
        costs.append(_cost(found, config.cost))
        losses.append(float(found.cut_losses_KN.mean(1).max()))
        tried.append(setting)
        if losses[-1] > limit:
            hopeless.append(places)
    front = pareto_front(costs, losses, _cost(full, config.cost))
    most = _cost(full, config.cost)
    shown = "; ".join(f"{tried[n]} ({costs[n] / most:.1%} of the cost, loss {losses[n]:.2%})" for n in front)
    say(f"{len(tried)} of them were tried; {len(front)} make the path: {shown or 'none saves anything'}")
    return [tried[n] for n in front]


def _cost(found: Measured, kind: str) -> float:
    return found.bytes_per_token if kind == "bytes" else found.seconds_per_token


def _hash(facts: Mapping[str, Scalar]) -> str:
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class _Prompts:
    """Where prompts came from, those that choose, those that test, and a hash of these two in their order; those that
    order the settings."""

    source: str
    choose: list[list[int]]
    test: list[list[int]]
    pilot: list[list[int]]

    @property
    def hash(self) -> str:
        return prompts_hash([*self.choose, *self.test])


def _prompts(config: CalibrateConfig, path: Path, llm: LLM, say: Callable[[str], None], pilot: int = 0) -> _Prompts:
    """Distinct prompts, drawn from all that there are."""
    file = path / PROMPTS_FILE if config.prompts is None else Path(config.prompts).expanduser()
    if config.prompts is None and not file.is_file():
        raise ValueError(f"no prompts lie beside {config.model}; name a file of them: prompts=requests.jsonl")
    prompts = read_prompts(file, llm.model.tokenizer)
    numbers: dict[tuple[int, ...], int] = {}
    for number, prompt in enumerate(prompts, 1):
        numbers.setdefault(tuple(prompt), number)
    used = config.requests + config.test_requests
    wanted, repeated = used + pilot, len(prompts) - len(numbers)
    if len(numbers) < wanted:
        tries = f" and pilot_requests={pilot}" if pilot else ""
        raise ValueError(
            f"{file} holds {len(prompts)} prompts, {len(numbers)} of them distinct; requests={config.requests} and"
            f" test_requests={config.test_requests}{tries} want {wanted} distinct ones"
        )
    if repeated:
        say(f"{repeated} of the {len(prompts)} prompts in {file} are repetitions: each counts once")
    drawn = draw([list(prompt) for prompt in numbers], wanted, 0, str(file))
    limit = llm.engine.max_model_len - config.max_tokens
    for prompt in drawn:
        if len(prompt) > limit:
            raise ValueError(
                f"prompt {numbers[tuple(prompt)]} of {file} has {len(prompt)} tokens; with max_tokens, {limit} fit"
            )
    source = file.name if config.prompts else f"{file.name} beside {path.name}"
    choose, test, pilots = drawn[: config.requests], drawn[config.requests : used], drawn[used:]
    return _Prompts(source=source, choose=choose, test=test, pilot=pilots)


def _would_need(config: CalibrateConfig, alpha: float, measured: Sequence[Measured]) -> str:
    """How many requests might prove a level at the safest setting, in words."""
    risk = float(measured[0].cut_losses_KN.mean(1).max()) if measured else 1.0
    return (
        f"; about {requests_needed(alpha, config.delta, risk)} might prove the safest setting" if risk < alpha else ""
    )


def _tried(
    config: CalibrateConfig,
    alpha: float,
    settings: Sequence[Setting],
    prompts: str,
    facts: Mapping[str, Scalar],
    proved: Sequence[str],
) -> dict[str, object]:
    """An entry of the ledger.

    Arguments:
        facts: of the reference's deployment.
        proved: ids of the certificates, the boldest last.
    """
    entry: dict[str, object] = {
        "alpha": alpha,
        "delta": config.delta,
        "temperature": config.temperature,
        "method": config.method,
        "requests": config.requests,
        "max_tokens": config.max_tokens,
        "path": [str(setting) for setting in settings],
        "prompts_hash": prompts,
        "backend": facts["backend"],
        "dtype": facts["dtype"],
        "deployment": _hash(facts),
        "proved": proved[-1] if proved else None,
    }
    return entry | ({"in_other_precisions": list(proved[:-1])} if len(proved) > 1 else {})
