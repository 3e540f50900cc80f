"""Counts where host code waits for what a device computed, or brings it something: a CUDA graph records neither."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose output has as many elements as the data says: a device must tell the host first.
_SIZED_BY_DATA = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount")
_READS = (
    *("item", "tolist", "cpu", "numpy", "__array__", "__int__", "__float__", "__bool__", "__index__"),
    *("__contains__", "__iter__", "storage"),
)
_WRITES = ("tensor", "as_tensor", "from_numpy")


class _Sized(TorchDispatchMode):
    """Counts such operations, and indexing by a mask, which becomes one of them."""

    def __init__(self, count: Callable[[str], None]) -> None:
        super().__init__()
        self._count = count

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if masks or repeats or name in _SIZED_BY_DATA:
            self._count(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def host_reads(backend: Any, monkeypatch: pytest.MonkeyPatch, found: Counter[str]) -> Iterator[None]:
    """Count what is asked of tensors while the context lasts, by name; not what Triton's interpreter does in a launch.

    On a CPU no copy tells the host from a device, so Python's own calls are watched, and torch's operations below them.
    """
    launching = [False]

    def count(name: str) -> None:
        if not launching[0]:
            found[name] += 1

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            count(name)
            was, launching[0] = launching[0], True  # what it calls in turn is one read
            try:
                return function(*arguments, **more)
            finally:
                launching[0] = was

        return call

    run = getattr(backend, "_run", None)  # other backends than triton have none

    def launch(launches: Any) -> None:
        assert run is not None
        was, launching[0] = launching[0], True
        try:
            with torch.utils._python_dispatch._disable_current_modes():
                run(launches)
        finally:
            launching[0] = was

    with monkeypatch.context() as patched:
        for name in _READS:
            patched.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))
        for name in _WRITES:
            patched.setattr(torch, name, watched(name, getattr(torch, name)))
        patched.setattr(backend, "_run", launch, raising=False)
        with _Sized(count):
            yield
