"""``dynamoe calibrate``: proves on requests which settings stay below a risk, and writes certificates.

Three disjoint sets: the probes' training text; prompts that choose the setting of every level; prompts that measure the
chosen settings.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from ...kernels.api.ranges import check_ranges
from ..contract.bounds import BOUNDS, betting_bound, conformal_risk_control, learn_then_test
from ..contract.calibration_runs import PROBABILITIES, Measured, Setting, measure, path_through
from ..contract.catalog import CERTIFICATES
from ..contract.certificate import Certificate, HeldOut, Scope, save_certificate
from ..contract.intervals import mean
from ..convert.model_store import resolve_model
from ..engine.config import EngineConfig
from ..engine.sampling_params import GREEDY_EPSILON
from ..llm import LLM
from ..model.load_config import LoadConfig
from ..parallel.config import ParallelConfig
from ..text.prompt_file import read_prompts
from ..train.held_out import PROMPTS_FILE
from ..train.recipe import claim, plot_path
from .records import deployment_of
from .requests import draw

if TYPE_CHECKING:
    from ..contract.certificate import Scalar

REPORT = "report.json"
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
        requests: prompts that choose the settings.
        test_requests: further prompts that measure the chosen settings.
        max_tokens: longest output; requests that ask for more are not covered.
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
        check_ranges(self, "requests", "test_requests", "max_tokens", "threads", least=1)


def calibrate(config: CalibrateConfig, *, progress: bool = True, say: Callable[[str], None] = print) -> Path:
    """Certify levels of risk for a model on this deployment.

    Arguments:
        progress: show bars.

    Returns: the directory of the certificates.

    Raises:
        ValueError: for a model without exits, prompts that cannot be read, are too few or too long, or a directory that
            holds another run.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    path, output = resolve_model(config.model, progress=progress), Path(config.output).expanduser()
    engine = EngineConfig(logits_processors=config.logits_processors)
    llm = LLM.from_config(path, config, engine, progress=progress, parallel=config.parallel)
    probed = [exit.after_layers for exit in llm.model.decoder.exits.values() if exit.probe is not None]
    settings = path_through(probed, config.probabilities, config.keeps)
    source, chosen, tested = _prompts(config, path, llm)
    facts = deployment_of(llm)
    kept = {
        k: v
        for k, v in asdict(config).items()
        if k not in ("output", "threads", "alphas", "delta", "method", "parallel", "logits_processors")
    }
    claim(output, {**kept, "deployment": facts})

    def measured_at(prompts: list[list[int]], setting: Setting, file: Path) -> Measured:
        return measure(
            llm, prompts, setting, config.max_tokens, file, temperature=config.temperature, progress=progress
        )

    measured = []
    for number, setting in enumerate(settings):
        measured.append(measured_at(chosen, setting, output / f"setting-{number:02}.json"))
        if measured[-1].losses_N.mean() > 1.5 * max(config.alphas):  # the tests of every level stop before later ones
            break
    say(_table(settings, measured, config.temperature))
    losses_MN = np.stack([m.losses_N for m in measured])
    target = output / CERTIFICATES
    target.mkdir(exist_ok=True)
    for stale in target.glob("*.json"):
        stale.unlink()
    certificates = []
    for alpha in config.alphas:
        place = learn_then_test(losses_MN, alpha, config.delta, config.method)
        expected = conformal_risk_control(losses_MN, alpha)
        crc = "none" if expected is None else _name(settings[expected])
        if place is None:
            say(f"alpha={alpha:g}: nothing but full compute, on {len(chosen)} requests; in expectation only: {crc}")
            continue
        held_out = measured_at(tested, settings[place], output / f"test-{place:02}.json")
        certificate = _certificate(config, alpha, settings[place], held_out, len(chosen), source, facts)
        save_certificate(certificate, target / f"alpha-{alpha:g}-{certificate.id}.json")
        certificates.append(certificate)
        found = certificate.held_out
        say(
            f"alpha={alpha:g}, delta={config.delta:g}: exits at {_name(settings[place])}; on {found.requests} other"
            f" requests {_differ(config.temperature, found.mean_loss)} ({found.low:.2%} … {found.high:.2%}),"
            f" {found.layers_executed:.1%} of the layers, {held_out.experts_share:.1%} of their experts;"
            f" in expectation only: {crc}"
        )
    if file := plot_path(output):
        plot(measured, certificates, config.delta, config.temperature, file.with_name("risk.svg"))
    _write_report(output, settings, measured, target)
    say(f"{len(certificates)} certificates in {target}")
    return target


def _prompts(config: CalibrateConfig, path: Path, llm: LLM) -> tuple[str, list[list[int]], list[list[int]]]:
    """Where the prompts came from; those that choose; those that test."""
    file = path / PROMPTS_FILE if config.prompts is None else Path(config.prompts).expanduser()
    if config.prompts is None and not file.is_file():
        raise ValueError(f"no prompts lie beside {config.model}; name a file of them: prompts=requests.jsonl")
    prompts = read_prompts(file, llm.model.tokenizer)
    wanted = config.requests + config.test_requests
    if len(prompts) < wanted:
        raise ValueError(
            f"{file} holds {len(prompts)} prompts, requests={config.requests} and"
            f" test_requests={config.test_requests} want {wanted}"
        )
    limit = llm.engine.max_model_len - config.max_tokens
    for number, prompt in enumerate(prompts[:wanted], 1):
        if len(prompt) > limit:
            raise ValueError(f"prompt {number} of {file} has {len(prompt)} tokens; with max_tokens, {limit} fit")
    shuffled = draw(prompts[:wanted], wanted, 0, str(file))
    source = file.name if config.prompts else f"{file.name} beside {path.name}"
    return source, shuffled[: config.requests], shuffled[config.requests :]


def _certificate(
    config: CalibrateConfig,
    alpha: float,
    setting: Setting,
    held_out: Measured,
    requests: int,
    source: str,
    facts: dict[str, Scalar],
) -> Certificate:
    loss = mean(held_out.losses_N)
    return Certificate(
        alpha=alpha,
        delta=config.delta,
        requests=requests,
        method=config.method,
        loss=SAMPLED_LOSS if config.temperature else GREEDY_LOSS,
        scope=Scope(
            lowest_temperature=config.temperature,
            highest_temperature=config.temperature,
            max_tokens=config.max_tokens,
            prompts=source,
        ),
        exit_thresholds=setting.exit_thresholds,
        expert_budget={} if setting.expert_keep is None else {"expert_keep": setting.expert_keep},
        held_out=HeldOut(
            requests=len(held_out.losses_N),
            mean_loss=loss.value,
            low=loss.low,
            high=loss.high,
            layers_executed=held_out.layers_share,
        ),
        created=datetime.date.today().isoformat(),
        deployment=facts,
    )


def _write_report(output: Path, settings: Sequence[Setting], measured: Sequence[Measured], certified: Path) -> None:
    """``report.json``: the path with its means, and what was certified."""
    path = [
        {
            **asdict(setting),
            "requests": len(found.losses_N),
            "mean_loss": float(found.losses_N.mean()),
            "layers_share": found.layers_share,
            "experts_share": found.experts_share,
        }
        for setting, found in zip(settings, measured, strict=False)
    ]
    certificates = [json.loads(file.read_text()) for file in sorted(certified.glob("*.json"))]
    (output / REPORT).write_text(json.dumps({"path": path, "certificates": certificates}, indent=1) + "\n")


def _name(setting: Setting) -> str:
    values = set(setting.exit_thresholds.values())
    keep = "" if setting.expert_keep is None else f", experts {setting.expert_keep:g}"
    return (f"{values.pop():g}" if len(values) == 1 else str(setting.exit_thresholds)) + keep


def _differ(temperature: float, loss: float) -> str:
    return f"distributions differ by {loss:.2%}" if temperature else f"{loss:.2%} of the tokens differ"


def _table(settings: Sequence[Setting], measured: Sequence[Measured], temperature: float) -> str:
    what = "distance of the distributions" if temperature else "tokens that differ"
    lines = [f"| setting | {what} | layers executed | of their experts |", "|---|---|---|---|"]
    for setting, found in zip(settings, measured, strict=False):
        shares = f"{found.layers_share:.1%} | {found.experts_share:.1%}"
        lines.append(f"| {_name(setting)} | {found.losses_N.mean():.2%} | {shares} |")
    return "\n".join(lines)


def plot(
    measured: Sequence[Measured], certificates: Sequence[Certificate], delta: float, temperature: float, file: Path
) -> None:
    """Risk against compute along the path, with the upper bounds, and the certified points on other requests."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    layers = [100 * m.layers_share for m in measured]
    axes.plot(layers, [100 * m.losses_N.mean() for m in measured], "o-", label="mean of the requests that choose")
    bounds = [100 * betting_bound(m.losses_N, delta) for m in measured]
    axes.plot(layers, bounds, "--", color="0.5", label=f"upper bound (betting, delta = {delta:g})")
    for certificate in certificates:
        found = certificate.held_out
        reach = [[100 * (found.mean_loss - found.low)], [100 * (found.high - found.mean_loss)]]
        axes.errorbar(
            100 * found.layers_executed, 100 * found.mean_loss, reach, fmt="s", capsize=4,
            label=f"alpha = {certificate.alpha:g}, on other requests",
        )  # fmt: skip
    axes.set(
        xlabel="layers executed for decoded tokens, % of all",
        ylabel=(
            f"distance of the distributions at temperature {temperature:g}, %"
            if temperature
            else "served tokens that differ from the full model's, %"
        ),
        title=f"risk against compute, {len(measured[0].losses_N)} requests",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)
