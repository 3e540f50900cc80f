"""The ledger of calibrations: every level that was ever tried in a directory of certificates, proved or not.

Delta holds for one calibration. A level that was tried until it passed was not proved at that delta, and here it shows.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LEDGER = "ledger.jsonl"


def enter(directory: Path, level: Mapping[str, Any]) -> int:
    """Append a level that was tried, unless the same try is in the ledger already: a run that was resumed.

    Arguments:
        directory: of the certificates.
        level: JSON-able: what was to be proved (``alpha``, ``delta``), how, on what, and what came of it.

    Returns: other tries at the same alpha and delta on the same backend and dtype that the ledger holds, whatever the
        state of code and model.
    """
    file = directory / LEDGER
    entry = json.loads(json.dumps(level))
    tried = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = [{name: value for name, value in past.items() if name != "date"} for past in tried]
    if entry not in known:
        with file.open("a") as stream:
            stream.write(json.dumps({"date": datetime.date.today().isoformat(), **entry}) + "\n")
    same = ("alpha", "delta", "temperature", "backend", "dtype")
    return sum(past != entry and all(past.get(name) in (entry[name], None) for name in same) for past in known)
