"""Paged attention on torch's own scaled dot product: all sequences at once while they decode, one by one otherwise.

Shape suffixes are explained in ``types.py``; L is positions, W is pages looked at per sequence, R is query heads per
key/value head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..api.kv_codes import read_pages
from ..api.types import AttentionBatch, KVLayer


def run_attention(
    q_THC: torch.Tensor,
    layer: KVLayer,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None = None,
    sinks_H: torch.Tensor | None = None,
    lse_TH: torch.Tensor | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """What :func:`reference.paged_attention` computes, (T, H, C). A step that only decodes never waits for a device."""
    if batch.max_query_len == 1:
        return _decode(q_THC, layer, batch, scale, window, sinks_H, lse_TH, softcap)
    out_THC = torch.empty_like(q_THC)
    starts, lengths = batch.query_start_S1.tolist(), batch.context_len_S.tolist()
    for s, length in enumerate(lengths):
        rows = slice(starts[s], starts[s + 1])
        lse_RH = None if lse_TH is None else lse_TH[rows]
        out_THC[rows] = _one_sequence(
            q_THC[rows], layer, batch.block_table_SM[s], length, scale, window, sinks_H, lse_RH, softcap
        )
    return out_THC


def _decode(
    q_SHC: torch.Tensor,
    layer: KVLayer,
    batch: AttentionBatch,
    scale: float,
    window: int | None,
    sinks_H: torch.Tensor | None,
    lse_SH: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    page, device = layer.page_size, q_SHC.device
    lengths_S1 = batch.context_len_S[:, None].long()
    width = -(-batch.max_context_len // page)
    first_S1 = torch.zeros_like(lengths_S1)
    if window is not None:
        width = min(width, (window - 1) // page + 2)
        first_S1 = (lengths_S1 - window).clamp(min=0) // page
    columns_SW = first_S1 + torch.arange(width, device=device)
    exists_SW = columns_SW * page < lengths_S1
    table_SW = batch.block_table_SM.gather(1, columns_SW.clamp(max=batch.block_table_SM.shape[1] - 1)).long()
    pages_SW = table_SW.masked_fill(~exists_SW, 0)  # entries beyond the context may be anything
    positions_SL = (columns_SW[..., None] * page + torch.arange(page, device=device)).flatten(1)
    hidden_SL = positions_SL >= lengths_S1
    if window is not None:
        hidden_SL |= positions_SL < lengths_S1 - window
    # What nobody wrote may be NaN, which a mask on the scores alone would not keep out of the sum.
    k_SGLC = _gather(layer.keys_BGPC, pages_SW, layer, q_SHC.dtype).masked_fill_(hidden_SL[:, None, :, None], 0.0)
    v_SGLC = _gather(layer.values_BGPC, pages_SW, layer, q_SHC.dtype).masked_fill_(hidden_SL[:, None, :, None], 0.0)
    # Heads of a group become rows, so that one pass over the keys serves them all.
    q_SGRC = q_SHC.unflatten(1, (k_SGLC.shape[1], -1))
    seen_S11L = ~hidden_SL[:, None, None, :]
    if sinks_H is not None or lse_SH is not None or softcap is not None:
        q_SH1C = q_SHC[:, :, None]
        lse_SH1 = None if lse_SH is None else lse_SH[:, :, None]
        return _step_by_step(q_SH1C, k_SGLC, v_SGLC, seen_S11L, scale, sinks_H, lse_SH1, softcap)[:, :, 0]
    return F.scaled_dot_product_attention(q_SGRC, k_SGLC, v_SGLC, attn_mask=seen_S11L, scale=scale).flatten(1, 2)


def _one_sequence(
    q_RHC: torch.Tensor,
    layer: KVLayer,
    table_M: torch.Tensor,
    length: int,
    scale: float,
    window: int | None,
    sinks_H: torch.Tensor | None,
    lse_RH: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of a sequence's last rows, (R, H, C), with R rows here."""
    page, num_rows = layer.page_size, q_RHC.shape[0]
    past = length - num_rows
    first = 0 if window is None else max(0, past - window + 1) // page
    pages_1W = table_M[first : -(-length // page)].long()[None]
    start = first * page
    k_1GLC = _gather(layer.keys_BGPC, pages_1W, layer, q_RHC.dtype)[:, :, : length - start]
    v_1GLC = _gather(layer.values_BGPC, pages_1W, layer, q_RHC.dtype)[:, :, : length - start]
    explicit = sinks_H is not None or lse_RH is not None or softcap is not None
    causal = past == 0 and (window is None or length <= window) and not explicit
    mask_RL = None
    if not causal:
        index_L = torch.arange(start, length, device=q_RHC.device)
        behind_RL = index_L[past - start :, None] - index_L
        mask_RL = behind_RL >= 0
        if window is not None:
            mask_RL &= behind_RL < window
    q_1HRC, grouped = q_RHC.transpose(0, 1)[None], q_RHC.shape[1] != k_1GLC.shape[1]
    if explicit:
        assert mask_RL is not None
        lse_1HR = None if lse_RH is None else lse_RH.T[None]
        return _step_by_step(q_1HRC, k_1GLC, v_1GLC, mask_RL, scale, sinks_H, lse_1HR, softcap)[0].transpose(0, 1)
    out_1HRC = F.scaled_dot_product_attention(
        q_1HRC, k_1GLC, v_1GLC, attn_mask=mask_RL, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return out_1HRC[0].transpose(0, 1)


def _step_by_step(
    q_SHRC: torch.Tensor,
    k_SGLC: torch.Tensor,
    v_SGLC: torch.Tensor,
    seen: torch.Tensor,
    scale: float,
    sinks_H: torch.Tensor | None,
    lse_SHR: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention step by step, (S, H, R, C): torch's own takes no sinks, caps nothing, does not tell its denominator.

    Arguments:
        seen: which positions every row sees; broadcast to (S, H, R, L).
        lse_SHR: takes the logarithm of the denominator.
    """
    repeats = q_SHRC.shape[1] // k_SGLC.shape[1]
    k_SHLC, v_SHLC = (x.float().repeat_interleave(repeats, 1) for x in (k_SGLC, v_SGLC))
    scores_SHRL = q_SHRC.float() @ k_SHLC.transpose(-1, -2) * scale
    if softcap is not None:
        scores_SHRL = scores_SHRL.div_(softcap).tanh_().mul_(softcap)
    total_SHR = scores_SHRL.masked_fill_(~seen, float("-inf")).logsumexp(-1)
    if sinks_H is not None:
        total_SHR = torch.logaddexp(total_SHR, sinks_H[:, None])
    if lse_SHR is not None:
        lse_SHR.copy_(total_SHR)
    return ((scores_SHRL - total_SHR[..., None]).exp_() @ v_SHLC).to(q_SHRC.dtype)


def _gather(stored_BGPX: torch.Tensor, pages_SW: torch.Tensor, layer: KVLayer, dtype: torch.dtype) -> torch.Tensor:
    """A copy of some pages, side by side: (S, G, W · P, C), in ``dtype`` where they are kept in 8 bits."""
    found = read_pages(stored_BGPX, pages_SW, layer).transpose(1, 2).flatten(2, 3)
    return found.to(dtype) if layer.keys_BGPC.itemsize == 1 else found
