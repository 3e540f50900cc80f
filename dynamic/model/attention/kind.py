"""What a kind of attention says of itself: configuration, tensors, arithmetic, cache, shards and cost.

A kind is a subclass of :class:`AttentionSpec` in a file of its own, known to the registry by its name. The loader, the
quantisers, the cache and the parallel decoder ask it; none of them lists what its layers are made of.

Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

import torch

from ....kernels.api.kv_codes import KV_DTYPES
from ....kernels.api.stack import NotStacked, StackBlock
from ....kernels.api.types import AttentionBatch, KVLayer, KVProjection, LinearWeights
from ....kernels.torch.backend import TorchBackend
from ...checkpoint.config_reader import ConfigReader
from ..channel_order import Order
from ..family import Family
from ..norms import TensorLayout

Shape = tuple[int, ...]
Cut = slice | tuple[slice, ...] | Callable[[torch.Tensor], torch.Tensor]
FullNorms = Callable[..., Sequence[torch.Tensor]]


def _alone(x: torch.Tensor) -> torch.Tensor:
    """The sum over one rank."""
    return x


@dataclass(frozen=True, kw_only=True)
class LinearLayout:
    """A linear layer in a checkpoint: tensors whose outputs follow each other.

    Arguments:
        weights: names of its tensors; outputs: of each of them.
        inputs: what all of them read.
        biases: a name for each tensor, or none.
        orders: for each tensor, and its bias, see :func:`.in_order`; or none.
    """

    weights: tuple[str, ...]
    outputs: tuple[int, ...]
    inputs: int
    biases: tuple[str, ...] = ()
    orders: tuple[Order, ...] = ()

    def shapes(self) -> Iterator[tuple[str, Shape]]:
        """Name and shape of every tensor."""
        yield from ((name, (size, self.inputs)) for name, size in zip(self.weights, self.outputs, strict=True))
        yield from ((name, (size,)) for name, size in zip(self.biases, self.outputs, strict=False))


def linear_layout(
    prefix: str, inputs: int, outputs: Mapping[str, int], *, bias: bool = False, orders: tuple[Order, ...] = ()
) -> LinearLayout:
    """A linear layer of modules below a prefix.

    Arguments:
        outputs: by the name of the module.
        bias: whether each has one.
        orders: see :class:`LinearLayout`.
    """
    return LinearLayout(
        weights=tuple(f"{prefix}{name}.weight" for name in outputs),
        outputs=tuple(outputs.values()),
        inputs=inputs,
        biases=tuple(f"{prefix}{name}.bias" for name in outputs) if bias else (),
        orders=orders,
    )


@dataclass(frozen=True, kw_only=True)
class AttentionLayout:
    """The tensors of one layer's attention, by the names of the fields of the kind's weights.

    Arguments:
        unused: shapes of tensors that the checkpoint has and that nothing here reads, by name.
    """

    kind: AttentionSpec
    linears: Mapping[str, LinearLayout]
    tensors: Mapping[str, TensorLayout] = field(default_factory=dict)
    unused: Mapping[str, Shape] = field(default_factory=dict)

    def orders(self) -> dict[str, Order]:
        """By name, of tensors whose rows the decoder keeps in another order than the checkpoint."""
        orders = {tensor.name: tensor.order for tensor in self.tensors.values()}
        for linear in self.linears.values():
            orders |= zip(linear.weights, linear.orders, strict=False)
            orders |= zip(linear.biases, linear.orders, strict=False)
        return {name: order for name, order in orders.items() if order}

    def shapes(self) -> Iterator[tuple[str, Shape]]:
        """Name and shape of every tensor."""
        for linear in self.linears.values():
            yield from linear.shapes()
        yield from ((tensor.name, tensor.shape) for tensor in self.tensors.values())
        yield from self.unused.items()


@dataclass(frozen=True, kw_only=True)
class AttentionCuts:
    """How the tensor axis splits a layer's attention; what is not named every rank has whole.

    Arguments:
        outputs: by tensor, the first dimension's part of one rank, or several one behind the other, or what takes its
            part.
        inputs: by weight, the inputs of all ranks in their order. Such a layer's bias is the first rank's.
    """

    outputs: Mapping[str, Cut]
    inputs: Mapping[str, tuple[slice, ...]]


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """The weights of one layer's attention as the backend keeps them; a kind adds fields."""

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return sum(getattr(self, f.name).nbytes for f in fields(self) if getattr(self, f.name) is not None)

    @property
    def propagated_bytes(self) -> int:
        """Of the weights that make keys and values of a row that skips the layer."""
        return 0


@dataclass(frozen=True)
class AttentionContext:
    """What attention needs beside a layer's own weights and cache.

    Arguments:
        cos_sin_LC: see :func:`.rope_table`.
        norm_over_heads: RMS norms that go over the heads of all ranks: takes pairs of rows (T, X) and weight (X).
        sum_over_ranks: adds numbers up among the ranks that share the heads.
    """

    backend: TorchBackend
    cos_sin_LC: torch.Tensor
    norm_eps: float
    norm_over_heads: FullNorms
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = _alone

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMS norm over the last dimension of a slice of a fused projection."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        return self.backend.rounded_rms_norm(rows, weight, self.norm_eps).view(x.shape)


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(ABC):
    """One layer's attention, as data.

    Arguments:
        window: how many positions a row sees, its own included; None sees all.
    """

    kind: ClassVar[str]
    kv_formats: ClassVar[tuple[str, ...]] = tuple(KV_DTYPES)  # in which its cache may be kept
    window: int | None = None

    @classmethod
    @abstractmethod
    def from_config(cls, config: ConfigReader, family: Family, layer: int) -> Self:
        """What a ``config.json`` says of a layer.

        Raises:
            ValueError: for a value that cannot be.
        """

    @property
    def reach(self) -> int | None:
        """How many positions a row sees at most, its own included; None sees all."""
        return self.window

    @property
    def uncommon(self) -> set[str]:
        """See :attr:`.ModelSpec.uncommon`."""
        return set()

    @property
    @abstractmethod
    def rotary_channels(self) -> int:
        """Channels of a head that are rotated."""

    @property
    def unrotated_channels(self) -> int:
        """Channels of the same head that are not."""
        return 0

    @property
    def keeps_keys(self) -> bool:
        """Whether rows leave keys and values, or what stands for them, in pages of the cache."""
        return True

    @property
    def keeps_rows(self) -> bool:
        """Whether rows leave anything for those behind them: keys, values or states."""
        return True

    @property
    def dense_positions(self) -> int | None:
        """Up to how many positions rows see all of those that come before them, where attention chooses among more,
        which no kind here can; None: always."""
        return None

    @abstractmethod
    def layout(self, prefix: str, hidden_size: int, available: Container[str]) -> AttentionLayout:
        """The tensors of a layer.

        Arguments:
            prefix: of the layer's names, with the dot at its end.
            available: names that the checkpoint has, for kinds that are stored in several ways.
        """

    @abstractmethod
    def weights(self, parts: Mapping[str, LinearWeights | torch.Tensor]) -> AttentionWeights:
        """The weights, made of what :meth:`layout` names."""

    def pack(self, parts: Mapping[str, LinearWeights | torch.Tensor], backend: TorchBackend) -> AttentionWeights:
        """:meth:`weights` for kinds that keep some tensors in the backend's layout."""
        return self.weights(parts)

    @abstractmethod
    def forward(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        """What attention adds to the residual stream, (T, D), made of normed rows, which are cached first."""

    @abstractmethod
    def cache_shapes(self, page_size: int, dtype: torch.dtype) -> tuple[Shape, ...]:
        """Of one page in each tensor of a layer's cache."""

    def state_shapes(self) -> tuple[Shape, ...]:
        """Of one sequence in each tensor of recurrent states, for kinds that keep these instead of keys and values."""
        return ()

    def cache(self, tensors: Sequence[torch.Tensor], scales_behind_page: bool) -> KVLayer:
        """A layer's cache, of tensors of :meth:`cache_shapes` with a dimension of pages in front."""
        keys, values = tensors
        return KVLayer(keys_BGPC=keys, values_BGPC=values, scales_behind_page=scales_behind_page)

    @abstractmethod
    def part(self, parts: int, part: int) -> Self:
        """One rank's share of the heads.

        Raises:
            ValueError: when the heads cannot be shared out among so many.
        """

    @abstractmethod
    def cuts(self, layout: AttentionLayout, parts: int, part: int) -> AttentionCuts:
        """One rank's share of the tensors."""

    @abstractmethod
    def flops(self, hidden_size: int) -> int:
        """Floating-point operations for one row, without those that grow with the context."""

    def propagation_flops(self, hidden_size: int) -> int:
        """Of the keys and values of a row that skips the layer."""
        return 0

    def stack_block(self, weights: Any) -> StackBlock:
        """The same for a backend's stack.

        Raises:
            NotStacked: no stack runs it, so that it goes operation by operation.
        """
        raise NotStacked(f"attention of kind {self.kind!r}")

    def projection(self, norm_D: torch.Tensor | None, weights: Any, backend: TorchBackend) -> KVProjection:
        """What makes the keys and values of rows that skip the layer.

        Arguments:
            norm_D: in front of attention; None: it reads the residual stream itself.

        Raises:
            ValueError: when this kind's cannot be made of the residual stream at an exit.
        """
        raise ValueError(f"attention of kind {self.kind!r} makes no keys and values for rows that exit early")

    def propagate(
        self,
        projections: Sequence[KVProjection],
        x_RD: torch.Tensor,
        kv: Sequence[KVLayer],
        batch: AttentionBatch,
        context: AttentionContext,
    ) -> None:
        """Write the keys and values of layers that rows skip, or advance their recurrent states; all of this kind and
        alike but for their windows."""
        raise NotImplementedError
