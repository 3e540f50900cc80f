"""The command line as a user meets it: help, settings, mistakes, prompts with awkward characters."""

from __future__ import annotations

import dataclasses
import errno
import io
import math
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast, get_type_hints

import pytest
from dynamoe.dynamic.cli import generate
from dynamoe.dynamic.cli import main as cli
from dynamoe.dynamic.cli.config import GenerateConfig, SamplingConfig, schema
from dynamoe.dynamic.cli.errors import explain
from dynamoe.dynamic.cli.generate import encode_prompt, read_prompt, sampling_params
from dynamoe.dynamic.cli.main import COMMANDS, Command, main
from dynamoe.dynamic.text.tokenizer import Tokenizer
from omegaconf import OmegaConf

COMMAND_NAMES = [command.name for command in COMMANDS]


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[GenerateConfig]]:
    """The configurations that reach ``generate``, which does nothing else; runs in an empty directory."""
    configs: list[GenerateConfig] = []
    monkeypatch.setattr(generate, "generate", configs.append)
    monkeypatch.chdir(tmp_path)
    yield configs
    assert list(tmp_path.iterdir()) == [], "the command left something behind"


def test_overview_is_quick_and_lists_every_command(tmp_path: Path) -> None:
    code = "import sys, dynamoe.dynamic.cli.main as c; rc = c.main(['--help']); sys.exit(rc or 'torch' in sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, because other tests share the machine.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    for command in COMMANDS:
        assert f"  {command.name} " in done.stdout
        assert command.summary in done.stdout


@pytest.mark.parametrize("name", COMMAND_NAMES)
def test_help_explains_every_key(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from dynamoe.dynamic.cli.config import keys

    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    command = next(command for command in COMMANDS if command.name == name)
    for key in keys(command.load(command.config)()):
        assert key.help, f"{key.path} has no explanation in its docstring"
        assert f"  {key.path}=" in out
    assert all(example in out for example in command.examples)


def test_settings_reach_the_command(received: list[GenerateConfig]) -> None:
    assert (
        main(["generate", "engine=throughput", "engine.kv_memory=2GiB", "sampling.stop=[a,'b, c']", "dtype=float32"])
        == 0
    )
    (config,) = received
    assert (config.engine.max_num_seqs, config.engine.kv_memory) == (64, "2GiB")
    assert config.engine.block_size == 16
    assert list(config.sampling.stop) == ["a", "b, c"]
    assert config.load_arguments()["config"].dtype == "float32"


@pytest.mark.parametrize(
    "text",
    ["a, b (c) [d] {e}", "What's “this”?", "'quoted'", "x=1, y=${z}", "back\\slash\\", "line\nbreak", "- dash", "  "],
)
def test_prompt_is_taken_as_it_stands(received: list[GenerateConfig], text: str) -> None:
    assert main(["generate", f"prompt={text}", "model=default"]) == 0
    assert received[0].prompt == text


def test_multirun_runs_every_combination(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configs: list[GenerateConfig] = []
    monkeypatch.setattr(generate, "generate", configs.append)
    arguments = ["generate", "prompt=hi", "-m", "sampling.seed=1,2", "engine=default,throughput"]
    assert main([*arguments, f"hydra.sweep.dir={tmp_path}"]) == 0
    assert [(c.sampling.seed, c.engine.max_num_seqs) for c in configs] == [(1, 16), (1, 64), (2, 16), (2, 64)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["engine.max_num_sqs=3"], "no key engine.max_num_sqs; did you mean engine.max_num_seqs?"),
        (["port=3"], "no key port"),
        (["+engine.depth=3"], "no key engine.depth"),
        (["engine=fast"], "no preset engine=fast; there are: default, low_memory, throughput"),
        (["engine.max_num_seqs=many"], "engine.max_num_seqs: Value 'many'"),
        (["engine.max_num_seqs=0"], "engine.max_num_seqs must be at least 1, not 0"),
        (["sampling.temperature=-1"], "temperature must be between 0 and 100, not -1.0"),
        (["sampling.stop=a,b"], "a list is written [a,b]"),
        (["sampling.stop=[a"], "cannot read 'sampling.stop=[a'"),
        (["default"], "cannot read 'default'"),
        (["--port", "3"], "no option --port"),
        (["prompt_file=missing.txt"], "missing.txt: No such file"),
        ([f"prompt_file={sys.executable}"], "is no text in UTF-8"),
        (["prompt=a", "prompt_file=b"], "not both"),
        (["prompt=", "model=nowhere"], "the prompt is empty"),
        (["prompt=hi", "model=nowhere"], "no model 'nowhere'"),
    ],
)
def test_mistake_is_one_line(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    assert main(["generate", *arguments]) == 2
    out, err = capfd.readouterr()
    assert message in err
    assert err.startswith("dynamoe generate: ")
    assert err.count("\n") == 1
    assert out == ""


def test_readme_lists_every_command() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    for name in COMMAND_NAMES:
        assert f"| `dynamoe {name}" in readme


def test_unknown_command_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serv"]) == 2
    names = ", ".join(COMMAND_NAMES)
    assert capsys.readouterr().err == f"dynamoe: there is no command 'serv'; there are: {names}, certificate\n"


def test_the_cpu_backend_without_a_compiler_is_one_line(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dynamoe", "generate", f"model={make_checkpoint('llama')}", "prompt=Hello"]
    environment = {**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([*command, "backend=cpu"], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 2
    reason = "no C++ compiler: 'no-such-compiler' is not on the path"
    assert done.stderr == f"dynamoe generate: the cpu backend cannot run here: {reason}\n"


def test_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: GenerateConfig) -> None:
        raise KeyError("layer 3")

    monkeypatch.setattr(generate, "generate", broken)
    with pytest.raises(KeyError, match="layer 3"):
        main(["generate"])


def test_interrupt_and_exit_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: BaseException) -> Callable[[GenerateConfig], None]:
        def run(config: GenerateConfig) -> None:
            raise error

        return run

    monkeypatch.setattr(generate, "generate", raising(KeyboardInterrupt()))
    assert main(["generate"]) == 130
    monkeypatch.setattr(generate, "generate", raising(SystemExit(3)))
    with pytest.raises(SystemExit, match="3"):
        main(["generate"])


def test_targets_in_a_configuration_are_not_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "mine.yaml").write_text("_target_: os.mkdir\npath: made\n")
    assert main(["generate", "--config-dir", str(tmp_path), "engine=mine"]) == 2
    assert "_target_" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_command_is_one_entry_in_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again = Command(
        name="prepare",
        summary="a summary",
        module="dynamic.cli.generate",
        config="GenerateConfig",
        run="generate",
        examples=(),
    )
    monkeypatch.setattr(cli, "COMMANDS", (again,))
    assert main([]) == 2
    assert "a summary" in capsys.readouterr().out


def test_prompt_sources(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("from a file,\nin two lines\n")
    pipe = io.StringIO("from a pipe\n")
    assert read_prompt(GenerateConfig(prompt_file=str(file)), pipe) == "from a file,\nin two lines"
    assert read_prompt(GenerateConfig(prompt="hello\n"), pipe) == "hello\n"
    assert read_prompt(GenerateConfig(prompt="-"), pipe) == "from a pipe"
    assert read_prompt(GenerateConfig(), io.StringIO("x")) == "x"


def test_no_prompt_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with pytest.raises(ValueError, match="there is no prompt"):
        read_prompt(GenerateConfig(), Terminal())


def test_chat_template_is_used_when_wanted(make_checkpoint: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_directory(make_checkpoint("llama"))
    bare = tokenizer.decode(encode_prompt(tokenizer, "Hello", chat=False), skip_special_tokens=False)
    chat = tokenizer.decode(encode_prompt(tokenizer, "Hello", chat=True, system="Be brief."), skip_special_tokens=False)
    assert bare == "Hello"
    assert chat == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(ValueError, match="system="):
        encode_prompt(tokenizer, "Hello", chat=False, system="Be brief.")


def test_null_takes_the_models_own_sampling() -> None:
    defaults = {"temperature": 0.2, "top_p": 0.9, "max_new_tokens": 7}
    params = sampling_params(SamplingConfig(top_p=0.5, max_tokens=None), defaults)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.2, 0.5, None)
    assert sampling_params(SamplingConfig(temperature=0.0), defaults).greedy


def test_generates_the_models_text(make_checkpoint: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    from dynamoe import LLM, SamplingParams

    model = make_checkpoint("llama")
    settings = ["chat=false", "sampling=greedy", "sampling.max_tokens=12", "dtype=float32"]
    assert main(["generate", f"model={model}", "prompt=The capital of France", *settings]) == 0
    streamed = capfd.readouterr().out
    llm = LLM(str(model), dtype="float32")
    (whole,) = llm.generate("The capital of France", SamplingParams(temperature=0.0, max_tokens=12), use_tqdm=False)
    assert whole.outputs[0].text
    assert streamed == whole.outputs[0].text + "\n"


def test_output_that_nobody_reads_to_its_end_is_no_failure() -> None:
    command = f"{sys.executable} -m dynamoe serve --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("dynamoe serve")
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("generate --help >&-", 0, ""),
        ("generate model=nowhere prompt=hi <&- >&- 2>&-", 2, ""),
        ("generate model=nowhere <&-", 2, "dynamoe generate: the prompt is empty\n"),
        ("--help >/dev/full", 2, "dynamoe: standard output cannot be written: No space left on device\n"),
    ],
)
def test_streams_that_are_closed_or_full_are_no_bugs(command: str, code: int, error: str) -> None:
    done = subprocess.run(f"{sys.executable} -m dynamoe {command}", shell=True, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr.decode()) == (code, error)


def test_a_working_directory_that_is_gone_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    command = f"cd {folder} && rmdir {folder} && {sys.executable} -m dynamoe generate prompt=hi"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (2, "dynamoe generate: the working directory does not exist any more\n")


def test_a_reader_that_leaves_while_tokens_come_is_no_failure(make_checkpoint: Callable[..., Path]) -> None:
    settings = "prompt=hi chat=false sampling.max_tokens=200 sampling.ignore_eos=true"
    command = f"{sys.executable} -m dynamoe generate model={make_checkpoint('llama')} {settings} | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, timeout=120)
    assert (len(done.stdout), done.stderr) == (1, b"")


@pytest.mark.parametrize("command", [["bench", "bench.json"], ["evaluate", "json"]])
def test_results_that_could_not_be_written_are_not_measured(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, says in ((tmp_path / "none" / "x.json", "No such file or directory"), (tmp_path, "Is a directory")):
        assert main([command[0], "model=nowhere", f"{command[1]}={place}"]) == 2
        assert capsys.readouterr().err == f"dynamoe {command[0]}: {place}: {says}\n"


@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "No space left on device"), (errno.EFBIG, "File too large")]
)
def test_a_full_disk_is_one_line(
    number: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(config: GenerateConfig) -> None:
        raise OSError(number, os.strerror(number))  # as a file object does: it names no file

    monkeypatch.setattr(generate, "generate", write)
    assert main(["generate"]) == 2
    assert capsys.readouterr().err == f"dynamoe generate: a file cannot be written: {says}\n"


def test_a_terminal_without_the_characters_gets_their_numbers(make_checkpoint: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "dynamoe", "generate", f"model={make_checkpoint('llama')}", "prompt=hi"]
    settings = ["chat=false", "sampling.max_tokens=20", "sampling.ignore_eos=true"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*command, *settings], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\ufffd" in done.stdout


def test_completion_offers_commands_settings_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    def offered(line: str, shell: str = "bash") -> list[str]:
        assert main(["--complete", shell, line]) == 0
        return capsys.readouterr().out.split("\n")[:-1]

    assert offered("dynamoe ")[: len(COMMAND_NAMES)] == [f"{name} " for name in COMMAND_NAMES]
    assert offered("dynamoe ge") == ["generate "]
    assert offered("dynamoe generate sampling.tem") == ["sampling.temperature="]
    assert offered("dynamoe generate chat=false engine.enable_prefix_caching=t") == ["true"]
    assert offered("dynamoe generate engine=thr", "zsh") == ["engine=throughput"]
    assert offered("dynamoe nothing ") == [""]
    assert main(["completion", "tcsh"]) == 2


def test_bash_completes_a_command_line(tmp_path: Path) -> None:
    script = tmp_path / "complete.bash"
    script.write_text(
        f"""dynamoe() {{ {sys.executable} -m dynamoe "$@"; }}
eval "$(dynamoe completion bash)"
COMP_LINE="dynamoe bench engine=lo"; COMP_POINT=${{#COMP_LINE}}
_dynamoe; printf '%s|' "${{COMPREPLY[@]}}"
complete -p dynamoe
"""
    )
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("low_memory|complete ")


def test_several_runs_leave_nothing_behind(received: list[GenerateConfig]) -> None:
    assert main(["generate", "-m", "sampling.seed=1,2"]) == 0
    assert [config.sampling.seed for config in received] == [1, 2]


def test_a_progress_bar_is_not_written_into_a_file(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = make_checkpoint("llama")
    code = f"import dynamoe; dynamoe.LLM({str(model)!r}).generate(['Hello', 'a'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "\r" not in done.stderr
    folders = (Path(__file__).parents[1] / name for name in ("dynamic", "exits", "kernels", "moe", "serve"))
    sources = [file.read_text() for folder in folders for file in folder.rglob("*.py")]
    bars = [call for source in sources for call in re.findall(r"\btqdm\([^\n]*\)", source)]
    assert len(bars) > 5
    # None: only on a terminal.
    assert all("disable=None" in call or "or None" in call for call in bars)


def number_keys(config_class: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The keys of a configuration that hold numbers, and their types as text."""
    hints = get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            yield from number_keys(cast(type, kind), f"{prefix}{item.name}.")
        elif "int" in str(kind) or "float" in str(kind):
            yield prefix + item.name, str(kind)


MODEL = {
    "train": {"output": "/dev/null/nowhere"},
    "generate": {"model": "nowhere", "prompt": "Hello"},
    "prepare": {"model": "nowhere", "quantization": "gptq", "output": "nowhere"},
}


@pytest.mark.parametrize("name", [name for name in COMMAND_NAMES if name != "sweep"])  # jobs check their own settings
def test_ranges_are_checked_before_a_model_is_loaded(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every key as the command's function gets it, and the last one through the command line, which takes longer."""
    command = next(command for command in COMMANDS if command.name == name)
    config_class, run = command.load(command.config), command.load(command.run)
    accepted, last = [], ""
    for key, kind in number_keys(config_class):
        if key.endswith(("seed", "priority")):  # any number will do where it is only hashed or compared
            continue
        value = math.nan if "float" in kind else -7
        given = [value] if "tuple" in kind or "list" in kind else {4: value} if "dict" in kind else value
        config = schema(config_class)
        for path, setting in (*MODEL.get(name, {"model": "nowhere"}).items(), (key, given)):
            OmegaConf.update(config, path, setting)
        with pytest.raises(Exception) as caught:  # noqa: PT011 - what kind is the next line's business
            run(OmegaConf.to_object(config))
        error = explain(caught.value, command)
        assert error is not None
        assert "\n" not in error
        if key.split(".")[-1] not in error and "must be" not in error:
            accepted.append(f"{key}={given}: {error}")
        last = f"{key}={given}"
    assert accepted == []
    if last:
        model = [f"{key}={value}" for key, value in MODEL.get(name, {"model": "nowhere"}).items()]
        assert main([name, *model, last]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "bound"), [({}, "300"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "x"}, "")]
)
def test_waiting_threads_stop_spinning_before_torch_is_loaded(given: dict[str, str], bound: str) -> None:
    code = "import sys, os, dynamoe; print(os.environ.get('GOMP_SPINCOUNT', ''), 'torch' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | given
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split(" ")[:2] == [bound, "False\n"]
