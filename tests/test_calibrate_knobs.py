"""Calibration of bits and experts: models without exits, paths that a pilot makes, losses against the original."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dynamoe import LLM, Quality, SamplingParams
from dynamoe.dynamic.contract.bounds import betting
from dynamoe.dynamic.contract.calibration_runs import Judge, Measured, measure, read_measured
from dynamoe.dynamic.contract.certificate import Certificate, load_certificate
from dynamoe.dynamic.contract.full_runs import FullRuns
from dynamoe.dynamic.contract.monitor import MonitorConfig, RiskMonitor
from dynamoe.dynamic.contract.setting_path import Precision, Setting, all_settings, bolder, pareto_front
from dynamoe.dynamic.engine.quality import ContractUnavailable
from dynamoe.dynamic.engine.sampling_params import SamplingParams as EngineParams
from dynamoe.dynamic.studies import calibration_engines
from dynamoe.dynamic.studies.calibrate import CalibrateConfig, calibrate
from dynamoe.dynamic.studies.calibration_certificates import prove
from dynamoe.dynamic.studies.calibration_engines import Plan
from peaked import peaked_checkpoint

BOLD, STRICT = 0.25, 0.12
TOKENS = 12


@dataclass
class Run:
    """A calibration of a checkpoint: its certificates, the boldest last, its report, what it said."""

    checkpoint: Path
    output: Path
    said: list[str]

    @property
    def certificates(self) -> list[Certificate]:
        return [load_certificate(file) for file in sorted((self.output / "certificates").glob("*.json"))]

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.output / "report.json").read_text())


def calibrated(checkpoint: Path, output: Path, **changes: Any) -> Run:
    run = Run(checkpoint, output, [])
    settings = {"alphas": (STRICT, BOLD), "requests": 100, "test_requests": 16, "max_tokens": TOKENS, "threads": 1}
    config = CalibrateConfig(
        model=str(checkpoint), output=str(output), dtype="float32", prompts=str(checkpoint / "prompts.jsonl"),
        **{**settings, **changes},
    )  # fmt: skip
    calibrate(config, progress=False, say=run.said.append)
    return run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return peaked_checkpoint(tmp_path_factory.mktemp("peaked"), "qwen3_moe")


@pytest.fixture(scope="module")
def bits(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return calibrated(
        checkpoint, tmp_path_factory.mktemp("bits") / "run",
        quantization=["none", "int8"], experts_per_token=(2, 1), pilot_requests=16,
    )  # fmt: skip


@pytest.fixture(scope="module")
def planted(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A path with a lossy, cheap setting in the middle, and one without any loss behind it."""
    path = [Setting(exit_thresholds={}, experts_per_token=cap) for cap in (2, 1, 3)]
    with pytest.MonkeyPatch.context() as patch:
        plan = Plan(path=path, combinations={}, pilot=0)
        patch.setattr(calibration_engines.Engines, "plan", lambda self: plan)
        output = tmp_path_factory.mktemp("planted") / "run"
        return calibrated(checkpoint, output, alphas=(BOLD,), experts_per_token=(2,))


def ask(llm: LLM, quality: object, prompt: list[int] | None = None, **params: Any):
    settings = {"temperature": 0.0, "max_tokens": TOKENS, "detokenize": False, "quality": quality, **params}
    (output,) = llm.generate([prompt or [5, 6, 7, 8]], SamplingParams(**settings), use_tqdm=False)
    return output


def prompts_of(checkpoint: Path) -> list[list[int]]:
    lines = (checkpoint / "prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt_token_ids"] for line in lines]


def test_a_model_without_exits_gets_certificates_and_refusals(bits: Run) -> None:
    proved = {(c.alpha, str(c.deployment["quantisation"]).split(",")[0]) for c in bits.certificates}
    assert (STRICT, "int8") in proved
    path = bits.report["path"]
    assert max(point["worst_length_loss"] for point in path) > BOLD, "a setting that is refused at every level"
    for certificate in bits.certificates:
        assert certificate.held_out.weight_bytes_read is not None
        assert certificate.held_out.weight_bytes_read < 1
        assert len(certificate.evidence) <= len(path) - 1
    cheapest = [c for c in bits.certificates if c.alpha == BOLD][-1]
    assert min(c.held_out.weight_bytes_read or 1 for c in bits.certificates) == cheapest.held_out.weight_bytes_read


def test_the_path_is_the_pilots_front_and_the_pilot_is_used_for_nothing_else(bits: Run, checkpoint: Path) -> None:
    tried = sorted(bits.output.glob("pilot-*.json"))
    records = [json.loads(file.read_text()) for file in tried]
    assert len(tried) == 1 + 5  # all layers and experts in the original precision, and the rest of 2 x 3 combinations
    pilot = {json.dumps(r["setting"]): read_measured(f) for r, f in zip(records, tried, strict=True)}
    walked = [json.loads(file.read_text()) for file in sorted(bits.output.glob("setting-*.json"))]
    assert {record["prompts"] for record in records}.isdisjoint(record["prompts"] for record in walked)
    path = [pilot[json.dumps(record["setting"])] for record in walked]
    losses = [m.cut_losses_KN.mean(1).max() for m in path]
    costs = [m.bytes_per_token for m in path]
    assert losses == sorted(losses)
    assert costs == sorted(costs, reverse=True)
    for other in pilot.values():  # nobody beats a setting of the path in both
        loss = other.cut_losses_KN.mean(1).max()
        assert not any(loss < mine and other.bytes_per_token < cost for mine, cost in zip(losses, costs, strict=True))


def test_what_settings_share_is_computed_once_and_the_cost_is_said(bits: Run) -> None:
    cost = bits.report["cost"]
    assert cost["known_rows"] > 0
    assert 0 < cost["reused_share"] < 1
    assert cost["judged_rows"] + cost["known_rows"] == cost["rows"] + cost["cached_rows"]
    assert cost["words"] in bits.said


def test_an_output_that_was_judged_is_not_judged_again(checkpoint: Path, tmp_path: Path) -> None:
    llm = LLM(checkpoint, dtype="float32", progress=False)
    prompts, judge = prompts_of(checkpoint)[:6], Judge(llm.model.decoder)
    everything = Setting(exit_thresholds={})
    first = measure(llm, prompts, everything, TOKENS, tmp_path / "first.json", progress=False, judge=judge)
    rows = judge.rows
    second = measure(llm, prompts, everything, TOKENS, tmp_path / "second.json", progress=False, judge=judge)
    assert (judge.rows, judge.known_rows) == (rows, rows)
    np.testing.assert_array_equal(first.losses_NT, second.losses_NT)
    assert not first.losses_NT.any()
    capped = Setting(exit_thresholds={}, experts_per_token=1)
    shared = measure(llm, prompts, capped, TOKENS, tmp_path / "shared.json", progress=False, judge=judge)
    alone = measure(llm, prompts, capped, TOKENS, tmp_path / "alone.json", progress=False)
    np.testing.assert_array_equal(shared.losses_NT, alone.losses_NT)
    assert alone.losses_NT.any()


def test_losses_of_other_bits_are_measured_against_the_original(bits: Run, checkpoint: Path) -> None:
    """Computed again, prefix by prefix, by the original model."""
    prompts = prompts_of(checkpoint)[:4]
    small = LLM(checkpoint, dtype="float32", quantization="int8", progress=False)
    original = LLM(checkpoint, dtype="float32", progress=False)
    setting = Setting(exit_thresholds={})
    found = measure(small, prompts, setting, TOKENS, bits.output / "again.json", judge=Judge(original.model.decoder))
    params = EngineParams(temperature=0.0, max_tokens=TOKENS, detokenize=False)
    for losses_T, output in zip(found.losses_NT, small.generate(prompts, params, use_tqdm=False), strict=True):
        prefix = list(output.prompt_token_ids)
        for loss, token in zip(losses_T, output.outputs[0].token_ids, strict=False):
            (choice,) = ask(original, "exact", list(prefix), max_tokens=1).outputs[0].token_ids
            assert loss == (choice != token)
            prefix.append(token)


def test_a_deployment_in_fewer_bits_keeps_its_promise_against_the_original(bits: Run, checkpoint: Path) -> None:
    certificates = bits.output / "certificates"
    llm = LLM(checkpoint, dtype="float32", quantization="int8", progress=False, certificates=certificates)
    served = ask(llm, Quality(alpha=BOLD))
    assert served.contract.certificate in {c.id for c in bits.certificates}
    assert "against the original model (quantisation none, dtype float32" in served.contract.reason
    assert served.compute.tokens.weight_bytes <= served.compute.tokens.full_weight_bytes
    longer = ask(llm, Quality(alpha=BOLD), max_tokens=TOKENS + 1)
    assert longer.contract.certificate is None
    assert "cannot run on the original model" in longer.contract.reason
    for certificate in bits.certificates:
        if certificate.reference:
            assert certificate.reference["quantisation"] == "none"
            assert certificate.reference["weights"] == certificate.deployment["weights"]
            assert certificate.reference["logits"] != certificate.deployment["logits"]


def test_a_deployment_in_other_bits_is_not_offered_it_and_hears_why(bits: Run, checkpoint: Path) -> None:
    certificates = bits.output / "certificates"
    llm = LLM(checkpoint, dtype="float32", quantization="int4", progress=False, certificates=certificates)
    output = ask(llm, Quality(alpha=BOLD))
    assert output.contract.certificate is None
    assert "quantisation: certified for 'int8, LM head and embedding int8', 'int4" in output.contract.reason
    assert "an engine runs in the precision that it was started with" in output.contract.reason
    with pytest.raises(ContractUnavailable, match="the contract cannot be kept: no certificate"):
        ask(llm, Quality(alpha=BOLD, require=True))


def test_the_walk_stops_at_a_lossy_cheap_setting_in_the_middle(planted: Run) -> None:
    losses = [point["worst_length_loss"] for point in planted.report["path"]]
    assert losses[1] > BOLD > losses[0] > losses[2] == 0
    (certificate,) = planted.certificates
    assert dict(certificate.expert_budget) == {"experts_per_token": 2}
    assert not certificate.reference
    assert len(certificate.evidence) == 1


def test_requests_run_below_full_work_until_the_served_rows_drift(planted: Run, tmp_path: Path) -> None:
    """Served, judged and watched as in a server, until half of the tokens that are served are others."""
    llm = LLM(planted.checkpoint, dtype="float32", progress=False, certificates=planted.output / "certificates")
    (certificate,) = llm.catalog.contracts.certificates
    monitor = RiskMonitor(tmp_path / "monitor.db", MonitorConfig(share=1.0))
    assert monitor.register(certificate)
    runs = FullRuns(decoder=llm.model.decoder, monitor=lambda: monitor)
    below = 0

    def serve(number: int, prompt: list[int], drift: bool) -> None:
        nonlocal below
        output = ask(llm, Quality(alpha=BOLD), prompt)
        assert output.contract.certificate == certificate.id
        assert output.compute.expert_rows < output.compute.full_expert_rows
        below += output.compute.tokens.weight_bytes < output.compute.tokens.full_weight_bytes
        tokens = list(output.outputs[0].token_ids)
        if drift:
            tokens[::2] = [3 + (token + 1) % 300 for token in tokens[::2]]
        assert monitor.admit(str(number), certificate.id)
        assert monitor.finished(str(number), prompt, [tokens])
        while runs.work():
            pass

    prompts = prompts_of(planted.checkpoint)[200:]
    for number, prompt in enumerate(prompts[:12]):
        serve(number, prompt, drift=False)
    assert below == 12
    state = monitor.state(certificate.id)
    assert not monitor.is_reverted(certificate.id)
    assert state.bets.losses == 12
    assert 0 < state.bets.mean < BOLD
    number = 12
    while not monitor.is_reverted(certificate.id):
        assert number < 100, "the drift was never found"
        serve(number, prompts[number], drift=True)
        number += 1
    monitor.close()


def losses_of(share_M: list[float], requests: int, seed: int) -> list[Measured]:
    """Measurements of settings whose tokens differ with these probabilities; some outputs end early."""
    generator = np.random.default_rng(seed)
    found = []
    for share in share_M:
        losses_NT = (generator.random((requests, TOKENS)) < share).astype(np.float32)
        losses_NT[np.arange(TOKENS)[None] >= generator.integers(10, TOKENS + 3, requests)[:, None]] = np.nan
        found.append(Measured(losses_NT=losses_NT, layers_share=1.0, experts_share=1.0, decoded=1))
    return found


def test_every_precision_gets_the_boldest_of_its_settings_before_the_stop() -> None:
    small = Precision(quantization="int8")
    settings = [
        Setting(exit_thresholds={}, experts_per_token=cap, precision=precision)
        for cap, precision in ((4, None), (3, small), (2, None), (1, small), (1, None))
    ]
    measured = losses_of([0.01, 0.02, 0.03, 0.4, 0.0], 300, 0)
    assert [found.place for found in prove(settings, measured, 0.1, 0.05, "wsr")] == [1, 2]
    assert prove(settings, measured[3:], 0.1, 0.05, "wsr") == []


def test_outputs_that_go_on_past_their_end_are_covered_where_the_worst_case_is_proved() -> None:
    settings = [Setting(exit_thresholds={})]
    (measured,) = losses_of([0.02], 400, 1)
    worst = measured.worst_case_cuts_KN
    assert (worst >= measured.cut_losses_KN - 1e-12).all()
    assert worst[-1].mean() > 0.05 > measured.cut_losses_KN[-1].mean()
    assert [f.ignore_eos for f in prove(settings, [measured], 0.05, 0.05, "wsr")] == [False]
    assert [f.ignore_eos for f in prove(settings, [measured], 0.2, 0.05, "wsr")] == [True]


def test_paths_that_a_pilot_made_are_as_valid_as_given_ones() -> None:
    """500 calibrations of five settings, whose true risks straddle alpha; each has a pilot of its own."""
    risks, costs, alpha, delta = np.array([0.04, 0.08, 0.105, 0.11, 0.2]), [5.0, 4.0, 3.0, 2.0, 1.0], 0.1, 0.1
    generator = np.random.default_rng(0)
    wrong = proved = 0
    for _ in range(500):
        pilot_M = generator.binomial(20 * TOKENS, risks) / (20 * TOKENS)
        path = pareto_front(costs, pilot_M.tolist(), math.inf)
        losses_MN = generator.binomial(TOKENS, risks[path][:, None], (len(path), 150)) / TOKENS
        passed = 0
        while passed < len(path) and betting(losses_MN[passed][None], alpha, delta)[0] <= delta:
            passed += 1
        proved += passed > 0
        wrong += any(risks[place] > alpha for place in path[:passed])
    assert proved > 250
    assert wrong <= 500 * delta + 3 * math.sqrt(500 * delta * (1 - delta))


def test_combinations_leave_every_axis_alone_once_and_know_which_is_bolder() -> None:
    small = Precision(quantization="int8")
    found = all_settings([None, small], (4, 8), (0.9, 0.8), (0.7,), (2,))
    assert len(found) == 2 * 3 * 2 * 2
    assert found[0, 0, 0, 0] == Setting(exit_thresholds={})
    assert str(found[1, 2, 1, 1]) == "int8, 0.8, experts 0.7, at most 2 experts"
    assert bolder((1, 2, 1, 0), (1, 1, 1, 0))
    assert not bolder((1, 2, 0, 0), (1, 1, 1, 0))
    assert not bolder((0, 2, 1, 1), (1, 1, 1, 0))
    with pytest.raises(ValueError, match=r"1331 combinations .* give fewer values"):
        all_settings([None], (4,), [0.5] * 10, [0.5] * 10, range(1, 11))
    assert pareto_front([3, 2, 2, 1, 5], [0.1, 0.2, 0.3, 0.9, 0.0], 4) == [0, 1, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": ["none", "int8"], "pilot_requests": 0}, "pilot_requests=0 leaves open which"),
        ({"probabilities": (0.9,)}, "has no exits"),
        ({}, "there is nothing to calibrate: .* has no exits; give keeps, experts_per_token"),
        ({"experts_per_token": (1, 2)}, r"experts_per_token must fall .* not \[1, 2\]"),
        ({"keeps": (0.5,)}, "calibrated contributions, which this model lacks"),
        ({"quantization": ["int8", "int8"]}, "quantization must be one precision or a list of different ones"),
        ({"cost": "joules"}, "cost must be one of bytes, seconds"),
        ({"reference": "int3", "experts_per_token": (1,)}, "int3"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        calibrated(checkpoint, tmp_path / "run", **changes)


@pytest.mark.slow
def test_contributions_are_measured_in_the_same_run(copy_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = peaked_checkpoint(copy_checkpoint("qwen3_moe"), "qwen3_moe")
    run = calibrated(checkpoint, tmp_path / "run", keeps=(0.95, 0.6), measure_experts=True, pilot_requests=0)
    assert (checkpoint / "experts.json").is_file()
    assert {tuple(c.expert_budget) for c in run.certificates} == {("expert_keep",)}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss"])
def test_other_families_without_exits(family: str, tmp_path: Path) -> None:
    checkpoint = peaked_checkpoint(tmp_path / "model", family)
    run = calibrated(checkpoint, tmp_path / "run", quantization=["none", "w8a8", "int4"], experts_per_token=(2, 1))
    assert run.certificates
    assert max(point["worst_length_loss"] for point in run.report["path"]) > STRICT
    llm = LLM(checkpoint, dtype="float32", progress=False)
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=2, detokenize=False)
    outputs = llm.generate(prompts_of(checkpoint)[:50], params, use_tqdm=False)
    best = [sorted((e.logprob for e in at.values()), reverse=True) for o in outputs for at in o.outputs[0].logprobs]
    assert np.median([first - second for first, second, *_ in best]) > 0.8
