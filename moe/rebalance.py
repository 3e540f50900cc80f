"""How experts are moved and copied while a model runs, so that the ranks of the expert axis get equal work.

Places of a layer: by rank, the expert in each place, :data:`UNUSED` in one that is free. An expert is on at least one
rank, and at most once on each. Shape suffixes as in ``kernels/api/types.py``; X ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .dispatch import UNUSED

Places = list[list[int]]
_EVEN = 1.02  # times the mean: no rank's work is worth a move below it
_LEAST_GAIN = 1e-3  # of the sum of squares of the ranks' work


@dataclass(frozen=True)
class _Change:
    """An expert that joins or leaves ranks, and what this adds to their work.

    Arguments:
        added: experts that the rank has more for it, and the other one.
    """

    expert: int
    joins: int
    leaves: int
    work_X: np.ndarray
    added: tuple[int, int]


def imbalance(work_NX: Sequence[Sequence[int]] | np.ndarray) -> float:
    """The most loaded rank's work over the mean, where ranks wait for each other in every layer; 1 without work."""
    work = np.asarray(work_NX, dtype=float)
    total = work.mean(-1).sum()
    return float(work.max(-1).sum() / total) if total else 1.0


def evened_out(rows_E: Sequence[int], places: Sequence[Sequence[int]]) -> Places:
    """Places that give ranks more equal work, as few steps from the present ones as lead there.

    A step moves an expert, copies it to one more rank, drops a copy, or does two of these at once. The rows of an
    expert are shared equally among the ranks that have it.

    Arguments:
        rows_E: that chose each expert.
        places: as many on every rank.
    """
    rows = np.asarray(rows_E, dtype=float)
    here_XE = np.zeros((len(places), len(rows)), dtype=bool)
    for here_E, experts in zip(here_XE, places, strict=True):
        here_E[[expert for expert in experts if expert != UNUSED]] = True
    room = len(places[0])
    for _ in range(2 * len(rows)):
        work_X = here_XE @ (rows / here_XE.sum(0))
        if work_X.max() <= _EVEN * work_X.mean():
            break
        best = _best_step(rows, here_XE, work_X, room)
        if best is None:
            break
        for change in best:
            if change.joins != UNUSED:
                here_XE[change.joins, change.expert] = True
            if change.leaves != UNUSED:
                here_XE[change.leaves, change.expert] = False
    return [_fill(before, np.flatnonzero(here_E).tolist()) for before, here_E in zip(places, here_XE, strict=True)]


def _best_step(rows: np.ndarray, here_XE: np.ndarray, work_X: np.ndarray, room: int) -> list[_Change] | None:
    """What takes most from the most loaded rank; None where nothing takes enough."""
    free_X, most = room - here_XE.sum(1), int(work_X.argmax())
    least, best = float((work_X**2).sum()) * (1 - _LEAST_GAIN), None
    for other in np.argsort(work_X, kind="stable").tolist():
        if other == most:
            continue
        taken = list(_changes(rows, here_XE, most, other))
        nothing = _Change(UNUSED, UNUSED, UNUSED, np.zeros(len(work_X)), (0, 0))
        given = [nothing, *(change for change in _changes(rows, here_XE, other, most) if change.leaves == other)]
        sums_CGX = work_X + np.stack([c.work_X for c in taken])[:, None] + np.stack([c.work_X for c in given])
        squares_CG = (sums_CGX**2).sum(-1)
        come_C2, come_G2 = (np.array([change.added for change in changes]) for changes in (taken, given))
        come_CG2 = come_C2[:, None] + come_G2[:, ::-1]
        same_CG = np.array([c.expert for c in taken])[:, None] == np.array([c.expert for c in given])
        squares_CG[same_CG | (come_CG2 > (free_X[most], free_X[other])).any(-1)] = np.inf
        at = int(squares_CG.argmin())
        if squares_CG.flat[at] < least:
            least = float(squares_CG.flat[at])
            best = [c for c in (taken[at // len(given)], given[at % len(given)]) if c is not nothing]
    return best


def _changes(rows: np.ndarray, here_XE: np.ndarray, rank: int, other: int) -> Iterator[_Change]:
    """What may become of a rank's experts: they go to another, are copied there, or are dropped where others have
    them."""
    copies_E = here_XE.sum(0)
    for expert in np.flatnonzero(here_XE[rank]).tolist():
        share, count = rows[expert] / copies_E[expert], copies_E[expert]
        if count > 1:
            fewer_X = here_XE[:, expert] * (rows[expert] / (count - 1) - share)
            fewer_X[rank] = -share
            yield _Change(expert, UNUSED, rank, fewer_X, (-1, 0))
        if not here_XE[other, expert]:
            moved_X = np.zeros(len(here_XE))
            moved_X[rank], moved_X[other] = -share, share
            yield _Change(expert, other, rank, moved_X, (-1, 1))
            more_X = here_XE[:, expert] * (rows[expert] / (count + 1) - share)
            more_X[other] = rows[expert] / (count + 1)
            yield _Change(expert, other, UNUSED, more_X, (0, 1))


def _fill(before: Sequence[int], experts: Sequence[int]) -> list[int]:
    """Experts in places: those that stay keep theirs."""
    come = iter(sorted(set(experts) - set(before)))
    return [expert if expert in experts else next(come, UNUSED) for expert in before]
