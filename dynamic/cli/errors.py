"""One-line error messages for mistakes on the command line."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from .commands import DISK_FAULTS
from .config import keys

if TYPE_CHECKING:
    from .commands import Command


def explain(error: Exception, command: Command) -> str | None:
    """The message for the caller; None if the error is a bug and needs its traceback.

    Callers' mistakes are what Hydra and OmegaConf refuse, ``ValueError`` (the package raises it for nothing else) and
    files and addresses that cannot be opened.
    """
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, (ConfigKeyError, AttributeError)) and isinstance(cause, OmegaConfBaseException):
        return _unknown_key(_refused_key(cause, error), command)
    if isinstance(cause, ValidationError):
        return f"{cause.full_key}: {_first_line(cause)}"
    if isinstance(error, OverrideParseException):
        advice = "put text with special characters in quotes" if "=" in error.override else "settings are key=value"
        return f"cannot read {error.override!r}: {_first_line(error)}; {advice}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"there is no preset {group}={name}; there are: {', '.join(error.options)}"
    if isinstance(error, HydraException) and "Ambiguous value" in str(error):
        return f"{_first_line(error)}; a list is written [a,b], several runs -m, text with commas in quotes"
    if isinstance(error, (HydraException, OmegaConfBaseException, ValueError)):
        return _first_line(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return f"a file cannot be written: {error.strerror}"
    if type(error).__name__ == "SafetensorError" and "(os error" in str(error):
        return f"a file cannot be written: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # Hydra breaks some messages after a colon.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _refused_key(cause: OmegaConfBaseException, error: Exception) -> str:
    """The dotted key that was refused: Hydra's message has all of it, OmegaConf's what it had reached."""
    match = re.search(r"Could not override '([^']+)'", str(error))
    return match.group(1) if match else str(cause.full_key)


def _unknown_key(key: str, command: Command) -> str:
    known = [item.path for item in keys(command.load(command.config)())]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.8) or [
        path for path in known if path.split(".")[-1] == key.split(".")[-1]
    ]
    suggestion = f"; did you mean {close[0]}?" if close else ""
    return f"there is no key {key}{suggestion} (`dynamoe {command.name} --help` lists all)"
