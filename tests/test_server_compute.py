"""What requests cost: contracts side by side, token by token in streams, and all of them together on ``/metrics``."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from dynamoe.dynamic.contract.deployment import deployment
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.llm import LLM
from safetensors import safe_open

LAYERS, EXPERTS = 16, 2
SETTINGS: list[dict[str, Any]] = [
    {},
    {"quality": {"alpha": 0.02}},
    {"quality": {"alpha": 0.1}},
    {"quality": {"alpha": 0.4}},
    {"quality": {"alpha": 0.005}},  # stricter than anything on offer
    {"experts_per_token": 1},
    {"quality": "exact"},
    {"quality": {"alpha": 0.4}, "n": 2},
]


@pytest.fixture(scope="module")
def running() -> Mapping[str, Any]:
    engine = LLM("tiny", progress=False).engine
    return deployment(engine.model, engine.runner.exits)


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    lines = (resolve_model("tiny") / "prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:16]]


@pytest.fixture(scope="module")
def server(start_server: Any, certify: Any, running: Mapping[str, Any], tmp_path_factory: Any) -> Any:
    """Three contracts, all of whose requests are run again in idle time, and no shared prefixes."""
    root = tmp_path_factory.mktemp("contracts")
    for alpha, probability, keep in ((0.02, 0.9, 0.9), (0.1, 0.6, 0.8), (0.4, 0.3, None)):
        certify(root / "certificates", running, alpha, probability, keep)
    return start_server(
        resolve_model("tiny"),
        f"quality.certificates={json.dumps(str(root / 'certificates'))}",
        f"quality.monitor.file={json.dumps(str(root / 'monitor.db'))}",
        "quality.monitor.share=1",
        "engine.enable_prefix_caching=false",
        "engine.max_num_seqs=32",  # a second completion that finds no place has to read its prompt again
    )


def totals(server: Any) -> dict[str, float]:
    """This project's own metrics without labels of their own."""
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    return {name: float(n) for name, n in re.findall(r"^(?:dynamoe|vllm):(\w+)_total{engine=\S+} (\S+)$", text, re.M)}


async def streamed(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The choices of a stream's chunks, and its usage."""
    options = {"include_usage": True, "include_compute": True}
    async with client.stream("POST", path, json={**body, "stream": True, "stream_options": options}) as response:
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    events = [json.loads(line) for line in lines[:-1]]
    return [choice for event in events for choice in event["choices"]], events[-1]["usage"]


def check_stream(choices: list[Any], usage: dict[str, Any]) -> None:
    """What was said with each token adds up to what was said at the end."""
    layers = [n for choice in choices for n in choice["compute"]["layers"]]
    experts = [n for choice in choices for n in choice["compute"]["experts"]]
    compute, count = usage["compute"], usage["completion_tokens"]
    assert len(layers) == len(experts) == count
    assert sum(layers) == compute["token_layers"]
    assert sum(experts) == compute["token_experts"]
    assert compute["layers_per_token"] == sum(layers) / count
    assert compute["experts_per_token"] == sum(experts) / count
    if {choice["index"] for choice in choices} == {0}:  # the last token is never run, the first comes from the prompt
        assert compute["layer_rows"] == LAYERS * usage["prompt_tokens"] + sum(layers[1:])
        assert compute["expert_rows"] == LAYERS * EXPERTS * usage["prompt_tokens"] + sum(experts[1:])


def test_sixteen_at_once_get_what_each_would_get_alone(server: Any, prompts: list[str]) -> None:
    async def ask(client: httpx.AsyncClient, number: int) -> tuple[dict[int, str], dict[str, Any]]:
        settings = SETTINGS[number % len(SETTINGS)]
        body = {"prompt": prompts[number], "temperature": 0, "max_tokens": 16 + number, **settings}
        if number >= len(SETTINGS):
            choices, usage = await streamed(client, "/v1/completions", body)
            check_stream(choices, usage)
        else:
            answer = (await client.post("/v1/completions", json=body)).json()
            choices, usage = answer["choices"], answer["usage"]
        texts: dict[int, str] = {}
        for choice in choices:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        return texts, usage

    async def scenario() -> tuple[list[Any], list[Any]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            alone = [await ask(client, number) for number in range(16)]
            return alone, list(await asyncio.gather(*(ask(client, number) for number in range(16))))

    before = totals(server)
    alone, together = asyncio.run(scenario())
    assert together == alone
    computes = [usage["compute"] for _, usage in together]
    qualities = [compute["quality"] for compute in computes[:8]]
    bounded, exact = "bounded", "exact"
    assert qualities == [exact, bounded, bounded, bounded, exact, "uncertified", exact, bounded]
    assert "no certificate is as strict as alpha=0.005" in computes[4]["reason"]
    assert "experts_per_token=1" in computes[5]["reason"]
    assert len({compute["certificates"][0] for compute in computes[1:4]}) == 3
    shares = [compute["weight_bytes"] / compute["full_weight_bytes"] for compute in computes]
    assert shares[0] == shares[6] == 1
    assert shares[3] < shares[2] < shares[1] < 1
    assert shares[5] < 1

    after = totals(server)
    said = {"quality", "certificates", "reason", "certified_tokens", "exact_after"}
    for name in set(computes[0]) - said - {"layers_per_token", "experts_per_token"}:
        assert after[name] - before.get(name, 0) == 2 * sum(compute[name] for compute in computes), name
    count = 2 * sum(usage["completion_tokens"] for _, usage in together)
    assert after["generation_tokens"] - before["generation_tokens"] == count
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    read_outs = re.findall(r'dynamoe:read_out_tokens_total{.*layers="(\d+)".*} (\S+)', text)
    assert {int(layers) for layers, _ in read_outs} <= {4, 8, 12, 16}
    assert sum(int(layers) * float(tokens) for layers, tokens in read_outs) == after["token_layers"]


def test_a_streamed_chat_says_what_each_token_cost(server: Any, prompts: list[str]) -> None:
    async def scenario() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            body = {"messages": [{"role": "user", "content": prompts[0]}], "max_tokens": 24, "temperature": 0}
            for settings in ({"quality": {"alpha": 0.4}}, {"experts_per_token": 1}):
                choices, usage = await streamed(client, "/v1/chat/completions", {**body, **settings})
                check_stream(choices, usage)
                assert usage["compute"]["token_experts"] < LAYERS * EXPERTS * usage["completion_tokens"]
            plain = {**body, "stream": True, "stream_options": {"include_usage": True}}
            assert '"compute":{"layers"' not in (await client.post("/v1/chat/completions", json=plain)).text

    asyncio.run(scenario())


def test_weight_bytes_are_those_of_the_checkpoint(server: Any) -> None:
    body = {"prompt": "a", "max_tokens": 1, "temperature": 0}
    compute = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["usage"]["compute"]
    size = 0.0
    with safe_open(Path(resolve_model("tiny")) / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            share = EXPERTS / 8 if ".experts." in name else 1
            size += share * file.get_tensor(name).nbytes
    assert compute["full_weight_bytes"] == pytest.approx(size, rel=0.02)  # what is packed may be padded


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"experts_per_token": 0}, "experts_per_token"),
        ({"experts_per_token": 1, "quality": {"alpha": 0.4}}, "contradicts quality"),
        ({"stream_options": {"include_compute": True}}, "needs stream"),
        ({"stream": True, "stream_options": {"include_compute": 1}}, "include_compute"),
    ],
)
def test_what_cannot_be_is_a_400_that_says_why(server: Any, wrong: dict[str, Any], message: str) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", **wrong}, timeout=60)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
