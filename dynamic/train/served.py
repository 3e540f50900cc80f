"""Text that the model itself generates: exits are trained and measured on served text too, not only on given text.

Shape suffixes: N sequences, L positions.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, TypeVar

import torch

from ..engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from ..engine.offline import OfflineEngine

T = TypeVar("T")
GREEDY_SHARE = 0.5  # the other half is sampled, since a served prefix may be either


def blocks_from(streams: dict[str, torch.Tensor], count: int, length: int, seed: int) -> list[list[int]]:
    """Disjoint blocks of held-out text, in turn from each stream until it is used up.

    Arguments:
        streams: named tokens of any integer type; those shorter than a block give none.
        count: blocks in all, at most.
        length: tokens per block.

    Raises:
        ValueError: when no stream is long enough.
    """
    blocks = [block for _, block in _first_blocks(_shuffled(streams, length, seed), count)]
    if not blocks:
        raise ValueError(f"no held-out text is as long as {length} tokens")
    return blocks


def unused_blocks(streams: dict[str, torch.Tensor], used: int, length: int, seed: int) -> dict[str, list[list[int]]]:
    """By stream, the blocks that :func:`blocks_from` did not give out when it was asked for ``used`` of them."""
    shuffled = _shuffled(streams, length, seed)
    given = Counter(name for name, _ in _first_blocks(shuffled, used))
    return {name: blocks[given[name] :] for name, blocks in shuffled.items()}


def _shuffled(streams: dict[str, torch.Tensor], length: int, seed: int) -> dict[str, list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    shuffled = {}
    for name, stream in sorted(streams.items()):
        starts = torch.randperm(stream.numel() // length, generator=generator) * length
        shuffled[name] = [stream[start : start + length].tolist() for start in starts.tolist()]
    return shuffled


def _first_blocks(shuffled: dict[str, list[list[int]]], count: int) -> list[tuple[str, list[int]]]:
    return round_robin([[(name, block) for block in blocks] for name, blocks in shuffled.items()])[:count]


def round_robin(lists: list[list[T]]) -> list[T]:
    """One element of each list in turn, until all are used up."""
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*lists))
    return [element for element in rounds if element is not None]


def continuations(
    llm: OfflineEngine, prompts: list[list[int]], new_tokens: int, seed: int, *, progress: bool = False
) -> torch.Tensor:
    """Prompts with the model's continuations from this engine, int64 (N, prompt + new tokens).

    Arguments:
        prompts: all of the same length.
        progress: show a bar.
    """
    greedy = round(len(prompts) * GREEDY_SHARE)
    params = [
        SamplingParams(
            temperature=0.0 if number < greedy else 0.8,
            top_p=0.95,
            max_tokens=new_tokens,
            ignore_eos=True,
            detokenize=False,
            seed=seed + number,
        )
        for number in range(len(prompts))
    ]
    results = llm.generate([list(p) for p in prompts], params, use_tqdm=progress)
    return torch.tensor([[*r.prompt_token_ids, *r.outputs[0].token_ids] for r in results])
