"""``docs/models.md`` says what each family does, and every cell of it can be tried again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models_table
import pytest
from dynamoe.dynamic.model.families import FAMILIES

ROWS = {text.split("`")[1]: text for text in models_table.DOCUMENT.read_text().splitlines() if text.startswith("| `")}
EVERY = sorted(set(FAMILIES) - {"dynamoe"})


def test_every_family_has_a_row_and_a_checkpoint_and_bounds_are_those_of_the_page() -> None:
    assert sorted(ROWS) == EVERY
    assert set(EVERY) <= set(models_table.variants())
    assert f"\n\n{models_table.bounds()}\n\n" in models_table.DOCUMENT.read_text()
    assert all(len(text.split("|")) == len(models_table.COLUMNS) + 3 for text in ROWS.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", EVERY)
def test_the_table_says_what_is_found(family: str, reference_model: Callable[[Path], Any]) -> None:
    found = models_table.row(models_table.variants()[family], reference_model)
    assert models_table.line(family, found) == ROWS[family]
