"""Damaged files: a model that loads and runs, or one line that names the culprit; see ``file_fuzz.py`` for the limits.

A process that dies (a crash, ten seconds, memory beyond the limit) ends the list of cases early, and fails the test.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from models_table import variants
from stored_layouts import LAYOUTS, SIZES, store_all

FUZZ = Path(__file__).with_name("file_fuzz.py")
WEIGHTS, CONFIG = "model.safetensors", "config.json"
# Checkpoint, file, and its share of 500 cases.
FILES = [
    ("llama", WEIGHTS, 200),
    ("gptq", WEIGHTS, 150),
    ("ct-int4", WEIGHTS, 150),
    ("qwen3_moe", CONFIG, 300),
    ("llama", CONFIG, 200),
    ("llama", "tokenizer.json", 350),
    ("llama", "tokenizer_config.json", 150),
    ("llama", "generation_config.json", 50),
    *(("gptq", CONFIG, 100), ("awq", CONFIG, 100), ("fp8-block", CONFIG, 100), ("ct-int4", CONFIG, 200)),
]
NORMAL = 6  # of each in a normal run
# Families with parts of their own: their configs have most to say.
NEWER = [
    *("afmoe", "bamba", "cohere2_moe", "deepseek_v3", "deepseek_v32", "exaone_moe", "gemma4_text", "glm4_moe_lite"),
    *("gpt_oss", "granitemoehybrid", "hunyuan_v1_moe", "jamba", "kimi_linear", "lfm2_moe", "llama4_text"),
    *("mimo_v2_flash", "minimax_m2", "nemotron_h", "phimoe", "qwen3_5_moe", "qwen3_next"),
]
NAMED = re.compile(r"config\.json|safetensors|tokenizer|tensor|quantis|model_type|rotary|experts")


@pytest.fixture
def damageable(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[[str, str], Path]:
    """``damageable(checkpoint, file)``: the file, in a copy of the checkpoint."""

    def copy(checkpoint: str, file: str) -> Path:
        if checkpoint in NEWER:
            return variants()[checkpoint].save(tmp_path / f"{checkpoint} {file}") / file
        family = checkpoint if checkpoint == "qwen3_moe" else "llama"
        source = make_checkpoint(family, num_hidden_layers=1, **SIZES.get(family, {}))
        path = tmp_path / f"{checkpoint} {file}"
        if checkpoint == family:
            shutil.copytree(source, path)
        else:
            store_all(source, path, LAYOUTS[checkpoint])
        return path / file

    return copy


def check(count: int, files: list[Path]) -> None:
    """Run ``count`` cases of each file in one process."""
    command = [sys.executable, str(FUZZ), str(count), *map(str, files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    cases = [json.loads(line) for line in run.stdout.splitlines()]
    assert (len(cases), run.returncode) == (count * len(files), 0), f"after {cases[-1:]}: {run.stderr[-2000:]}"
    refused = [case for case in cases if case[3] != "it loads"]
    assert refused
    wrong = [case for case in refused if not re.match(r"refused: .*\Z", case[3]) or not NAMED.search(case[3])]
    assert not wrong


def test_some_damage_of_each_kind(damageable: Callable[[str, str], Path]) -> None:
    check(NORMAL, [damageable(checkpoint, file) for checkpoint, file, _ in FILES])
    check(NORMAL, [damageable(family, CONFIG) for family in ("gpt_oss", "qwen3_next")])


@pytest.mark.slow
@pytest.mark.parametrize(("checkpoint", "file", "count"), FILES, ids=[f"{c}-{f}" for c, f, _ in FILES])
def test_much_damage(checkpoint: str, file: str, count: int, damageable: Callable[[str, str], Path]) -> None:
    check(count, [damageable(checkpoint, file)])


@pytest.mark.slow
@pytest.mark.parametrize("family", NEWER)
def test_much_damage_to_other_families(family: str, damageable: Callable[[str, str], Path]) -> None:
    check(100, [damageable(family, CONFIG)])
    check(40, [damageable(family, WEIGHTS)])
