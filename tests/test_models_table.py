"""``docs/models.md`` says what each family does, and every cell of it can be tried again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models_table
import pytest
from dynamoe.dynamic.model.families import FAMILIES
from family_parity import ENGINE_PATHS, check_variant

ROWS = {text.split("`")[1]: text for text in models_table.DOCUMENT.read_text().splitlines() if text.startswith("| `")}
# With 48 tokens more at most the 128 to which some of the checkpoints are limited.
LENGTHS = (1, 3, 7, 16, 17, 33, 60, 80)
EVERY = sorted(set(FAMILIES) - {"dynamoe"})


def test_every_family_has_a_row_and_a_checkpoint_and_bounds_are_those_of_the_page() -> None:
    assert sorted(ROWS) == EVERY
    assert set(EVERY) <= set(models_table.variants())
    assert f"\n\n{models_table.bounds()}\n\n" in models_table.DOCUMENT.read_text()
    assert all(len(text.split("|")) == len(models_table.COLUMNS) + 3 for text in ROWS.values())


@pytest.mark.slow
@pytest.mark.parametrize("family", EVERY)
def test_tokens_are_those_of_transformers_on_every_path(
    family: str, tmp_path: Path, reference_model: Callable[[Path], Any]
) -> None:
    """Eight prompts, 48 tokens of each: together, in chunks, under preemption and with prefix hits."""
    given = models_table.variants()[family]
    check_variant(given, tmp_path, reference_model, paths=ENGINE_PATHS, lengths=LENGTHS, count=48)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", EVERY)
def test_the_table_says_what_is_found(family: str, reference_model: Callable[[Path], Any]) -> None:
    found = models_table.row(models_table.variants()[family], reference_model)
    assert models_table.line(family, found) == ROWS[family]
