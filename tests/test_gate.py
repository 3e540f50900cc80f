"""What stands in front of the routes: admission of requests and their bodies, and their lines in the log."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from dynamoe.dynamic.contract.catalog import CertificateSource
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.serve.app import create_app, make_context
from dynamoe.serve.contracts import ContractManager, MonitorSettings
from dynamoe.serve.errors import ApiError
from dynamoe.serve.gate import Arriving, BodyBudget, Gate
from dynamoe.serve.logs import RepeatFilter
from dynamoe.serve.middleware import RequestContext
from dynamoe.serve.settings import ServerSettings


def test_finished_bodies_refuse_new_ones_and_end_nobody() -> None:
    async def main() -> None:
        budget, (finished, late, other) = BodyBudget(100), (Arriving(), Arriving(), Arriving())
        async with asyncio.timeout(60) as deadline:
            for body in (finished, other, late):
                budget.begin(body, deadline)
            budget.grow(finished, 100)
            budget.finish(finished)
            with pytest.raises(ApiError) as caught:
                budget.grow(late, 1)
            assert caught.value.status_code == 429
            budget.release(late)
            budget.release(finished)
            budget.grow(other, 100)  # it has not been ended
        assert budget.used == 100

    asyncio.run(main())


def test_an_unfinished_body_that_gives_way_may_end_otherwise_first() -> None:
    budget, old, new = BodyBudget(100), Arriving(), Arriving()

    async def main() -> None:
        async with asyncio.timeout(60) as deadline:
            for body in (old, new):
                budget.begin(body, deadline)
                budget.grow(body, 60)
            budget.finish(old)  # its client has left before its deadline was noticed
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        asyncio.run(main())
    assert budget.used == 60


def test_retry_after_is_the_measured_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("dynamoe.dynamic.engine.stats.time.monotonic", lambda: now)
    gate = Gate(1)
    for _ in range(200):
        now += 1000.0  # nothing is open
        gate.enter()
        gate.leave(submitted=False)
        gate.enter()
        now += 7.0
        gate.leave(submitted=True)
    gate.enter()
    refusal = gate.refusal()
    assert refusal is not None
    assert refusal.headers == {"Retry-After": "7"}


async def answers(app: Any, *requests: tuple[str, Any]) -> list[httpx.Response]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        return [await client.post(path, json=body) for path, body in requests]


def test_only_what_reaches_the_engine_counts_for_the_pace(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(load_model(make_checkpoint("llama"), progress=False, backend="torch", device="cpu"))
    contracts = ContractManager(
        source=CertificateSource(engine), settings=MonitorSettings(), default_file=tmp_path / "monitor.db"
    )
    context = make_context(engine, ServerSettings(), contracts)
    left: list[bool] = []
    leave = context.gate.leave
    monkeypatch.setattr(context.gate, "leave", lambda submitted: (left.append(submitted), leave(submitted)))

    async def main() -> list[httpx.Response]:
        context.bridge.start()
        released = threading.Event()
        large = asyncio.create_task(context.text.run_large(released.wait, 30))
        try:
            prompts = ([{}], [999], "a", "a")
            bodies = [("/v1/completions", {"prompt": prompt, "max_tokens": 1}) for prompt in prompts]
            texts = ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})
            found = await answers(create_app(context), *bodies, *texts)
            assert not large.done(), "small texts wait for no large one"
            return found
        finally:
            released.set()
            context.text.close()
            await context.bridge.stop()
            await contracts.close()

    assert [answer.status_code for answer in asyncio.run(main())] == [400, 400, 200, 200, 200, 200]
    assert left == [False, False, True, True, False, False]


def test_the_id_of_every_500_is_in_the_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/fails":
            raise KeyError("secret")
        await ApiError(404, "No such path.").response()(scope, receive, send)

    monkeypatch.setattr(logging.getLogger("dynamoe.requests"), "filters", [RepeatFilter()])
    server = RequestContext(app, on_done=lambda *_: None)
    with caplog.at_level(logging.INFO):
        found = asyncio.run(answers(server, *[("/fails", {}), ("/nowhere", {})] * 3))
    written = [vars(record)["fields"] for record in caplog.records if record.msg == "request"]
    lines = {fields["request_id"]: fields for fields in written}
    failed = [answer for answer in found if answer.status_code == 500]
    assert len(failed) == 3
    for answer in failed:
        request_id = answer.json()["error"]["message"].rstrip(".").rpartition(" ")[2]
        assert lines[request_id]["error"].startswith("KeyError in ")
    assert len(lines) == 4, "refused requests are logged once a minute"
    assert sum(record.exc_info is not None for record in caplog.records) == 1
