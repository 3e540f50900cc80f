"""The only place that chooses which backend runs the operations."""

from __future__ import annotations

import warnings

import torch

from .torch.backend import TorchBackend

BACKENDS = ("auto", "torch", "cpu", "triton", "grouped_mm", "megablocks")


def select_backend(device: torch.device | str, dtype: torch.dtype, name: str = "auto") -> TorchBackend:
    """The backend for a device and dtype.

    Arguments:
        name: ``auto`` takes the fastest that runs here; ``cpu:avx512vnni`` the CPU's with this instruction set, one of
            ``cpu.build.isas()``.

    Raises:
        ValueError: for an unknown name, or a backend that cannot run here: on that device, in that dtype, without a
            GPU, a package or (``cpu``) a compiler.
    """
    name, _, isa = name.partition(":")
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    if isa and name != "cpu":
        raise ValueError(f"backend {name!r} takes no instruction set, not {isa!r}; cpu does")
    if name == "cpu":
        return _cpu(device, dtype, isa or "auto")
    if name == "triton":
        from .triton.backend import TritonBackend

        return TritonBackend(device, dtype)
    if name == "grouped_mm":
        from .torch.grouped_mm import GroupedMmBackend

        return GroupedMmBackend(device, dtype)
    if name == "megablocks":
        from .torch.megablocks import MegaBlocksBackend

        return MegaBlocksBackend(device, dtype)
    return _fastest(device, dtype) if name == "auto" else TorchBackend(device, dtype)


def _fastest(device: torch.device | str, dtype: torch.dtype) -> TorchBackend:
    kind = torch.device(device).type
    try:
        if kind == "cuda" and dtype in (torch.bfloat16, torch.float16):
            return select_backend(device, dtype, "triton")
    except (ImportError, ValueError) as error:
        _warn(str(error))
    if kind == "cpu" and dtype in (torch.float32, torch.bfloat16):
        from .cpu.backend import CpuBackend
        from .cpu.build import BuildError

        try:
            return CpuBackend(device, dtype)
        except BuildError as error:  # anything else is a bug, and a slow server would hide it
            _warn(f"several times slower: the cpu backend cannot run here: {error}")
    return TorchBackend(device, dtype)


def _warn(why: str) -> None:
    # The warnings module shows the same text from the same place once per process.
    warnings.warn(f"running on torch's own operations, {why}", RuntimeWarning, stacklevel=4)


def _cpu(device: torch.device | str, dtype: torch.dtype, isa: str) -> TorchBackend:
    from .cpu.backend import CpuBackend
    from .cpu.build import BuildError

    try:
        return CpuBackend(device, dtype, isa)
    except BuildError as error:
        raise ValueError(f"the cpu backend cannot run here: {error}") from error
