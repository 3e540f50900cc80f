"""One kernel launch as data: the same object runs on the device, runs in the interpreter, or compiles ahead of time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

_DTYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A kernel, its grid, its arguments and its compile-time configuration.

    Arguments:
        kernel: what ``@triton.jit`` made.
        grid: programs in up to three dimensions.
        args: run-time arguments by name: tensors, tensor descriptors, numbers, or None for a tensor that is not there.
        constexprs: compile-time arguments by name.
        role: what its configuration is called among a variant's tilings, if not by the kernel's name.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    constexprs: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    role: str = ""

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def part(self) -> str:
        """What its configuration is called among a variant's tilings."""
        return self.role or self.name.removesuffix("_kernel")

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told beside them."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def run(self) -> None:
        """Launch on the current device. A grid with no programs is skipped."""
        if all(self.grid):
            self.kernel[self.grid](**self.args, **self.constexprs, **self.options)

    def warm(self) -> None:
        """Compile for the current device without launching; tensors may be on the meta device."""
        self.kernel.warmup(grid=self.grid, **self.args, **self.constexprs, **self.options)

    def compile(self, target: GPUTarget) -> CompiledKernel:
        """Compile for a target that need not be present, specialised as :meth:`run` would be on it."""
        fixed = self._unspecialized()
        signature, constants, attrs = {}, dict(self.constexprs), {}
        for index, name in enumerate(self.kernel.arg_names):
            value = self.args.get(name)
            if name in self.constexprs or value is None:
                signature[name] = "constexpr"
                constants[name] = self.constexprs.get(name)
            elif isinstance(value, torch.Tensor):
                signature[name] = f"*{_DTYPES[value.dtype]}"
                attrs[(index,)] = _ALIGNED
            elif isinstance(value, TensorDescriptor):
                shape = ",".join(str(size) for size in value.block_shape)
                signature[name] = f"tensordesc<{_DTYPES[value.base.dtype]}[{shape}]>"
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
                if name not in fixed and value % 16 == 0:
                    attrs[(index,)] = _ALIGNED
        source = ASTSource(self.kernel, signature, constants, attrs)
        return triton.compile(source, target=target, options=self.options)

    def variant(self) -> tuple:
        """What decides which compiled kernel a launch uses: equal variants share one."""
        fixed = self._unspecialized()
        kinds: list[tuple] = []
        for name, value in self.args.items():
            if isinstance(value, torch.Tensor):
                kinds.append((name, value.dtype))
            elif isinstance(value, TensorDescriptor):
                kinds.append((name, value.base.dtype, tuple(value.block_shape)))
            elif isinstance(value, int) and name not in fixed:
                kinds.append((name, value % 16 == 0, value == 1))
            else:
                kinds.append((name, value is None))
        constexprs = tuple(sorted(self.constexprs.items()))
        return self.name, tuple(sorted(kinds)), constexprs, self.num_warps, self.num_stages

    def _unspecialized(self) -> set[str]:
        return {p.name for p in getattr(self.kernel, "params", ()) if p.do_not_specialize}  # the interpreter has none


def next_power_of_2(value: int) -> int:
    """Smallest power of two that is at least ``value`` and at least 1."""
    return 1 << max(value - 1, 0).bit_length()


def cdiv(value: int, divisor: int) -> int:
    """Division rounded up."""
    return -(-value // divisor)


def require_contiguous(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError naming a tensor whose rows a kernel could not walk."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous; it has shape {tuple(tensor.shape)}, strides {tensor.stride()}"
            )


def require_contiguous_channels(**tensors: torch.Tensor) -> None:
    """Raise ValueError naming a tensor whose last dimension is strided; the others may be."""
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have contiguous channels; its strides are {tensor.stride()}")
