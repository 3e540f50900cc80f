"""The tensors of one quantised weight in a checkpoint, and what is read of them where only a part of it is wanted.

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from .weights import CheckpointError, TensorInfo

Index = tuple[slice, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some outputs and inputs of a weight (O, I), or some outputs of a bias (O) or of a convolution (O, 1, W).

    Arguments:
        outputs, inputs: without steps; None: all.
    """

    outputs: slice | None = None
    inputs: slice | None = None

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """The part, a view."""
        return weight[self.of(tuple(weight.shape))]

    def of(self, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """As numbers from 0 on, for a weight of this shape."""
        parts = (self.outputs, self.inputs, None)[: len(shape)]
        return tuple(slice(0, size) if part is None else part for part, size in zip(parts, shape, strict=True))


ALL = Part()


@dataclass(frozen=True)
class Runs:
    """Several runs of outputs, one behind the other."""

    parts: tuple[Part, ...]

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """The runs, copied."""
        return torch.cat([part(weight) for part in self.parts])


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """One weight's tensors.

    Arguments:
        name: of the module.
        listed: what patterns in ``config.json`` call it.
        tensors: from the files' headers.
        load: reads a part of a tensor by its full name.
        kept: the part of the weight to read.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    load: Callable[[str, Index], torch.Tensor]
    kept: Part = ALL
    listed: str = ""

    def has(self, part: str) -> bool:
        """Whether there is a tensor ``name.part``."""
        return f"{self.name}.{part}" in self.tensors

    def info(self, part: str, *dtypes: str) -> TensorInfo:
        """A tensor's header.

        Raises:
            CheckpointError: when it is missing, or has none of these dtypes.
        """
        full = f"{self.name}.{part}"
        if full not in self.tensors:
            raise CheckpointError(f"the quantised weight {self.name!r} lacks its tensor {full!r}")
        info = self.tensors[full]
        if info.dtype not in dtypes:
            raise CheckpointError(
                f"tensor {full!r} in {info.file} has dtype {info.dtype}; its layout wants {' or '.join(dtypes)}"
            )
        return info

    def shaped(self, part: str, shape: tuple[int, ...], *dtypes: str) -> None:
        """Raises CheckpointError unless a tensor is there in this shape."""
        info = self.info(part, *dtypes)
        if info.shape != shape:
            raise CheckpointError(
                f"tensor {self.name + '.' + part!r} in {info.file} has shape {info.shape};"
                f" the rest of the quantised weight implies {shape}"
            )

    def read(self, part: str, *index: slice) -> torch.Tensor:
        """A tensor over the mapped file, or a part of it."""
        return self.load(f"{self.name}.{part}", index)

    def scale(self, part: str, *index: slice) -> torch.Tensor:
        """Scales, or a part of them, in float32.

        Raises:
            CheckpointError: when some are not finite.
        """
        scale = self.read(part, *index).float()
        if not bool(scale.isfinite().all()):
            raise self.error(f"{int((~scale.isfinite()).sum())} of the {scale.numel()} values of {part} are not finite")
        return scale

    def error(self, reason: str) -> CheckpointError:
        """For a weight that cannot be represented or is inconsistent."""
        return CheckpointError(f"the quantised weight {self.name!r} cannot be loaded: {reason}")
