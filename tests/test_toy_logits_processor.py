"""A logits processor that lives here, loaded from this file: it changes tokens, contracts know, its hash counts."""

from __future__ import annotations

import importlib
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from dynamoe import LLM, SamplingParams
from dynamoe.dynamic.cli.main import main
from dynamoe.dynamic.contract.deployment import deployment
from dynamoe.dynamic.engine.plugins import GROUPS, load_plugins
from dynamoe.dynamic.engine.protocols import Drafter, LogitsProcessor, ProcessorContext
from dynamoe.dynamic.engine.quality import Quality

ALPHA = 0.4


class NoRepeats:
    """The output never holds a token twice."""

    changes_distribution: ClassVar[bool] = True

    def __init__(self, context: ProcessorContext) -> None:
        self.output: list[int] = []

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        return params.presence_penalty == 0.0

    def edit(self, logits_V: torch.Tensor) -> None:
        logits_V[self.output] = -math.inf

    def accept(self, token_id: int) -> None:
        self.output.append(token_id)

    def rollback(self, count: int) -> None:
        del self.output[len(self.output) - count :]

    def fork(self) -> Self:
        other = type(self).__new__(type(self))
        other.output = list(self.output)
        return other


class Watcher(NoRepeats):
    """Looks on."""

    changes_distribution: ClassVar[bool] = False

    def edit(self, logits_V: torch.Tensor) -> None:
        assert logits_V.dtype == torch.float32


class Forgetful(LogitsProcessor):
    """Has only what the protocol declares, and an edit."""

    def edit(self, logits_V: torch.Tensor) -> None: ...


not_a_class = 3

RULE, WATCHER = f"{__file__}:NoRepeats", f"{__file__}:Watcher"
LONG = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("mixtral")


def make(checkpoint: str | Path, *plugins: str, **settings: Any) -> LLM:
    return LLM(checkpoint, progress=False, logits_processors=plugins, **settings)


def tokens(llm: LLM, params: SamplingParams, prompts: int = 4) -> list[list[int]]:
    results = llm.generate([[7, 8, 9 + i] for i in range(prompts)], params, use_tqdm=False)
    return [completion.token_ids for result in results for completion in result.outputs]


def test_it_changes_the_tokens_of_the_requests_that_need_it(checkpoint: Path) -> None:
    plain, ruled, watched = make(checkpoint), make(checkpoint, WATCHER, RULE), make(checkpoint, WATCHER)
    assert any(len(set(ids)) < len(ids) for ids in tokens(plain, LONG))
    assert all(len(set(ids)) == len(ids) for ids in tokens(ruled, LONG))
    assert tokens(watched, LONG) == tokens(plain, LONG)
    spared = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, presence_penalty=0.01)
    assert tokens(ruled, spared) == tokens(plain, spared)


def test_it_holds_in_every_completion_and_after_a_preemption(checkpoint: Path) -> None:
    params = SamplingParams(n=3, seed=1, temperature=1.0, max_tokens=40, ignore_eos=True)
    roomy, tight = make(checkpoint, RULE), make(checkpoint, RULE, kv_memory="200KiB", max_model_len=64)
    expected = tokens(roomy, params)
    assert all(len(set(ids)) == len(ids) for ids in expected)
    assert tokens(tight, params) == expected
    assert tight.engine.stats().preemptions > 0


def test_rules_about_tokens_hold_in_an_engine(checkpoint: Path) -> None:
    llm = make(checkpoint)
    allowed = SamplingParams(seed=2, max_tokens=30, allowed_token_ids=[11, 12, 13], ignore_eos=True)
    assert {t for ids in tokens(llm, allowed) for t in ids} == {11, 12, 13}
    tokenizer = llm.get_tokenizer()
    texts = {token: tokenizer.decode([token]) for ids in tokens(llm, LONG) for token in ids}
    words = {t: text for t, text in texts.items() if text.strip().isalnum() and tokenizer.encode(text, False) == [t]}
    assert words
    banned = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, bad_words=list(words.values()))
    assert not words.keys() & {t for ids in tokens(llm, banned) for t in ids}
    with pytest.raises(ValueError, match=r"allowed_token_ids holds 99999999"):
        tokens(llm, SamplingParams(allowed_token_ids=[99999999]))
    for settings in ({"allowed_token_ids": []}, {"bad_words": ["x", " "]}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            SamplingParams(**settings)  # type: ignore[arg-type]


def facts(llm: LLM) -> dict[str, Any]:
    return deployment(llm.model, llm.engine.runner.exits, llm.engine.logits_plugins)


def test_contracts_know_what_runs(certify: Callable[..., Any], tmp_path: Path) -> None:
    def contract(llm: LLM) -> Any:
        (result,) = llm.generate(["Once"], SamplingParams(temperature=0.0, max_tokens=8, quality=Quality(alpha=ALPHA)))
        return result.contract

    watched = make("tiny", WATCHER)
    certificate = certify(tmp_path / "watched", facts(watched), ALPHA, 0.3)
    ruled = make("tiny", RULE)
    certify(tmp_path / "ruled", facts(ruled), ALPHA, 0.3)
    plain = make("tiny", certificates=tmp_path / "watched")
    assert "logits_processors: certified for" in contract(plain).reason
    assert contract(make("tiny", WATCHER, certificates=tmp_path / "watched")).certificate == certificate.id
    refused = contract(make("tiny", RULE, certificates=tmp_path / "ruled"))
    assert refused.certificate is None
    assert "it covers the model's own scores" in refused.reason


def test_its_hash_changes_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "rule.py"
    shutil.copy(__file__, file)
    (first,), (again,) = (load_plugins([f"{file}:NoRepeats"], LogitsProcessor) for _ in range(2))
    with file.open("a") as stream:
        stream.write("# changed\n")
    (other,) = load_plugins([f"{file}:NoRepeats"], LogitsProcessor)
    assert first == again
    assert first.name == other.name == "rule.py:NoRepeats"
    assert first.sha256 != other.sha256
    assert load_plugins([RULE], LogitsProcessor)[0].sha256 == first.sha256


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/rule.py:Rule", "/nowhere/rule.py cannot be read: No such file"),
        (f"{__file__}:Nothing", "has no class Nothing"),
        (f"{__file__}:not_a_class", "is 3, not a class"),
        (
            f"{__file__}:Forgetful",
            "is no LogitsProcessor: it lacks changes_distribution, needed, accept, rollback, fork",
        ),
        ("rule.txt:Rule", "must be FILE.py:Class, or the name of an entry point"),
        ("missing", r"there is no plug-in 'missing' in the entry points dynamoe.logits_processors \(none\)"),
    ],
)
def test_what_cannot_be_loaded_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_plugins([name], LogitsProcessor)


def test_code_that_fails_and_a_class_of_another_protocol_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(ValueError, match=r"bad.py cannot be imported: ModuleNotFoundError: No module named"):
        load_plugins([f"{tmp_path / 'bad.py'}:Rule"], LogitsProcessor)
    with pytest.raises(ValueError, match=r"is no Drafter: it lacks propose, forget"):
        load_plugins([RULE], Drafter)


def test_an_entry_point_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, info = tmp_path / "toy_rules", tmp_path / "toy_rules-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    shutil.copy(__file__, package / "__init__.py")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-rules\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUPS[LogitsProcessor]}]\nno-repeats = toy_rules:NoRepeats\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    (plugin,) = load_plugins(["no-repeats"], LogitsProcessor)
    assert plugin.name == "no-repeats (toy_rules:NoRepeats)"
    (package / "more.py").write_text("x = 1\n")
    assert load_plugins(["no-repeats"], LogitsProcessor)[0].sha256 != plugin.sha256


def test_the_command_line_takes_a_list(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = ["sampling.temperature=0", "sampling.max_tokens=30", "sampling.ignore_eos=true", "chat=false"]
    arguments = ["generate", f"model={checkpoint}", "prompt=hello", *settings]
    printed = []
    for plugins in ([], [WATCHER], [WATCHER, RULE]):
        extra = [f"engine.logits_processors=[{','.join(plugins)}]"] if plugins else []
        assert main([*arguments, *extra]) == 0
        printed.append(capfd.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert main([*arguments, "engine.logits_processors=[missing]"]) == 2
    assert "there is no plug-in 'missing'" in capfd.readouterr().err
