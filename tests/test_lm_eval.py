"""lm-evaluation-harness through the server equals the same tasks through transformers."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

WORDS = "the capital of France is Paris a house in forest where old man reads his books every night until morning"
CHOICE_TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc}}
  - {{metric: acc_norm}}
"""
CHAT_TASK = """
task: local_chat
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
fewshot_split: test
num_fewshot: 2
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match}}
"""
TEXT_TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: bits_per_byte}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three tasks and their data."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(0)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS.split(), k=rng.randrange(low, high)))

    choices = [
        {"question": words(3, 40), "choices": [words(1, 6) for _ in range(4)], "answer": rng.randrange(4)}
        for _ in range(24)
    ]
    for name, template, rows in (
        ("choice", CHOICE_TASK, choices),
        ("text", TEXT_TASK, [{"text": words(20, 80)} for _ in range(8)]),
        ("chat", CHAT_TASK, [{"question": words(3, 9), "answer": words(2, 6)} for _ in range(12)]),
    ):
        data = folder / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, rows)))
        (folder / f"{name}.yaml").write_text(template.format(file=json.dumps(str(data))))
    return folder


def evaluate(
    tasks: Path, output: Path, model: str, arguments: str, *flags: str, chosen: str = "local_choice,local_text"
) -> tuple[dict[str, Any], list[Any]]:
    """The metrics of the tasks, and every single answer: log-likelihoods or texts."""
    output.mkdir()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(output / "cache")}
    command = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments, "--batch_size", "4"]
    command += ["--tasks", chosen, "--include_path", str(tasks), "--device", "cpu", *flags]
    command += ["--output_path", str(output), "--log_samples"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=output)
    assert result.returncode == 0, result.stdout + result.stderr
    (results,) = output.rglob("results_*.json")
    metrics = {
        (task, name): value
        for task, found in json.loads(results.read_text())["results"].items()
        for name, value in found.items()
        if isinstance(value, float)
    }
    samples = []
    for file in sorted(output.rglob("samples_*.jsonl")):
        rows = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["doc_id"])
        samples += [response for row in rows for response in row["filtered_resps"]]
    return metrics, samples


def test_lm_eval_equals_transformers(
    tasks: Path, start_server: Any, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("mixtral")
    server = start_server(checkpoint)
    folders = [tmp_path / "server", tmp_path / "transformers"]
    served = f"model=tiny,base_url={server.url}/v1/completions,tokenizer={checkpoint},num_concurrent=3,max_length=511"
    ours, our_samples = evaluate(tasks, folders[0], "local-completions", served)
    local = f"pretrained={checkpoint},dtype=float32,max_length=511"
    theirs, their_samples = evaluate(tasks, folders[1], "hf", local)
    assert len(theirs) >= 3
    assert ours == pytest.approx(theirs, abs=1e-3)
    assert len(our_samples) == len(their_samples) == 24 * 4 + 8
    for mine, other in zip(our_samples, their_samples, strict=True):
        mine, other = (item if isinstance(item, list) else [item] for item in (mine, other))
        assert float(mine[0]) == pytest.approx(float(other[0]), abs=1e-2)
        assert mine[1:] == other[1:]  # whether the continuation is the greedy one


def test_conversations_equal_those_of_transformers(
    tasks: Path, start_server: Any, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Questions with two answered ones before them, as the turns of a chat."""
    checkpoint = make_checkpoint("mixtral")
    server = start_server(checkpoint)
    flags = ("--apply_chat_template", "--fewshot_as_multiturn")
    served = f"model=tiny,base_url={server.url}/v1/chat/completions,num_concurrent=3"
    _, ours = evaluate(tasks, tmp_path / "server", "local-chat-completions", served, *flags, chosen="local_chat")
    local = f"pretrained={checkpoint},dtype=float32,max_length=511"
    _, theirs = evaluate(tasks, tmp_path / "transformers", "hf", local, *flags, chosen="local_chat")
    assert len(ours) == 12
    assert ours == theirs
    assert any(text.strip() for text in ours)
