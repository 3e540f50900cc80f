"""How many pages the cache of keys and values gets, out of what memory."""

from __future__ import annotations

import logging
from bisect import bisect_right
from typing import TYPE_CHECKING

import torch

from ...exits.training.memory import available_memory
from ...kernels.api.ranges import parse_bytes
from ..model.kv_cache import bytes_per_sequence, group_page_bytes
from .block_pool import BlockPool
from .config import EngineConfig
from .prefix_cache import PrefixCache
from .state_snapshots import StateSnapshots
from .window_pages import WindowPages

if TYPE_CHECKING:
    from ..model.spec import ModelSpec

logger = logging.getLogger(__name__)

TYPICAL_TOKENS = 2048  # of one sequence, when the pool's size is left to us
MOST_SNAPSHOTS = 4  # of recurrent states, for each sequence that may run


def count_pages(
    config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, device: torch.device, kv_shards: int = 1
) -> tuple[int, int]:
    """How many pages the pool gets, as many in each KV shard, and how many snapshots of recurrent states are kept.

    Beside the pool are :class:`.WindowPages` of layers that see less than others. States of ``max_num_seqs`` sequences
    come out of the same memory first, in each KV shard. Snapshots of them get a quarter at most of what is left, beside
    the pages of one sequence where its longest length is given.

    Raises:
        ValueError: when the memory holds no page for each KV shard.
    """
    state_bytes = bytes_per_sequence(spec) * kv_shards
    states = state_bytes * config.max_num_seqs
    first, *others = group_page_bytes(spec, dtype, config.block_size)
    most = [most_seen(config, window, kv_shards) for window in spec.page_windows[1:] if window is not None]

    def size(pages: int) -> int:
        return pages * first + sum(min(pages, limit) * each for limit, each in zip(most, others, strict=True))

    longest = min(config.max_model_len or spec.max_position, spec.max_position)
    least = -(-longest // config.block_size) * kv_shards if config.max_model_len else 0
    memory = (
        available_memory(device) // 4 if config.kv_memory is None else parse_bytes(config.kv_memory, "engine.kv_memory")
    )
    snapshots = 0
    if state_bytes and config.enable_prefix_caching:
        spare = memory - states - size(least)
        snapshots = min(MOST_SNAPSHOTS * config.max_num_seqs, max(0, spare // 4) // state_bytes)
    left = max(0, memory - states - snapshots * state_bytes)
    pages = bisect_right(range(left // first + 1), left, key=size) - 1
    if config.kv_memory is None:
        typical = -(-min(longest, TYPICAL_TOKENS) // config.block_size)
        pages = min(pages, max(config.max_num_seqs * typical, least))
    elif size(pages) + states + snapshots * state_bytes > (free := available_memory(device)):
        raise ValueError(f"engine.kv_memory={config.kv_memory} is more than the {free} bytes that are free")
    if pages < kv_shards:
        many = f"{kv_shards} pages, one for each KV shard" if kv_shards > 1 else "page"
        beside = f" beside {states} bytes of states for {config.max_num_seqs} sequences" if states else ""
        raise ValueError(f"engine.kv_memory={config.kv_memory} holds no {many}{beside}; one takes {size(1)} bytes")
    return pages - pages % kv_shards, snapshots


def most_seen(config: EngineConfig, window: int, kv_shards: int) -> int:
    """Pages that are enough for a window of each sequence and one step's rows, wherever the sequences live; twice as
    many where prefixes are kept."""
    size = config.block_size
    seen = config.max_num_seqs * (-(-window // size) + 2) + -(-config.max_num_batched_tokens // size)
    return kv_shards * seen * (2 if config.enable_prefix_caching else 1)


def make_cache(
    config: EngineConfig, spec: ModelSpec, pool: BlockPool, snapshots: int, max_model_len: int
) -> PrefixCache:
    """What finds shared pages of a pool, with the pages of layers that see less than others.

    Arguments:
        snapshots: of recurrent states, in slots behind those of running sequences.
    """
    size, running = config.block_size, config.max_num_seqs
    windows = [
        WindowPages(pool, min(pool.num_pages, most_seen(config, window, pool.kv_shards)), window, size)
        for window in spec.page_windows[1:]
        if window is not None
    ]
    if not spec.has_states:
        return PrefixCache(pool, size, config.enable_prefix_caching, windows=windows)
    if config.enable_prefix_caching and not snapshots:
        logger.info("no prefixes are shared: there is no memory for copies of recurrent states")
    kept = StateSnapshots(range(running, running + snapshots), size, max_model_len)
    return PrefixCache(pool, size, config.enable_prefix_caching and snapshots > 0, kept, windows)


def longest_sequence(config: EngineConfig, spec: ModelSpec, num_pages: int) -> int:
    """Tokens of prompt and output together that one sequence may have; ``num_pages`` are those of one KV shard."""
    wanted = spec.max_position if config.max_model_len is None else config.max_model_len
    if wanted > spec.max_position:
        raise ValueError(f"engine.max_model_len={wanted} exceeds {spec.longest_context}")
    held = num_pages * config.block_size
    if wanted <= held:
        return wanted
    if config.max_model_len is not None and config.kv_memory is not None:
        raise ValueError(
            f"engine.kv_memory={config.kv_memory} holds {held} tokens, fewer than engine.max_model_len={wanted}"
        )
    logger.info("the key/value cache holds %d tokens: max_model_len is %d instead of %d", held, held, wanted)
    return held
