"""The tensors that hold keys and values in pages, and recurrent states in slots.

Which tensors a layer's cache has, and of which shape, its kind of attention says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ...kernels.api.kv_codes import KV_DTYPES
from ...kernels.api.types import KVLayer, KVLayers, StateLayer

if TYPE_CHECKING:
    from ...kernels.torch.backend import TorchBackend
    from .attention.kind import AttentionSpec
    from .spec import ModelSpec

_ALIGNMENT = 64
Copies = Sequence[tuple[int, int]]  # (from, to)


def check_kv_dtype(name: str, spec: ModelSpec | None = None, backend: TorchBackend | None = None) -> None:
    """Raises ValueError for a ``kv_cache_dtype`` that does not exist, or that a backend or a layer does not take."""
    if name not in KV_DTYPES:
        raise ValueError(f"kv_cache_dtype must be {', '.join(KV_DTYPES)}, not {name!r}")
    if backend is not None and name not in backend.kv_formats:
        known = ", ".join(backend.kv_formats)
        raise ValueError(f"kv_cache_dtype={name} does not run on the {backend.name} backend; {known} do")
    for attention in (layer.attention for layer in (spec.layers if spec is not None else ())):
        if name not in attention.kv_formats:
            known = ", ".join(attention.kv_formats)
            raise ValueError(f"kv_cache_dtype={name} does not go with {attention.kind!r} attention; {known} do")


def bytes_per_page(spec: ModelSpec, dtype: torch.dtype, page_size: int) -> int:
    """Of the caches of all layers together."""
    return sum(group_page_bytes(spec, dtype, page_size))


def group_page_bytes(spec: ModelSpec, dtype: torch.dtype, page_size: int) -> list[int]:
    """Of one page of each group of layers, see :attr:`.ModelSpec.page_windows`."""
    sizes = dict.fromkeys(spec.page_windows, 0)
    for attention in (layer.attention for layer in spec.layers if layer.attention.keeps_keys):
        shapes = attention.cache_shapes(page_size, dtype)
        sizes[attention.reach] += sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    return list(sizes.values())


def bytes_per_sequence(spec: ModelSpec) -> int:
    """Of the recurrent states of all layers together, which one sequence has whatever its length."""
    shapes = [shape for layer in spec.layers for shape in layer.attention.state_shapes()]
    return sum(math.prod(shape) for shape in shapes) * torch.float32.itemsize


def allocate_layers(
    spec: ModelSpec,
    num_pages: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    scales_behind_page: bool = False,
    num_states: int = 1,
    window_pages: Sequence[int] = (),
) -> KVLayers:
    """Zeroed keys and values of every layer: attention multiplies slots it must not see by zero, so no slot is NaN.

    Arguments:
        scales_behind_page: as the backend wants it, see :class:`KVLayer`.
        num_states: sequences that have recurrent states at a time.
        window_pages: of the groups of layers behind the first; none: as many as that has, with the same numbers.
    """
    pages = (num_pages, *(window_pages or [num_pages] * (len(spec.page_windows) - 1)))
    zeros = _lazy_zeros if device.type == "cpu" else torch.zeros
    none = torch.empty(0, dtype=dtype, device=device)

    def cache(attention: AttentionSpec) -> KVLayer:
        if not attention.keeps_keys:
            shapes = attention.state_shapes()
            tensors = [zeros((num_states, *shape), dtype=torch.float32, device=device) for shape in shapes]
            return StateLayer(keys_BGPC=none, values_BGPC=none, states=tuple(tensors))
        group = spec.page_windows.index(attention.reach)
        shapes = attention.cache_shapes(page_size, dtype)
        tensors = [zeros((pages[group], *shape), dtype=dtype, device=device) for shape in shapes]
        return replace(attention.cache(tensors, scales_behind_page), group=group)

    return KVLayers(cache(layer.attention) for layer in spec.layers)


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros whose memory the system hands out when it is first written: an idle server stays small."""
    nbytes = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(nbytes + _ALIGNMENT, dtype=np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[offset : offset + nbytes]).view(dtype).view(shape)


def copy_pages(layers: Sequence[KVLayer], *copies: Copies) -> None:
    """Copy whole pages, in all layers. All sources are read before any target is written.

    Arguments:
        copies: by group of layers; where there is one alone, it is for all groups.
    """
    for group, pairs in enumerate(copies):
        if not pairs:
            continue
        sources, targets = (list(pages) for pages in zip(*pairs, strict=True))
        for layer in layers if len(copies) == 1 else [layer for layer in layers if layer.group == group]:
            for tensor in layer.tensors:
                pages = tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor  # torch indexes no 8-bit floats
                pages[targets] = pages[sources]


def copy_states(layers: Sequence[KVLayer], copies: Copies) -> None:
    """Copy the recurrent states of sequences, (from slot, to slot), in all layers, as :func:`copy_pages` does pages."""
    if not copies:
        return
    sources, targets = (list(slots) for slots in zip(*copies, strict=True))
    for layer in layers:
        for states in layer.states if isinstance(layer, StateLayer) else ():
            states[targets] = states[sources]
