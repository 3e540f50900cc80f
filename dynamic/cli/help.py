"""``dynamoe COMMAND --help``: every key with its default and its explanation, read from the configuration itself."""

from __future__ import annotations

import importlib.resources
import shutil
import textwrap
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from .config import Key, keys

if TYPE_CHECKING:
    from .commands import Command

INDENT = 34


def command_help(command: Command) -> str:
    """The text of ``dynamoe COMMAND --help``."""
    config = command.load(command.config)()
    width = min(shutil.get_terminal_size().columns, 120)
    groups = presets(command)
    lines = [
        f"dynamoe {command.name}: {command.summary}",
        "",
        f"usage: dynamoe {command.name} [key=value …]",
        "",
        "Keys and their defaults:",
        *(line for key in keys(config) for line in _key_lines(key, width)),
        "",
        "Examples:",
        *(f"  {example}" for example in command.examples),
        "",
        *(f"Presets: {group}={'|'.join(names)}" for group, names in groups.items()),
        "Lists are written [a,b], text with commas or brackets in quotes: 'sampling.stop=[\"a, b\"]'.",
        "Hydra's options work too: `-m key=a,b` runs every combination, `--cfg job` prints the configuration.",
    ]
    return "\n".join(lines)


def presets(command: Command) -> dict[str, list[str]]:
    """The groups of ``conf/`` that a command's file names, with the presets in each."""
    conf = importlib.resources.files(f"{__name__.split('.')[0]}.conf")
    file = OmegaConf.to_container(OmegaConf.create((conf / f"{command.name}.yaml").read_text()))
    assert isinstance(file, dict)
    groups = [str(name) for entry in file["defaults"] if isinstance(entry, dict) for name in entry]
    return {
        group: sorted(path.name.removesuffix(".yaml") for path in (conf / group).iterdir())
        for group in groups
        if not group.startswith("override")
    }


def _key_lines(key: Key, width: int) -> list[str]:
    default = "null" if key.default is None else str(key.default)
    if isinstance(key.default, bool):
        default = default.lower()
    elif isinstance(key.default, (list, tuple)):
        default = f"[{','.join(map(str, key.default))}]"
    head = f"  {key.path}={default}"
    text = textwrap.wrap(key.help, width - INDENT) or [""]
    if len(head) < INDENT - 1:
        text[0] = head.ljust(INDENT) + text[0]
        return [text[0].rstrip(), *(" " * INDENT + line for line in text[1:])]
    return [head, *(" " * INDENT + line for line in text if line)]
