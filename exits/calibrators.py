"""Turn a probe's logit into a calibrated probability: temperature, or isotonic regression.

Neither gives a guarantee by itself (that is risk control's job); they make thresholds comparable between exits.
Arguments: ``logits`` float (R,), ``correct`` 0/1 (R,).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

_INFINITY_KEY = 0x7F800000  # the bits of float32's infinity
ISOTONIC_MINIMUM = 1000  # below this many positives isotonic regression follows the noise


@dataclass(frozen=True)
class Temperature:
    """``sigmoid((logit - shift) / temperature)``; both by maximum likelihood (Platt 1999; Guo et al. 2017)."""

    temperature: float
    shift: float = 0.0

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid((logits.double() - self.shift) / self.temperature).float()

    def to_json(self) -> dict:
        """What :func:`calibrator_from_json` reads."""
        return {"kind": "temperature", "temperature": self.temperature, "shift": self.shift}


@dataclass(frozen=True)
class Isotonic:
    """A rising step function: the probability of a logit is that of the last knot at or below it.

    Arguments:
        knots: rising logits where a step begins; probabilities: of each step, rising.
    """

    knots: tuple[float, ...]
    probabilities: tuple[float, ...]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        knots = torch.tensor(self.knots, dtype=torch.float64)
        index = torch.searchsorted(knots, logits.double().contiguous(), right=True) - 1
        return torch.tensor(self.probabilities)[index.clamp(min=0)]

    def to_json(self) -> dict:
        """What :func:`calibrator_from_json` reads."""
        return {"kind": "isotonic", "knots": list(self.knots), "probabilities": list(self.probabilities)}


def calibrator_from_json(record: dict) -> Temperature | Isotonic:
    """The calibrator that ``to_json`` described.

    Raises:
        ValueError: for an unknown kind.
    """
    if record["kind"] == "temperature":
        return Temperature(record["temperature"], record["shift"])
    if record["kind"] == "isotonic":
        return Isotonic(tuple(record["knots"]), tuple(record["probabilities"]))
    raise ValueError(f"unknown calibrator {record['kind']!r}; known: temperature, isotonic")


@lru_cache(maxsize=1024)
def logit_threshold(calibrator: Temperature | Isotonic, probability: float) -> float:
    """The lowest float32 logit whose calibrated probability is at least ``probability``; inf where none is.

    Rows are compared with it instead of being calibrated one by one: calibrators never decrease.
    """
    wanted = torch.tensor(probability, dtype=torch.float32)

    def reaches(key: int) -> bool:
        return bool(calibrator(_float_of(key)[None])[0] >= wanted)

    low, high = -_INFINITY_KEY, _INFINITY_KEY
    if reaches(low):
        return float("-inf")
    if not reaches(high):
        return float("inf")
    while high - low > 1:  # the keys of floats are in the floats' order
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return float(_float_of(high))


def _float_of(key: int) -> torch.Tensor:
    """The float32 whose bits are ``key``; with a minus sign for a negative key."""
    magnitude = torch.tensor(abs(key), dtype=torch.int32).view(torch.float32)
    return -magnitude if key < 0 else magnitude


def fit_temperature(logits: torch.Tensor, correct: torch.Tensor) -> Temperature:
    """Scale and shift with the highest likelihood, by L-BFGS from the identity.

    Raises:
        ValueError: when all rows are correct or all are wrong: no finite scale is best then.
    """
    positives = int(correct.sum())
    if positives in (0, correct.numel()):
        raise ValueError(f"calibration needs right and wrong rows, not {positives} right of {correct.numel()}")
    x, y = logits.double(), correct.double()
    parameters = torch.tensor([0.0, 0.0], dtype=torch.float64, requires_grad=True)  # log scale, offset
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(x * parameters[0].exp() + parameters[1], y)
        loss.backward()
        return loss

    optimizer.step(closure)
    scale, offset = parameters[0].exp().item(), parameters[1].item()
    return Temperature(temperature=1 / scale, shift=-offset / scale)


def fit_isotonic(logits: torch.Tensor, correct: torch.Tensor) -> Isotonic:
    """The rising function closest to the outcomes in squares, by pooling adjacent violators (Ayer et al. 1955).

    Raises:
        ValueError: with fewer than 1000 correct rows.
    """
    positives = int(correct.sum())
    if positives < ISOTONIC_MINIMUM:
        raise ValueError(f"isotonic calibration needs {ISOTONIC_MINIMUM} correct rows, not {positives}")
    knots, inverse = torch.unique(logits.double(), return_inverse=True)
    weights = torch.bincount(inverse).double().tolist()
    sums = torch.bincount(inverse, weights=correct.double()).tolist()
    pools: list[tuple[float, float, float]] = []  # first logit, sum of outcomes, rows
    for knot, total, weight in zip(knots.tolist(), sums, weights, strict=True):
        start = knot
        while pools and pools[-1][1] * weight >= total * pools[-1][2]:
            start, earlier, rows = pools.pop()
            total, weight = total + earlier, weight + rows
        pools.append((start, total, weight))
    return Isotonic(tuple(p[0] for p in pools), tuple(p[1] / p[2] for p in pools))
