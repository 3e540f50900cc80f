"""What the benchmarks share: their command line, where they ran, and the file their results go into.

Importing it makes ``import dynamoe`` mean this checkout, installed or not, so its name sorts before the package's.
"""

import argparse
import datetime
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

if "dynamoe" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "dynamoe", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert _spec is not None
    assert _spec.loader is not None
    _package = importlib.util.module_from_spec(_spec)
    sys.modules["dynamoe"] = _package
    _spec.loader.exec_module(_package)


def command_line(description: str | None, *, name: bool = False, output: bool = False) -> argparse.ArgumentParser:
    """A parser that prints the script's own text as it is written.

    Arguments:
        name: add ``--name``, which :func:`name_of` reads.
        output: add ``--output``, a folder.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if name:
        parser.add_argument("--name", help="of the result file; the model's name otherwise")
    if output:
        parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the result file")
    return parser


def name_of(options: argparse.Namespace) -> str:
    """What results of the model are called."""
    return options.name or Path(options.model).name


def surroundings() -> dict[str, Any]:
    """When and on what a benchmark ran."""
    import torch
    from dynamoe.dynamic.model.machine import processor

    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": now.date().isoformat(),
        "when": now.isoformat(timespec="seconds"),
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def write(file: Path, result: dict[str, Any] | list[Any]) -> None:
    """Write results as JSON; folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def in_turns(names: Sequence[str], turn: int) -> list[str]:
    """Who runs in which order in a turn: each turn begins with the next one, because machines drift."""
    first = turn % len(names)
    return [*names[first:], *names[:first]]
