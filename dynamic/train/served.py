"""Text that the model itself writes: exits are judged on what is served, not only on what was read.

Shape suffixes: N sequences, L positions.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

import torch

from ..engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from ..engine.offline import OfflineEngine

GREEDY_SHARE = 0.5  # the other half is sampled, since a served prefix may be either


def blocks_from(streams: dict[str, torch.Tensor], count: int, length: int, seed: int) -> list[list[int]]:
    """Pieces of held-out text that do not overlap, in turn from each stream until it is used up.

    Arguments:
        streams: named tokens of any integer type; those shorter than a block give none.
        count: blocks in all, at most.
        length: tokens per block.

    Raises:
        ValueError: when no stream is long enough.
    """
    waiting = [[(name, block) for block in blocks] for name, blocks in _shuffled(streams, length, seed).items()]
    blocks = [block for _, block in _rounds(waiting, count)]
    if not blocks:
        raise ValueError(f"no held-out text is as long as {length} tokens")
    return blocks


def unused_blocks(streams: dict[str, torch.Tensor], used: int, length: int, seed: int) -> dict[str, list[list[int]]]:
    """By stream, the blocks that :func:`blocks_from` did not give out when it was asked for ``used`` of them."""
    shuffled = _shuffled(streams, length, seed)
    given = Counter(name for name, _ in _rounds([[(n, b) for b in blocks] for n, blocks in shuffled.items()], used))
    return {name: blocks[given[name] :] for name, blocks in shuffled.items()}


def _shuffled(streams: dict[str, torch.Tensor], length: int, seed: int) -> dict[str, list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    shuffled = {}
    for name, stream in sorted(streams.items()):
        starts = torch.randperm(stream.numel() // length, generator=generator) * length
        shuffled[name] = [stream[start : start + length].tolist() for start in starts.tolist()]
    return shuffled


def _rounds(waiting: list[list[tuple[str, list[int]]]], count: int) -> list[tuple[str, list[int]]]:
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*waiting))
    return list(itertools.islice((block for block in rounds if block is not None), count))


def continuations(
    llm: OfflineEngine, prompts: list[list[int]], new_tokens: int, seed: int, *, progress: bool = False
) -> torch.Tensor:
    """Prompts with what the model makes of them, int64 (N, prompt + new tokens), through this framework's engine.

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
