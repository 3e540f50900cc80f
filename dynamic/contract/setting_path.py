"""Settings and the path that a calibration walks: given as it is, or made on pilot requests that are never used again.

A setting has three knobs: bits (the precision of weights, activations and cache), experts, depth. The path goes from
the safest setting to the boldest. Fixed-sequence testing holds for any path that the requests it tests on have not
shaped, so that a bad order costs savings and never the promise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..engine.sampling_params import GREEDY_EPSILON, SamplingParams

PROBABILITIES = (0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.91, 0.88, 0.85, 0.8, 0.75, 0.7, 0.6)
MOST_SETTINGS = 1000  # that a pilot compares


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The bits of a deployment, in the words of :class:`..model.load_config.LoadConfig`."""

    dtype: str = "auto"
    quantization: str = "none"
    kv_cache_dtype: str = "auto"

    def __str__(self) -> str:
        cache = "" if self.kv_cache_dtype == "auto" else f", cache {self.kv_cache_dtype}"
        return f"{'unquantised' if self.quantization == 'none' else self.quantization}{cache}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of the path.

    Arguments:
        exit_thresholds: layers in front of an exit → calibrated probability from which on a row exits.
        expert_keep: share of the calibrated contributions that a token's experts reach; None uses all experts.
        experts_per_token: most experts of a token in a layer, beside those always on; None: as many as routers choose.
        precision: of the deployment that runs it; None: of the one that is at hand.
    """

    exit_thresholds: dict[int, float]
    expert_keep: float | None = None
    experts_per_token: int | None = None
    precision: Precision | None = None

    def __str__(self) -> str:
        values = set(self.exit_thresholds.values())
        parts = [] if self.precision is None else [str(self.precision)]
        if values:
            parts.append(f"{values.pop():g}" if len(values) == 1 else str(self.exit_thresholds))
        if self.expert_keep is not None:
            parts.append(f"experts {self.expert_keep:g}")
        if self.experts_per_token is not None:
            parts.append(f"at most {self.experts_per_token} experts")
        return ", ".join(parts) or "everything"

    @property
    def expert_budget(self) -> dict[str, int | float]:
        """As a certificate names it."""
        budget = {"expert_keep": self.expert_keep, "experts_per_token": self.experts_per_token}
        return {name: value for name, value in budget.items() if value is not None}

    def as_json(self) -> dict[str, Any]:
        """Without knobs that were left alone."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def params(self, max_tokens: int, temperature: float = 0.0, seed: int | None = None) -> SamplingParams:
        """Sampling settings of a request; as by default, an end-of-text token ends the output."""
        return SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            detokenize=False,
            keep_states=temperature >= GREEDY_EPSILON,
            quality=None,
            exit_thresholds=self.exit_thresholds,
            expert_keep=self.expert_keep,
            experts_per_token=self.experts_per_token,
        )


def path_through(
    exits: Sequence[int], probabilities: Sequence[float] = PROBABILITIES, keeps: Sequence[float] = ()
) -> list[Setting]:
    """The same probability at every exit, from the safest to the boldest, and an expert budget beside each.

    Arguments:
        keeps: expert-keep schedule: ``expert_keep`` of every setting, not rising; empty: all experts.

    Raises:
        ValueError: for probabilities that do not fall, keeps that rise or are not as many, a model without exits.
    """
    if keeps and len(keeps) != len(probabilities):
        raise ValueError(
            f"there are {len(probabilities)} probabilities and {len(keeps)} keeps; give one for each, or pilot_requests"
            " that try them all"
        )
    if any(later > earlier for earlier, later in itertools.pairwise(keeps)):
        raise ValueError(f"keeps must not rise from the safest to the boldest, not {list(keeps)}")
    if not exits:
        raise ValueError("the model has no exits, so there are no probabilities to calibrate")
    if any(later >= earlier for earlier, later in itertools.pairwise(probabilities)):
        raise ValueError(f"probabilities must fall from the safest to the boldest, not {list(probabilities)}")
    pairs = itertools.zip_longest(probabilities, keeps)
    return [Setting(exit_thresholds=dict.fromkeys(exits, p), expert_keep=keep) for p, keep in pairs]


def budget_path(keeps: Sequence[float], caps: Sequence[int]) -> list[Setting]:
    """Expert budgets alone, from the safest to the boldest; one of the two is empty.

    Raises:
        ValueError: for budgets that do not fall.
    """
    for name, values in (("keeps", keeps), ("experts_per_token", caps)):
        if any(later >= earlier for earlier, later in itertools.pairwise(values)):
            raise ValueError(f"{name} must fall from the safest to the boldest, not {list(values)}")
    by_keep = [Setting(exit_thresholds={}, expert_keep=keep) for keep in keeps]
    return by_keep + [Setting(exit_thresholds={}, experts_per_token=cap) for cap in caps]


def all_settings(
    precisions: Sequence[Precision | None],
    exits: Sequence[int],
    probabilities: Sequence[float],
    keeps: Sequence[float],
    caps: Sequence[int],
) -> dict[tuple[int, ...], Setting]:
    """Every combination of the values of the axes, and of leaving an axis alone, which has place 0.

    Returns: place on each axis (precision, exits, keeps, caps) → setting; those of one precision follow each other.

    Raises:
        ValueError: for more than :data:`MOST_SETTINGS`.
    """
    axes = (precisions, (None, *probabilities), (None, *keeps), (None, *caps))
    sizes = [len(axis) for axis in axes]
    if math.prod(sizes) > MOST_SETTINGS:
        raise ValueError(
            f"the axes have {math.prod(sizes)} combinations ({sizes[0]} precisions, {sizes[1]} exits, {sizes[2]}"
            f" keeps, {sizes[3]} caps, each with none), more than {MOST_SETTINGS}; give fewer values"
        )
    return {
        places: Setting(
            exit_thresholds={} if probability is None else dict.fromkeys(exits, probability),
            expert_keep=keep,
            experts_per_token=cap,
            precision=precision,
        )
        for places, (precision, probability, keep, cap) in zip(
            itertools.product(*map(range, sizes)), itertools.product(*axes), strict=True
        )
    }


def bolder(places: tuple[int, ...], than: tuple[int, ...]) -> bool:
    """Whether a combination has another one's bits and is as bold or bolder on every other axis."""
    return places[0] == than[0] and all(mine >= other for mine, other in zip(places, than, strict=True))


def pareto_front(costs: Sequence[float], losses: Sequence[float], most: float) -> list[int]:
    """Numbers of the settings that no other one beats in both, by rising loss and so by falling cost.

    Arguments:
        most: cost from which on a setting saves nothing.
    """
    front: list[int] = []
    for place in sorted(range(len(costs)), key=lambda n: (losses[n], costs[n])):
        if costs[place] < most:
            front.append(place)
            most = costs[place]
    return front
