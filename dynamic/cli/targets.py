"""Restricts what a configuration may instantiate through Hydra: objects of this package, and plug-ins of Hydra.

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
# Launchers and sweepers of Hydra, and what its Optuna sweeper builds: modules, and the base class of what they offer.
PLUGINS = {
    "hydra._internal.core_plugins.": "hydra.plugins.plugin.Plugin",
    "hydra_plugins.": "hydra.plugins.plugin.Plugin",
    "optuna.samplers.": "optuna.samplers.BaseSampler",
}
_SEARCH = "searchpath"
# What runs code or commands: our plug-ins, and the shell lines of the submitit and Ray launchers.
_CODE_KEYS = frozenset({"cache_policy", "logits_processors", "setup", "srun_args", "python", "custom_search_space"})
_CODE_KEYS |= {"setup_commands", "initialization_commands", "worker_setup_commands", "head_setup_commands"}


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
            elif key in _CODE_KEYS and value:
                raise ValueError(f"{where}: {key} runs code and is given on the command line only: {value!r}")
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
    from hydra.utils import get_class, get_object

    name = target if isinstance(target, str) else ""
    prefix = next((p for p in (f"{PACKAGE}.", *PLUGINS) if name.startswith(p)), None)
    if prefix is None:
        raise ValueError(f"{where}: _target_ must be in {PACKAGE} or a plug-in of Hydra, not {target!r}")
    try:
        found = get_object(name)
        base = get_class(PLUGINS[prefix]) if prefix in PLUGINS else object
    except Exception as error:  # whatever an import raises
        raise ValueError(f"{where}: _target_ {target!r} is not there") from error
    # A module's imports can be reached through it too: `package.module.os.system`.
    if not str(getattr(found, "__module__", "")).startswith(prefix):
        raise ValueError(f"{where}: _target_ must be in {prefix[:-1]}, and {target!r} is only imported there")
    if prefix in PLUGINS and not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{where}: _target_ {target!r} is no {base.__name__}")
