"""The ``dynamoe`` command: a table of subcommands, each a Hydra application over ``conf/`` with a typed config."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ..parallel.config import launched_size

PACKAGE = __name__.split(".")[0]
USAGE_ERROR = 2
INTERRUPTED = 130
# Hydra's own options that are passed on, and whether a value follows.
HYDRA_OPTIONS = {
    "-m": False,
    "--multirun": False,
    "-c": True,
    "--cfg": True,
    "--resolve": False,
    "-p": True,
    "--package": True,
    "-cd": True,
    "--config-dir": True,
    "--hydra-help": False,
    "-sc": True,
    "--shell-completion": True,
}


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand.

    Arguments:
        name: also the name of its file in ``conf/``.
        summary: one line for ``dynamoe --help``.
        module: where it lives, below the package. A name and not an import, for two reasons: ``--help`` must not wait
            for torch, and the server lies above this module.
        config: dataclass in that module which types its configuration.
        run: function in that module which takes one.
        examples: command lines for its help.
        multirun: ``run`` takes one job's configuration as Hydra composed it; Hydra starts the jobs.
    """

    name: str
    summary: str
    module: str
    config: str
    run: str
    examples: tuple[str, ...]
    multirun: bool = False

    def load(self, attribute: str) -> Any:
        """An attribute of the command's module."""
        return getattr(importlib.import_module(f"{PACKAGE}.{self.module}"), attribute)


COMMANDS = (
    Command(
        name="serve",
        summary="answer OpenAI-compatible requests over HTTP",
        module="serve.command",
        config="ServeConfig",
        run="serve",
        examples=(
            "dynamoe serve",
            "dynamoe serve model=./my-checkpoint dtype=bfloat16 server.port=8001",
            "dynamoe serve engine=throughput server.api_keys_file=keys.txt",
            "dynamoe serve model=tiny quality.certificates=runs/calibration/certificates quality.monitor.share=0.05",
        ),
    ),
    Command(
        name="generate",
        summary="continue a prompt, or answer it with the model's chat template",
        module="dynamic.cli.generate",
        config="GenerateConfig",
        run="generate",
        examples=(
            'dynamoe generate prompt="What is the capital of France?"',
            "dynamoe generate prompt_file=question.txt sampling.temperature=0.7 sampling.seed=1",
            'echo "Once upon a time" | dynamoe generate chat=false sampling.max_tokens=64',
        ),
    ),
    Command(
        name="bench",
        summary="measure TTFT, inter-token latency and throughput, here or of a running server",
        module="dynamic.bench.command",
        config="BenchCommandConfig",
        run="bench",
        examples=(
            "dynamoe bench bench.concurrency=[1,4,16] bench.input_len=[128,512]",
            "dynamoe bench bench.url=http://127.0.0.1:8000 bench.output_len=32 bench.json=bench.json",
        ),
    ),
    Command(
        name="evaluate",
        summary="measure what a setting gives up against the full model, what it executes, and how fast it is",
        module="dynamic.studies.evaluate",
        config="EvaluateConfig",
        run="evaluate",
        examples=(
            "dynamoe evaluate model=tiny quality.alpha=0.02",
            "dynamoe evaluate quality.exit_threshold=0.9 quality.expert_keep=0.8 json=result.json",
            "dynamoe evaluate model=tiny dtype=bfloat16 reference.dtype=float32 text=chapter.txt",
        ),
    ),
    Command(
        name="sweep",
        summary="evaluate every combination of settings: one table, plots of quality against compute, configurations",
        module="dynamic.studies.sweep",
        config="SweepConfig",
        run="job",
        examples=(
            "dynamoe sweep quality.alpha=null,0.02,0.05 dtype=bfloat16,float32 quality.uncertified=true",
            "dynamoe sweep quality.exit_threshold=0.9,0.95 hydra/launcher=joblib hydra.launcher.n_jobs=2",
            "dynamoe sweep experiment=contribution_vs_score output=runs/contribution",
        ),
        multirun=True,
    ),
    Command(
        name="prepare",
        summary="fetch, convert or quantise a model and compile the kernels, ahead of the first use",
        module="dynamic.cli.prepare",
        config="PrepareConfig",
        run="prepare",
        examples=(
            "dynamoe prepare",
            "dynamoe prepare model=default",
            "dynamoe prepare quantization=gptq model=./my-checkpoint output=./my-checkpoint-int4",
        ),
    ),
    Command(
        name="train",
        summary="train a model with exits by a recipe: text, vocabulary, weights, exits, report",
        module="dynamic.train.command",
        config="TrainConfig",
        run="train",
        examples=("dynamoe train recipe=tiny", "dynamoe train recipe=tiny output=runs/tiny max_minutes=10"),
    ),
    Command(
        name="exits",
        summary="give a model that is served as it is early exits: read-out adapters, probes, calibration",
        module="dynamic.train.frozen",
        config="FrozenConfig",
        run="make_frozen_exits",
        examples=(
            "dynamoe exits model=default output=runs/default-exits",
            "dynamoe exits model=./my-checkpoint exit_layers=[8,16,24] text_folder=./texts",
        ),
    ),
    Command(
        name="calibrate",
        summary="prove which exit thresholds keep a risk: certificates, and a plot of risk against compute",
        module="dynamic.studies.calibrate",
        config="CalibrateConfig",
        run="calibrate",
        examples=(
            "dynamoe calibrate model=tiny",
            "dynamoe calibrate model=runs/default-exits/model prompts=requests.jsonl alphas=[0.02,0.05]",
        ),
    ),
    Command(
        name="experts",
        summary="measure what each expert of a model adds, for requests with an expert budget",
        module="dynamic.train.expert_scales",
        config="ExpertsConfig",
        run="make_expert_scales",
        examples=("dynamoe experts model=./my-checkpoint", "dynamoe experts model=./my-checkpoint windows=512"),
    ),
)


class JobFailed(SystemExit):
    """Carries an error past Hydra, which would print lines of its own about an ordinary exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(1)
        self.error = error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for what the caller got wrong, 130 when interrupted."""
    try:
        code = _main(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


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
    command = next((command for command in COMMANDS if command.name == arguments[0]), None)
    if command is None:
        known = ", ".join(command.name for command in COMMANDS)
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
        )
    )


def _run(command: Command, arguments: list[str]) -> int:
    # Hydra prints its errors over several lines and exits with 1, unless told to leave them alone.
    full_errors = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    previous_argv = sys.argv
    try:
        from .targets import check_arguments

        config_class = command.load(command.config)
        shared = {"parallel", "zero"} & {field.name for field in dataclasses.fields(config_class)}
        if not shared and (processes := launched_size()) > 1:
            raise ValueError(f"it runs in one process; the launcher started {processes}")
        settings, verbatim = _split(arguments, config_class)
        check_arguments(arguments)
        sys.argv = [f"dynamoe {command.name}", *settings]
        _hydra_application(command, config_class, verbatim)()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader went away (`… | head`); what is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, JobFailed) as failure:
        from .errors import explain

        error = failure.error if isinstance(failure, JobFailed) else failure
        message = None if full_errors else explain(error, command)
        if message is None:
            raise error from error.__cause__
        return _fail(f"dynamoe {command.name}", message)
    finally:
        sys.argv = previous_argv
        if not full_errors:
            os.environ.pop("HYDRA_FULL_ERROR", None)
    return 0


def _split(arguments: list[str], config_class: type) -> tuple[list[str], dict[str, str]]:
    """What Hydra parses, and the free text that it must not see: a comma or a quote means something in its grammar."""
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
            if key not in HYDRA_OPTIONS:
                raise ValueError(f"there is no option {key}; settings are written key=value, without dashes")
            options.append(argument)
            value_follows = HYDRA_OPTIONS[key] and not equals
        elif equals and key in free_text and not sweep:
            verbatim[key] = value
        else:
            settings.append(argument)
    # Hydra's parser wants its options in one piece.
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
            # Merged once more, so that a key added with `+` meets the schema as well.
            typed = OmegaConf.merge(schema(config_class), cast(Any, OmegaConf.to_container(config)))
            settings = cast(Any, OmegaConf.to_object(typed))
            command.load(command.run)(dataclasses.replace(settings, **verbatim))
        except BrokenPipeError:
            raise
        except Exception as error:
            raise JobFailed(error) from error

    return main(task)


def _fail(program: str, message: str) -> int:
    print(f"{program}: {message}", file=sys.stderr)
    return USAGE_ERROR
