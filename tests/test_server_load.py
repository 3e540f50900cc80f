"""Two hundred streams at once, many of whose clients leave: nothing leaks and nobody is forgotten."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

STREAMS = 200
MAX_TOKENS = 24


class Load:
    """Streams against one server."""

    def __init__(self, server: Any) -> None:
        self.url = server.url
        self.process = psutil.Process(server.process.pid)

    def round(self, seed: int) -> Counter[str]:
        """Run all streams; returns how they ended."""

        async def main() -> Counter[str]:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            async with httpx.AsyncClient(base_url=self.url, timeout=120, limits=limits) as client:
                rng = random.Random(seed)
                return Counter(await asyncio.gather(*(self.stream(client, rng, i) for i in range(STREAMS))))

        return asyncio.run(main())

    async def stream(self, client: httpx.AsyncClient, rng: random.Random, number: int) -> str:
        """One stream: read to its end, or left after some events, before the first one, or before the answer."""
        leave_after = rng.choice([None, None, rng.randrange(1, MAX_TOKENS), 0, -1])
        delay = rng.random() * 0.3
        await asyncio.sleep(delay)
        body = {
            "prompt": [5 + number % 9, *range(3, 3 + rng.randrange(80))],
            "max_tokens": MAX_TOKENS,
            "ignore_eos": True,
            "stream": True,
            "n": rng.choice([1, 1, 2]),
        }
        if leave_after == -1:
            request = asyncio.create_task(client.post("/v1/completions", json={**body, "stream": False}))
            await asyncio.sleep(delay)
            request.cancel()
            await asyncio.wait([request])
            return "left before the answer" if request.cancelled() else "finished"
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            seen = 0
            reasons = set()
            async for line in response.aiter_lines():
                if seen == leave_after:
                    return "left"
                if line == "data: [DONE]":
                    assert reasons == {(index, "length") for index in range(body["n"])}
                    return "finished"
                if line:
                    seen += 1
                    event = json.loads(line.removeprefix("data: "))
                    reasons |= {(c["index"], c["finish_reason"]) for c in event["choices"] if c["finish_reason"]}
        raise AssertionError("the stream ended without [DONE]")

    def metrics(self) -> dict[str, float]:
        """All gauges and counters, summed over their labels."""
        found: Counter[str] = Counter()
        for line in httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[name.partition("{")[0]] += float(value)
        return dict(found)

    def settled(self) -> dict[str, float]:
        """The metrics once nothing is open any more."""
        deadline = time.monotonic() + 120
        while (metrics := self.metrics())["dynamoe:open_http_requests"] and time.monotonic() < deadline:
            time.sleep(0.05)
        while (metrics := self.metrics())["vllm:num_requests_running"] and time.monotonic() < deadline:
            time.sleep(0.05)
        return metrics

    def memory(self) -> int:
        """Bytes of resident memory."""
        return self.process.memory_info().rss


def test_streams_with_random_disconnects(start_server: Any, make_checkpoint: Callable[..., Path]) -> None:
    # A pool too small for everybody, so that requests wait and are preempted as well.
    server = start_server(make_checkpoint("mixtral"), "engine.max_num_seqs=16", "engine.kv_memory=320KiB")
    load = Load(server)
    idle = load.metrics()
    assert idle["dynamoe:kv_pages_free"] == idle["dynamoe:kv_pages_total"]

    load.round(0)  # fills caches and thread pools
    load.settled()
    memory = load.memory()
    for seed in (1, 2):
        outcomes = load.round(seed)
        assert outcomes.total() == STREAMS  # every client saw an end, or left of its own accord
        assert outcomes["left"] > 10
        assert outcomes["left before the answer"] > 10
    after = load.settled()

    for gauge in ("open_prompts", "open_http_requests"):
        assert after[f"dynamoe:{gauge}"] == 0
    for gauge in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[f"vllm:{gauge}"] == 0
    assert after["dynamoe:kv_pages_free"] == after["dynamoe:kv_pages_total"] == idle["dynamoe:kv_pages_total"]
    assert after["vllm:num_preemptions_total"] > idle["vllm:num_preemptions_total"]
    assert load.memory() - memory < 8 << 20, f"{(load.memory() - memory) / 2**20:.1f} MiB more"
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
    assert "Traceback" not in server.log
    assert "ERROR" not in server.log
