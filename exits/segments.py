"""A segment is a run of layers between two exits: the unit in which the engine runs a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Layers ``layers.start … layers.stop - 1``, run without a decision in between."""

    index: int
    layers: range


def split_into_segments(num_layers: int, exit_layers: Iterable[int] = ()) -> tuple[Segment, ...]:
    """Cut a model at its exits.

    Arguments:
        num_layers: layers of the model.
        exit_layers: after how many layers a row may exit; each between 1 and ``num_layers - 1``.

    Raises:
        ValueError: for an exit before the first or after the last layer.
    """
    cuts = sorted(set(exit_layers))
    for cut in cuts:
        if not 1 <= cut < num_layers:
            raise ValueError(f"an exit must lie after layer 1 … {num_layers - 1}, not {cut}")
    bounds = [0, *cuts, num_layers]
    return tuple(
        Segment(index=index, layers=range(start, stop)) for index, (start, stop) in enumerate(pairwise(bounds))
    )
