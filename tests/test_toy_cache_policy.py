"""A cache policy in this file that keeps the first and the last pages of a sequence (StreamingLLM, arXiv 2309.17453).

Its outputs are compared with transformers, where a mask hides what was evicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.contract.deployment import deployment
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.outputs import CompletionOutput, RequestDelta, RequestOutput
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.llm import LLM
from dynamoe.dynamic.model.loaded import LoadedModel

PAGE = 4
FIRST, LAST = 1, 2  # pages
TOKENS = 30
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, logprobs=1)


class KeepEnds:
    """Keeps the first page and the last two full ones."""

    def __init__(self, layers: range, page_size: int) -> None:
        assert layers.start == 0
        assert page_size == PAGE

    def evict(self, blocks: Sequence[int], num_computed: int) -> Sequence[int]:
        assert list(blocks) == sorted(blocks)
        assert (blocks[-1] + 1 if blocks else 0) == num_computed // PAGE
        return blocks[FIRST:-LAST]


class Confused(KeepEnds):
    """Evicts what is not there."""

    def evict(self, blocks: Sequence[int], num_computed: int) -> Sequence[int]:
        return [99]


POLICY = f"{__file__}:{KeepEnds.__name__}"


def prompts(lengths: Sequence[int] = (3, 25, 14, 8, 33), seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in lengths]


FREED = sum((len(p) + TOKENS - 1) // PAGE - FIRST - LAST for p in prompts())  # pages, where nobody is preempted


def hidden(num_prompt: int, total: int) -> torch.Tensor:
    """Which positions each row does not see, bool, (L, L): later ones, and those that were evicted before it."""
    mask_LL = torch.ones(total, total).triu(1).bool()
    for moment in [num_prompt, *range((num_prompt // PAGE + 1) * PAGE, total, PAGE)]:
        # What is between the first pages and the last full ones is gone for this row and for all later ones.
        mask_LL[moment:, FIRST * PAGE : max(moment // PAGE - LAST, FIRST) * PAGE] = True
    return mask_LL


@torch.no_grad()
def reference(path: Path, prompt: list[int], output: list[int]) -> torch.Tensor:
    """Log-probabilities of transformers behind every token of a prompt's output but the last, (outputs, V)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    tokens = torch.tensor([prompt + output[:-1]])
    mask = torch.zeros(tokens.shape[1], tokens.shape[1]).masked_fill(hidden(len(prompt), tokens.shape[1]), -1e30)
    logits_LV = model(tokens, attention_mask=mask[None, None]).logits[0]
    return logits_LV[len(prompt) - 1 :].log_softmax(-1)


def run(engine: Engine, requests: list[list[int]], params: SamplingParams = GREEDY) -> list[RequestOutput]:
    outputs = {}
    for number, prompt in enumerate(requests):
        engine.add_request(str(number), prompt, params)
        completions = [CompletionOutput(i) for i in range(params.n)]
        outputs[str(number)] = RequestOutput(str(number), None, prompt, completions)
    while engine.has_unfinished():
        for delta in engine.step():
            outputs[delta.request_id].add(delta)
        for sequence in engine.scheduler.running:
            if sequence.num_computed >= sequence.num_prompt:
                assert sequence.num_computed - sequence.num_evicted < (FIRST + LAST + 1) * PAGE
    assert engine.stats().free_pages == engine.stats().total_pages
    return list(outputs.values())


def choices(outputs: list[RequestOutput]) -> list[Any]:
    return [[(c.token_ids, c.logprobs) for c in output.outputs] for output in outputs]


def evicting(**settings: Any) -> EngineConfig:
    return EngineConfig(**{"cache_policy": POLICY, "block_size": PAGE, **settings})


@pytest.fixture(scope="module")
def path(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("qwen3_moe")


@pytest.fixture(scope="module")
def model(path: Path) -> LoadedModel:
    return load_model(path, dtype="float32", backend="cpu", progress=False)


@pytest.fixture(scope="module")
def alone(model: LoadedModel) -> list[Any]:
    """What every prompt gives when nobody is beside it."""
    return [choices(run(Engine(model, evicting(enable_prefix_caching=False)), [p]))[0] for p in prompts()]


@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_outputs_are_those_of_a_model_that_does_not_see_what_was_evicted(
    family: str, backend: str, make_checkpoint: Callable[..., Path]
) -> None:
    path = make_checkpoint(family)
    llm = LLM(path, dtype="float32", backend=backend, progress=False, block_size=PAGE, cache_policy=POLICY)
    for prompt, output in zip(prompts(), llm.generate(prompts(), GREEDY, use_tqdm=False), strict=True):
        completion = output.outputs[0]
        expected_NV = reference(path, prompt, completion.token_ids)
        assert completion.token_ids == expected_NV.argmax(-1).tolist()
        assert completion.logprobs is not None
        found = [step[token].logprob for step, token in zip(completion.logprobs, completion.token_ids, strict=True)]
        assert found == pytest.approx(expected_NV.amax(-1).tolist(), abs=1e-3)


def test_evicting_changes_outputs(model: LoadedModel, alone: list[Any]) -> None:
    plain = [choices(run_plain(model, prompt))[0] for prompt in prompts()]
    assert sum(a != b for a, b in zip(plain, alone, strict=True)) >= len(plain) - 1


def run_plain(model: LoadedModel, prompt: list[int]) -> list[RequestOutput]:
    engine = Engine(model, EngineConfig(block_size=PAGE))
    engine.add_request("r", prompt, GREEDY)
    output = RequestOutput("r", None, prompt, [CompletionOutput(0)])
    while engine.has_unfinished():
        for delta in engine.step():
            output.add(delta)
    assert engine.stats().evicted_pages == 0
    return [output]


@pytest.mark.parametrize("caching", [True, False])
def test_neighbours_and_chunks_change_nothing(model: LoadedModel, alone: list[Any], caching: bool) -> None:
    engine = Engine(model, evicting(enable_prefix_caching=caching))
    assert choices(run(engine, prompts())) == alone
    assert engine.stats().evicted_pages == FREED
    chunked = Engine(model, evicting(enable_prefix_caching=caching, max_num_batched_tokens=7, max_num_seqs=3))
    assert choices(run(chunked, prompts())) == alone
    assert chunked.stats().evicted_pages == FREED


@pytest.mark.parametrize("caching", [True, False])
def test_a_preempted_sequence_sees_again_what_it_saw(model: LoadedModel, alone: list[Any], caching: bool) -> None:
    engine = Engine(model, evicting(enable_prefix_caching=caching, max_num_batched_tokens=20))
    step, count = engine.step, 0

    def preempting_step() -> list[RequestDelta]:
        nonlocal count
        count += 1
        for sequence in engine.scheduler.running[1::2] if count % 20 == 0 else ():
            engine.scheduler._preempt(sequence)
        return step()

    engine.step = preempting_step  # type: ignore[method-assign]
    assert choices(run(engine, prompts())) == alone
    assert engine.stats().preemptions > 1
    assert engine.stats().evicted_pages > FREED, "pages that had been given up are computed and given up again"


def test_completions_of_one_prompt_evict_for_themselves(model: LoadedModel) -> None:
    several = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=TOKENS, ignore_eos=True)
    together = run(Engine(model, evicting()), prompts(), several)
    crowded = run(Engine(model, evicting(max_num_seqs=2)), prompts(), several)
    assert choices(together) == choices(crowded)
    assert len({tuple(tokens) for tokens, _ in choices(together)[0]}) > 1


def test_pages_computed_after_an_eviction_are_not_found(model: LoadedModel) -> None:
    engine = Engine(model, evicting())
    prompt = prompts()[1]
    output = run(engine, [prompt])[0].outputs[0].token_ids
    follow_up = prompt + output
    found = run(engine, [follow_up])[0]
    assert found.num_cached_tokens == len(prompt) // PAGE * PAGE, "the prompt was computed in full"
    assert choices([found]) == choices(run(Engine(model, evicting(enable_prefix_caching=False)), [follow_up]))


def test_a_certificate_knows_what_was_evicted(model: LoadedModel) -> None:
    engine = Engine(model, evicting())
    facts = deployment(model, engine.runner.exits, engine.logits_plugins, engine.cache_plugins)
    assert str(facts["keys_and_values"]).startswith("float32, evicted by test_toy_cache_policy.py:KeepEnds ")
    assert deployment(model, engine.runner.exits)["keys_and_values"] == "float32, nothing evicted"


def test_what_cannot_be_is_refused(
    model: LoadedModel, make_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(model, evicting(cache_policy=f"{__file__}:Confused"))
    (output,) = run(engine, [[5, 6, 7, 8, 9]])
    assert output.outputs[0].finish_reason == "error"
    assert "plug-in Confused failed: ValueError: it evicts blocks [99]; the sequence holds [0]" in caplog.text
    windowed = load_model(make_checkpoint("mixtral", sliding_window=11), backend="cpu", progress=False)
    with pytest.raises(ValueError, match="sliding window"):
        Engine(windowed, evicting())
