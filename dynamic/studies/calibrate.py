"""``dynamoe calibrate``: proves on requests which settings stay below a risk, and writes certificates.

Three disjoint sets: the probes' training text; prompts that choose the setting of every level; prompts that measure the
chosen settings.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ...kernels.api.ranges import check_ranges
from ...kernels.api.sources import sources_hash
from ..contract.bounds import BOUNDS, conformal_risk_control, learn_then_test, requests_needed
from ..contract.calibration_runs import (
    PROBABILITIES,
    SHORTEST,
    Measured,
    Setting,
    measure,
    path_through,
    prompts_hash,
)
from ..contract.catalog import CERTIFICATES
from ..contract.certificate import Certificate, HeldOut, Scope, save_certificate
from ..contract.intervals import mean
from ..convert.model_store import resolve_model
from ..engine.config import EngineConfig
from ..engine.sampling_params import GREEDY_EPSILON
from ..llm import LLM
from ..model.load_config import LoadConfig
from ..model.machine import processor, use_threads
from ..parallel.config import ParallelConfig
from ..text.prompt_file import read_prompts
from ..train.held_out import PROMPTS_FILE
from ..train.recipe import claim, plot_path
from .calibration_report import plot, setting_name, summary, table, write_report
from .ledger import LEDGER, enter
from .requests import draw

if TYPE_CHECKING:
    from ..contract.certificate import Scalar

_AT_ONCE = 64  # sequences that run in one step
GREEDY_LOSS = "share of a request's served tokens that are not the full model's choice after the served prefix, greedy"
SAMPLED_LOSS = (
    "mean total-variation distance between the distributions that a request's tokens were drawn from and the full"
    " model's after the served prefix"
)


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(LoadConfig):
    """``dynamoe calibrate``.

    Arguments:
        model: a local directory, a Hub id, or the name of a shipped model: ``default``, ``tiny``. It must have exits.
        prompts: JSON lines with ``prompt``, ``messages`` or ``prompt_token_ids``; null takes the prompts
            beside the model.
        output: directory of the run; the same command resumes an interrupted run. ``certificates/`` in it is for
            servers, ``report.json`` has the loss and the saved work of every setting.
        alphas: levels of risk to certify.
        delta: probability that a calibration is wrong, for each level.
        method: bound of the test: ``wsr``, ``hoeffding_bentkus`` or ``exact_binomial``.
        requests: prompts that choose the settings; at a risk of R a level needs about ln(1 / delta) / (alpha - R).
        test_requests: further prompts that measure the chosen settings.
        max_tokens: longest output, at least 8. A level is proved for outputs cut at every length from 8 on; what a
            request asks for beyond the longest runs exactly.
        temperature: of the requests, and the one that the certificates hold for; 0 is greedy.
        probabilities: the path, the same calibrated probability at every exit, from the safest to the boldest.
        keeps: ``expert_keep`` beside each of them, not rising (it needs ``dynamoe experts``); empty uses all experts.
        logits_processors: as engine.logits_processors of a server that the certificates are for.
        threads: CPU threads; null leaves torch's own choice.
        parallel: the processes that share the model; certificates hold for these.

    Raises:
        ValueError: naming the key and the value that is out of range.
    """

    FREE_TEXT: ClassVar[frozenset[str]] = frozenset({"output", "prompts"})

    model: str = "tiny"
    prompts: str | None = None
    output: str = "runs/calibration"
    alphas: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    delta: float = 0.05
    method: str = "wsr"
    requests: int = 1000
    test_requests: int = 500
    max_tokens: int = 64
    temperature: float = 0.0
    probabilities: tuple[float, ...] = field(default=PROBABILITIES)
    keeps: tuple[float, ...] = ()
    logits_processors: tuple[str, ...] = ()
    threads: int | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alphas", "probabilities", "keeps", "logits_processors"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_ranges(self, "alphas", "delta", above=0, below=1)
        check_ranges(self, "probabilities", least=0, most=1)
        check_ranges(self, "keeps", above=0, most=1)
        if not self.alphas:
            raise ValueError("alphas is empty: there is no level to certify")
        if self.method not in BOUNDS:
            raise ValueError(f"method must be one of {', '.join(BOUNDS)}, not {self.method!r}")
        if not (self.temperature == 0 or GREEDY_EPSILON <= self.temperature <= 100):
            raise ValueError(f"temperature must be 0 or between {GREEDY_EPSILON} and 100, not {self.temperature}")
        check_ranges(self, "requests", "test_requests", "threads", least=1)
        check_ranges(self, "max_tokens", least=SHORTEST)


def calibrate(config: CalibrateConfig, *, progress: bool = True, say: Callable[[str], None] = print) -> Path:
    """Certify levels of risk for a model on this deployment.

    Arguments:
        progress: show bars.

    Returns: the directory of the certificates.

    Raises:
        ValueError: for a model without exits, prompts that cannot be read, are too few or too long, or a directory that
            holds another run: other settings, prompts, code, deployment or processor.
    """
    use_threads(config.threads)
    path, output = resolve_model(config.model, progress=progress), Path(config.output).expanduser()
    engine = EngineConfig(max_num_seqs=_AT_ONCE, logits_processors=config.logits_processors)
    llm = LLM.from_config(path, config, engine, progress=progress, parallel=config.parallel)
    probed = [exit.after_layers for exit in llm.model.decoder.exits.values() if exit.probe is not None]
    settings = path_through(probed, config.probabilities, config.keeps)
    for alpha in config.alphas:
        if config.requests < (least := requests_needed(alpha, config.delta)):
            say(f"alpha={alpha:g} needs at least {least} requests, even without any loss; there are {config.requests}")
    prompts = _prompts(config, path, llm, say)
    facts = dict(llm.certificates.running)
    kept = {
        k: v
        for k, v in asdict(config).items()
        if k not in ("output", "threads", "alphas", "delta", "method", "parallel", "logits_processors")
    }
    made_by = {"code": sources_hash("kernels", "moe", "exits", "dynamic"), "processor": processor()}
    claim(output, {**kept, "deployment": facts, "prompts_hash": prompts.hash, **made_by})

    def measured_at(prompts: list[list[int]], setting: Setting, file: Path) -> Measured:
        return measure(
            llm, prompts, setting, config.max_tokens, file, temperature=config.temperature, progress=progress
        )

    measured = []
    for number, setting in enumerate(settings):
        measured.append(measured_at(prompts.choose, setting, output / f"setting-{number:02}.json"))
        # The tests of every level stop before later ones.
        if measured[-1].cut_losses_KN.mean(1).max() > 1.5 * max(config.alphas):
            break
    say(table(settings, measured, config.temperature))
    losses_MKN = np.stack([m.cut_losses_KN for m in measured])
    target = output / CERTIFICATES
    target.mkdir(exist_ok=True)
    for stale in target.glob("*.json"):
        stale.unlink()
    certificates = []
    for alpha in config.alphas:
        place = learn_then_test(losses_MKN, alpha, config.delta, config.method)
        expected = conformal_risk_control(losses_MKN, alpha)
        crc = "none" if expected is None else setting_name(settings[expected])
        certificate = None
        if place is None:
            say(
                f"alpha={alpha:g}: nothing but full compute, on {config.requests} requests"
                f"{_would_need(config, alpha, losses_MKN[0])}; in expectation only: {crc}"
            )
        else:
            held_out = measured_at(prompts.test, settings[place], output / f"test-{place:02}.json")
            certificate = _certificate(config, alpha, settings[place], held_out, prompts, facts)
            save_certificate(certificate, target / f"alpha-{alpha:g}-{certificate.id}.json")
            certificates.append(certificate)
            say(f"{summary(certificate, setting_name(settings[place]), held_out)}; in expectation only: {crc}")
        again = enter(target, _tried(config, alpha, settings, prompts.hash, facts, certificate))
        if again:
            say(f"alpha={alpha:g} was tried {again} times before, see {LEDGER}: delta holds for one calibration alone")
    if file := plot_path(output):
        plot(measured, certificates, config.delta, config.temperature, file.with_name("risk.svg"))
    write_report(output, settings, measured, target)
    say(f"{len(certificates)} certificates in {target}")
    return target


@dataclass(frozen=True, kw_only=True)
class _Prompts:
    """Where prompts came from, those that choose, those that test, and a hash of all of them in their order."""

    source: str
    choose: list[list[int]]
    test: list[list[int]]

    @property
    def hash(self) -> str:
        return prompts_hash([*self.choose, *self.test])


def _prompts(config: CalibrateConfig, path: Path, llm: LLM, say: Callable[[str], None]) -> _Prompts:
    """Distinct prompts, drawn from all that there are."""
    file = path / PROMPTS_FILE if config.prompts is None else Path(config.prompts).expanduser()
    if config.prompts is None and not file.is_file():
        raise ValueError(f"no prompts lie beside {config.model}; name a file of them: prompts=requests.jsonl")
    prompts = read_prompts(file, llm.model.tokenizer)
    numbers: dict[tuple[int, ...], int] = {}
    for number, prompt in enumerate(prompts, 1):
        numbers.setdefault(tuple(prompt), number)
    wanted, repeated = config.requests + config.test_requests, len(prompts) - len(numbers)
    if len(numbers) < wanted:
        raise ValueError(
            f"{file} holds {len(prompts)} prompts, {len(numbers)} of them distinct; requests={config.requests} and"
            f" test_requests={config.test_requests} want {wanted} distinct ones"
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
    return _Prompts(source=source, choose=drawn[: config.requests], test=drawn[config.requests :])


def _certificate(
    config: CalibrateConfig,
    alpha: float,
    setting: Setting,
    held_out: Measured,
    prompts: _Prompts,
    facts: dict[str, Scalar],
) -> Certificate:
    loss, cut_means_K = mean(held_out.losses_N), held_out.cut_losses_KN.mean(1)
    return Certificate(
        alpha=alpha,
        delta=config.delta,
        requests=config.requests,
        method=config.method,
        loss=SAMPLED_LOSS if config.temperature else GREEDY_LOSS,
        scope=Scope(
            lowest_temperature=config.temperature,
            highest_temperature=config.temperature,
            min_tokens=SHORTEST,
            max_tokens=config.max_tokens,
            prompts=prompts.source,
            prompts_hash=prompts.hash,
        ),
        exit_thresholds=setting.exit_thresholds,
        expert_budget={} if setting.expert_keep is None else {"expert_keep": setting.expert_keep},
        held_out=HeldOut(
            requests=len(held_out.losses_N),
            mean_loss=loss.value,
            low=loss.low,
            high=loss.high,
            layers_executed=held_out.layers_share,
            worst_length=SHORTEST + int(cut_means_K.argmax()),
            worst_length_loss=float(cut_means_K.max()),
            token_loss=held_out.token_loss,
            worst_cut_loss=float(held_out.worst_cut_N.mean()),
        ),
        created=datetime.date.today().isoformat(),
        deployment=facts,
    )


def _would_need(config: CalibrateConfig, alpha: float, losses_KN: np.ndarray) -> str:
    """How many requests might prove a level at the safest setting, in words."""
    risk = float(losses_KN.mean(1).max())
    return (
        f"; about {requests_needed(alpha, config.delta, risk)} might prove the safest setting" if risk < alpha else ""
    )


def _tried(
    config: CalibrateConfig,
    alpha: float,
    settings: Sequence[Setting],
    prompts: str,
    facts: dict[str, Scalar],
    certificate: Certificate | None,
) -> dict[str, object]:
    """An entry of the ledger."""
    return {
        "alpha": alpha,
        "delta": config.delta,
        "temperature": config.temperature,
        "method": config.method,
        "requests": config.requests,
        "max_tokens": config.max_tokens,
        "path": [setting_name(setting) for setting in settings],
        "prompts_hash": prompts,
        "backend": facts["backend"],
        "dtype": facts["dtype"],
        "deployment": hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(),
        "proved": None if certificate is None else certificate.id,
    }
