"""Restricts what a configuration may instantiate through Hydra: objects of this package and Hydra's launchers.

Hydra imports and calls the value of ``_target_``, and Python's logging that of ``()``. A configuration file from
somebody else must not be able to run code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

PACKAGE = __name__.split(".")[0]
PLUGINS = frozenset(
    {
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
    }
)
_SEARCH = "searchpath"
_PLUGIN_KEYS = frozenset({"cache_policy", "logits_processors"})


def refuse_foreign_targets(config: Any, where: str) -> None:
    """Check nested mappings and lists.

    Arguments:
        where: their name in the error.

    Raises:
        ValueError: naming the first target or plug-in that is not allowed, or a search path for further files.
    """
    if isinstance(config, dict):
        for key, value in config.items():
            if key == "_target_":
                _check(value, where)
            elif key == "()":
                raise ValueError(f"{where}: a logging factory ('()') is not allowed: {value!r}")
            elif key == _SEARCH and value:
                raise ValueError(f"{where}: hydra.searchpath is not allowed; use --config-dir")
            elif key in _PLUGIN_KEYS and value:
                raise ValueError(f"{where}: {key} run code and are named on the command line only: {value!r}")
            refuse_foreign_targets(value, where)
    elif isinstance(config, list):
        for value in config:
            refuse_foreign_targets(value, where)


def check_arguments(arguments: Sequence[str]) -> None:
    """Check the files of ``--config-dir`` and the settings of a command line, before Hydra reads them.

    Raises:
        ValueError: as :func:`refuse_foreign_targets`, and for a file that cannot be read.
    """
    for folder in _config_dirs(arguments):
        for file in sorted(path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml")):
            try:
                content = OmegaConf.to_container(OmegaConf.load(file))
            except (OSError, YAMLError, OmegaConfBaseException) as error:
                raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
            refuse_foreign_targets(content, str(file))
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.split(".")[-1] == "_target_":
            _check(value.strip("'\""), argument)
        elif "_target_" in argument or (key.lstrip("+~") == f"hydra.{_SEARCH}"):
            raise ValueError(f"{argument}: a target or a search path inside a value is not allowed")


def _config_dirs(arguments: Sequence[str]) -> Iterable[Path]:
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in ("-cd", "--config-dir"):
            if not equals:
                value = arguments[place + 1] if place + 1 < len(arguments) else ""
            yield Path(value)


def _check(target: Any, where: str) -> None:
    if target in PLUGINS:
        return
    if not isinstance(target, str) or not target.startswith(f"{PACKAGE}."):
        raise ValueError(f"{where}: _target_ must be in {PACKAGE}, not {target!r}")
    from hydra.utils import get_object

    try:
        found = get_object(target)
    except Exception as error:  # whatever an import raises
        raise ValueError(f"{where}: _target_ {target!r} is not there") from error
    # A module's imports can be reached through it too: `package.module.os.system`.
    if not str(getattr(found, "__module__", "")).startswith(f"{PACKAGE}."):
        raise ValueError(f"{where}: _target_ must be in {PACKAGE}, and {target!r} is only imported there")
