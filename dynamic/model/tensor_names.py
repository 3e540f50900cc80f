"""What a family's checkpoints call their tensors, and what these are called here."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .family import Family
from .text_part import Rename


def family_names(family: Family, rename: Rename) -> Rename:
    """A table of names with those that are used here for a family's own.

    Arguments:
        rename: makes the table, see :func:`.text_names`.
    """

    def renamed(names: Iterable[str]) -> dict[str, str]:
        table = rename(names)
        for pattern, known in family.names.items():
            table = {theirs: re.sub(pattern, known, name) for theirs, name in table.items()}
        return table

    return renamed
