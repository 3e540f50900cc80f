"""How many pages the cache of keys and values gets, out of what memory."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from ...exits.training.memory import available_memory
from ..model.kv_cache import bytes_per_page, bytes_per_sequence
from .config import EngineConfig, parse_bytes

if TYPE_CHECKING:
    from ..model.spec import ModelSpec

logger = logging.getLogger(__name__)

TYPICAL_TOKENS = 2048  # of one sequence, when the pool's size is left to us
MOST_SNAPSHOTS = 4  # of recurrent states, for each sequence that may run


def count_pages(
    config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, device: torch.device, kv_shards: int = 1
) -> tuple[int, int]:
    """How many pages the pool gets, as many in each KV shard, and how many snapshots of recurrent states are kept.

    States of ``max_num_seqs`` sequences come out of the same memory first, in each KV shard. Snapshots of them get a
    quarter at most of what is left, beside the pages of one sequence where its longest length is given.

    Raises:
        ValueError: when the memory holds no page for each KV shard.
    """
    state_bytes = bytes_per_sequence(spec) * kv_shards
    states = state_bytes * config.max_num_seqs
    page_bytes = bytes_per_page(spec, dtype, config.block_size)
    longest = min(config.max_model_len or spec.max_position, spec.max_position)
    least = -(-longest // config.block_size) * kv_shards if config.max_model_len else 0
    memory = available_memory(device) // 4 if config.kv_memory is None else parse_bytes(config.kv_memory)
    snapshots = 0
    if state_bytes and config.enable_prefix_caching:
        spare = memory - states - least * page_bytes
        snapshots = min(MOST_SNAPSHOTS * config.max_num_seqs, max(0, spare // 4) // state_bytes)
    pages = max(0, memory - states - snapshots * state_bytes) // page_bytes
    if config.kv_memory is None:
        typical = -(-min(longest, TYPICAL_TOKENS) // config.block_size)
        pages = min(pages, max(config.max_num_seqs * typical, least))
    elif pages * page_bytes + states + snapshots * state_bytes > (free := available_memory(device)):
        raise ValueError(f"engine.kv_memory={config.kv_memory} is more than the {free} bytes that are free")
    if pages < kv_shards:
        many = f"{kv_shards} pages, one for each KV shard" if kv_shards > 1 else "page"
        beside = f" beside {states} bytes of states for {config.max_num_seqs} sequences" if states else ""
        raise ValueError(f"engine.kv_memory={config.kv_memory} holds no {many}{beside}; one takes {page_bytes} bytes")
    return pages - pages % kv_shards, snapshots


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
