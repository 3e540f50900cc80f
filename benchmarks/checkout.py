"""Makes ``import dynamoe`` mean this checkout, installed or not. Import it before anything of the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

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
