"""The ``dynamoe`` command: a table of subcommands, each a Hydra application over ``conf/`` with a typed config."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import Any, cast

from ..parallel.config import launched_size
from .commands import COMMANDS, DISK_FAULTS, PACKAGE, Command, JobFailed

USAGE_ERROR = 2
INTERRUPTED = 130
# Hydra's own options that are passed on: alone, and those that a value follows.
HYDRA_FLAGS = frozenset({"-m", "--multirun", "--resolve", "--hydra-help"})
HYDRA_VALUES = frozenset({"-c", "--cfg", "-p", "--package", "-cd", "--config-dir"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for what the caller got wrong, 130 when interrupted."""
    _open_standard_streams()
    code = 0
    try:
        code = _main(argv)
        sys.stdout.flush()
    except KeyboardInterrupt:  # outside of a command
        return INTERRUPTED
    except BrokenPipeError:  # the reader has gone (`… | head`)
        _discard_output()
    except OSError as error:
        if error.errno not in DISK_FAULTS:
            raise
        _discard_output()
        return code or _fail("dynamoe", f"standard output cannot be written: {error.strerror}")
    return code


def _open_standard_streams() -> None:
    """Give streams that the caller has closed a place that leads nowhere, so that no file gets their numbers; and let
    no character fail that the terminal cannot show."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Nothing is written when the interpreter ends, which would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("--local_rank="):  # of the deepspeed launcher, which sets RANK as well
        del arguments[0]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(overview())
        return 0 if arguments else USAGE_ERROR
    if arguments[0] == "--version":
        print(importlib.import_module(PACKAGE).__version__)
        return 0
    if arguments[0] in ("completion", "--complete"):
        return _complete(arguments)
    if arguments[0] == "certificate":
        return _certificate(arguments[1:])
    command = next((command for command in COMMANDS if command.name == arguments[0]), None)
    if command is None:
        known = ", ".join((*(command.name for command in COMMANDS), "certificate"))
        return _fail("dynamoe", f"there is no command {arguments[0]!r}; there are: {known}")
    if any(argument in ("-h", "--help") for argument in arguments[1:]):
        from .help import command_help

        print(command_help(command))
        return 0
    return _run(command, arguments[1:])


def overview() -> str:
    """The text of ``dynamoe --help``."""
    lines = [f"  {command.name:<10} {command.summary}" for command in COMMANDS]
    return "\n".join(
        (
            "dynamoe: mixture-of-experts and early-exit inference with a quality contract per request",
            "",
            "usage: dynamoe COMMAND [key=value …]",
            "",
            *lines,
            "",
            "`dynamoe COMMAND --help` lists a command's keys.",
            "`dynamoe certificate list|show|verify|diff` looks at certificates (`dynamoe certificate --help`).",
            'Tab completion: eval "$(dynamoe completion bash)", or zsh, or fish.',
        )
    )


def _complete(arguments: list[str]) -> int:
    from .completion import candidates, completion_script

    if arguments[0] == "--complete" and len(arguments) == 3:
        print("\n".join(candidates(*arguments[1:])))
        return 0
    try:
        print(completion_script(" ".join(arguments[1:])), end="")
    except ValueError as error:
        return _fail("dynamoe completion", str(error))
    return 0


def _certificate(arguments: list[str]) -> int:
    from .certificate import certificate

    try:
        return certificate(arguments)
    except ValueError as error:
        return _fail("dynamoe certificate", str(error))


def _run(command: Command, arguments: list[str]) -> int:
    # Otherwise Hydra prints its errors over several lines and exits with 1.
    full_errors = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    previous_argv = sys.argv
    try:
        from .targets import check_arguments

        _check_working_directory()
        config_class = command.load(command.config)
        shared = {"parallel", "zero"} & {field.name for field in dataclasses.fields(config_class)}
        if not shared and (processes := launched_size()) > 1:
            raise ValueError(f"it runs in one process; the launcher started {processes}")
        settings, verbatim = _split(arguments, config_class)
        check_arguments(arguments)
        with tempfile.TemporaryDirectory(prefix="dynamoe-") as folder:
            if not command.multirun and not any(setting.startswith("hydra.sweep.dir=") for setting in settings):
                # Of several runs Hydra writes a list; these commands leave nothing behind.
                settings += [f"hydra.sweep.dir={folder}", "hydra.sweep.subdir=."]
            sys.argv = [f"dynamoe {command.name}", *settings]
            _hydra_application(command, config_class, verbatim)()
    except KeyboardInterrupt:
        return INTERRUPTED
    except (Exception, JobFailed) as failure:
        from .errors import explain

        error = failure.error if isinstance(failure, JobFailed) else failure
        if isinstance(error, BrokenPipeError):
            raise error from None
        message = None if full_errors else explain(error, command)
        if message is None:
            raise error from error.__cause__
        return _fail(f"dynamoe {command.name}", message)
    finally:
        sys.argv = previous_argv
        if not full_errors:
            os.environ.pop("HYDRA_FULL_ERROR", None)
    return 0


def _check_working_directory() -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("the working directory does not exist any more") from None


def _split(arguments: list[str], config_class: type) -> tuple[list[str], dict[str, str]]:
    """The arguments that Hydra parses, and the free text that it must not: its grammar has commas and quotes."""
    free_text: frozenset[str] = getattr(config_class, "FREE_TEXT", frozenset())
    sweep = any(argument in ("-m", "--multirun") for argument in arguments)
    options: list[str] = []
    settings: list[str] = []
    verbatim: dict[str, str] = {}
    value_follows = False
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if value_follows:
            options.append(argument)
            value_follows = False
        elif argument.startswith("-"):
            if key not in HYDRA_FLAGS | HYDRA_VALUES:
                raise ValueError(f"there is no option {key}; settings are written key=value, without dashes")
            options.append(argument)
            value_follows = key in HYDRA_VALUES and not equals
        elif equals and key in free_text and not sweep:
            verbatim[key] = value
        else:
            settings.append(argument)
    # Hydra's parser needs its options in one sequence.
    return [*options, *settings], verbatim


def _hydra_application(command: Command, config_class: type, verbatim: dict[str, str]) -> Callable[[], None]:
    import hydra
    from omegaconf import DictConfig, OmegaConf

    from .config import register, schema

    register(command.name, config_class)
    main = hydra.main(version_base="1.3", config_path=f"pkg://{PACKAGE}.conf", config_name=command.name)
    if command.multirun:
        return main(command.load(command.run))

    def task(config: DictConfig) -> None:
        try:
            # Merged once more, so that a key added with `+` is checked against the schema as well.
            typed = OmegaConf.merge(schema(config_class), cast(Any, OmegaConf.to_container(config)))
            settings = cast(Any, OmegaConf.to_object(typed))
            command.load(command.run)(dataclasses.replace(settings, **verbatim))
        except Exception as error:
            raise JobFailed(error) from error

    return main(task)


def _fail(program: str, message: str) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return USAGE_ERROR
