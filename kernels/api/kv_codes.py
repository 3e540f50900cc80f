"""Keys and values in 8 bits: how a cache keeps the head of a token, and what it stands for.

**int8**: C codes and their scale as two bytes (bfloat16): C + 2 bytes in place of 2 C. A scale is the largest magnitude
of the head over 127, rounded up, so that no code is cut off; rows are quantised one by one and never depend on others.
Symmetric, per token and head, as KVQuant and KIVI do it for values; keys are taken the same way, after their rotation.
The scale lies right behind its codes, or those of a page lie behind all of the page's codes (GPUs: there the codes of a
head begin at multiples of 16 bytes, and one load of a thread takes that many).

**fp8**: e4m3 (Micikevicius et al. 2022) without a scale, as serving engines keep it by default: C bytes. What lies
beyond ± 448 is cut off, and NaN stays.
"""

from __future__ import annotations

import torch

from .formats import FP8_MAX
from .types import KVLayer

# As ``kv_cache_dtype`` names them; None: the model's own.
KV_DTYPES = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
SCALE_BYTES = 2


def stored_channels(head_dim: int, dtype: torch.dtype) -> int:
    """Elements that a head of ``head_dim`` channels takes in a cache of this dtype."""
    return head_dim + SCALE_BYTES if dtype == torch.int8 else head_dim


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Heads (..., C), floating, as int8 codes (..., C) and bfloat16 scales (...).

    A head that is not finite gets NaN for a scale.
    """
    x32 = x.float()
    bits = (x32.abs().amax(-1) / 127).view(torch.int32)
    scale = ((bits + 0xFFFF) >> 16 << 16).view(torch.float32)
    scale = torch.where(x32.isfinite().all(-1), scale, torch.nan)
    inverse = torch.where(scale > 0, 1 / scale, 0.0)[..., None]
    codes = (x32 * inverse).round().clamp(-127, 127).nan_to_num().to(torch.int8)
    return codes, scale.bfloat16()


def codes_and_scales(stored_BGPX: torch.Tensor, scales_behind_page: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of int8 pages, (B, G, P, C + 2): codes (B, G, P, C) and bfloat16 scales (B, G, P)."""
    page, channels = stored_BGPX.shape[-2], stored_BGPX.shape[-1] - SCALE_BYTES
    if not scales_behind_page:
        return stored_BGPX[..., :channels], stored_BGPX[..., channels:].view(torch.bfloat16)[..., 0]
    pages_BGX = stored_BGPX.flatten(-2)
    codes_BGX, scales_BGX = pages_BGX[..., : page * channels], pages_BGX[..., page * channels :]
    return codes_BGX.unflatten(-1, (page, channels)), scales_BGX.view(torch.bfloat16)


def write_heads(
    stored_BGPX: torch.Tensor, x_TGC: torch.Tensor, pages_T: torch.Tensor, offsets_T: torch.Tensor, layer: KVLayer
) -> None:
    """Put heads, one row per token, into their slots of ``layer``'s keys or values."""
    if layer.coded:
        codes_BGPC, scales_BGP = codes_and_scales(stored_BGPX, layer.scales_behind_page)
        codes_BGPC[pages_T, :, offsets_T], scales_BGP[pages_T, :, offsets_T] = quantize(x_TGC)
    elif stored_BGPX.dtype == torch.float8_e4m3fn:  # torch has no indexing of it everywhere
        x_TGC = x_TGC.float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        stored_BGPX.view(torch.uint8)[pages_T, :, offsets_T] = x_TGC.view(torch.uint8)
    else:
        stored_BGPX[pages_T, :, offsets_T] = x_TGC.to(stored_BGPX.dtype)


def read_pages(stored_BGPX: torch.Tensor, pages: torch.Tensor, layer: KVLayer) -> torch.Tensor:
    """Some pages of ``layer``'s keys or values, (..., G, P, C): as they are, 8 bits as float32."""
    if layer.coded:
        codes_BGPC, scales_BGP = codes_and_scales(stored_BGPX, layer.scales_behind_page)
        return codes_BGPC[pages].float() * scales_BGP[pages].float()[..., None]
    if stored_BGPX.dtype == torch.float8_e4m3fn:
        return stored_BGPX.view(torch.uint8)[pages].view(torch.float8_e4m3fn).float()
    return stored_BGPX[pages]
