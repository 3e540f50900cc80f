"""Choosing tokens: against a plain implementation in numpy, row by row, and bit by bit alone and in company.

Whether tokens come as often as they should is a chi-square test under a fixed seed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from dynamoe.dynamic.engine.draws import Draws
from dynamoe.dynamic.engine.logits_processors import Penalties, edit_logits
from dynamoe.dynamic.engine.logprobs import position_logprobs
from dynamoe.dynamic.engine.request import Sequence, StopTokens
from dynamoe.dynamic.engine.sampler import NO_TOKEN, draw_tokens, sample
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.engine.selection import first_best, largest
from dynamoe.dynamic.text.tokenizer import Tokenizer
from request_maker import make_sequence
from scipy import stats

STOPS = StopTokens(eos=frozenset({2}), listed=frozenset({5}))


def written(prompt: list[int], output: list[int], **settings: Any) -> Sequence:
    """A completion that has some output."""
    sequence = make_sequence(prompt, stop_tokens=STOPS, **settings)
    for token in output:
        sequence.append(token)
    return sequence


def plain_distribution(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Temperature, min-p, top-k, top-p, one after the other, by sorting, in float64."""
    weights = np.exp((logits - logits.max()) / params.temperature)
    probs = weights / weights.sum()
    probs = np.where(probs < params.min_p * probs.max(), 0.0, probs)
    order = np.argsort(-probs, kind="stable")
    if params.top_k > 0:
        probs[order[params.top_k :]] = 0.0
    probs /= probs.sum()
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += probs[token]
        if mass >= params.top_p:
            break
    final = np.zeros_like(probs)
    final[kept] = probs[kept]
    return final / final.sum()


def keys(count: int, seed: int = 3) -> list[int]:
    draws = Draws((1, seed), 0)
    return [draws.peek(position) for position in range(count)]


def drawn_counts(logits: np.ndarray, params: SamplingParams, draws: int) -> np.ndarray:
    """How often each token comes at the positions of a long output that has the same logits everywhere."""
    tokens: list[int] = []
    for first in range(0, draws, 500):
        rows_RV = torch.from_numpy(logits).repeat(500, 1)
        tokens += draw_tokens(rows_RV, [params] * 500, keys(draws)[first : first + 500])
    return np.bincount(tokens, minlength=len(logits))


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """The p-value of counts under a distribution; tokens that should come less than ten times are taken together."""
    wanted = expected * counts.sum()
    rare = wanted < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(wanted[~rare], wanted[rare].sum())
    possible = wanted > 0
    if possible.sum() < 2:
        return 1.0
    return float(stats.chisquare(observed[possible], wanted[possible] * observed.sum() / wanted.sum()).pvalue)


@pytest.mark.parametrize("vocabulary", [50, 2501])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 5000},
        {"top_p": 0.5},
        {"top_p": 0.93, "temperature": 1.7},
        {"min_p": 0.2},
        {"top_k": 20, "top_p": 0.7},
        {"top_k": 20, "top_p": 0.7, "min_p": 0.05, "temperature": 0.8},
        {"top_p": 0.99, "min_p": 0.01},
    ],
)
def test_shares_of_tokens_equal_the_plain_distribution(settings: dict, vocabulary: int) -> None:
    logits = np.random.default_rng(1).normal(0, 2, vocabulary).astype(np.float32)
    params = SamplingParams(**settings)
    counts = drawn_counts(logits, params, 4000)
    expected = plain_distribution(logits.astype(np.float64), params)
    assert not counts[expected == 0].any()
    assert chi_square(counts, expected) > 1e-3


def test_a_nucleus_wider_than_the_head_is_found_by_sorting() -> None:
    logits = np.random.default_rng(1).normal(0, 0.1, 2000).astype(np.float32)  # nearly flat
    params = SamplingParams(top_p=0.6)
    expected = plain_distribution(logits.astype(np.float64), params)
    assert (expected > 0).sum() > 1000
    counts = drawn_counts(logits, params, 15_000)
    outside = counts[expected == 0]
    assert np.count_nonzero(outside) <= 1  # the last one of the nucleus may be another by a rounding
    assert chi_square(counts, expected) > 1e-3


def test_no_draw_ever_takes_a_token_without_weight() -> None:
    for vocabulary in (100, 5000):
        logits = torch.full((500, vocabulary), -math.inf)
        logits[:, [20, 60]] = 1.0
        tokens = draw_tokens(logits, [SamplingParams()] * 500, keys(500))
        assert set(tokens) == {20, 60}


def test_equals_at_the_limit_of_top_k_are_all_kept() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]]).repeat(1000, 1)
    tokens = draw_tokens(logits, [SamplingParams(top_k=2)] * 1000, keys(1000))
    assert set(tokens) == {0, 1, 2, 3}


def varied_rows(vocabulary: int, seed: int) -> tuple[torch.Tensor, list[dict]]:
    rng = np.random.default_rng(seed)
    settings = []
    for row in range(16):
        options = {
            "temperature": float(rng.choice([0.0, 0.7, 1.0, 1.3])),
            "top_k": int(rng.choice([0, 1, 5, 40])),
            "top_p": float(rng.choice([1.0, 0.9, 0.99])),
            "min_p": float(rng.choice([0.0, 0.02])),
            "repetition_penalty": float(rng.choice([1.0, 1.2])),
            "presence_penalty": float(rng.choice([0.0, 0.4])),
            "min_tokens": int(rng.choice([0, 9])),
            "logit_bias": {int(rng.integers(vocabulary)): 2.0} if row % 3 == 0 else {},
            "seed": row if row % 2 else None,
        }
        settings.append(options)
    # Logits rounded to few values, as those of a bfloat16 head: equals are everywhere.
    logits_RV = torch.from_numpy(rng.normal(0, 3, (16, vocabulary))).to(torch.bfloat16).float()
    return logits_RV, settings


@pytest.mark.parametrize("vocabulary", [97, 4099])
def test_a_row_gives_the_same_token_alone_and_in_company(vocabulary: int) -> None:
    for seed in range(5):
        logits_RV, settings = varied_rows(vocabulary, seed)
        prompts = [[r + 1, r + 2, r + 3] for r in range(16)]

        def sequence(row: int, prompts: list = prompts, settings: list = settings) -> Sequence:
            return written(prompts[row], [row, row, 7], arrival=row, **settings[row])

        together = sample(logits_RV.clone(), [sequence(r) for r in range(16)])
        alone = [sample(logits_RV[r : r + 1].clone(), [sequence(r)])[0] for r in range(16)]
        some = sample(logits_RV[5:9].clone(), [sequence(r) for r in range(5, 9)])
        assert together == alone
        assert together[5:9] == some


def test_reported_logprobs_are_bitwise_the_same_alone_and_in_company(plain_tokenizer) -> None:
    tokens, counts = list(range(16)), [0, 1, 2, 5] * 4
    logits_RV, _ = varied_rows(1009, 0)
    together = position_logprobs(logits_RV.log_softmax(-1), tokens, counts, plain_tokenizer)
    for row in range(16):
        alone = position_logprobs(
            logits_RV[row : row + 1].log_softmax(-1), [tokens[row]], [counts[row]], plain_tokenizer
        )
        assert alone == [together[row]]


def test_logprobs_name_the_chosen_token_first_and_rank_it(plain_tokenizer) -> None:
    logits_RV = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    (position,) = position_logprobs(logits_RV.log_softmax(-1), [2], [2], plain_tokenizer)
    expected = logits_RV.double().log_softmax(-1)[0]
    assert list(position) == [2, 1, 3]
    assert [entry.rank for entry in position.values()] == [3, 1, 2]
    for token, entry in position.items():
        assert entry.logprob == pytest.approx(expected[token].item(), abs=1e-6)
    (chosen_only,) = position_logprobs(logits_RV.log_softmax(-1), [1], [0], plain_tokenizer)
    assert [(t, e.rank) for t, e in chosen_only.items()] == [(1, 1)]


def test_penalties_follow_their_definitions() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, 40).astype(np.float32)
    prompt, output = [1, 1, 6, 9], [3, 9, 3, 3, 30]
    params = {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.7,
        "frequency_penalty": 0.25,
        "logit_bias": {3: 4.0, 8: -2},
    }
    expected = logits.astype(np.float64).copy()
    expected[3] += 4.0
    expected[8] -= 2.0
    for token in {*prompt, *output}:
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    for token in set(output):
        expected[token] -= 0.7 + 0.25 * output.count(token)
    logits_RV = torch.from_numpy(np.stack([logits, logits]))
    edit_logits(logits_RV, [written(prompt, output, **params).processors, written(prompt, output).processors])
    np.testing.assert_allclose(logits_RV[0].numpy(), expected, rtol=1e-5)
    np.testing.assert_array_equal(logits_RV[1].numpy(), logits)


def test_counts_grow_with_the_output() -> None:
    sequence = written([4, 4], [], frequency_penalty=1.0)
    tokens = [int(t) for t in np.random.default_rng(0).integers(0, 300, 1000)]
    for token in tokens:
        sequence.append(token)
    assert counted(sequence) == {4: tokens.count(4)} | {t: tokens.count(t) for t in set(tokens)}


def counted(sequence: Sequence) -> dict[int, float]:
    (penalties,) = sequence.processors
    assert isinstance(penalties, Penalties)
    return dict(zip(penalties.counts.ids.tolist(), penalties.counts.counts.tolist(), strict=True))


def test_tokens_that_are_taken_back_leave_no_trace() -> None:
    tokens = [int(t) for t in np.random.default_rng(1).integers(0, 20, 60)]
    settings = {"frequency_penalty": 0.3, "repetition_penalty": 1.4, "min_tokens": 25, "max_tokens": 90}
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(0))
    for kept in (0, 1, 24, 25, 59):
        sequence, plain = written([4, 4, 7], tokens, **settings), written([4, 4, 7], tokens[:kept], **settings)
        sequence.rollback(60 - kept)
        edited, expected = logits.clone(), logits.clone()
        edit_logits(edited, [sequence.processors])
        edit_logits(expected, [plain.processors])
        assert torch.equal(edited, expected)
        assert sequence.token_ids == plain.token_ids
        assert sequence.peek() == plain.peek()


def test_forked_processors_do_not_affect_each_other() -> None:
    first = written([4, 4, 7], [], frequency_penalty=1.0, min_tokens=1)
    second = first.fork(1)
    first.append(9)
    logits = torch.zeros(2, 30)
    edit_logits(logits, [first.processors, second.processors])
    assert logits[0, 9] == -1.0
    assert logits[0, 2] == 0.0
    assert logits[1, 9] == 0.0
    assert logits[1, 2] == -math.inf


def test_only_allowed_tokens_come_and_later_rules_still_hold() -> None:
    logits = torch.arange(10.0)[None]
    params = {"temperature": 0.0, "allowed_token_ids": [1, 5, 7], "logit_bias": {1: 2.5}}
    assert sample(logits.clone(), [written([3], [], **params)]) == [7]
    assert sample(logits.clone(), [written([3], [], **params, min_tokens=1, frequency_penalty=1.0)]) == [7]
    assert sample(logits.clone(), [written([3], [7, 7], **params, frequency_penalty=2.0)]) == [1 + 4]
    drawn = {sample(logits.clone(), [written([3], [], allowed_token_ids=[1, 5], seed=s)])[0] for s in range(400)}
    assert drawn == {1, 5}


def test_bad_words_are_never_finished(word_tokenizer: Tokenizer) -> None:
    words = {"temperature": 0.0, "bad_words": ["token3", "token4 token5"], "tokenizer": word_tokenizer}
    logits = torch.zeros(1, 10)
    logits[0, 3], logits[0, 5] = 9.0, 8.0
    for output, expected in (([], 5), ([4], 0), ([5, 4, 6], 5), ([6, 4], 0)):
        assert sample(logits.clone(), [written([4], output, **words)]) == [expected]
    sequence = written([4], [6, 4], **words)
    sequence.rollback(1)
    assert sample(logits.clone(), [sequence]) == [5]


def test_min_tokens_forbids_every_stop_until_then() -> None:
    logits = torch.zeros(1, 10)
    logits[0, 2], logits[0, 5] = 9.0, 8.0
    short = written([1], [3], temperature=0.0, min_tokens=2)
    assert sample(logits.clone(), [short]) == [0]
    short.append(3)
    assert sample(logits.clone(), [short]) == [2]


@pytest.mark.parametrize("vocabulary", [1, 50, 4096, 4100, 20_011])
@pytest.mark.parametrize("count", [1, 5, 50])
def test_the_largest_entries_equal_those_of_a_sort(vocabulary: int, count: int) -> None:
    count = min(count, vocabulary)
    generator = torch.Generator().manual_seed(vocabulary + count)
    for decimals in (6, 1):  # few decimals: equals everywhere
        values_RV = torch.randn(5, vocabulary, generator=generator).round(decimals=decimals)
        best_RN, places_RN = largest(values_RV, count)
        assert torch.equal(best_RN, values_RV.sort(-1, descending=True).values[:, :count])
        assert torch.equal(values_RV.gather(1, places_RN), best_RN)
        assert all(len(set(row)) == count for row in places_RN.tolist())
        places, best = first_best(values_RV)
        assert places == values_RV.argmax(-1).tolist()
        assert best == values_RV.amax(-1).tolist()


def test_seeds_repeat_and_completions_differ() -> None:
    def draws(index: int = 0, **params: object) -> list[int]:
        sequence = written([1], [], **params).fork(index)
        return [sequence.peek(ahead) for ahead in range(5)]

    assert draws(seed=3) == draws(seed=3)
    assert draws(seed=-1) == draws(seed=-1)
    streams = [draws(seed=3), draws(seed=4), draws(index=1, seed=3), draws(), draws(arrival=1), draws(seed=0)]
    assert len({tuple(s) for s in streams}) == len(streams)
    assert len({key for s in streams for key in s}) == 5 * len(streams)
    assert written([1], [4, 4], seed=3).peek(1) == draws(seed=3)[3]


def test_a_row_of_nonsense_yields_no_token_and_spares_the_others() -> None:
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    clean = [written([1], [], temperature=t) for t in (0.0, 1.0, 0.0, 1.0)]
    logits[0, 3] = math.nan
    logits[1] = -math.inf
    tokens = sample(logits, clean)
    assert tokens[:2] == [NO_TOKEN, NO_TOKEN]
    assert all(0 <= t < 20 for t in tokens[2:])


def make_tokenizer(directory: Path, *, split: bool = False) -> Tokenizer:
    vocabulary = {"a": 0, **{f"token{i}": i for i in range(1, 1009)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    if split:
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.save(str(directory / "tokenizer.json"))
    return Tokenizer.from_directory(directory)


@pytest.fixture(scope="module")
def plain_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("words"), split=True)
