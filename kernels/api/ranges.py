"""Ranges of settings, checked when a configuration is made: before a model is loaded for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def check_ranges(
    config: object,
    *names: str,
    where: str = "",
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Check numbers, or sequences and mappings of numbers, in the attributes of an object. None passes; NaN never does.

    Arguments:
        config: holds the attributes.
        names: of the attributes.
        where: what stands before a name in the message, as in ``engine.``.
        least, most: bounds that are allowed themselves.
        above, below: bounds that are not.

    Raises:
        ValueError: naming the attribute, its range and its value.
    """
    for name in names:
        value: Any = getattr(config, name)
        if isinstance(value, Mapping):
            value = tuple(value.values())
        numbers: tuple[Any, ...] = tuple(value) if isinstance(value, Iterable) else (value,)
        for number in numbers:
            inside = number is None or (
                number == number
                and (least is None or number >= least)
                and (above is None or number > above)
                and (most is None or number <= most)
                and (below is None or number < below)
            )
            if not inside:
                raise ValueError(f"{where}{name} must be {_words(least, above, most, below)}, not {value}")


def _words(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    if None not in (least, most) or None not in (above, below):
        return f"between {above if least is None else least} and {below if most is None else most}"
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
