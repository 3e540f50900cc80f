"""From prompts to a promise: `dynamoe calibrate` on the shipped model, and what a request with a contract gets."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from dynamoe import LLM, Quality, SamplingParams
from dynamoe.dynamic.cli.main import main
from dynamoe.dynamic.contract.bounds import betting, learn_then_test
from dynamoe.dynamic.contract.calibration_runs import Measured, read_measured
from dynamoe.dynamic.contract.catalog import CertificateSource
from dynamoe.dynamic.contract.certificate import load_certificate, save_certificate
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.studies.calibrate import CalibrateConfig, _prompts, calibrate
from dynamoe.dynamic.studies.ledger import LEDGER, enter
from dynamoe.dynamic.text.prompt_file import read_prompts

ALPHA = 0.2
PROMPT = "The following options are available:"


def config(output: Path, **changes: object) -> CalibrateConfig:
    settings = {"alphas": (0.001, ALPHA), "requests": 60, "test_requests": 20, "max_tokens": 12}
    settings |= {"probabilities": (0.95, 0.8, 0.6), "keeps": (0.7, 0.6, 0.5), "threads": 1}
    return CalibrateConfig(output=str(output), **{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrate(config(tmp_path_factory.mktemp("calibration")), progress=False, say=lambda _: None)


@pytest.fixture(scope="module")
def llm(certificates: Path) -> LLM:
    return LLM("tiny", progress=False, certificates=certificates)


def ask(llm: LLM, quality: object, **params: object):
    settings = {"temperature": 0.0, "max_tokens": 12, "quality": quality, **params}
    (output,) = llm.generate([PROMPT], SamplingParams(**settings), use_tqdm=False)  # type: ignore[arg-type]
    return output


def test_levels_that_can_be_proved_get_a_certificate_and_others_none(certificates: Path) -> None:
    (file,) = certificates.glob("*.json")  # 60 requests prove nothing about one in a thousand
    found = load_certificate(file)
    assert (found.alpha, found.delta, found.requests, found.method) == (ALPHA, 0.05, 60, "wsr")
    assert set(found.exit_thresholds) == {4, 8, 12}
    assert found.held_out.requests == 20
    assert found.held_out.layers_executed < 1
    assert found.expert_budget["expert_keep"] in (0.7, 0.6, 0.5)
    assert found.deployment["weights"]
    assert (certificates.parent / "risk.svg").stat().st_size > 1000
    report = json.loads((certificates.parent / "report.json").read_text())
    assert report["certificates"] == [json.loads(file.read_text())]
    assert [point["requests"] for point in report["path"]] == [60] * len(report["path"])
    assert (found.scope.min_tokens, found.scope.max_tokens) == (8, 12)
    held_out = found.held_out
    assert held_out.worst_length in range(8, 13)
    assert held_out.worst_length_loss is not None
    assert held_out.worst_cut_loss is not None
    assert held_out.mean_loss <= held_out.worst_length_loss <= held_out.worst_cut_loss < 1


def test_every_length_is_proved(certificates: Path) -> None:
    """What the certificate rests on, computed again from the losses of single tokens."""
    (file,) = certificates.glob("*.json")
    found = load_certificate(file)
    thresholds = list(dict.fromkeys(found.exit_thresholds.values()))
    place = (0.95, 0.8, 0.6).index(thresholds[0])
    measured = read_measured(certificates.parent / f"setting-{place:02}.json")
    assert measured.losses_NT.shape == (60, 12)
    for length in range(8, 13):
        cut_N = np.array(
            [row[: min(length, n)].mean() for row, n in zip(measured.losses_NT, measured.lengths_N, strict=True)]
        )
        assert betting(cut_N[None], ALPHA, 0.05)[0] <= 0.05
        np.testing.assert_allclose(measured.cut_losses_KN[length - 8], cut_N)
    assert measured.worst_cut_N.mean() > measured.cut_losses_KN.mean(1).max() >= measured.losses_N.mean() - 1e-12


def test_a_setting_whose_beginnings_are_worse_than_its_whole_outputs_is_not_proved() -> None:
    """Outputs that differ in their first eight tokens only: 4 % of 64, 31 % of 8."""
    losses_NT = np.zeros((1000, 64), dtype=np.float32)
    losses_NT[np.random.default_rng(0).random((1000, 64)) < np.where(np.arange(64) < 8, 0.3, 0.0)] = 1
    measured = Measured(losses_NT=losses_NT, layers_share=0.5, experts_share=1.0, decoded=63_000)
    assert learn_then_test(measured.losses_N[None], 0.05, 0.05) == 0  # the mean over whole outputs
    assert learn_then_test(measured.cut_losses_KN[None], 0.05, 0.05) is None
    assert measured.cut_losses_KN.shape == (57, 1000)
    assert learn_then_test(measured.cut_losses_KN[None], 0.35, 0.05) == 0


def test_tokens_and_requests_weigh_differently() -> None:
    losses_NT = np.full((2, 20), np.nan, dtype=np.float32)
    losses_NT[0, :2], losses_NT[1] = [1, 0], 0
    measured = Measured(losses_NT=losses_NT, layers_share=0.5, experts_share=1.0, decoded=20)
    assert measured.losses_N.tolist() == [0.5, 0.0]
    assert measured.token_loss == pytest.approx(1 / 22)


def test_the_ledger_keeps_every_level_that_was_tried(certificates: Path, tmp_path: Path) -> None:
    (file,) = certificates.glob("*.json")
    entries = [json.loads(line) for line in (certificates / LEDGER).read_text().splitlines()]
    assert [(entry["alpha"], entry["proved"]) for entry in entries] == [
        (0.001, None),
        (ALPHA, load_certificate(file).id),
    ]
    assert {entry["prompts_hash"] for entry in entries} == {load_certificate(file).scope.prompts_hash}
    entry = {name: value for name, value in entries[0].items() if name != "date"}
    assert enter(tmp_path, entry) == 0
    assert enter(tmp_path, entry) == 0  # the same run, resumed
    assert enter(tmp_path, {**entry, "method": "hoeffding_bentkus"}) == 1
    assert enter(tmp_path, {**entry, "method": "hoeffding_bentkus", "path": ["0.9"]}) == 2
    assert enter(tmp_path, {**entry, "deployment": "of other kernels"}) == 3
    assert enter(tmp_path, {**entry, "backend": "cpu portable"}) == 0
    assert enter(tmp_path, {**entry, "alpha": 0.05}) == 0
    assert len((tmp_path / LEDGER).read_text().splitlines()) == 6


def test_a_second_run_measures_nothing_again(certificates: Path) -> None:
    files = {file: file.stat().st_mtime_ns for file in certificates.parent.glob("setting-*.json")}
    assert len(files) >= 2
    said: list[str] = []
    calibrate(config(certificates.parent), progress=False, say=said.append)
    assert {file: file.stat().st_mtime_ns for file in files} == files
    assert any("alpha=0.001: nothing but full compute" in line for line in said)
    assert "alpha=0.001 needs at least 2996 requests, even without any loss; there are 60" in said
    assert not any("was tried" in line for line in said)
    with pytest.raises(ValueError, match=r"another recipe.*max_tokens"):
        calibrate(config(certificates.parent, max_tokens=8), progress=False)


@pytest.mark.parametrize(
    ("name", "changed"),
    [("sources_hash", lambda *folders: "other code"), ("processor", lambda: "another processor")],
)
def test_a_run_goes_on_only_where_it_was_begun(
    certificates: Path, monkeypatch: pytest.MonkeyPatch, name: str, changed: Callable[..., str]
) -> None:
    monkeypatch.setattr(f"dynamoe.dynamic.studies.calibrate.{name}", changed)
    with pytest.raises(ValueError, match=r"another recipe \((code|processor): .* → (other code|another processor)"):
        calibrate(config(certificates.parent), progress=False, say=lambda _: None)


def numbered(file: Path, prompts: list[list[int]]) -> str:
    file.write_text("".join(json.dumps({"prompt_token_ids": prompt}) + "\n" for prompt in prompts))
    return str(file)


def test_other_prompts_in_the_same_file_are_another_run(certificates: Path, tmp_path: Path) -> None:
    prompts = [[7, 8, 9 + n] for n in range(80)]
    fast = {"requests": 4, "test_requests": 2, "max_tokens": 8, "probabilities": (0.6,), "keeps": (0.5,)}
    file = numbered(tmp_path / "prompts.jsonl", prompts)
    calibrate(config(tmp_path / "run", prompts=file, **fast), progress=False, say=lambda _: None)
    numbered(tmp_path / "prompts.jsonl", prompts[::-1])
    with pytest.raises(ValueError, match=r"another recipe \(prompts_hash"):
        calibrate(config(tmp_path / "run", prompts=file, **fast), progress=False, say=lambda _: None)


def test_prompts_are_drawn_from_the_whole_file(llm: LLM, tmp_path: Path) -> None:
    file = numbered(tmp_path / "prompts.jsonl", [[7, 8, n] for n in range(1000)])
    drawn = _prompts(config(tmp_path, prompts=file), tmp_path, llm, print)
    lines = [prompt[2] for prompt in (*drawn.choose, *drawn.test)]
    assert len(set(lines)) == 80
    assert max(lines) > 900  # not the first 80
    assert min(lines) < 100


def test_a_prompt_counts_once(llm: LLM, tmp_path: Path) -> None:
    said: list[str] = []
    file = numbered(tmp_path / "prompts.jsonl", [[7, 8, 9]] * 200)
    with pytest.raises(ValueError, match=r"holds 200 prompts, 1 of them distinct; .* want 80 distinct ones"):
        _prompts(config(tmp_path, prompts=file), tmp_path, llm, said.append)
    numbered(tmp_path / "prompts.jsonl", [[7, 8, n] for n in range(100)] + [[7, 8, 9]] * 30)
    drawn = _prompts(config(tmp_path, prompts=file), tmp_path, llm, said.append)
    assert len({tuple(prompt) for prompt in (*drawn.choose, *drawn.test)}) == 80
    assert said == [f"30 of the 130 prompts in {file} are repetitions: each counts once"]


def test_a_request_runs_under_the_certificate_that_it_asked_for(llm: LLM, certificates: Path) -> None:
    (certificate,) = (load_certificate(file) for file in certificates.glob("*.json"))
    output = ask(llm, Quality(alpha=ALPHA))
    assert output.contract is not None
    assert output.contract.certificate == certificate.id
    assert "as asked" in output.contract.reason
    assert output.compute is not None
    assert output.compute.projected_rows > 0, "nobody left"
    thresholds = SamplingParams(
        temperature=0.0,
        max_tokens=12,
        quality=None,
        exit_thresholds=dict(certificate.exit_thresholds),
        expert_keep=float(certificate.expert_budget["expert_keep"]),
    )
    (raw,) = llm.generate([PROMPT], thresholds, use_tqdm=False)
    assert raw.outputs[0].token_ids == output.outputs[0].token_ids
    assert raw.compute == output.compute
    assert output.compute.skipped_experts > 0
    bolder = ask(llm, {"alpha": 0.5, "delta": 0.1})
    assert bolder.contract is not None
    assert "stricter" in bolder.contract.reason


@pytest.mark.parametrize(
    ("quality", "params", "reason"),
    [
        ({"alpha": 0.01}, {}, r"no certificate is as strict as alpha=0.01.*there are \(0.2, 0.05\)"),
        ({"alpha": 0.2, "delta": 0.01}, {}, "no certificate is as strict"),
        ({"alpha": 0.2}, {"max_tokens": 7}, "covers max_tokens from 8 on, not max_tokens=7"),
        ({"alpha": 0.2}, {"temperature": 0.7}, "greedy requests only, not temperature 0.7"),
        ({"alpha": 0.2}, {"repetition_penalty": 1.2}, "without penalties"),
    ],
)
def test_what_no_certificate_covers_runs_exactly_and_says_why(
    llm: LLM, quality: dict[str, float], params: dict[str, float], reason: str
) -> None:
    output = ask(llm, quality, seed=7, **params)
    assert output.contract is not None
    assert output.contract.certificate is None
    assert re.search(reason, output.contract.reason)
    exact = ask(llm, "exact", seed=7, **params)
    assert output.outputs[0].token_ids == exact.outputs[0].token_ids
    assert output.compute is not None
    assert output.compute.projected_rows == 0


def test_requests_that_sample_have_certificates_of_their_temperature(tmp_path: Path) -> None:
    directory = calibrate(config(tmp_path, temperature=0.8, keeps=()), progress=False, say=lambda _: None)
    (certificate,) = (load_certificate(file) for file in directory.glob("*.json"))
    assert (certificate.scope.lowest_temperature, certificate.scope.highest_temperature) == (0.8, 0.8)
    assert "total-variation" in certificate.loss
    assert 0 < certificate.held_out.mean_loss < ALPHA
    llm = LLM("tiny", progress=False, certificates=directory)
    bounded = ask(llm, Quality(alpha=ALPHA), temperature=0.8, seed=1)
    assert bounded.contract is not None
    assert bounded.contract.certificate == certificate.id
    for changes, reason in (({"temperature": 0.7}, "temperatures 0.8 to 0.8"), ({"top_p": 0.9}, "cuts")):
        refused = ask(llm, Quality(alpha=ALPHA), **{"temperature": 0.8, "seed": 1, **changes})
        assert refused.contract is not None
        assert refused.contract.certificate is None
        assert reason in refused.contract.reason


def test_another_deployment_refuses_the_certificate_and_names_what_differs(certificates: Path, tmp_path: Path) -> None:
    other = LLM("tiny", dtype="float32", progress=False, certificates=certificates)
    output = ask(other, Quality(alpha=ALPHA))
    assert output.contract is not None
    assert output.contract.certificate is None
    assert "dtype: certified for 'bfloat16', 'float32' runs" in output.contract.reason
    copy = tmp_path / "copy"
    shutil.copytree(resolve_model("tiny"), copy)
    heads = json.loads((copy / "exits.json").read_text())
    (copy / "exits.json").write_text(json.dumps({**heads, "metrics": {}}))
    changed = LLM(copy, progress=False, certificates=certificates)
    output = ask(changed, Quality(alpha=ALPHA))
    assert output.contract is not None
    assert "exits: certified for" in output.contract.reason


def test_certificates_of_several_processors_lie_side_by_side(llm: LLM, certificates: Path, tmp_path: Path) -> None:
    (here,) = (load_certificate(file) for file in certificates.glob("*.json"))
    elsewhere = replace(here, deployment={**here.deployment, "backend": "cpu avx2"})
    save_certificate(elsewhere, tmp_path / "elsewhere.json")
    only_elsewhere = CertificateSource(llm.engine, tmp_path).read()
    assert not only_elsewhere.contracts.certificates
    assert "backend: certified for 'cpu avx2'" in only_elsewhere.refused[0]
    save_certificate(here, tmp_path / "here.json")
    both = CertificateSource(llm.engine, tmp_path).read()
    assert [certificate.id for certificate in both.contracts.certificates] == [here.id]
    assert not both.refused


def test_over_http_a_contract_is_kept_and_accounted_for(start_server, certificates: Path, tmp_path: Path) -> None:
    file = f"quality.monitor.file={json.dumps(str(tmp_path / 'monitor.db'))}"
    server = start_server(resolve_model("tiny"), f"quality.certificates={json.dumps(str(certificates))}", file)
    url = f"{server.url}/v1/completions"
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    exact = httpx.post(url, json=body, timeout=60).json()["usage"]["compute"]
    assert exact["quality"] == "exact"
    assert exact["layers_per_token"] == 16
    assert exact["layer_rows"] == exact["full_layer_rows"]
    assert exact["flops"] == exact["full_flops"]
    assert exact["expert_rows"] == exact["full_expert_rows"] == 2 * exact["layer_rows"]
    bounded = httpx.post(url, json={**body, "quality": {"alpha": ALPHA}}, timeout=60).json()["usage"]["compute"]
    assert bounded["quality"] == "bounded"
    assert len(bounded["certificates"]) == 1
    assert bounded["layers_per_token"] < 16
    assert bounded["expert_rows"] < 2 * bounded["layer_rows"]
    assert bounded["flops"] < bounded["full_flops"] == exact["full_flops"]
    refused = httpx.post(url, json={**body, "quality": {"alpha": ALPHA}, "max_tokens": 7}, timeout=60)
    assert refused.headers["x-quality"] == "exact"
    assert "max_tokens=7" in refused.headers["x-quality-reason"]
    refused = refused.json()
    assert refused["usage"]["compute"]["quality"] == "exact"
    assert "max_tokens=7" in refused["usage"]["compute"]["reason"]
    totals = httpx.get(f"{server.url}/metrics", timeout=60).text
    rows = {
        first: float(n) for first, n in re.findall(r'dynamoe:segment_rows_total{.*layers="(\d+)-\d+".*} (\S+)', totals)
    }
    assert set(rows) == {"1", "5", "9", "13"}
    usages = (exact, bounded, refused["usage"]["compute"])
    assert 4 * sum(rows.values()) == sum(usage["layer_rows"] for usage in usages)
    (certificate,) = bounded["certificates"]
    assert re.search(rf'dynamoe:prompts_total{{certificate="{certificate}".*}} 1.0', totals)
    assert re.search(r'dynamoe:prompts_total{certificate="exact".*} 2.0', totals)
    for wrong, words in (
        ({"alpha": 0}, ""),
        ({"alpha": 1.5}, ""),
        ({"delta": 0.1}, "alpha is missing: quality is 'exact', or holds alpha and perhaps delta and require"),
        ({"aplha": 0.1}, "alpha is missing: .* not 'aplha' .did you mean alpha\\?"),
        ({"alpha": 0.1, "requires": True}, "not 'requires' .did you mean require\\?"),
        ({"alpha": 0.1, "require": 1}, ""),
        ("lossless", ""),
        (3, ""),
    ):
        answer = httpx.post(url, json={**body, "quality": wrong}, timeout=60)
        assert answer.status_code == 400
        assert re.search(f"quality.*{words}", answer.json()["error"]["message"])
    for fields in ({"max_tokens": 7}, {"stop": "."}):
        quality = {"alpha": ALPHA, "require": True}
        answer = httpx.post(url, json={**body, "quality": quality, **fields}, timeout=60)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (409, "contract_unavailable", "quality")
        assert "the contract cannot be kept: no certificate" in error["message"]
    # All outputs of the calibration reached max_tokens, so that nothing is unknown of those that go on past their end.
    assert _asked(url, body, ignore_eos=True).headers["x-quality"] == "bounded"
    kept = _asked(url, body, quality={"alpha": ALPHA, "require": True}, stream=True)
    assert (kept.status_code, kept.headers["x-quality"]) == (200, "bounded")
    assert certificate in kept.headers["x-quality-reason"]
    assert "x-quality" not in httpx.post(url, json=body, timeout=60).headers
    (card,) = httpx.get(f"{server.url}/v1/contracts", timeout=60).json()["data"]
    assert (card["id"], card["reference"], card["evidence"]) == (certificate, {}, True)
    assert card["scope"]["ignore_eos"]
    held_out = card["held_out"]
    assert 0 < held_out["weight_bytes_read"] < 1
    assert 0 < held_out["experts_executed"] < 1
    assert card["speed"] == held_out["tokens_per_second"] / held_out["full_tokens_per_second"] > 0


def _asked(url: str, body: dict[str, object], **fields: object) -> httpx.Response:
    return httpx.post(url, json={**body, "quality": {"alpha": ALPHA}, **fields}, timeout=60)


def test_prompt_files_are_read_and_mistakes_named(tmp_path: Path, llm: LLM) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "a b"}\n\n{"prompt_token_ids": [5, 6]}\n{"messages": [{"role": "user", "content": "x"}]}\n'
    )
    assert read_prompts(file, llm.get_tokenizer())[1] == [5, 6]
    file.write_text('{"prompt": "line\u2028break\x85"}\n{"prompt": "b"}\n', encoding="utf-8")
    assert len(read_prompts(file, llm.get_tokenizer())) == 2, "only a line feed ends a line of JSON"
    for text, message in (
        ("", "holds no prompt"),
        ("{", "line 1 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON"),
        ("9" * 10_000, "line 1 is not JSON"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ('{"text": "a"}', "line 1 must hold one of prompt, messages, prompt_token_ids"),
        ('{"prompt": 3}', "prompt has the wrong type, int"),
        ('{"prompt_token_ids": [true]}', "wrong type"),
        ('{"prompt_token_ids": []}', "the prompt is empty"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_prompts(file, llm.get_tokenizer())
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_prompts(tmp_path / "none", llm.get_tokenizer())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["max_tokens=7"], "max_tokens must be at least 8, not 7"),
        (["alphas=[2.0]"], "alphas must be between 0 and 1, not (2.0,)"),
        (["method=clt"], "method must be one of"),
        (["prompts=/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
        (["requests=100000"], "holds 2000 prompts"),
        (["probabilities=[0.5,0.9]"], "probabilities must fall"),
        (["keeps=[0.9]"], "there are 14 probabilities and 1 keeps"),
        (["probabilities=[0.9,0.5]", "keeps=[0.8,0.9]"], "keeps must not rise"),
    ],
)
def test_mistakes_on_the_command_line_take_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "model=tiny", f"output={tmp_path / 'run'}", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error


def test_a_model_without_exits_cannot_be_calibrated(make_checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no exits"):
        calibrate(config(tmp_path, model=str(make_checkpoint("mixtral"))), progress=False)
