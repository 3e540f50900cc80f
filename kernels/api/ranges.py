"""Ranges and types of settings, checked when a configuration is made: before a model is loaded for it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

_MAPPING = re.compile(r"(dict|Mapping)\[")
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SEQUENCE = re.compile(r"(tuple|list|Sequence|Iterable)\[")


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, of Python or of an array; true and false are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_ranges(
    config: Any,
    *names: str,
    where: str = "",
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """Check numbers in the fields of a dataclass, and sequences and mappings of numbers where a field is annotated as
    one. None passes where it is annotated; NaN never does, nor does what is no number, or no whole one where the field
    is annotated as ``int``.

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
        annotation = annotations[name]
        kind: Any = Real if "float" in annotation else Integral
        if isinstance(value, Mapping) and _MAPPING.search(annotation):
            value = tuple(value.values())
            numbers = value
        else:
            is_many = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
            numbers = tuple(value) if is_many and _SEQUENCE.search(annotation) else (value,)
        for number in numbers:
            is_typed = isinstance(number, kind) and not isinstance(number, bool)
            inside = (number is None and "None" in annotation) or (
                is_typed and _inside(number, least, above, most, below)
            )
            if not inside:
                words = "" if is_typed else "a whole number" if kind is Integral else "a number"
                expected = ", ".join(filter(None, (words, _words(least, above, most, below)))) or "a number"
                raise ValueError(f"{where}{name} must be {expected}, not {value!r}")


def check_flags(config: Any, where: str = "") -> None:
    """Check that the fields of a dataclass that are annotated as ``bool`` are true or false.

    Raises:
        ValueError: naming the field and its value.
    """
    for item in fields(config):
        value = getattr(config, item.name)
        if str(item.type) == "bool" and not isinstance(value, bool):
            raise ValueError(f"{where}{item.name} must be true or false, not {value!r}")


def parse_bytes(amount: int | str, name: str) -> int:
    """``"2GiB"``, ``"512 MB"`` or a number, in bytes.

    Arguments:
        name: of the setting, for the message.

    Raises:
        ValueError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(amount))
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{name} must be a number of bytes or like '2GiB', not {amount!r}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _inside(number: Any, least: float | None, above: float | None, most: float | None, below: float | None) -> bool:
    return (
        number == number
        and (least is None or number >= least)
        and (above is None or number > above)
        and (most is None or number <= most)
        and (below is None or number < below)
    )


def _words(least: float | None, above: float | None, most: float | None, below: float | None) -> str:
    if None not in (least, most) or None not in (above, below):
        return f"between {above if least is None else least} and {below if most is None else most}"
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    return " and ".join(f"{words} {bound}" for words, bound in bounds.items() if bound is not None)
