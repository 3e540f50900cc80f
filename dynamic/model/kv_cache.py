"""The tensors that hold keys and values.

Shape suffixes: B pages, G key/value heads, P tokens per page, C channels of one head as they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...kernels.api.kv_codes import stored_channels
from ...kernels.api.types import KVLayer, KVLayers

if TYPE_CHECKING:
    from .spec import ModelSpec

_ALIGNMENT = 64


def bytes_per_page(spec: ModelSpec, dtype: torch.dtype, page_size: int) -> int:
    """Keys and values of all layers for one page."""
    channels = stored_channels(spec.head_dim, dtype)
    return 2 * spec.num_layers * spec.num_kv_heads * page_size * channels * dtype.itemsize


def allocate_layers(
    spec: ModelSpec,
    num_pages: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    scales_behind_page: bool = False,
) -> KVLayers:
    """Zeroed keys and values of every layer: attention multiplies slots it must not see by zero, so no slot is NaN.

    Arguments:
        scales_behind_page: as the backend wants it, see :class:`KVLayer`.
    """
    shape = (num_pages, spec.num_kv_heads, page_size, stored_channels(spec.head_dim, dtype))
    zeros = _lazy_zeros if device.type == "cpu" else torch.zeros
    pairs = [[zeros(shape, dtype=dtype, device=device) for _ in range(2)] for _ in range(spec.num_layers)]
    return KVLayers(KVLayer(keys_BGPC=k, values_BGPC=v, scales_behind_page=scales_behind_page) for k, v in pairs)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose memory the system hands out when it is first written: an idle server stays small."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(nbytes + _ALIGNMENT, dtype=np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[offset : offset + nbytes]).view(dtype).view(shape)


def copy_pages(layers: Sequence[KVLayer], copies: list[tuple[int, int]]) -> None:
    """Copy whole pages, in all layers. All sources are read before any target is written."""
    sources, targets = (list(pages) for pages in zip(*copies, strict=True))
    for layer in layers:
        for tensor in (layer.keys_BGPC, layer.values_BGPC):
            pages = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor  # torch indexes no 8-bit floats
            pages[targets] = pages[sources]
