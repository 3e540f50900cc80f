"""Published clients hold a conversation with a real server: openai in Python and in a browser, LiteLLM, LangChain.
lm-evaluation-harness has a file of its own."""

from __future__ import annotations

import functools
import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

JS_CLIENT = "openai@6.49.0"
BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome")
TALK: list[dict[str, Any]] = [
    {"role": "developer", "content": "Answer in one line."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "What is the capital"}, {"type": "text", "text": "of France?"}],
    },
]
LONG: list[dict[str, Any]] = [{"role": "user", "content": "the old man reads " * 200}]
NEXT = {"role": "user", "content": "And of Italy?"}


def test_openai(server: Any) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        (model,) = client.models.list()
        ask = functools.partial(client.chat.completions.create, model=model.id, temperature=0, max_tokens=12)
        first = ask(messages=TALK).choices[0].message
        turns: Any = [*TALK, first.model_dump(), NEXT]  # with all of the message's fields
        second = ask(messages=turns, logprobs=True, top_logprobs=2).choices[0]
        chunks = list(ask(messages=turns, stream=True, stream_options={"include_usage": True}))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert said == second.message.content
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 12
        with pytest.raises(openai.BadRequestError) as caught:
            ask(messages=LONG)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="documents"):
            ask(messages=TALK, extra_body={"documents": [{"text": "a"}]})
        assert client.completions.create(model=model.id, prompt="The", max_tokens=4).choices[0].text


@pytest.mark.filterwarnings("ignore")
def test_litellm(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise it is fetched on import
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    place = {"api_base": f"{server.url}/v1", "api_key": "none", "max_retries": 0, "temperature": 0, "max_tokens": 12}
    ask = functools.partial(litellm.completion, model="openai/tiny", **place)
    first = ask(messages=TALK).choices[0].message
    turns = [*TALK, first.model_dump(), NEXT]
    second = ask(messages=turns)
    assert second.usage.completion_tokens == 12
    chunks = list(ask(messages=turns, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == second.choices[0].message.content
    for stream in (False, True):
        with pytest.raises(litellm.ContextWindowExceededError):
            ask(messages=LONG, stream=stream)
    with pytest.raises(litellm.BadRequestError, match="documents"):
        ask(messages=TALK, extra_body={"documents": [{"text": "a"}]})
    place["model"] = "openai/tiny"
    answer = litellm.responses(input=TALK, max_output_tokens=12, **{k: place[k] for k in place if k != "max_tokens"})
    assert answer.output[-1].content[0].text == first.content
    place |= {"model": "anthropic/tiny", "api_base": server.url}
    assert litellm.completion(messages=TALK, **place).choices[0].message.content == first.content
    chunks = list(litellm.completion(messages=TALK, stream=True, **place))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == first.content
    place = {"api_base": f"{server.url}/v1", "api_key": "none", "max_retries": 0, "temperature": 0, "max_tokens": 12}
    text = litellm.text_completion(model="text-completion-openai/tiny", prompt="The capital", seed=-1, **place)
    assert text.choices[0].text


@pytest.mark.filterwarnings("ignore")
def test_langchain(server: Any) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
    from langchain_core.exceptions import ContextOverflowError

    place = {"model": "tiny", "base_url": f"{server.url}/v1", "api_key": "none", "temperature": 0, "max_retries": 0}
    chat = langchain.ChatOpenAI(**place, max_tokens=12, stream_usage=True)
    first = chat.invoke(TALK)
    assert first.usage_metadata["output_tokens"] == 12
    turns = [*TALK, first, NEXT]
    second = chat.invoke(turns)
    chunks = list(chat.stream(turns))
    assert "".join(chunk.content for chunk in chunks) == second.content
    assert [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata] == [12]
    assert [answer.content for answer in chat.batch([TALK, turns])] == [first.content, second.content]
    scored = chat.bind(logprobs=True, top_logprobs=2).invoke(TALK)
    assert len(scored.response_metadata["logprobs"]["content"]) == 12
    for call in (chat.invoke, lambda talk: list(chat.stream(talk))):
        with pytest.raises(ContextOverflowError):
            call(LONG)
    newer = langchain.ChatOpenAI(**place, max_tokens=12, use_responses_api=True)
    answer = newer.invoke(TALK)
    assert (answer.text, answer.usage_metadata["output_tokens"]) == (first.content, 12)
    assert "".join(chunk.text for chunk in newer.stream(TALK)) == first.content
    assert langchain.OpenAI(**place, max_tokens=5).invoke("The capital of")


PAGE = """<!doctype html><script type="module">
import OpenAI from "/openai/index.mjs";
const server = new URLSearchParams(location.search).get("server");
const result = {};
try {
  const settings = {baseURL: server + "/v1", apiKey: "alice", maxRetries: 0, dangerouslyAllowBrowser: true};
  const client = new OpenAI(settings);
  for await (const model of client.models.list()) result.model = model.id;
  const ask = {model: result.model, temperature: 0, max_tokens: 12};
  const talk = TALK;
  const first = await client.chat.completions.create({...ask, messages: talk});
  talk.push(first.choices[0].message, {role: "user", content: "And of Italy?"});
  result.second = (await client.chat.completions.create({...ask, messages: talk})).choices[0].message.content;
  result.streamed = "";
  const options = {stream: true, stream_options: {include_usage: true}};
  for await (const chunk of await client.chat.completions.create({...ask, ...options, messages: talk})) {
    result.streamed += chunk.choices[0]?.delta?.content ?? "";
    result.tokens = chunk.usage?.completion_tokens ?? result.tokens;
  }
  try { await client.chat.completions.create({...ask, messages: LONG}); }
  catch (error) { result.long = [error.status, error.code]; }
  try { await new OpenAI({...settings, apiKey: "eve"}).models.list(); }
  catch (error) { result.stranger = [error instanceof OpenAI.AuthenticationError, error.code]; }
} catch (error) { result.error = String(error) + error.stack; }
await fetch("/result", {method: "POST", body: JSON.stringify(result)});
</script>"""


class Page(SimpleHTTPRequestHandler):
    """Serves a folder, and keeps what its page posts."""

    results: queue.Queue[Any]

    def do_POST(self) -> None:
        self.results.put(json.loads(self.rfile.read(int(self.headers["content-length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def page(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    """A web server whose page holds a conversation through OpenAI's JavaScript client."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    install = [npm, "install", "--no-save", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", ".", JS_CLIENT]
    done = subprocess.run(install, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (tmp_path / "openai").symlink_to(tmp_path / "node_modules" / "openai")
    (tmp_path / "page.html").write_text(PAGE.replace("TALK", json.dumps(TALK)).replace("LONG", json.dumps(LONG)))
    handler = type("Handler", (Page,), {"results": queue.Queue()})
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=tmp_path)) as server:
        server.results = handler.results  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_openai_in_a_browser(
    page: Any, start_server: Any, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed: {', '.join(BROWSERS)}")
    origin = f"http://127.0.0.1:{page.server_port}"
    server = start_server(make_checkpoint("mixtral"), f"server.cors_origins=[{origin}]", "server.api_keys=[alice]")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [browser, *flags, "--remote-debugging-port=0", f"{origin}/page.html?server={server.url}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            result = page.results.get(timeout=240)
        finally:
            process.kill()
    assert "error" not in result, result["error"]
    assert result["model"] == "tiny"
    assert result["streamed"] == result["second"] != ""
    assert result["tokens"] == 12
    assert result["long"] == [400, "context_length_exceeded"]
    assert result["stranger"] == [True, "invalid_api_key"]
