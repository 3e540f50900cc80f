"""Memory for keys and values: how many pages there are, and the tensors that hold them.

Which tensors a layer's cache has, and of which shape, its kind of attention says.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...kernels.api.types import KVLayer, KVLayers
from ..engine.config import EngineConfig

if TYPE_CHECKING:
    from .attention.kind import AttentionSpec
    from .spec import ModelSpec

TYPICAL_TOKENS = 2048  # of one sequence, when the pool's size is left to us
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_ALIGNMENT = 64


def parse_bytes(amount: int | str) -> int:
    """``"2GiB"``, ``"512 MB"`` or a number, in bytes.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(amount, int):
        return amount
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", amount)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"engine.kv_memory must be a number of bytes or like '2GiB', not {amount!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def free_memory(device: torch.device) -> int:
    """Bytes that a new allocation on the device could take now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (match := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        free = int(match[1]) * 1024
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min(free, _cgroup_headroom())


def _cgroup_headroom() -> int:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:  # no cgroup v2 here
        return 1 << 62
    return 1 << 62 if limit == "max" else max(int(limit) - used, 0)


def bytes_per_page(spec: ModelSpec, dtype: torch.dtype, page_size: int) -> int:
    """Of the caches of all layers together."""
    shapes = [shape for layer in spec.layers for shape in layer.attention.cache_shapes(page_size, dtype)]
    return sum(math.prod(shape) for shape in shapes) * dtype.itemsize


def count_pages(config: EngineConfig, spec: ModelSpec, dtype: torch.dtype, device: torch.device, homes: int = 1) -> int:
    """How many pages the pool gets: as many in each home.

    Raises:
        ValueError: when the memory holds no page for each home.
    """
    page_bytes = bytes_per_page(spec, dtype, config.block_size)
    longest = min(config.max_model_len or spec.max_position, spec.max_position)
    if config.kv_memory is None:
        typical = -(-min(longest, TYPICAL_TOKENS) // config.block_size)
        least = -(-longest // config.block_size) * homes if config.max_model_len else 0
        wanted = max(config.max_num_seqs * typical, least)
        pages = min(wanted, free_memory(device) // 4 // page_bytes)
    else:
        pages = parse_bytes(config.kv_memory) // page_bytes
    if pages < homes:
        many = f"{homes} pages, one for each home" if homes > 1 else "page"
        raise ValueError(f"engine.kv_memory={config.kv_memory} holds no {many}; one takes {page_bytes} bytes")
    return pages - pages % homes


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
    zeros = _lazy_zeros if device.type == "cpu" else torch.zeros

    def cache(attention: AttentionSpec) -> KVLayer:
        shapes = attention.cache_shapes(page_size, dtype)
        tensors = [zeros((num_pages, *shape), dtype=dtype, device=device) for shape in shapes]
        return attention.cache(tensors, scales_behind_page)

    return KVLayers(cache(layer.attention) for layer in spec.layers)


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
        for tensor in layer.tensors:
            pages = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor  # torch indexes no 8-bit floats
            pages[targets] = pages[sources]
