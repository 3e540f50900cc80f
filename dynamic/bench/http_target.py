"""The benchmark's load on a running server, through OpenAI's completions endpoint with streaming."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from .timing import RequestTiming

_TIMEOUT = 600.0  # seconds without a byte after which a request counts as failed
# Source of token ids for random prompts.
SAMPLE_TEXT = """
Every morning the harbour master writes down which ships came in, how deep they lay in the water, and what they carried:
timber from the north, oranges, copper wire, seven crates of clocks. Nobody had asked him to do so for thirty years.
When the new bridge was planned, engineers needed to know how often it would have to open, and at which hours; his books
answered within an afternoon what a survey could not have found out in a year. def area(r): return 3.14159 * r ** 2
"""


class ServerTarget:
    """A server that speaks OpenAI's protocol; ``model`` is the first one that it lists.

    Arguments:
        url: its address, with or without ``/v1``.
        api_key: sent as a bearer token.

    Raises:
        ValueError: when it does not answer.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self.model: str = self._call("GET", "/v1/models")["data"][0]["id"]

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a text, by the server's own tokenizer."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        return self._call("POST", "/tokenize", body)["tokens"]

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            reply = httpx.request(method, self.url + path, json=body, headers=self._headers, timeout=30.0)
        except httpx.HTTPError as error:
            raise ValueError(f"no server answers at {self.url}: {error}") from error
        if reply.status_code != 200:
            raise ValueError(f"{self.url}{path} answered {reply.status_code}: {_error_text(reply.text)}")
        return reply.json()

    def measure(
        self, prompts: Sequence[Sequence[int] | str], *, concurrency: int, output_len: int, done: Callable[[], object]
    ) -> tuple[list[RequestTiming], float]:
        """Keep ``concurrency`` requests open until every prompt has been answered; see :func:`measure_engine`.

        Raises:
            ValueError: when the server refuses a request or fails in the middle of one.
        """
        timings: list[RequestTiming | None] = [None] * len(prompts)
        waiting = iter(enumerate(prompts))
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)

        async def work(client: httpx.AsyncClient) -> None:
            for index, prompt in waiting:
                timings[index] = await self._stream(client, prompt, output_len)
                done()

        async def run() -> float:
            async with httpx.AsyncClient(headers=self._headers, timeout=_TIMEOUT, limits=limits) as client:
                begin = time.perf_counter()
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(concurrency, len(prompts))):
                        group.create_task(work(client))
                return time.perf_counter() - begin

        try:
            seconds = asyncio.run(run())
        except ExceptionGroup as failures:
            error = failures.exceptions[0]
            if isinstance(error, httpx.HTTPError):
                raise ValueError(f"a request to {self.url} failed: {error or type(error).__name__}") from error
            raise error from None
        return [timing for timing in timings if timing is not None], seconds

    async def _stream(self, client: httpx.AsyncClient, prompt: Sequence[int] | str, output_len: int) -> RequestTiming:
        body = {
            "model": self.model,
            "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": output_len,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        timing = RequestTiming(start=time.perf_counter())
        async with client.stream("POST", f"{self.url}/v1/completions", json=body) as reply:
            if reply.status_code != 200:
                text = _error_text((await reply.aread()).decode(errors="replace"))
                raise ValueError(f"{self.url} answered {reply.status_code}: {text}")
            async for line in reply.aiter_lines():
                if not line.startswith("data:") or line[5:].strip() == "[DONE]":
                    continue
                now = time.perf_counter()
                event = json.loads(line[5:])
                if "error" in event:
                    raise ValueError(f"{self.url} failed: {event['error'].get('message')}")
                if event.get("usage"):
                    timing.output_tokens = event["usage"]["completion_tokens"]
                if event["choices"]:
                    timing.arrivals.append(now)
        return timing


def _error_text(text: str) -> str:
    try:
        return json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return text[:200]
