"""From measured settings to certificates: what is proved, the losses that it rests on, how fast it is.

Shape suffixes: M settings of the path, K lengths, N requests.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..contract.bounds import learn_then_test
from ..contract.calibration_runs import SHORTEST, Measured
from ..contract.certificate import LOSSES, Certificate, HeldOut, Scope
from ..contract.intervals import mean
from ..contract.setting_path import Precision, Setting

if TYPE_CHECKING:
    from ..contract.certificate import Scalar
    from ..llm import LLM
    from .calibrate_config import CalibrateConfig

GREEDY_LOSS = "share of a request's served tokens that are not the full model's choice after the served prefix, greedy"
SAMPLED_LOSS = (
    "mean total-variation distance between the distributions that a request's tokens were drawn from and the full"
    " model's after the served prefix"
)
_TIMED = 32  # requests


@dataclass(frozen=True, kw_only=True)
class Proved:
    """A setting of which a level was proved.

    Arguments:
        place: on the path.
        ignore_eos: whether the level is proved of requests that go on past the model's end of text as well, even if
            every token there differed.
    """

    place: int
    ignore_eos: bool


def prove(
    settings: Sequence[Setting], measured: Sequence[Measured], alpha: float, delta: float, method: str
) -> list[Proved]:
    """The boldest proved setting of each precision, in the path's order; the last one is the boldest of all.

    Fixed-sequence testing rejects all hypotheses before its stop at once: with probability 1 - ``delta`` every setting
    that it passed has a risk of at most ``alpha``. So each precision may have one of them.
    """
    last = learn_then_test(np.stack([m.cut_losses_KN for m in measured]), alpha, delta, method)
    if last is None:
        return []
    filled = learn_then_test(np.stack([m.worst_case_cuts_KN for m in measured]), alpha, delta, method)
    boldest: dict[Precision | None, int] = {settings[place].precision: place for place in range(last + 1)}
    return [Proved(place=n, ignore_eos=filled is not None and n <= filled) for n in sorted(boldest.values())]


def keep_losses(files: Sequence[Path], directory: Path) -> tuple[str, ...]:
    """Copy files of losses to ``losses/`` in a directory of certificates, each under the hash of its content.

    Returns: these hashes.
    """
    folder, hashes = directory / LOSSES, []
    folder.mkdir(exist_ok=True)
    for file in files:
        hashes.append(hashlib.sha256(file.read_bytes()).hexdigest())
        shutil.copyfile(file, folder / f"{hashes[-1]}.json")
    return tuple(hashes)


def decode_speed(llm: LLM, prompts: Sequence[list[int]], setting: Setting, max_tokens: int, file: Path) -> dict:
    """Time a setting on a few requests whose prompts are cached; or read what an earlier run measured.

    Returns: ``tokens_per_second``, and ``weight_bytes`` of all layers and experts for an output token.
    """
    facts = {"setting": setting.as_json(), "max_tokens": max_tokens}
    if file.exists():
        record = json.loads(file.read_text())
        if {name: record.get(name) for name in facts} == json.loads(json.dumps(facts)):
            return record
    timed = [list(prompt) for prompt in prompts[:_TIMED]]
    llm.generate(timed, setting.params(1), use_tqdm=False)
    started = time.perf_counter()
    outputs = llm.generate(timed, setting.params(max_tokens), use_tqdm=False)
    seconds = time.perf_counter() - started
    costs = [output.compute.tokens for output in outputs if output.compute is not None]
    tokens = sum(cost.count for cost in costs)
    weights = sum(cost.full_weight_bytes for cost in costs) / tokens
    record = {**facts, "tokens_per_second": tokens / seconds, "weight_bytes": weights}
    file.write_text(json.dumps(record))
    return record


def make_certificate(
    config: CalibrateConfig,
    alpha: float,
    setting: Setting,
    proved: Proved,
    held_out: Measured,
    speeds: tuple[dict[str, Any], dict[str, Any]],
    prompts: tuple[str, str],
    facts: Mapping[str, Scalar],
    original: Mapping[str, Scalar],
    evidence: tuple[str, ...],
) -> Certificate:
    """The certificate of a setting.

    Arguments:
        speeds: of the full model in the precision that losses are measured against, and of the setting.
        prompts: their source, and their hash.
        facts: of the deployment; original: of what the losses are measured against, if that is another one.
        evidence: see :class:`Certificate`.
    """
    loss, cut_means_K = mean(held_out.losses_N), held_out.cut_losses_KN.mean(1)
    full, own = speeds
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
            prompts=prompts[0],
            prompts_hash=prompts[1],
            ignore_eos=proved.ignore_eos,
        ),
        exit_thresholds=setting.exit_thresholds,
        expert_budget=setting.expert_budget,
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
            experts_executed=held_out.experts_share,
            weight_bytes_read=held_out.weight_bytes / full["weight_bytes"],
            tokens_per_second=own["tokens_per_second"],
            full_tokens_per_second=full["tokens_per_second"],
        ),
        created=datetime.date.today().isoformat(),
        deployment=facts,
        reference=original,
        evidence=evidence,
    )
