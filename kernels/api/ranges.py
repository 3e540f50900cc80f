"""Ranges and types of settings, checked when a configuration is made: before a model is loaded for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any


def check_ranges(
    config: Any,
    *names: str,
    where: str = "",
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Check numbers, or sequences and mappings of numbers, in the fields of a dataclass. None passes; NaN never does,
    nor does what is no number, or no whole one where the field is annotated as ``int``.

    Arguments:
        config: holds the attributes.
        names: of the attributes.
        where: what stands before a name in the message, as in ``engine.``.
        least, most: bounds that are allowed themselves.
        above, below: bounds that are not.

    Raises:
        ValueError: naming the attribute, its range and its value.
    """
    annotations = {item.name: str(item.type) for item in fields(config)}
    for name in names:
        value: Any = getattr(config, name)
        kind: Any = Real if "float" in annotations[name] else Integral
        if isinstance(value, Mapping):
            value = tuple(value.values())
        numbers: tuple[Any, ...] = tuple(value) if isinstance(value, Iterable) else (value,)
        for number in numbers:
            inside = number is None or (
                isinstance(number, kind)
                and not isinstance(number, bool)
                and number == number
                and (least is None or number >= least)
                and (above is None or number > above)
                and (most is None or number <= most)
                and (below is None or number < below)
            )
            if not inside:
                words = "" if isinstance(number, kind) else "a whole number, " if kind is Integral else "a number, "
                raise ValueError(f"{where}{name} must be {words}{_words(least, above, most, below)}, not {value!r}")


def check_flags(config: Any, where: str = "") -> None:
    """Check that the fields of a dataclass that are annotated as ``bool`` are true or false.

    Raises:
        ValueError: naming the field and its value.
    """
    for item in fields(config):
        value = getattr(config, item.name)
        if str(item.type) == "bool" and not isinstance(value, bool):
            raise ValueError(f"{where}{item.name} must be true or false, not {value!r}")


def _words(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    if None not in (least, most) or None not in (above, below):
        return f"between {above if least is None else least} and {below if most is None else most}"
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
