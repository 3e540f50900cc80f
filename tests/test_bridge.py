"""The bridge between the event loop and the engine's thread, with a real engine on a tiny model."""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.contract.catalog import CERTIFICATES, CertificateSource
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine, EngineFull
from dynamoe.dynamic.engine.outputs import RequestDelta
from dynamoe.dynamic.engine.runner import Runner
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.loaded import LoadedModel
from dynamoe.serve.bridge import EngineBridge, EngineRequest
from dynamoe.serve.contracts import ContractManager, MonitorSettings
from dynamoe.serve.submission import ClientGone, EngineFailure, Submission


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> LoadedModel:
    return load_model(make_checkpoint("llama"), progress=False)


class Harness:
    """A running bridge and what it reported."""

    def __init__(self, engine: Engine, hang_timeout: float) -> None:
        self.aborted = 0
        self.deltas: list[RequestDelta] = []
        self.bridge = EngineBridge(
            engine, hang_timeout=hang_timeout, on_delta=lambda _t, d, _n: self.deltas.append(d), on_abort=self._abort
        )

    def _abort(self, request_ids: Sequence[str]) -> None:
        self.aborted += len(request_ids)

    async def settled(self) -> Any:
        """The engine's numbers once it is idle."""
        for _ in range(200):
            stats = self.bridge.stats
            if stats.num_running == stats.num_waiting == 0 and stats.kv_usage == 0:
                break
            await asyncio.sleep(0.02)
        return self.bridge.stats


def run(
    engine: Engine, scenario: Callable[[Harness], Awaitable[None]], *, hang_timeout: float = 60.0, stops: bool = True
) -> None:
    async def main() -> None:
        harness = Harness(engine, hang_timeout)
        harness.bridge.start()
        async with asyncio.timeout(60):
            await scenario(harness)
        assert await harness.bridge.stop(timeout=10) is stops

    asyncio.run(main())


def asked(*prompt: int, max_tokens: int = 8, **settings: Any) -> EngineRequest:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **settings)
    return EngineRequest(prompt_token_ids=prompt or (5, 6, 7), params=params)


async def tokens_of(submission: Submission) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    async for batch in submission.batches():
        for number, delta in batch:
            for completion in delta.completions:
                found.setdefault(number, []).extend(completion.token_ids)
    return found


def test_prompts_of_one_request_finish_together_and_equal_the_engine_alone(model: LoadedModel) -> None:
    engine = Engine(model)
    expected = []
    for number, prompt in enumerate(((5, 6, 7), (8, 9))):
        engine.add_request(f"alone{number}", prompt, asked().params)
        found: list[int] = []
        while engine.has_unfinished():
            for delta in engine.step():
                found += delta.completions[0].token_ids
        expected.append(found)

    async def scenario(harness: Harness) -> None:
        submission = await harness.bridge.submit([asked(5, 6, 7), asked(8, 9)])
        assert await tokens_of(submission) == dict(enumerate(expected))
        assert harness.bridge.num_open == 0
        assert harness.aborted == 0

    run(engine, scenario)


def test_a_refused_prompt_takes_its_whole_request_with_it(model: LoadedModel) -> None:
    async def scenario(harness: Harness) -> None:
        with pytest.raises(ValueError, match="vocabulary"):
            await harness.bridge.submit([asked(5), asked(10**6)])
        assert harness.bridge.num_open == 0
        assert (await harness.settled()).generation_tokens == 0
        assert len((await tokens_of(await harness.bridge.submit([asked(5)])))[0]) == 8  # and the engine goes on

    run(Engine(model), scenario)


def test_a_full_queue_is_reported_with_a_time(model: LoadedModel) -> None:
    async def scenario(harness: Harness) -> None:
        with pytest.raises(EngineFull) as caught:
            await harness.bridge.submit([asked(5, max_tokens=50) for _ in range(4)])
        assert caught.value.retry_after_seconds > 0
        assert harness.bridge.num_open == 0

    run(Engine(model, EngineConfig(max_num_seqs=1, max_waiting=3)), scenario)


def test_clients_that_leave_free_their_pages(model: LoadedModel) -> None:
    async def scenario(harness: Harness) -> None:
        submissions = [await harness.bridge.submit([asked(5, 6, max_tokens=400)]) for _ in range(6)]
        stays, leaves = submissions[0], submissions[1:]
        await anext(aiter(leaves[0].batches()))
        for submission in leaves:
            submission.client_left()
        with pytest.raises(ClientGone):
            await tokens_of(leaves[0])
        assert len((await tokens_of(stays))[0]) == 400
        stats = await harness.settled()
        assert (stats.kv_usage, stats.num_running, stats.num_waiting) == (0, 0, 0)
        assert harness.aborted == 5
        assert harness.bridge.num_open == 0
        submission.close()  # once more does no harm
        assert harness.aborted == 5

    run(Engine(model), scenario)


def test_cancelling_a_submission_that_waits_for_the_engine_aborts_it(model: LoadedModel) -> None:
    async def scenario(harness: Harness) -> None:
        task = asyncio.create_task(harness.bridge.submit([asked(5, max_tokens=400)]))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert harness.bridge.num_open == 0
        assert (await harness.settled()).kv_usage == 0

    run(Engine(model), scenario)


def test_an_idle_engine_costs_no_time_and_a_step_one_call(model: LoadedModel, monkeypatch: Any) -> None:
    async def scenario(harness: Harness) -> None:
        await tokens_of(await harness.bridge.submit([asked(5)]))
        used = time.process_time()
        await asyncio.sleep(0.5)
        assert time.process_time() - used < 0.25
        assert harness.bridge.failure() is None  # idle is not hung

        calls = 0
        steps = 0
        notify, step = harness.bridge._notify, engine.step

        def counted_notify(*arguments: Any) -> None:
            nonlocal calls
            calls += 1
            notify(*arguments)

        def counted_step() -> list[RequestDelta]:
            nonlocal steps
            steps += 1
            return step()

        monkeypatch.setattr(harness.bridge, "_notify", counted_notify)
        monkeypatch.setattr(engine, "step", counted_step)
        submissions = await asyncio.gather(*(harness.bridge.submit([asked(5 + i)]) for i in range(12)))
        await asyncio.gather(*map(tokens_of, submissions))
        assert calls <= steps + 12  # one per step, and one per submission

    engine = Engine(model)
    run(engine, scenario, hang_timeout=0.2)


class Faulty(Runner):
    """Runs some steps, then calls ``fault``."""

    def __init__(self, runner: Runner, steps: int, fault: Callable[[], None]) -> None:
        self.__dict__.update(runner.__dict__)
        self.steps, self.fault = steps, fault

    def run(self, schedule: Any) -> Any:
        self.steps -= 1
        if self.steps < 0:
            self.fault()
        return super().run(schedule)


def test_a_dying_engine_ends_every_request_with_an_error(model: LoadedModel) -> None:
    def fault() -> None:
        raise RuntimeError("boom")

    async def scenario(harness: Harness) -> None:
        running = await asyncio.gather(*(harness.bridge.submit([asked(5, max_tokens=100)]) for _ in range(3)))
        outcomes = await asyncio.gather(*map(tokens_of, running), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [EngineFailure] * 3
        assert {outcome.code for outcome in outcomes if isinstance(outcome, EngineFailure)} == {"engine_dead"}
        assert harness.bridge.num_open == 0
        with pytest.raises(EngineFailure, match="died"):
            await harness.bridge.submit([asked(5)])

    engine = Engine(model, EngineConfig(max_num_seqs=2))
    engine.runner = Faulty(engine.runner, 6, fault)
    run(engine, scenario)


def test_a_hung_engine_ends_requests_and_may_come_back(model: LoadedModel) -> None:
    released = threading.Event()

    async def scenario(harness: Harness) -> None:
        submission = await harness.bridge.submit([asked(5, max_tokens=100)])
        with pytest.raises(EngineFailure) as caught:
            await tokens_of(submission)
        assert caught.value.code == "engine_hung"
        with pytest.raises(EngineFailure, match="no progress"):
            await harness.bridge.submit([asked(5)])
        released.set()
        for _ in range(200):
            if harness.bridge.failure() is None:
                break
            await asyncio.sleep(0.02)
        assert len((await tokens_of(await harness.bridge.submit([asked(5)])))[0]) == 8
        assert (await harness.settled()).kv_usage == 0

    engine = Engine(model)
    engine.runner = Faulty(engine.runner, 6, lambda: released.wait(30) and None)
    run(engine, scenario, hang_timeout=0.5)


def test_closing_ends_requests_and_refuses_new_ones(model: LoadedModel) -> None:
    async def scenario(harness: Harness) -> None:
        submission = await harness.bridge.submit([asked(5, max_tokens=400)])
        harness.bridge.close()
        with pytest.raises(EngineFailure, match="shutting down"):
            await tokens_of(submission)
        with pytest.raises(EngineFailure, match="shutting down"):
            await harness.bridge.submit([asked(5)])
        assert (await harness.settled()).kv_usage == 0

    run(Engine(model), scenario)


def test_a_call_runs_between_two_steps_on_the_engines_thread(model: LoadedModel) -> None:
    async def scenario(harness: Harness) -> None:
        submission = await harness.bridge.submit([asked(5, max_tokens=100)])
        threads: list[str] = []
        await harness.bridge.call(lambda: threads.append(threading.current_thread().name))
        assert threads == ["engine"]

        def refuse() -> None:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await harness.bridge.call(refuse)
        assert len((await tokens_of(submission))[0]) == 100
        harness.bridge.close()
        with pytest.raises(EngineFailure, match="shutting down"):
            await harness.bridge.call(refuse)

    run(Engine(model), scenario)


def test_certificates_that_appear_later_do_not_run_the_model_beside_the_engine(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(shutil.copytree(make_checkpoint("llama"), tmp_path / "model"), progress=False)
    threads: set[str] = set()
    embed = model.decoder.embed

    def seen(ids_T: torch.Tensor) -> torch.Tensor:
        threads.add(threading.current_thread().name)
        return embed(ids_T)

    monkeypatch.setattr(model.decoder, "embed", seen)

    async def scenario(harness: Harness) -> None:
        manager = ContractManager(
            source=CertificateSource(harness.bridge.engine),
            settings=MonitorSettings(),
            default_file=tmp_path / "monitor.db",
            between_steps=harness.bridge.call,
        )
        manager.open()
        assert not threads, "without certificates nothing is run"
        (model.path / CERTIFICATES).mkdir()
        await manager.reload()
        await manager.close()
        assert threads == {"engine"}

    run(Engine(model), scenario)
