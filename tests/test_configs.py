"""Every file under ``conf/`` composes, is typed, and names only keys that exist."""

from __future__ import annotations

import itertools
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from dynamoe.dynamic.cli.config import keys, register, schema
from dynamoe.dynamic.cli.help import presets
from dynamoe.dynamic.cli.main import COMMANDS, Command
from dynamoe.dynamic.cli.sweep import SweepCallback
from dynamoe.dynamic.cli.targets import refuse_foreign_targets
from dynamoe.dynamic.studies.sweep_config import SweepConfig
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

CONF = Path(__file__).parents[1] / "conf"
PRESETS = [
    (command, group, name)
    for command in COMMANDS
    for group, names in presets(command).items()
    for name in names
    if group != "experiment"
]
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


def composed(command: Command, *overrides: str) -> Any:
    """The command's configuration as the object that its function gets."""
    config_class = command.load(command.config)
    register(command.name, config_class)
    with initialize_config_module("dynamoe.conf", version_base="1.3"):
        config = compose(command.name, overrides=list(overrides))
    return OmegaConf.to_object(OmegaConf.merge(schema(config_class), config))


def as_plain(config: Any) -> Any:
    """Nested dictionaries and lists, whatever the containers were."""
    if is_dataclass(config):
        return {item.name: as_plain(getattr(config, item.name)) for item in fields(config)}
    return list(config) if isinstance(config, (list, tuple)) else config


def contains(whole: Any, part: Any) -> bool:
    """Whether every key of nested dictionaries has the same value in others."""
    return all(contains(whole[key], value) for key, value in part.items()) if isinstance(part, dict) else whole == part


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_command_composes_to_its_dataclass(command: Command) -> None:
    config_class = command.load(command.config)
    config = composed(command)
    assert type(config) is config_class
    # What `--help` prints as the defaults is what a user gets.
    assert as_plain(config) == as_plain(config_class())


@pytest.mark.parametrize(("command", "group", "name"), PRESETS, ids=lambda value: getattr(value, "name", value))
def test_preset_composes_and_counts(command: Command, group: str, name: str) -> None:
    config = getattr(composed(command, f"{group}={name}"), group)
    settings = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
    assert isinstance(settings, dict)
    assert contains(as_plain(config), settings)
    assert bool(settings) == (name != "default")


def test_every_file_belongs_to_a_command() -> None:
    used = {f"{command.name}.yaml" for command in COMMANDS} | {f"{group}/{name}.yaml" for _, group, name in PRESETS}
    used |= {f"experiment/{name}.yaml" for name in EXPERIMENTS}
    assert {str(path.relative_to(CONF)) for path in CONF.rglob("*.yaml")} == used | {"quiet.yaml"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_and_every_job_of_it_can_be_built(name: str) -> None:
    sweep = next(command for command in COMMANDS if command.name == "sweep")
    settings: Any = OmegaConf.to_container(OmegaConf.load(CONF / "experiment" / f"{name}.yaml"))
    params = settings.pop("hydra")["sweeper"]["params"]
    assert contains(as_plain(composed(sweep, f"experiment={name}")), settings)
    overrides = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    assert len(jobs) >= 8
    values = [{setting for job in jobs for setting in job if setting.startswith(f"{key}=")} for key in params]
    for job in itertools.zip_longest(*map(sorted, values)):  # every value once
        config = composed(sweep, f"experiment={name}", *filter(None, job))
        assert type(config) is SweepConfig
    compare = settings.get("compare")
    assert compare is None or compare in params


def test_every_target_in_the_files_is_ours_and_can_be_built() -> None:
    found = []
    for file in CONF.rglob("*.yaml"):
        content: Any = OmegaConf.to_container(OmegaConf.load(file))
        refuse_foreign_targets(content, str(file))
        for settings in (content.get("hydra") or {}).get("callbacks", {}).values():
            found.append(type(instantiate(settings)))
    assert found == [SweepCallback]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_key_can_be_set(command: Command) -> None:
    """The defaults written out as overrides give the same configuration: the schema knows each key by its name."""
    overrides = []
    for key in keys(command.load(command.config)()):
        value = "null" if key.default is None else str(key.default)
        if isinstance(key.default, (list, tuple)):
            value = f"[{','.join(map(str, key.default))}]"
        overrides.append(f"{key.path}={value}")
    assert as_plain(composed(command, *overrides)) == as_plain(composed(command))
