"""`dynamoe evaluate` against independent computations: transformers' logits, the engine's logprobs, counted layers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dynamoe import LLM, SamplingParams
from dynamoe.dynamic.cli.main import main
from dynamoe.dynamic.contract.intervals import mean, paired_difference, ratio
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.studies.evaluate import EvaluateConfig, ReferenceConfig, run, table
from dynamoe.dynamic.studies.forced import ForcingEngine, force
from dynamoe.dynamic.studies.requests import built_in_requests, forced_texts
from dynamoe.dynamic.studies.setting import StudiedQuality, find_keep
from dynamoe.dynamic.text.tokenizer import Tokenizer

TEXT = (
    "The old man reads his books every night until morning, and the other dogs sleep in the middle of the forest. "
    "Every token asks a few experts; the router of a mixture chooses them. What is the capital of Italy? Rome, of "
    "course. Ten, nine, eight, seven, six, five, four, three, two, one: the quick brown fox jumps over the house. "
) * 3
CONTEXT, LONGEST = 8, 24


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return str(file)


def config(model: Path | str, text: str | None, **changes: Any) -> EvaluateConfig:
    settings = {"requests": 4, "texts": 6, "max_tokens": LONGEST, "context_tokens": CONTEXT, "timing_groups": 2}
    settings |= {"dtype": "float32", "prompts": text, "text": text}
    return EvaluateConfig(model=str(model), **{**settings, **changes})


def pieces(model: Path, count: int, seed: int = 0) -> list[list[int]]:
    """The texts that the study draws, by its documented rule: cut into pieces, shuffled by the seed."""
    tokens = Tokenizer.from_directory(model).encode(TEXT, add_special_tokens=False)
    length = CONTEXT + LONGEST
    cut = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    return [cut[place] for place in np.random.default_rng(seed).permutation(len(cut))[:count]]


@torch.no_grad()
def log_probabilities(model: Any, texts: list[list[int]]) -> list[torch.Tensor]:
    """Of the tokens behind each context, by transformers in float32."""
    return [model(torch.tensor([text])).logits[0, CONTEXT - 1 : -1].log_softmax(-1) for text in texts]


def test_perplexity_and_divergence_are_those_of_transformers(
    make_checkpoint: Callable[..., Path], reference_model: Callable[[Path], Any], text: str
) -> None:
    measured, reference = make_checkpoint("mixtral"), make_checkpoint("mixtral", seed=1)
    result = run(config(measured, text, reference=ReferenceConfig(model=str(reference))), progress=False)
    texts = pieces(measured, 6)
    found, expected = (log_probabilities(reference_model(path), texts) for path in (measured, reference))
    tokens = [torch.tensor(piece[CONTEXT:]) for piece in texts]
    nll, reference_nll = (
        -torch.cat([p.gather(1, t[:, None]) for p, t in zip(rows, tokens, strict=True)]) for rows in (found, expected)
    )
    divergence = torch.cat([(e.exp() * (e - f)).sum(-1) for e, f in zip(expected, found, strict=True)])
    same = torch.cat([(e.argmax(-1) == f.argmax(-1)).float() for e, f in zip(expected, found, strict=True)])
    metrics = {name: estimate.value for name, estimate in result.metrics.items()}
    assert metrics["perplexity"] == pytest.approx(float(nll.mean().exp()), rel=1e-4)
    assert metrics["reference_perplexity"] == pytest.approx(float(reference_nll.mean().exp()), rel=1e-4)
    assert metrics["kl"] == pytest.approx(float(divergence.mean()), rel=1e-3)
    assert metrics["forced_agreement"] == pytest.approx(float(same.mean()), abs=1e-6)
    assert metrics["agreement"] < 1
    assert result.by_request["nll"] == pytest.approx(nll.view(6, -1).mean(1).tolist(), rel=1e-3)


def test_the_full_model_agrees_with_itself_and_runs_everything(make_exits: Callable[..., Path], text: str) -> None:
    result = run(config(make_exits("mixtral", {1: 0.5, 2: 0.5}), text), progress=False)
    values = {name: estimate.value for name, estimate in result.metrics.items()}
    assert values["agreement"] == values["forced_agreement"] == values["perplexity_ratio"] == 1
    assert values["kl"] == pytest.approx(0, abs=1e-9)
    assert values["layers_per_token"] == 3
    assert values["experts_per_layer"] == 2
    assert values["layer_flops_share"] == values["flops_share"] == values["experts_share"] == 1
    assert result.setting["exit_thresholds"] == {}


def test_executed_work_is_counted(make_exits: Callable[..., Path], text: str) -> None:
    model = make_exits("mixtral", {1: 0.5, 2: 0.5})
    quality = StudiedQuality(exit_threshold=0.0, experts_per_token=1)
    result = run(config(model, text, quality=quality), progress=False)
    values = {name: estimate.value for name, estimate in result.metrics.items()}
    assert values["layers_per_token"] == 1  # every decoded token leaves at the first exit
    assert values["experts_per_layer"] == 1
    spec = LLM(model, progress=False).model.spec
    layer = spec.layer_flops(spec.layers[0])
    left_out = 6 * spec.hidden_size * 48
    projected = 2 * (2 * spec.hidden_size * 2 * 2 * 16)  # two layers; keys and values of two heads of 16 channels
    assert values["layer_flops_share"] == pytest.approx((layer - left_out + projected) / (3 * layer))
    assert values["flops_share"] - values["layer_flops_share"] > 0
    assert values["agreement"] < 1
    assert values["kl"] > 0


def test_forced_distributions_are_those_that_served_tokens_came_from(make_exits: Callable[..., Path]) -> None:
    """Forcing what an engine served gives back the log-probabilities that the engine reported while serving it."""
    llm = LLM(make_exits("mixtral", {1: 0.5, 2: 0.5}), dtype="float32", progress=False)
    setting = {"temperature": 0.0, "max_tokens": 20, "quality": None, "ignore_eos": True}
    setting |= {"exit_thresholds": {1: 0.5, 2: 0.5}, "experts_per_token": 1}
    params = SamplingParams(**setting, logprobs=0)  # type: ignore[arg-type]
    prompts = [[5, 9, 30, 40, 50, 60, 70, 80], [90, 15, 8, 7, 200, 100, 33, 21]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    reported = []
    for output in outputs:
        completion = output.outputs[0]
        assert len(set(completion.layers[1:])) > 1, "all tokens left at one place: nothing is shown"
        assert completion.logprobs is not None
        pairs = zip(completion.logprobs, completion.token_ids, strict=True)
        reported.append(-sum(position[token].logprob for position, token in pairs))
    texts = [prompt + output.outputs[0].token_ids for prompt, output in zip(prompts, outputs, strict=True)]
    engine = ForcingEngine(llm.model, EngineConfig(max_num_seqs=2))
    forced = force(engine, llm.model.decoder, texts, 8, params)
    assert forced.nll_N.tolist() == pytest.approx(reported, rel=1e-5)
    assert [c.projected_rows for c in forced.computes] == [o.compute.projected_rows for o in outputs if o.compute]
    assert [c.skipped_experts for c in forced.computes] == [o.compute.skipped_experts for o in outputs if o.compute]


def test_a_contract_is_measured_as_it_is_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    small = ["requests=6", "texts=4", "max_tokens=16", "timing_groups=2"]
    assert main(["evaluate", "model=tiny", "quality.alpha=0.05", f"json={file}", *small]) == 0
    record = json.loads(file.read_text())
    setting, metrics = record["setting"], record["metrics"]
    if setting["promised"]:
        assert metrics["layers_share"]["value"] < 1
        assert setting["certificate"] in setting["reason"]
    else:
        assert metrics["layers_share"]["value"] == 1
        assert "refused" in setting["reason"]
    for metric in metrics.values():
        assert metric["low"] <= metric["value"] <= metric["high"]
    assert len(record["provenance"]["deployment.weights"]) == 64
    assert record["config"]["seed"] == 0
    printed = capsys.readouterr().out
    assert "perplexity_ratio" in printed
    assert "tokens_per_second" in printed


def test_uncertified_settings_run_and_promise_nothing(text: str) -> None:
    quality = StudiedQuality(alpha=0.05, uncertified=True, experts_per_token=1)
    result = run(config("tiny", None, quality=quality, texts=0), progress=False)
    assert result.setting["promised"] is False
    assert result.setting["experts_per_token"] == 1
    assert "without a promise" in result.setting["reason"]
    assert result.metrics["experts_per_layer"].value == 1
    assert "perplexity" not in result.metrics


def test_a_share_of_experts_is_found_and_the_rules_differ() -> None:
    results = {}
    for rule in ("contribution", "router_weight"):
        quality = StudiedQuality(expert_share=0.7, expert_rule=rule)
        results[rule] = run(config("tiny", None, quality=quality, texts=8, requests=4), progress=False)
        assert results[rule].metrics["experts_share"].value == pytest.approx(0.7, abs=0.05)
        assert results[rule].setting["expert_rule"] == rule
    kl = {rule: result.by_request["kl"] for rule, result in results.items()}
    assert kl["contribution"] != kl["router_weight"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quality.alpha=2"], "quality.alpha must be between 0 and 1, not 2"),
        (["quality.alpha=0.1", "quality.expert_keep=0.5"], "quality.alpha and quality.expert_keep contradict"),
        (
            ["quality.alpha=0.1", "quality.expert_rule=router_weight"],
            "quality.alpha and quality.expert_rule contradict",
        ),
        (["quality.expert_rule=luck"], "quality.expert_rule must be one of"),
        (["quality.exit_thresholds={5:0.9}"], "exit after 5 layers"),
        (["requests=0"], "requests must be at least 1, not 0"),
        (["requests=100000"], "100000 requests are wanted"),
        (["prompts=/nowhere.jsonl"], "/nowhere.jsonl cannot be read: No such file"),
        (["text=/nowhere.txt"], "/nowhere.txt cannot be read"),
        (["reference.model=nowhere"], "no model 'nowhere'"),
        (["context_tokens=500"], "no text is longer than context_tokens=500"),
        (["quality.alpah=0.1"], "there is no key quality.alpah; did you mean quality.alpha?"),
    ],
)
def test_mistakes_take_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "model=tiny", *arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line]
    assert message in error[-1]
    assert not any("Traceback" in line for line in error)


def test_an_empty_file_and_a_foreign_vocabulary_are_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, text: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        run(config("tiny", str(tmp_path / "empty.jsonl")), progress=False)
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ValueError, match="is too short"):
        run(config("tiny", str(tmp_path / "short.txt")), progress=False)
    with pytest.raises(ValueError, match="vocabulary of 320 tokens"):
        run(config("tiny", text, reference=ReferenceConfig(model=str(make_checkpoint("mixtral")))), progress=False)


def test_texts_end_where_an_output_would() -> None:
    texts = [[1, 2, 3, 4, 5, 6], [1, 2, 9, 4], [1, 2], [9, 9, 3]]
    assert forced_texts(texts, 2, 3, frozenset({9})) == [[1, 2, 3, 4, 5], [1, 2, 9], [9, 9, 3]]


def test_a_quantised_model_is_compared_with_the_unquantised_one(
    make_checkpoint: Callable[..., Path], text: str
) -> None:
    checkpoint = make_checkpoint("mixtral")
    found = {
        name: run(config(checkpoint, text, quantization=name), progress=False).metrics for name in ("int8", "int4")
    }
    assert 0 < found["int8"]["kl"].value < found["int4"]["kl"].value
    alike = run(
        config(checkpoint, text, quantization="int4", reference=ReferenceConfig(quantization=None)), progress=False
    )
    assert alike.metrics["kl"].value == pytest.approx(0, abs=1e-6)


def test_a_model_without_prompts_gets_pages_of_the_language_reference(make_checkpoint: Callable[..., Path]) -> None:
    where, requests = built_in_requests(LLM(make_checkpoint("llama"), progress=False).model)
    assert "language reference" in where
    assert len(requests) > 500
    assert {len(tokens) for tokens in requests} == {64}


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator, hits, tries = np.random.default_rng(0), 0, 200
    for _ in range(tries):
        tokens = generator.integers(5, 40, size=80).astype(float)
        losses = generator.binomial(tokens.astype(int), 0.2)
        found = ratio(losses, tokens)
        hits += found.low <= 0.2 <= found.high
    # 95 % of 200 within four standard errors, less a little: a resampled interval is somewhat short.
    assert 175 <= hits <= 200
    assert mean(np.array([0.25, 0.75])).value == 0.5
    exp = ratio(np.array([2.0, 1.0]), np.array([1.0, 2.0]), np.exp)
    assert exp.value == pytest.approx(np.e)
    assert exp.low == pytest.approx(np.exp(0.5))
    assert exp.high == pytest.approx(np.exp(2.0))
    with pytest.raises(ValueError, match="nothing to divide by"):
        ratio(np.zeros(2), np.zeros(2))


def test_no_loss_on_some_requests_is_no_proof_of_none() -> None:
    for count in (10, 500):
        none, all_of_them = mean(np.zeros(count)), mean(np.ones(count))
        assert (none.value, none.low) == (0.0, 0.0)
        assert (1 - none.high) ** count == pytest.approx(0.025)  # a larger risk would have shown
        assert (all_of_them.value, all_of_them.high) == (1.0, 1.0)
        assert all_of_them.low == pytest.approx(1 - none.high)
    same = mean(np.full(10, 0.25))
    assert (same.low, same.high) == (0.25, 0.25)
    paired = paired_difference(np.zeros(10), np.zeros(10))
    assert (paired.low, paired.high) == (0.0, 0.0)


def test_pairs_are_compared_request_by_request() -> None:
    first = np.random.default_rng(0).random(50)
    found = paired_difference(first, first + 0.01)
    assert (found.low, found.value, found.high) == pytest.approx((0.01, 0.01, 0.01))
    with pytest.raises(ValueError, match="50 and 49 requests"):
        paired_difference(first, first[1:])


def test_the_search_for_a_keep_ends_at_the_wanted_share() -> None:
    assert find_keep(lambda keep: keep**2, 0.49) == pytest.approx(0.7, abs=0.001)


def test_the_table_says_what_ran(make_checkpoint: Callable[..., Path], text: str) -> None:
    shown = table(run(config(make_checkpoint("llama"), text, requests=2, texts=2), progress=False))
    assert "prompts: text.txt" in shown
    assert "agreement" in shown
    assert "experts" not in shown  # a dense model has none
