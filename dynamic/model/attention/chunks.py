"""Chunked attention: a row sees the positions of its own chunk only, up to its own."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from ....kernels.api.types import AttentionBatch


def within_chunks(batch: AttentionBatch, chunk: int, page_size: int) -> AttentionBatch:
    """The same rows, with each chunk of a sequence as a sequence of its own.

    Arguments:
        chunk: positions in a chunk, a multiple of the page size.
    """
    if batch.max_context_len <= chunk:
        return batch
    made = batch.derived.get((chunk, page_size))
    if made is None:
        split = _last_chunks if batch.max_query_len == 1 else _split
        made = batch.derived[chunk, page_size] = split(batch, chunk, page_size)
    return made


def _last_chunks(batch: AttentionBatch, chunk: int, page_size: int) -> AttentionBatch:
    """As :func:`_split` where sequences have one row each, without waiting for what the device knows of them."""
    last_S, table_SM = batch.context_len_S - 1, batch.block_table_SM
    pages_M = torch.arange(chunk // page_size, device=table_SM.device)
    columns_SM = (last_S // chunk * (chunk // page_size))[:, None] + pages_M
    return replace(
        batch,
        context_len_S=last_S % chunk + 1,
        block_table_SM=table_SM.gather(1, columns_SM.clamp(max=table_SM.shape[1] - 1)),
        max_context_len=chunk,
        max_position=batch.num_positions - 1,
    )


def _split(batch: AttentionBatch, chunk: int, page_size: int) -> AttentionBatch:
    # Cache policies are refused for layers that see parts of a context: positions are indices into it.
    owners, first_pages, starts, contexts = [], [], [0], []
    for sequence, (length, first, last) in enumerate(
        zip(
            batch.context_len_S.tolist(),
            batch.query_start_S1[:-1].tolist(),
            batch.query_start_S1[1:].tolist(),
            strict=True,
        )
    ):
        position = length - (last - first)
        while position < length:
            begin = position // chunk * chunk
            end = min(begin + chunk, length)
            owners.append(sequence)
            first_pages.append(begin // page_size)
            starts.append(starts[-1] + end - position)
            contexts.append(end - begin)
            position = end
    device, table_SM = batch.block_table_SM.device, batch.block_table_SM
    columns_M = torch.arange(-(-max(contexts) // page_size), device=device)
    columns_SM = torch.tensor(first_pages, device=device)[:, None] + columns_M
    owners_S = torch.tensor(owners, device=device)
    return replace(
        batch,
        query_start_S1=torch.tensor(starts, dtype=torch.int32, device=device),
        context_len_S=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_table_SM=table_SM[owners_S[:, None], columns_SM.clamp(max=table_SM.shape[1] - 1)].contiguous(),
        max_query_len=max(last - first for first, last in pairwise(starts)),
        max_context_len=max(contexts),
        max_position=batch.num_positions - 1,
    )
