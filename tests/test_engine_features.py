"""What a request may ask for: completions, log-probabilities, stops, limits, cancellation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine, EngineFull
from dynamoe.dynamic.engine.outputs import CompletionOutput, RequestDelta, RequestOutput
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.loaded import LoadedModel

PROMPT = [40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51]
PAGE_BYTES = 2 * 3 * 2 * 16 * 16 * 4  # of the llama checkpoint: 3 layers, 2 heads of 16 channels, 16 tokens


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("llama")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> LoadedModel:
    return load_model(checkpoint, dtype="float32", progress=False)


def finish(engine: Engine) -> dict[str, RequestOutput]:
    """Run all requests to their end; checks what every stream of deltas has to keep to."""
    outputs: dict[str, RequestOutput] = {}
    while engine.has_unfinished():
        for delta in engine.step():
            output = outputs.setdefault(
                delta.request_id, RequestOutput(delta.request_id, None, [], [CompletionOutput(i) for i in range(128)])
            )
            assert not output.finished, "a delta after the last one"
            for completion in delta.completions:
                assert output.outputs[completion.index].finish_reason is None, "a delta after a completion's last one"
            output.add(delta)
    assert all(output.finished for output in outputs.values())
    assert engine.stats().free_pages == engine.stats().total_pages
    return outputs


def generate(model: LoadedModel, params: SamplingParams, prompt: list[int] = PROMPT, **config: Any) -> RequestOutput:
    engine = Engine(model, EngineConfig(**config))
    engine.add_request("r", prompt, params)
    return finish(engine)["r"]


def greedy(**params: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 20, "ignore_eos": True, **params})


def test_text_equals_the_decoded_tokens(model: LoadedModel) -> None:
    for seed in range(10):
        params = SamplingParams(max_tokens=40, seed=seed, ignore_eos=True, skip_special_tokens=bool(seed % 2))
        completion = generate(model, params).outputs[0]
        assert completion.text == model.tokenizer.decode(completion.token_ids, bool(seed % 2))
        assert (completion.finish_reason, completion.stop_reason) == ("length", None)


def test_without_detokenize_there_is_no_text(model: LoadedModel) -> None:
    completion = generate(model, greedy(detokenize=False)).outputs[0]
    assert (completion.text, len(completion.token_ids)) == ("", 20)


def test_an_end_token_ends_the_output_and_is_not_shown(model: LoadedModel) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=20, logit_bias={2: 100.0}, skip_special_tokens=False)
    completion = generate(model, params).outputs[0]
    assert (completion.token_ids, completion.text) == ([2], "")
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    kept = generate(model, SamplingParams(**{**vars(params), "include_stop_str_in_output": True})).outputs[0]
    assert kept.text == "<|im_end|>"


def test_stop_token_ids_end_the_output_and_are_named(model: LoadedModel) -> None:
    tokens = generate(model, greedy()).outputs[0].token_ids
    place = next(i for i in range(3, 20) if tokens[i] not in tokens[:i])
    completion = generate(model, greedy(stop_token_ids=[tokens[place], 319])).outputs[0]
    assert completion.token_ids == tokens[: place + 1]
    assert completion.text == model.tokenizer.decode(tokens[:place])
    assert (completion.finish_reason, completion.stop_reason) == ("stop", tokens[place])


def test_min_tokens_forbids_the_end_and_ignore_eos_runs_past_it(model: LoadedModel) -> None:
    bias = {2: 100.0}
    params = SamplingParams(temperature=0.0, max_tokens=20, min_tokens=7, logit_bias=bias)
    completion = generate(model, params).outputs[0]
    assert len(completion.token_ids) == 8
    assert 2 not in completion.token_ids[:7]
    assert generate(model, greedy(logit_bias=bias)).outputs[0].token_ids == [2] * 20


@pytest.mark.parametrize("keep", [False, True])
def test_stop_strings_across_tokens(model: LoadedModel, keep: bool) -> None:
    text = generate(model, greedy(max_tokens=60)).outputs[0].text
    whole = [i for i in range(4, len(text) - 8) if text.find(text[i : i + 5]) == i and text[i : i + 5].isascii()]
    for at in whole[:12]:
        stop = text[at : at + 5]
        completion = generate(model, greedy(max_tokens=60, stop=stop, include_stop_str_in_output=keep)).outputs[0]
        assert completion.text == text[: at + 5 if keep else at]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert whole


def test_stop_strings_wait_for_min_tokens(model: LoadedModel) -> None:
    text = generate(model, greedy(max_tokens=60)).outputs[0].text
    first = next(c for c in text if c.isascii())
    completion = generate(model, greedy(max_tokens=60, min_tokens=30, stop=first)).outputs[0]
    assert len(completion.token_ids) >= 30


def test_no_text_is_shown_that_a_stop_string_takes_back(model: LoadedModel) -> None:
    text = generate(model, greedy(max_tokens=60)).outputs[0].text
    stop = text[20:30]
    engine = Engine(model)
    engine.add_request("r", PROMPT, greedy(max_tokens=60, stop=stop))
    shown = ""
    while engine.has_unfinished():
        for delta in engine.step():
            shown += delta.completions[0].text
            assert text[: text.find(stop)].startswith(shown)


def reference_logprobs(reference_model: Callable[[Path], Any], checkpoint: Path, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return reference_model(checkpoint)(torch.tensor([tokens])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("rows", [2048, 5])
def test_logprobs_of_prompt_and_output_equal_transformers(
    model: LoadedModel, checkpoint: Path, reference_model: Callable[[Path], Any], rows: int
) -> None:
    params = SamplingParams(
        temperature=1.5, seed=1, max_tokens=10, ignore_eos=True, logprobs=3, prompt_logprobs=2, repetition_penalty=1.5
    )
    output = generate(model, params, max_num_batched_tokens=rows)
    completion = output.outputs[0]
    expected = reference_logprobs(reference_model, checkpoint, PROMPT + completion.token_ids)
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert completion.logprobs is not None
    positions = [*output.prompt_logprobs[1:], *completion.logprobs]
    assert len(positions) == len(PROMPT) - 1 + 10
    for place, position in enumerate(positions):
        assert position is not None
        token = (PROMPT + completion.token_ids)[place + 1]
        best = 2 if place < len(PROMPT) - 1 else 3
        assert next(iter(position)) == token
        assert set(position) == {token, *expected[place].topk(best).indices.tolist()}
        for other, entry in position.items():
            assert entry.logprob == pytest.approx(expected[place, other].item(), abs=1e-4)
            assert entry.rank == 1 + (expected[place] > expected[place, other]).sum().item()
            assert entry.decoded_token == model.tokenizer.token_text(other)


def test_prompt_logprobs_pass_the_prefix_cache_by_and_survive_it(model: LoadedModel) -> None:
    engine = Engine(model, EngineConfig(block_size=4))
    outputs = []
    for _ in range(2):
        engine.add_request("r", PROMPT, greedy(prompt_logprobs=0))
        outputs.append(finish(engine)["r"])
    assert outputs[0] == outputs[1]
    assert len(outputs[0].prompt_logprobs or []) == len(PROMPT)
    assert outputs[1].num_cached_tokens == 0


def test_prompt_logprobs_are_computed_in_pieces(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(model, greedy(prompt_logprobs=1), list(range(10, 90)))
    engine = Engine(model)
    engine.runner.max_logit_rows = 7
    engine.add_request("r", list(range(10, 90)), greedy(prompt_logprobs=1))
    pieces = finish(engine)["r"]
    assert [list(p or {}) for p in pieces.prompt_logprobs or []] == [list(p or {}) for p in whole.prompt_logprobs or []]


def test_prompt_logprobs_are_whole_after_a_preemption(model: LoadedModel) -> None:
    long = [3 + i % 300 for i in range(100)]
    alone = generate(model, greedy(prompt_logprobs=0), long)
    engine = Engine(model, EngineConfig(kv_memory=9 * PAGE_BYTES, max_num_batched_tokens=6))
    engine.add_request("first", PROMPT, greedy(max_tokens=90))
    engine.add_request("second", long, greedy(prompt_logprobs=0))
    output = finish(engine)["second"]
    assert engine.stats().preemptions > 0
    values = [[e.logprob for e in (p or {}).values()] for p in output.prompt_logprobs or []]
    expected = [[e.logprob for e in (p or {}).values()] for p in alone.prompt_logprobs or []]
    assert len(values) == 100
    assert all(a == pytest.approx(b, abs=1e-4) for a, b in zip(values, expected, strict=True))
    assert output.outputs[0].token_ids == alone.outputs[0].token_ids


@pytest.mark.parametrize("rows", [6, 7, 12])  # with 6, the last chunk has as many rows as there are completions
@pytest.mark.parametrize("config", [{}, {"max_num_seqs": 3}, {"kv_memory": 8 * PAGE_BYTES}])
def test_completions_of_one_prompt_equal_those_of_single_requests(model: LoadedModel, config: dict, rows: int) -> None:
    """Also a proof of copy on write: each completion's keys and values stay its own."""
    params = SamplingParams(n=6, seed=5, max_tokens=30, ignore_eos=True)
    together = generate(model, params, max_num_batched_tokens=rows, **config)
    for index in range(6):
        engine = Engine(model)
        engine.add_request("r", PROMPT, SamplingParams(seed=5, max_tokens=30, ignore_eos=True))
        (request,) = engine._requests.values()
        request.sequences[0].index = index  # the stream of draws that this completion has among the others
        engine.step()
        sequence = request.sequences[0]
        while engine.has_unfinished():
            engine.step()
        assert together.outputs[index].token_ids == sequence.token_ids[len(PROMPT) :]
    assert len({tuple(c.token_ids) for c in together.outputs[:6]}) == 6


def test_completions_end_one_by_one(model: LoadedModel) -> None:
    engine = Engine(model)
    engine.add_request("r", PROMPT, SamplingParams(n=8, seed=1, temperature=1.5, max_tokens=200, logit_bias={2: 6.0}))
    output = finish(engine)["r"]
    lengths = {len(c.token_ids) for c in output.outputs[:8]}
    assert len(lengths) > 1
    assert all(c.finish_reason is not None for c in output.outputs[:8])


def test_cached_tokens_and_queue_time_are_reported_once(model: LoadedModel) -> None:
    engine = Engine(model, EngineConfig(block_size=4))
    first: list[RequestDelta] = []
    for _ in range(2):
        engine.add_request("r", PROMPT, greedy())
        deltas = []
        while engine.has_unfinished():
            deltas += engine.step()
        first.append(deltas[0])
        assert all(d.queue_seconds is None and d.num_cached_tokens == 0 for d in deltas[1:])
    assert [d.num_cached_tokens for d in first] == [0, 8]
    assert all(d.queue_seconds is not None for d in first)


def test_salts_keep_prefixes_apart(model: LoadedModel) -> None:
    engine = Engine(model, EngineConfig(block_size=4))
    for salt, hits in (("a", 0), ("b", 0), (None, 0), ("a", 8)):
        before = engine.stats().prefix_cache_hits
        engine.add_request("r", PROMPT, greedy(), cache_salt=salt)
        finish(engine)
        assert engine.stats().prefix_cache_hits - before == hits


def test_an_abort_frees_pages_at_once_and_says_nothing_more(model: LoadedModel) -> None:
    engine = Engine(model, EngineConfig(max_num_seqs=2))
    for name in "abcd":
        engine.add_request(name, PROMPT, greedy(n=2 if name == "a" else 1, max_tokens=100))
    engine.step()
    engine.step()
    engine.abort(["a", "d", "unknown"])
    engine.abort(["a"])
    held = engine.stats().total_pages - engine.stats().free_pages
    assert held == sum(len(s.pages) for s in engine.scheduler.running)
    assert set(finish(engine)) == {"b", "c"}


def test_a_full_queue_says_when_to_come_back(model: LoadedModel) -> None:
    engine = Engine(model, EngineConfig(max_waiting=2, max_num_seqs=1))
    engine.add_request("a", PROMPT, greedy())
    engine.add_request("b", PROMPT, greedy())
    with pytest.raises(EngineFull) as full:
        engine.add_request("c", PROMPT, greedy())
    assert full.value.retry_after_seconds >= 1
    engine.step()
    engine.add_request("c", PROMPT, greedy())
    assert set(finish(engine)) == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], {}, "prompt is empty"),
        ([5, 320], {}, "prompt_token_ids holds 320"),
        ([-1], {}, "prompt_token_ids holds -1"),
        ([5] * 96, {}, "prompt has 96 tokens"),
        ([5], {"stop_token_ids": [999]}, "stop_token_ids holds 999"),
        ([5], {"logit_bias": {-4: 1.0}}, "logit_bias holds -4"),
        ([5], {"logprobs": 400}, "logprobs=400"),
    ],
)
def test_what_can_never_run_is_refused_at_once(
    model: LoadedModel, prompt: list[int], params: dict, message: str
) -> None:
    engine = Engine(model, EngineConfig(kv_memory=6 * PAGE_BYTES))
    assert engine.max_model_len == 96
    with pytest.raises(ValueError, match=message):
        engine.add_request("r", prompt, SamplingParams(**params))
    assert not engine.has_unfinished()


def test_the_longest_prompt_and_output_fit_exactly(model: LoadedModel) -> None:
    completion = generate(model, greedy(max_tokens=None), [5] * 40, kv_memory=6 * PAGE_BYTES).outputs[0]
    assert (len(completion.token_ids), completion.finish_reason) == (56, "length")
    completion = generate(model, greedy(), [5] * 95, kv_memory=6 * PAGE_BYTES).outputs[0]
    assert (len(completion.token_ids), completion.finish_reason) == (1, "length")


def test_settings_that_contradict_each_other_are_refused(model: LoadedModel) -> None:
    with pytest.raises(ValueError, match="max_model_len=600 exceeds the model's maximum of 512"):
        Engine(model, EngineConfig(max_model_len=600))
    with pytest.raises(ValueError, match=r"holds 96 tokens, fewer than engine\.max_model_len=200"):
        Engine(model, EngineConfig(max_model_len=200, kv_memory=6 * PAGE_BYTES))
    with pytest.raises(ValueError, match="holds no page"):
        Engine(model, EngineConfig(kv_memory=10))
    with pytest.raises(ValueError, match="'much'"):
        Engine(model, EngineConfig(kv_memory="much"))
    assert Engine(model, EngineConfig(kv_memory="0.5MiB")).stats().total_pages == (1 << 19) // PAGE_BYTES


def test_a_request_id_in_use_is_refused(model: LoadedModel) -> None:
    engine = Engine(model)
    engine.add_request("r", PROMPT, greedy())
    with pytest.raises(ValueError, match="'r' is in use"):
        engine.add_request("r", PROMPT, greedy())


def test_nonsense_from_the_model_ends_only_the_request_it_hits(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model)
    for name in "ab":
        engine.add_request(name, PROMPT, greedy(max_tokens=5, logprobs=1))
    engine.step()
    logits = engine.runner.logits

    def broken(*arguments: Any) -> torch.Tensor:
        result = logits(*arguments)
        result[0] = float("nan")
        return result

    monkeypatch.setattr(engine.runner, "logits", broken)
    (hit, spared) = engine.step()
    assert (hit.finished, hit.completions[0].finish_reason) == (True, "error")
    assert hit.error is not None
    assert not spared.finished
    monkeypatch.undo()
    assert set(finish(engine)) == {"b"}
