"""A pass over whole sequences outside of the engine: a cache of its own, and where each row lives in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...kernels.api.types import AttentionBatch, KVLayer
from .decoder import Decoder

_PAGE = 16


def fresh_cache(decoder: Decoder, lengths: Sequence[int]) -> tuple[list[KVLayer], AttentionBatch]:
    """Room for sequences from their beginnings, each in pages of its own, and the attention batch of all their rows.

    Each goes to the KV shard that has the fewest pages so far.

    Arguments:
        lengths: tokens of each sequence, at least 1.
    """
    device = torch.device(decoder.device)
    pages = [-(-length // _PAGE) for length in lengths]
    used, places = [0] * decoder.kv_shards, []
    for count in pages:
        kv_shard = used.index(min(used))
        places.append((kv_shard, used[kv_shard]))
        used[kv_shard] += count
    firsts = [kv_shard * max(used) + page for kv_shard, page in places]
    table_SM = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
    positions, slots = [], []
    for row, (length, first, count) in enumerate(zip(lengths, firsts, pages, strict=True)):
        table_SM[row, :count] = torch.arange(first, first + count)
        positions.append(torch.arange(length))
        slots.append(first * _PAGE + positions[-1])
    batch = AttentionBatch(
        positions_T=torch.cat(positions).to(device),
        slots_T=torch.cat(slots).to(device),
        query_start_S1=torch.tensor([0, *lengths]).cumsum(0).int().to(device),
        context_len_S=torch.tensor(lengths, dtype=torch.int32, device=device),
        block_table_SM=table_SM.to(device),
        max_query_len=max(lengths),
        max_context_len=max(lengths),
        state_slots_S=torch.arange(len(lengths), device=device) if decoder.spec.has_states else None,
    )
    return decoder.allocate_cache(max(used) * decoder.kv_shards, _PAGE, decoder.kv_shards, len(lengths)), batch
