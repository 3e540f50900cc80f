"""A job's key names all that its result depends on: whatever changes, the job runs again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.studies import records
from dynamoe.dynamic.studies.records import job_key
from dynamoe.dynamic.studies.sweep_config import SweepConfig


@pytest.fixture
def config(tmp_path: Path) -> SweepConfig:
    model = shutil.copytree(resolve_model("tiny"), tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt_token_ids": [1, 2]}\n')
    (tmp_path / "plugin.py").write_text("class Rule: ...\n")
    base = SweepConfig(model=str(model), prompts=str(tmp_path / "prompts.jsonl"))
    return replace(base, engine=replace(base.engine, logits_processors=(f"{tmp_path / 'plugin.py'}:Rule",)))


def append(name: str, text: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def change(folder: Path, patch: pytest.MonkeyPatch) -> None:
        with (folder / name).open("a") as stream:
            stream.write(text)

    return change


CHANGES: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "the file of prompts": append("prompts.jsonl", '{"prompt_token_ids": [3]}\n'),
    "the prompts beside the model": append("model/prompts.jsonl", '{"prompt": "one more"}\n'),
    "the model's configuration": append("model/config.json", " "),
    "what ends an output": append("model/generation_config.json", " "),
    "the chat template": append("model/tokenizer_config.json", " "),
    "a plug-in": append("plugin.py", "# another rule\n"),
    "the code": lambda folder, patch: patch.setattr(records, "sources_hash", lambda *folders: "other"),
    "the processor": lambda folder, patch: patch.setattr(records, "processor", lambda: "other"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_result_depends_on_changes_the_key(
    what: str, config: SweepConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = job_key(asdict(config))
    assert job_key(asdict(replace(config, output="elsewhere", threads=2))) == before
    CHANGES[what](tmp_path, monkeypatch)
    assert job_key(asdict(config)) != before


def test_the_code_is_every_source_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynamoe.kernels.api import sources

    (tmp_path / "part" / "csrc").mkdir(parents=True)
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    found = []
    for name in ("part/a.py", "part/csrc/b.cpp", "part/csrc/b.h", "part/data.json"):
        (tmp_path / name).write_text(json.dumps(name))
        sources._hash.cache_clear()
        found.append(sources.sources_hash("part"))
    sources._hash.cache_clear()
    assert len(set(found)) == 3
    assert found[2] == found[3]  # data is no code
