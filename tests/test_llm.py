"""The Python face: prompts of every kind in, whole results out, in order."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dynamoe import LLM, SamplingParams
from dynamoe.dynamic.model.machine import own_thread_for

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(make_checkpoint: Callable[..., Path]) -> LLM:
    return LLM(make_checkpoint("mixtral"), dtype="float32", max_num_seqs=3, progress=False)


def test_every_kind_of_prompt_gives_the_same(llm: LLM) -> None:
    text = "The capital of France is"
    ids = llm.get_tokenizer().encode(text)
    kinds: list[Any] = [text, ids, {"prompt": text}, {"prompt_token_ids": ids, "cache_salt": "s", "priority": 2}]
    together = llm.generate(kinds, GREEDY, use_tqdm=False)
    single = [llm.generate(kind, GREEDY, use_tqdm=False) for kind in kinds]
    assert all(len(outputs) == 1 for outputs in single)
    results = [*together, *(outputs[0] for outputs in single)]
    assert len({tuple(r.outputs[0].token_ids) for r in results}) == 1
    assert all(r.prompt_token_ids == ids and r.finished for r in results)
    assert [r.prompt for r in together] == [text, None, text, None]


def test_results_come_in_the_order_of_the_prompts_with_their_own_settings(llm: LLM) -> None:
    prompts = [[3 + i] * (1 + i % 7) for i in range(20)]
    params = [SamplingParams(temperature=0.0, max_tokens=1 + i * 7 % 13, ignore_eos=True, n=1) for i in range(20)]
    results = llm.generate(prompts, params, use_tqdm=False)
    assert [r.prompt_token_ids for r in results] == prompts
    assert [len(r.outputs[0].token_ids) for r in results] == [p.max_tokens for p in params]


def test_more_prompts_than_the_queue_holds_are_fed_as_it_drains(make_checkpoint: Callable[..., Path]) -> None:
    llm = LLM(make_checkpoint("llama"), max_num_seqs=4, progress=False)
    object.__setattr__(llm.engine.config, "max_waiting", 2)
    results = llm.generate([[5, 6, i] for i in range(3, 40)], SamplingParams(max_tokens=3), use_tqdm=False)
    assert [r.prompt_token_ids[2] for r in results] == list(range(3, 40))


def test_n_and_logprobs_arrive_whole(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=3, max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    (result,) = llm.generate([[9, 8, 7]], params, use_tqdm=False)
    assert [c.index for c in result.outputs] == [0, 1, 2, 3]
    assert all(len(c.logprobs or []) == len(c.token_ids) == 6 for c in result.outputs)
    assert all(c.text == llm.get_tokenizer().decode(c.token_ids) for c in result.outputs)
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    assert [next(iter(p or {})) for p in result.prompt_logprobs[1:]] == [8, 7]


def test_chat_equals_generate_on_the_rendered_prompt(llm: LLM) -> None:
    chats = [[{"role": "user", "content": "Hello"}], [{"role": "user", "content": "One, two"}]]
    results = llm.chat(chats, GREEDY, use_tqdm=False)
    theirs = llm.get_tokenizer().hf()
    for chat, result in zip(chats, results, strict=True):
        ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert result.prompt_token_ids == ids
        assert llm.generate([ids], GREEDY, use_tqdm=False)[0].outputs == result.outputs
    assert llm.chat(chats[0], GREEDY, use_tqdm=False)[0].outputs == results[0].outputs


def test_arrays_of_ids_are_read_as_lists_are(llm: LLM) -> None:
    (wanted,) = llm.generate([5, 6, 7], GREEDY, use_tqdm=False)
    ids = np.array([5, 6, 7])
    for prompt in (ids, [ids], ids[None], torch.tensor([5, 6, 7]), list(ids), {"prompt_token_ids": ids}, (5, 6, 7)):
        (found,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert found.prompt_token_ids == [5, 6, 7]
        assert found.outputs == wanted.outputs
    results = llm.generate(np.array([[5, 6, 7], [5, 6, 8]]), GREEDY, use_tqdm=False)
    assert [result.prompt_token_ids for result in results] == [[5, 6, 7], [5, 6, 8]]
    urgent = {"prompt_token_ids": ids, "priority": np.int64(-1)}
    assert llm.generate(urgent, GREEDY, use_tqdm=False)[0].outputs == wanted.outputs


def test_bad_input_is_refused_before_anything_runs(llm: LLM) -> None:
    before = llm.engine.stats().generation_tokens
    with pytest.raises(ValueError, match="prompt is empty"):
        llm.generate([[5, 6], []], GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="2 sampling_params for 1 prompts"):
        llm.generate([[5]], [GREEDY, GREEDY], use_tqdm=False)
    with pytest.raises(ValueError, match=r"\['text'\]"):
        llm.generate([{"text": "a"}], GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="prompt_token_ids holds 320"):
        llm.generate([[320]], GREEDY, use_tqdm=False)
    for prompt, message in (
        ([[5, 6.5]], "token ids, not float"),
        ([[True]], "token ids, not bool"),
        ([["5"]], "token ids, not str"),
        (b"abc", "not bytes"),
        ([b"abc"], "not bytes"),
        ({"prompt_token_ids": b"abc"}, "not bytes"),
        ({"prompt_token_ids": "567"}, "not str"),
        ({"prompt_token_ids": {5: 6}}, "not dict"),
        ({"prompt_token_ids": 5}, "not int"),
        (np.array([5.0, 6.0]), "token ids, not float"),
        ({"prompt": "a", "priority": True}, "priority must be a whole number, not True"),
        ({"prompt": None}, "a text or token ids, not None"),
        ({"prompt": "a", "priority": float("nan")}, "priority must be a whole number, not nan"),
        ({"prompt": "a", "cache_salt": 5}, "cache_salt must be a text, not 5"),
        ("\ud800", "half of a surrogate pair"),
    ):
        with pytest.raises(ValueError, match=message):
            llm.generate(prompt, GREEDY, use_tqdm=False)
    with pytest.raises(ValueError, match="must be SamplingParams"):
        llm.generate("a", {"max_tokens": 1}, use_tqdm=False)  # type: ignore[arg-type]
    assert llm.engine.stats().generation_tokens == before
    assert not llm.engine.has_unfinished()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": True}, "n must be a whole number, between 1 and 128, not True"),
        ({"n": (1,)}, r"n must be a whole number, between 1 and 128, not \(1,\)"),
        ({"n": b"a"}, "n must be a whole number, between 1 and 128, not b'a'"),
        ({"n": None}, "n must be a whole number, between 1 and 128, not None"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number, at least 1, not 2.5"),
        ({"seed": "7"}, "seed must be a whole number, not '7'"),
        ({"temperature": "0"}, "temperature must be a number, between 0 and 100, not '0'"),
        ({"temperature": None}, "temperature must be a number, between 0 and 100, not None"),
        ({"ignore_eos": "false"}, "ignore_eos must be true or false, not 'false'"),
        ({"stop": [5]}, "stop must hold texts, not 5"),
        ({"stop_token_ids": [5.5]}, "stop_token_ids must hold token ids, not 5.5"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias must hold token ids, not '5'"),
        ({"logit_bias": {5: "1"}}, "logit_bias must be a number, between -100 and 100, not"),
        ({"logit_bias": {5: True}}, "logit_bias must be a number, between -100 and 100, not"),
        ({"quality": None, "exit_thresholds": {1: "0.5"}}, "exit_thresholds must be a number, between 0 and 1, not"),
        ({"quality": None, "exit_thresholds": {1: True}}, "exit_thresholds must be a number, between 0 and 1, not"),
        ({"quality": None, "experts_per_token": True}, "experts_per_token must be a whole number"),
    ],
    ids=str,
)
def test_settings_of_another_type_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    """None would fail on its own: they would be cut, taken for true, or end the step of others."""
    with pytest.raises(ValueError, match=message):
        SamplingParams(**settings)
    assert SamplingParams(bad_words="two words").bad_words == ("two words",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_num_seqs": 1.5}, "engine.max_num_seqs must be a whole number, at least 1, not 1.5"),
        ({"block_size": "16"}, "engine.block_size must be a whole number, at least 1, not '16'"),
        ({"enable_prefix_caching": "no"}, "engine.enable_prefix_caching must be true or false, not 'no'"),
        ({"tensor_parallel_size": True}, "parallel.tensor must be a whole number, at least 1, not True"),
        ({"kv_memory": "1000000GiB"}, "engine.kv_memory=1000000GiB is more than the .* bytes that are free"),
    ],
    ids=str,
)
def test_settings_of_the_engine_have_their_types_too(
    make_checkpoint: Callable[..., Path], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(make_checkpoint("llama"), progress=False, **settings)


def test_conversations_are_read_as_the_server_reads_them(llm: LLM) -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "input_text", "text": "there"}]
    given = [{"role": "developer", "content": "Be kind"}, {"role": "user", "content": parts}]
    plain = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hello\nthere"}]
    assert llm.chat(given, GREEDY, use_tqdm=False)[0].prompt == llm.chat(plain, GREEDY, use_tqdm=False)[0].prompt
    for absent in ({}, {"content": None}, {"content": []}):
        refused = [*plain, {"role": "assistant", **absent, "refusal": "No"}]
        said = [*plain, {"role": "assistant", "content": "No"}]
        assert llm.chat(refused, GREEDY, use_tqdm=False)[0].prompt == llm.chat(said, GREEDY, use_tqdm=False)[0].prompt
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(ValueError, match="a part without text, of type 'image_url'"):
        llm.chat(image, GREEDY, use_tqdm=False)


def test_defaults_come_from_the_checkpoint(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    path = shutil.copytree(make_checkpoint("llama"), tmp_path / "model")
    file = path / "generation_config.json"
    settings = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05, "max_new_tokens": 7}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    llm = LLM(path, progress=False)
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.6, 0.9, 20, 7)
    assert params.repetition_penalty == 1.05
    (result,) = llm.generate([[5, 6]], use_tqdm=False)
    assert len(result.outputs[0].token_ids) <= 7


def test_an_interrupted_call_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = llm.engine.runner.run, []

    def interrupted(schedule: Any) -> torch.Tensor:
        calls.append(schedule)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(schedule)

    monkeypatch.setattr(llm.engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[5, 6, 7]] * 5, GREEDY, use_tqdm=False)
    assert not llm.engine.has_unfinished()
    assert llm.engine.stats().free_pages == llm.engine.stats().total_pages


def test_a_progress_bar_is_shown_on_a_terminal(
    llm: LLM, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm.generate([[5, 6], [7]], GREEDY)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    llm.generate([[5, 6], [7]], GREEDY)
    assert "2/2" in capfd.readouterr().err
    llm.generate([[5, 6]], GREEDY, use_tqdm=False)
    assert capfd.readouterr().err == ""


def test_keywords_of_vllm_that_change_nothing_warn_once(
    make_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    harmless = {"gpu_memory_utilization": 0.9, "enforce_eager": True, "swap_space": 4, "trust_remote_code": False}
    llm = LLM(make_checkpoint("llama"), progress=False, kv_cache_memory_bytes=1 << 20, **harmless)
    (warning,) = [record.getMessage() for record in caplog.records if "vLLM" in record.getMessage()]
    assert warning.endswith("no effect here: enforce_eager, gpu_memory_utilization, swap_space")
    assert llm.engine.config.kv_memory == 1 << 20


@pytest.mark.parametrize(
    ("keyword", "error", "message"),
    [
        ({"trust_remote_code": True}, ValueError, "trust_remote_code=True is not supported here, only False"),
        ({"cpu_offload_gb": 4}, ValueError, "cpu_offload_gb=4"),
        ({"speculative_config": {"method": "ngram"}}, ValueError, "speculative_config"),
        ({"gpu_memory": 0.9}, TypeError, "unexpected keyword argument 'gpu_memory'"),
    ],
)
def test_other_keywords_are_refused_before_a_model_is_loaded(
    keyword: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        LLM("nowhere", **keyword)


def test_the_tokenizer_is_called_as_that_of_transformers(llm: LLM) -> None:
    tokenizer, theirs = llm.get_tokenizer(), llm.get_tokenizer().hf()
    chat = [{"role": "user", "content": "Hello"}]
    assert tokenizer("Hello there")["input_ids"] == theirs("Hello there")["input_ids"]
    for options in ({"tokenize": False}, {"add_generation_prompt": True, "return_dict": False}):
        assert tokenizer.apply_chat_template(chat, **options) == theirs.apply_chat_template(chat, **options)


def test_a_checkpoint_without_a_tokenizer_serves_token_ids(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    whole = make_checkpoint("llama")
    bare = tmp_path / "bare"
    shutil.copytree(whole, bare, ignore=shutil.ignore_patterns("token*", "special*", "chat*"))
    with pytest.raises(ValueError, match="tokenizer"):
        LLM(bare, progress=False)
    llm = LLM(bare, progress=False, skip_tokenizer_init=True)
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=1)
    (result,) = llm.generate([[5, 6, 7]], params, use_tqdm=False)
    (same,) = LLM(whole, progress=False).generate([[5, 6, 7]], params, use_tqdm=False)
    assert result.outputs[0].token_ids == same.outputs[0].token_ids
    assert result.outputs[0].text == ""
    with pytest.raises(ValueError, match="without its tokenizer"):
        llm.generate("Hello", params, use_tqdm=False)
    with pytest.raises(ValueError, match="stop strings need detokenize"):
        llm.generate([[5]], SamplingParams(stop=["a"]), use_tqdm=False)


def test_the_threads_that_loaded_a_model_are_gone_before_another_thread_generates(
    make_checkpoint: Callable[..., Path],
) -> None:
    code = """
import os, sys, threading, torch
from dynamoe import LLM, SamplingParams
torch.set_num_threads(3)
def threads():
    return len(os.listdir("/proc/self/task"))
llm = LLM(sys.argv[1], progress=False)
before = threads()
torch.ones(1 << 20).add(1)
used = threads()
from dynamoe.dynamic.model.machine import release_threads
release_threads()
print(used - before, threads() - before)
"""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(make_checkpoint("llama"))],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["2", "0"]


@pytest.mark.parametrize(("elements", "expected"), [(1 << 20, 1), ((1 << 20) + 1, 3)])
def test_torch_reads_few_elements_on_the_calling_thread(elements: int, expected: int) -> None:
    before, found = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        with own_thread_for(elements):
            found.append(torch.get_num_threads())
            other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
            other.start()
            other.join()
        found.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(before)
    assert found == [expected, 3, 3]
