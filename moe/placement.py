"""How much work each expert gets, and which rank of the expert axis gets which experts.

Shape suffixes as in ``kernels/api/types.py``; N layers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..kernels.api.types import Routing
from .dispatch import UNUSED, used_ids

_FORMAT = 1


class ExpertLoad:
    """Counts the rows that chose each expert, by layer.

    Arguments:
        experts: routed experts of every layer; 0: it has none.
        device: that routings are on; nothing waits for it until the counts are read.
    """

    def __init__(self, experts: Sequence[int], device: torch.device | str) -> None:
        self.rows_NE = torch.zeros(len(experts), max(experts, default=0), dtype=torch.int64, device=device)

    def observe(self, layer: int, routing: Routing) -> None:
        """Count the slots of a routing, without those that a budget left empty."""
        used_TK = (used_ids(routing) != UNUSED).long()
        self.rows_NE[layer].scatter_add_(0, routing.expert_ids_TK.flatten().long(), used_TK.flatten())


def write_load(rows_NE: torch.Tensor, experts: Sequence[int], family: str, file: Path) -> None:
    """Keep what :class:`ExpertLoad` counted, for a later start.

    Arguments:
        experts: routed experts of every layer; 0: it has none.
        family: of the model, for the reader of the file.
    """
    counts = [rows_E[:count].tolist() for rows_E, count in zip(rows_NE, experts, strict=True) if count]
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps({"format": _FORMAT, "family": family, "rows_by_expert": counts}) + "\n")
    partial.rename(file)


def read_placement(file: Path, experts: Sequence[int], parts: int) -> dict[int, list[list[int]]]:
    """By layer, the experts of each rank: as even as the measured load and an equal number of experts allow.

    Arguments:
        file: of :func:`write_load`.
        experts: routed experts of every layer of the model; 0: it has none.
        parts: ranks of the expert axis.

    Raises:
        ValueError: naming the file, when it cannot be read or is of another model.
    """
    try:
        record = json.loads(file.read_text())
        counts = [[int(rows) for rows in layer] for layer in record["rows_by_expert"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"parallel.placement={file} cannot be read: {error}") from error
    mixtures = [(number, count) for number, count in enumerate(experts) if count]
    if record.get("format") != _FORMAT or [len(layer) for layer in counts] != [count for _, count in mixtures]:
        raise ValueError(f"parallel.placement={file} was not made by this model: its layers or experts differ")
    return {number: spread(rows, parts) for (number, _), rows in zip(mixtures, counts, strict=True)}


def spread(rows: Sequence[int], parts: int) -> list[list[int]]:
    """Experts in ``parts`` groups whose sizes differ by one at most: the most loaded first, each to the group with the
    least load that still has room."""
    size, larger = divmod(len(rows), parts)
    room = [size + (part < larger) for part in range(parts)]
    groups: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    for expert in sorted(range(len(rows)), key=lambda e: (-rows[e], e)):
        part = min((p for p in range(parts) if len(groups[p]) < room[p]), key=lambda p: (load[p], p))
        groups[part].append(expert)
        load[part] += rows[expert]
    return [sorted(group) for group in groups]
