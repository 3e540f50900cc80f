"""Operations and the ways to run them: one registered entry that backend, warm-up, reports and tuning read.

A backend turns what it is asked into a :class:`Call` and gets the launches from the :class:`Planner`. Of the variants
registered for the call the planner takes the one that was measured to be best, else the one with the least estimate.
Warm-up and ahead-of-time reports plan the calls that layers make, so they show what the planner takes.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch

from triton import knobs

from .device import DeviceProperties
from .launch import Launch, next_power_of_2
from .shapes import Steps, WarmUpShape
from .tuning import TuningCache, kernel_version

ResultT = TypeVar("ResultT")
CallT = TypeVar("CallT", bound="Call[Any]")
ProblemT = TypeVar("ProblemT", bound=tuple)
VariantT = TypeVar("VariantT", bound="OpVariant[Any, Any]")
Tilings = Mapping[str, Any]  # a configuration for each tuned kernel, by :attr:`Launch.part`
Ranked = Mapping[str, Sequence[Any]]  # several of them, the likeliest first
Planned = tuple[ResultT, list[Launch]]  # what a call returns, and the launches that fill it

_MOST_CHOICES = 4096
_REGISTERED: dict[type[Call[Any]], list[OpVariant[Any, Any]]] = {}


class NoKernelError(Exception):
    """No variant runs a call; the message names what has no kernel."""


class RowProblem(NamedTuple):
    """Rows, rounded up to a power of two, their shape and dtype: all that an operation on rows may need to choose."""

    rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x_TX: torch.Tensor) -> RowProblem:
        rows, *shape = x_TX.shape
        return cls(next_power_of_2(rows), tuple(shape), x_TX.dtype)


class Call(ABC, Generic[ResultT]):
    """One use of an operation, with its tensors. The result is new tensors, which the launches fill."""

    operation: ClassVar[str]

    @abstractmethod
    def problem(self) -> tuple:
        """All that a choice may depend on. Numbers of rows are rounded up to powers of two."""

    @classmethod
    def of_layer(cls, layer: WarmUpShape, steps: Steps, dtype: torch.dtype, planner: Planner) -> Iterator[Call[Any]]:
        """The calls that a layer makes in these steps, with tensors that have no storage."""
        return iter(())


class OpVariant(ABC, Generic[CallT, ProblemT]):
    """One way to run an operation.

    Arguments:
        call: the operation.
        kernels: all kernels of its own. Measurements hold for their source only.
        products: those of them that must use tensor cores as soon as a tile has 64 rows.
    """

    call: ClassVar[type[Call[Any]]]
    name: ClassVar[str]
    kernels: ClassVar[tuple[Any, ...]]
    products: ClassVar[tuple[Any, ...]] = ()

    def refuses(self, problem: ProblemT, device: DeviceProperties) -> str | None:
        """What it has no kernel for, if it cannot run this."""
        return None

    def seconds(self, problem: ProblemT, device: DeviceProperties) -> float:
        """Estimated time, to be compared with other variants of the operation; infinite: only if it was measured."""
        return 0.0

    def tilings(self, problem: ProblemT, device: DeviceProperties, count: int) -> Sequence[Ranked]:
        """Alternatives that are tuned one by one, the likeliest first: ``count`` configurations per tuned kernel."""
        return [{}]

    def table_rows(self, tilings: Tilings) -> int | None:
        """Rows per tile of the expert tables that it reads; None: it reads none."""
        return None

    @abstractmethod
    def plan(self, call: CallT, tilings: Tilings, device: DeviceProperties) -> Planned[Any]:
        """The call's result, and the launches that write every element of it."""

    def version(self) -> str:
        """Names the kernels and the compiler."""
        return kernel_version(self.kernels)


def register(variant: type[VariantT]) -> type[VariantT]:
    """Let a variant take part in the choices of planners made from now on. Of equal estimates the last one wins.

    Raises:
        ValueError: when the operation has a variant of this name.
    """
    others = _REGISTERED.setdefault(variant.call, [])
    if any(other.name == variant.name for other in others):
        raise ValueError(f"{variant.call.operation} already has a variant {variant.name!r}")
    others.append(variant())
    return variant


def variants(call: type[Call[Any]] | None = None) -> list[OpVariant[Any, Any]]:
    """What is registered for an operation, or for all of them."""
    return [v for key, found in _REGISTERED.items() if call in (None, key) for v in found]


@dataclass(frozen=True)
class Choice:
    """A variant and its configurations."""

    variant: OpVariant[Any, Any]
    tilings: Tilings

    @property
    def table_rows(self) -> int | None:
        return self.variant.table_rows(self.tilings)


class Planner:
    """Chooses variants and configurations for a device: measured ones where there are any, else the estimated best."""

    def __init__(self, device: DeviceProperties, measured: TuningCache) -> None:
        self.device = device
        self.measured = measured
        self._chosen: dict[tuple[type[Call[Any]], tuple], Choice] = {}

    def plan(self, call: Call[ResultT]) -> Planned[ResultT]:
        """A call's result, and the launches that fill it.

        Raises:
            NoKernelError: when no variant can run it.
        """
        choice = self.choice(type(call), call.problem())
        return choice.variant.plan(call, choice.tilings, self.device)

    def choice(self, call: type[Call[Any]], problem: tuple) -> Choice:
        """What runs calls with this problem. Raises as :meth:`plan` does."""
        found = self._chosen.get((call, problem))
        if found is None:
            if len(self._chosen) >= _MOST_CHOICES:
                self._chosen.clear()
            found = self._chosen[call, problem] = self._choose(call, problem)
        return found

    def _choose(self, call: type[Call[Any]], problem: tuple) -> Choice:
        able, reasons = [], []
        for variant in reversed(variants(call)):
            reason = variant.refuses(problem, self.device)
            able += [variant] if reason is None else []
            reasons += [reason] if reason is not None else []
        stored = self.measured.get(self.key(call, problem))
        for variant in able:
            if stored.get("variant") == variant.name and stored.get("kernels") == variant.version():
                default = self._default(variant, problem)
                with contextlib.suppress(KeyError, TypeError):  # measured when configurations had other fields
                    return Choice(variant, {k: type(config)(**stored["tilings"][k]) for k, config in default.items()})
        if not able:
            raise NoKernelError(reasons[-1] if reasons else call.operation)
        variant = min(able, key=lambda v: v.seconds(problem, self.device))
        return Choice(variant, self._default(variant, problem))

    def _default(self, variant: OpVariant[Any, Any], problem: tuple) -> dict[str, Any]:
        likeliest = variant.tilings(problem, self.device, 1)[0]
        return {part: configs[0] for part, configs in likeliest.items()}

    def keep(self, call: type[Call[Any]], problem: tuple, choice: Choice) -> None:
        """Remember a measured choice, here and on disk."""
        self._chosen[call, problem] = choice
        tilings = {part: asdict(config) for part, config in choice.tilings.items()}
        entry = {"variant": choice.variant.name, "kernels": choice.variant.version(), "tilings": tilings}
        self.measured.put(self.key(call, problem), entry)

    def key(self, call: type[Call[Any]], problem: tuple) -> str:
        """Name of a measurement on disk."""
        return "/".join(map(str, (call.operation, *problem)))


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which takes every dtype."""
    return knobs.runtime.interpret


def has_tensor_cores(dtype: torch.dtype) -> bool:
    """Whether products of a dtype have kernels."""
    return dtype in (torch.bfloat16, torch.float16) or interpreted()
