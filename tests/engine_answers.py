"""What an engine answers to prompts that run together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams


class Answer(NamedTuple):
    """One completion: its tokens, how many layers each one ran, and log-probabilities where they were asked for."""

    tokens: list[int]
    layers: list[int]
    logprobs: list[float]


def completions(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[dict[int, Answer]]:
    """All completions of each prompt, by index. Every page is free again behind them."""
    every = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    found: list[dict[int, Answer]] = [{} for _ in prompts]
    for number, (prompt, settings) in enumerate(zip(prompts, every, strict=True)):
        engine.add_request(str(number), prompt, settings)
    while engine.has_unfinished():
        for delta in engine.step():
            number = int(delta.request_id)
            for completion in delta.completions:
                answer = found[number].setdefault(completion.index, Answer([], [], []))
                answer.tokens.extend(completion.token_ids)
                answer.layers.extend(completion.layers or [])
                if every[number].logprobs is not None:
                    rows = zip(completion.token_ids, completion.logprobs or [], strict=True)
                    answer.logprobs.extend(row[token].logprob for token, row in rows)
    assert engine.stats().free_pages == engine.stats().total_pages
    return found


def answers(
    engine: Engine, prompts: Sequence[list[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[Answer]:
    """The only completion of each prompt."""
    found = completions(engine, prompts, params)
    assert all(list(each) == [0] for each in found)
    return [each[0] for each in found]
