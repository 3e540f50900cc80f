"""How the cache keeps latents and the keys that heads share: one entry per token, kernels' keys and values at once.

In 8 bits the latent is int8 with one scale per token (``kv_codes.py``), and the rotated key behind it stays bfloat16:
positions are told apart by it.

Shape suffixes as in ``types.py``, and
    Z channels of a latent    R channels of the key behind it    X elements of an entry    U pages that a step reads
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .kv_codes import SCALE_BYTES, quantize
from .types import AttentionBatch, KVLayer

KV_FORMATS = ("auto", "int8")
_KEY_BYTES = 2  # of a channel of the shared key, where latents are codes


def entry_size(latent: int, rotated: int, dtype: torch.dtype) -> int:
    """Elements of an entry in a cache of this dtype."""
    return latent + (SCALE_BYTES + _KEY_BYTES * rotated if dtype == torch.int8 else rotated)


def write_entries(latent_TZ: torch.Tensor, key_TR: torch.Tensor, kv: KVLayer, batch: AttentionBatch) -> None:
    """Put the rows' entries into their slots."""
    if kv.coded:
        codes_TZ, scale_T = quantize(latent_TZ)
        bytes_of_key = key_TR.bfloat16().contiguous().view(torch.int8)
        entry_TX = torch.cat((codes_TZ, scale_T[:, None].view(torch.int8), bytes_of_key), -1)
    else:
        entry_TX = torch.cat((latent_TZ, key_TR), -1)
    pages_T, offsets_T = batch.slots_T // kv.page_size, batch.slots_T % kv.page_size
    kv.keys_BGPC[pages_T, 0, offsets_T] = entry_TX


def readable(kv: KVLayer, batch: AttentionBatch, latent: int, dtype: torch.dtype) -> tuple[KVLayer, AttentionBatch]:
    """A cache that attention's kernels read, and where the rows' contexts are in it.

    Arguments:
        latent: Z.
        dtype: of what codes become.
    """
    if not kv.coded:
        return kv, batch
    counts = [-(-length // kv.page_size) for length in batch.context_len_S.tolist()]
    table_SM = batch.block_table_SM[:, : max(counts)]
    exists_SM = torch.arange(table_SM.shape[1], device=table_SM.device) < torch.tensor(
        counts, device=table_SM.device
    ).unsqueeze(1)
    entries_UGPX = kv.keys_BGPC[table_SM[exists_SM].long()]
    codes, scale, key = entries_UGPX.split((latent, SCALE_BYTES, entries_UGPX.shape[-1] - latent - SCALE_BYTES), -1)
    scale, key = (part.contiguous().view(torch.bfloat16) for part in (scale, key))
    wide_UGPC = torch.cat((codes.float() * scale.float(), key.float()), -1).to(dtype)
    places_SM = torch.zeros_like(table_SM)
    places_SM[exists_SM] = torch.arange(len(wide_UGPC), dtype=table_SM.dtype, device=table_SM.device)
    return KVLayer(keys_BGPC=wide_UGPC, values_BGPC=wide_UGPC), replace(batch, block_table_SM=places_SM)
