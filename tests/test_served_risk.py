"""The loss of served requests: what counts as differing from the full model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dynamoe.dynamic.contract.served_loss import disagreements, full_states, losses
from dynamoe.dynamic.engine.outputs import PositionLogprobs, RequestOutput
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.llm import LLM

PROMPTS = [[5, 6, 7], [8], list(range(3, 40))]
EXACT = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def llm(make_exits: Callable[..., Path]) -> LLM:
    path = make_exits("mixtral", {1: 0.6, 2: 0.6}, num_hidden_layers=4)
    return LLM(path, dtype="float32", backend="cpu", progress=False)


def served(llm: LLM, params: SamplingParams) -> list[RequestOutput]:
    return llm.generate([list(p) for p in PROMPTS], params, use_tqdm=False)


def test_what_the_full_model_said_has_no_loss(llm: LLM) -> None:
    assert disagreements(llm.model.decoder, served(llm, EXACT)).tolist() == [0.0, 0.0, 0.0]


def test_a_token_is_judged_after_what_was_served(llm: LLM) -> None:
    outputs = served(llm, EXACT)
    said = outputs[1].outputs[0].token_ids
    said[-1] = (said[-1] + 1) % 300  # nothing comes after it: one of twelve
    assert disagreements(llm.model.decoder, outputs).tolist() == [0.0, 1 / 12, 0.0]


def test_completions_of_a_request_count_alike_whatever_their_lengths_and_empty_ones_not(llm: LLM) -> None:
    outputs = served(llm, EXACT)
    second = replace(outputs[0].outputs[0], token_ids=[t + 1 for t in outputs[0].outputs[0].token_ids[:1]])
    outputs[0].outputs.append(second)
    outputs[1].outputs[0].token_ids.clear()
    assert disagreements(llm.model.decoder, outputs).tolist() == pytest.approx([1 / 2, 0.0, 0.0])


def test_tokens_that_left_early_differ_where_a_full_run_says_so(llm: LLM) -> None:
    early = SamplingParams(**{**vars(EXACT), "quality": None, "exit_thresholds": {1: 0.5, 2: 0.5}})
    outputs = served(llm, early)
    losses_N = disagreements(llm.model.decoder, outputs)
    assert 0 < losses_N.mean() < 1
    expected = []
    for output in outputs:
        wrong, prefix = 0, list(output.prompt_token_ids)
        for token in output.outputs[0].token_ids:
            (full,) = llm.generate([list(prefix)], replace(EXACT, max_tokens=1), use_tqdm=False)
            wrong += full.outputs[0].token_ids[0] != token
            prefix.append(token)
        expected.append(wrong / 12)
    np.testing.assert_array_equal(losses_N, expected)


def test_a_drawn_token_is_judged_by_the_distributions_before_and_after(llm: LLM) -> None:
    drawn = {**vars(EXACT), "temperature": 0.7, "seed": 3, "n": 2, "keep_states": True}
    exact = served(llm, SamplingParams(**drawn))
    assert losses(llm.model.decoder, exact, 0.7).tolist() == [0.0, 0.0, 0.0]
    everything = llm.engine.vocab_size
    early = {"quality": None, "exit_thresholds": {1: 0.5, 2: 0.5}, "logprobs": everything}
    outputs = served(llm, SamplingParams(**{**drawn, **early}))
    found_N = losses(llm.model.decoder, outputs, 0.7)
    assert 0 < found_N.min() < found_N.max() < 1
    full = replace(EXACT, max_tokens=1, prompt_logprobs=everything)
    for output, found in zip(outputs, found_N, strict=True):
        distances = []
        for completion in output.outputs:
            tokens = [*output.prompt_token_ids, *completion.token_ids]
            (judged,) = llm.generate([tokens], full, use_tqdm=False)
            assert judged.prompt_logprobs is not None
            assert completion.logprobs is not None
            after = judged.prompt_logprobs[len(output.prompt_token_ids) :]
            for ours, theirs in zip(completion.logprobs, after, strict=True):
                assert theirs is not None
                distances.append(np.abs(probabilities(ours, 0.7) - probabilities(theirs, 0.7)).sum() / 2)
        assert found == pytest.approx(np.mean(distances), abs=1e-6)


def probabilities(logprobs: PositionLogprobs, temperature: float) -> np.ndarray:
    logits_V = np.array([logprobs[token].logprob for token in sorted(logprobs)]) / temperature
    weights_V = np.exp(logits_V - logits_V.max())
    return weights_V / weights_V.sum()


def test_states_of_many_sequences_are_those_of_each_alone(llm: LLM) -> None:
    sequences = [torch.randint(3, 300, (length,)).tolist() for length in (2, 17, 40, 33)]
    together = full_states(llm.model.decoder, sequences, [1, 5, 1, 32])
    alone = [full_states(llm.model.decoder, [s], [first]) for s, first in zip(sequences, [1, 5, 1, 32], strict=True)]
    assert torch.equal(together, torch.cat(alone))
    assert [len(a) for a in alone] == [1, 12, 39, 1]
