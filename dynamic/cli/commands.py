"""The table of subcommands, and how one of them fails."""

from __future__ import annotations

import errno
import importlib
from dataclasses import dataclass
from typing import Any

PACKAGE = __name__.split(".")[0]
CERTIFICATE_ACTIONS = ("list", "show", "verify", "diff", "deployment", "schema")
# Writing ends so where a disk is full or broken, or files may not grow; Python does not say which file it was.
DISK_FAULTS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})


class JobFailed(SystemExit):
    """Carries an error through Hydra, which would print its own report of an ordinary exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(1)
        self.error = error


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
        summary="measure the loss of a setting against the full model, what it executes, and how fast it is",
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
        module="dynamic.cli.sweep",
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
            "dynamoe prepare model=./my-checkpoint quantization=int4",
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
        summary="give a model that is served as it is early exits: exit-head adapters, probes, calibration",
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
        summary="prove which exits, experts and bits stay below a risk: certificates, a plot of risk against compute",
        module="dynamic.studies.calibrate",
        config="CalibrateConfig",
        run="calibrate",
        examples=(
            "dynamoe calibrate model=tiny",
            "dynamoe calibrate model=runs/default-exits/model prompts=requests.jsonl alphas=[0.02,0.05]",
            "dynamoe calibrate model=./my-moe prompts=requests.jsonl quantization=[none,int8] experts_per_token=[4,2]",
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
