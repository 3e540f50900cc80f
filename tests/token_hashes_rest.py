"""The runs of ``token_hashes.py`` that ask a server over HTTP: ``dynamoe serve`` on a free port of this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from token_hashes_runs import Load
from token_hashes_worker import CROWD, PROMPTS, QUESTIONS, attempt, hashes

START_SECONDS = 180.0
Answer = dict[str, Any]


def _completion(**fields: Any) -> Answer:
    common = {"prompt": PROMPTS[2], "max_tokens": 20, "temperature": 0, "logprobs": 3, "ignore_eos": True}
    return {"path": "/v1/completions", **common, **fields}


def _conversation(**fields: Any) -> Answer:
    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": QUESTIONS[0]}]
    common = {"messages": messages, "max_tokens": 20, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    return {"path": "/v1/chat/completions", **common, **fields}


_STREAMED = {"stream": True, "stream_options": {"include_usage": True, "include_compute": True}}
WORKLOADS: dict[str, Callable[[], list[Answer]]] = {
    "completions": lambda: [_completion(prompt=prompt) for prompt in PROMPTS],
    "tokens": lambda: [_completion(prompt=list(range(200, 240))), _completion(n=2, repetition_penalty=1.2)],
    "stream": lambda: [_completion(**_STREAMED)],
    "list": lambda: [_completion(prompt=CROWD[:3])],
    "echo": lambda: [_completion(echo=True, max_tokens=0), _completion(stop=[" the"], prompt_logprobs=1)],
    "chat": lambda: [_conversation(), _conversation(messages=[{"role": "user", "content": QUESTIONS[1]}])],
    "chat-stream": lambda: [_conversation(**_STREAMED)],
    "contract": lambda: [_completion(prompt=prompt, quality={"alpha": 0.05}, ignore_eos=False) for prompt in PROMPTS],
    "experts": lambda: [_completion(experts_per_token=1)],
    "tokenize": lambda: [{"path": "/tokenize", "prompt": PROMPTS[3]}, {"path": "/detokenize", "tokens": [300, 301, 5]}],
}


def run_server(load: Load) -> dict[str, Any]:
    """The load's runs on one server, a request at a time."""
    with serving(load) as url, httpx.Client(base_url=url, timeout=120) as client:
        return {
            f"{load.name}/{name}": attempt(lambda name=name: entry(answers(client, name))) for name in load.workloads
        }


@contextmanager
def serving(load: Load) -> Iterator[str]:
    """The address of a server that is ready; it ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"{key}={value}" for key, value in load.settings.items()]
        settings += [f"model={json.dumps(load.model)}", f"server.port={port}", "quality.monitor.share=0"]
        settings.append("quality.monitor.file=" + json.dumps(str(Path(folder, "monitor.db"))))
        log = Path(folder, "log.txt")
        with log.open("wb") as output:
            command = [sys.executable, "-m", "dynamoe", "serve", *settings]
            server = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "NO_COLOR": "1"})
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, server, log)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        if server.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
        time.sleep(0.1)


def answers(client: httpx.Client, workload: str) -> list[Answer]:
    """To the workload's requests; it finds none of another's prompts in the prefix cache."""
    return [ask(client, body | {"cache_salt": workload}) for body in WORKLOADS[workload]()]


def ask(client: httpx.Client, body: Answer) -> Answer:
    """One answer; a stream is put together as if it had come in one piece."""
    fields = dict(body)
    answer = client.post(fields.pop("path"), json=fields)
    if answer.status_code != 200:
        raise RuntimeError(f"{answer.status_code}: {answer.text}")
    if not fields.get("stream"):
        return answer.json()
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", lines[-1]
    return _joined([json.loads(line) for line in lines[:-1]])


def _joined(chunks: list[Answer]) -> Answer:
    """How a stream was cut depends on timing; what its pieces add up to does not."""
    choices: dict[int, Answer] = {}
    usage = None
    for chunk in chunks:
        usage = chunk.get("usage") or usage
        for piece in chunk["choices"]:
            choice = choices.setdefault(piece["index"], {"text": "", "logprobs": {}, "compute": {}})
            choice["text"] += piece.get("text") or piece.get("delta", {}).get("content") or ""
            choice["finish_reason"] = piece.get("finish_reason")
            for part in ("logprobs", "compute"):
                for key, values in (piece.get(part) or {}).items():
                    choice[part][key] = choice[part].get(key, []) + (values or [])
    return {"choices": [choices[index] for index in sorted(choices)], "usage": usage}


def entry(found: list[Answer]) -> dict[str, Any]:
    """The hashes of some answers; over HTTP, tokens are texts."""
    choices = [choice for answer in found for choice in answer.get("choices", [answer])]
    tokens = [[_text(choice), *_tokens(choice.get("logprobs") or {})] for choice in choices]
    logprobs = [[choice.get("logprobs"), choice.get("prompt_logprobs")] for choice in choices]
    details = [[choice.get("finish_reason"), choice.get("compute")] for choice in choices]
    usages = [answer.get("usage") for answer in found]
    compute = [(usage or {}).get("compute") or {} for usage in usages]
    facts = {
        "generated": sum((usage or {}).get("completion_tokens", 0) for usage in usages),
        "quality": sorted({str(part["quality"]) for part in compute if "quality" in part}),
        "text": _text(choices[-1])[:60],
    }
    return hashes(tokens, logprobs, [details, usages], facts)


def _text(choice: Answer) -> str:
    if "message" in choice:
        return choice["message"]["content"]
    return choice["text"] if "text" in choice else json.dumps(choice, ensure_ascii=False)  # of the tokenizer


def _tokens(logprobs: Answer) -> list[str]:
    return logprobs.get("tokens") or [token["token"] for token in logprobs.get("content") or []]
