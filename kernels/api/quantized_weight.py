"""Quantised weights of one linear layer, (O, I), or of stacked experts, (E, O, I): codes, scales, zero points.

``dequantize`` is the oracle. Sizes need not divide: last groups and blocks may be ragged. Shape suffixes as in
``types.py``; G groups of inputs, X bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch

from .formats import FLOATS, Format


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight in any format; see :class:`Format` for what the tensors mean together.

    Arguments:
        format: says which of the tensors may be there.
        data: codes, (O, X) or (E, O, X).
        scale: (…, ⌈O / block_out⌉, G), G = ⌈I / group⌉; 1 without groups.
        inputs: I; None: one per element of the codes.
        group: inputs that share a scale; None: all.
        block_out: outputs that share a scale.
        zero: codes, uint8, shaped as the scales; None: the format's own zero.
        offset: shaped as the scales: takes the place of zero points where they are no whole numbers (GGUF's Q4_1).
        outer_scale, outer_offset: (…, O, ⌈I / the format's outer group⌉); None: scales and offsets are whole.

    Raises:
        ValueError: for a tensor of another dtype or shape, or one that the format does not have, naming it.
    """

    format: Format
    data: torch.Tensor = field(repr=False)
    scale: torch.Tensor = field(repr=False)
    inputs: int | None = None
    group: int | None = None
    block_out: int = 1
    zero: torch.Tensor | None = field(default=None, repr=False)
    offset: torch.Tensor | None = field(default=None, repr=False)
    outer_scale: torch.Tensor | None = field(default=None, repr=False)
    outer_offset: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        form, codes = self.format, self.format.codes
        if self.data.dim() not in (2, 3) or self.data.dtype != codes.dtype or self.data.shape[-1] == 0:
            wanted = f"{codes.dtype} with 2 or 3 dimensions and some inputs"
            raise ValueError(f"codes must be {wanted}, not {describe(self.data)}")
        form.check_group(self.group, self.block_out)
        if self.data.shape[-1] != (size := codes.row_bytes(self.in_features)):
            raise ValueError(f"{self.in_features} inputs take {size} bytes a row, not {self.data.shape[-1]}")
        shape = (*self.data.shape[:-2], -(-self.out_features // self.block_out), self.num_groups)
        outer = (*shape[:-1], self._groups_of(form.outer_group))
        whole = (*FLOATS, *form.scales) if self.outer_scale is None else form.scales
        self._check(self.scale, "scales", shape, whole)
        kinds = form.outer_scales
        self._check(self.outer_scale, "outer scales", outer, kinds, known=form.two_level)
        self._check(self.outer_offset, "outer offsets", outer, kinds, known=form.two_level and form.offsets)
        if self.zero is not None and self.offset is not None:
            raise ValueError("a weight has zero points or offsets, not both")
        self._check(self.offset, "offsets", shape, whole, known=form.offsets)
        self._check(self.zero, "zero points", shape, (torch.uint8,), known=form.zero_points)
        if self.zero is not None and self.zero.numel() and (largest := int(self.zero.max())) >= 1 << codes.bits:
            raise ValueError(f"zero points must be 0 … {(1 << codes.bits) - 1}, not {largest}")

    def _check(
        self,
        tensor: torch.Tensor | None,
        name: str,
        shape: tuple[int, ...],
        dtypes: tuple[torch.dtype, ...],
        *,
        known: bool = True,
    ) -> None:
        if tensor is None:
            return
        if not known:
            raise ValueError(f"{self.format.name} weights have no {name}")
        if tensor.dtype not in dtypes or tensor.shape != shape:
            kind = "floating" if dtypes[: len(FLOATS)] == FLOATS else " or ".join(map(str, dtypes))
            raise ValueError(f"{name} must be {kind} with shape {shape}, not {describe(tensor)}")

    @property
    def in_features(self) -> int:
        return self.data.shape[-1] if self.inputs is None else self.inputs

    @property
    def out_features(self) -> int:
        return self.data.shape[-2]

    @property
    def num_experts(self) -> int | None:
        """E, or None for a single linear layer."""
        return self.data.shape[0] if self.data.dim() == 3 else None

    @property
    def num_groups(self) -> int:
        """Groups of inputs, G."""
        return self._groups_of(self.group)

    @property
    def shape(self) -> tuple[int, ...]:
        """(O, I) or (E, O, I) of the weight that this stands for."""
        return (*self.data.shape[:-1], self.in_features)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, scales and zero points."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def symmetric(self) -> bool:
        """Whether the format's own zero stands for 0 everywhere."""
        return self.zero is None and self.offset is None

    @property
    def needs_offsets(self) -> bool:
        """Whether :meth:`offsets` say more than kernels know: they take the code in the middle for 0."""
        codes = self.format.codes
        return not (self.symmetric and (codes.centred or codes.table is not None))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Codes, scales and whatever else there is, by field."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedWeight:
        """The weight of changed tensors."""
        return self._with({name: change(tensor) for name, tensor in self.tensors().items()})

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def expert(self, number: int) -> QuantizedWeight:
        """One of stacked experts, (O, I).

        Raises:
            ValueError: for a single linear layer.
            IndexError: when there is no such expert.
        """
        if self.num_experts is None:
            raise ValueError(f"a weight of shape {self.shape} holds no experts")
        return self.map(lambda tensor: tensor[number])

    def experts(self, part: slice) -> QuantizedWeight:
        """Some of stacked experts, (…, O, I), in the same memory."""
        assert self.num_experts is not None
        return self.map(lambda tensor: tensor[part])

    def rows(self, start: int, stop: int) -> QuantizedWeight:
        """Outputs ``start … stop - 1``, with a scale of their own for each."""
        return self._select(slice(start, stop))

    def take(self, ids: torch.Tensor) -> QuantizedWeight:
        """Some outputs, with a scale of their own for each."""
        return self._select(ids)

    def columns(self, start: int, stop: int) -> QuantizedWeight:
        """Inputs ``start … stop - 1``.

        Raises:
            ValueError: for a start in the middle of a group.
        """
        form, codes = self.format, self.format.codes
        groups = (self.group, form.outer_group if self.outer_scale is not None else None)
        if wrong := [group for group in groups if group and start % group]:
            raise ValueError(f"inputs from {start} on begin inside a group of {wrong[0]}")
        if start * codes.bits % 8 == 0:
            data = self.data[..., start * codes.bits // 8 :][..., : codes.row_bytes(stop - start)]
        else:
            data = codes.pack(self.codes()[..., start:stop])
        parts = {"data": data.contiguous()}
        for name, tensor in self.tensors().items():
            group = form.outer_group if name.startswith("outer") else self.group
            if name != "data" and group:
                parts[name] = tensor[..., start // group : -(-stop // group)].contiguous()
        return replace(self, inputs=None if self.inputs is None else stop - start, **parts)  # type: ignore[arg-type]

    def per_output(self) -> QuantizedWeight:
        """The same weight with a scale for every output and group of inputs."""
        if self.block_out == 1:
            return self
        parts = {
            name: tensor.repeat_interleave(self.block_out, -2)[..., : self.out_features, :].contiguous()
            for name, tensor in self.tensors().items()
            if name != "data"
        }
        return replace(self, block_out=1, **parts)  # type: ignore[arg-type]

    def codes(self) -> torch.Tensor:
        """Codes 0 … 2^bits - 1, uint8, (…, O, I); see :meth:`Codes.unsigned`."""
        return self.format.codes.unsigned(self.data, self.in_features)

    def scales(self) -> torch.Tensor:
        """float32, (…, O, G): what the numbers of every output and group are multiplied with."""
        own = self.per_output()
        return own._whole(own.scale, own.outer_scale)

    def offsets(self) -> torch.Tensor:
        """float32, (…, O, G): what is added to ``number · scale``."""
        own = self.per_output()
        if own.offset is not None:
            return own._whole(own.offset, own.outer_offset)
        zero = float(self.format.codes.zero) if own.zero is None else own.zero.float()
        return -zero * own.scales()

    def dequantize(self) -> torch.Tensor:
        """The weight in float32: (O, I) or (E, O, I)."""
        numbers, scale = self.format.codes.numbers(self.data, self.in_features), self._spread(self.scales())
        if self.offset is not None:
            return numbers * scale + self._spread(self.offsets())
        if self.zero is not None:
            numbers = numbers - self._spread(self.per_output().zero.float())  # type: ignore[union-attr]
        elif self.format.codes.zero:
            numbers = numbers - self.format.codes.zero
        return numbers * scale

    def _groups_of(self, group: int | None) -> int:
        return 1 if group is None else -(-self.in_features // group)

    def _whole(self, values: torch.Tensor, outer: torch.Tensor | None) -> torch.Tensor:
        """Values of groups in float32, times those of the groups around them."""
        if outer is None:
            return values.float()
        size, group = self.format.outer_group, self.group
        if size is not None and group is not None:
            outer = spread(outer, size // group, self.num_groups)
        return values.float() * outer.float()

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of groups for each input; where there are no groups one for all."""
        return values if self.group is None else spread(values, self.group, self.in_features)

    def _select(self, outputs: slice | torch.Tensor) -> QuantizedWeight:
        own = self.per_output()
        return own.map(lambda tensor: tensor[..., outputs, :])

    def _with(self, tensors: dict[str, torch.Tensor]) -> QuantizedWeight:
        return replace(self, **tensors)  # type: ignore[arg-type]


def spread(values: torch.Tensor, group: int, inputs: int) -> torch.Tensor:
    """Values per group repeated for each input: (…, G) → (…, I)."""
    return values.repeat_interleave(group, -1)[..., :inputs]


def describe(t: torch.Tensor) -> str:
    """For messages."""
    return f"{t.dtype} of shape {tuple(t.shape)}"
