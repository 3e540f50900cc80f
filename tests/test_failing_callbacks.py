"""What others hang into the engine's loop may fail: observers, plug-ins, idle work. Nobody else's tokens are lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.fault_log import FaultLog
from dynamoe.dynamic.engine.protocols import ProcessorContext
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.loaded import LoadedModel
from dynamoe.serve.app import make_context
from dynamoe.serve.bridge import EngineBridge, EngineRequest
from dynamoe.serve.submission import EngineFailure, Submission

PLAIN, FAILING = 0.0, 0.5  # presence_penalty by which the plug-in below knows its requests


class Fails:
    """Fails in the method that ``bad_words`` names, for requests with a presence penalty, from their third token on."""

    changes_distribution: ClassVar[bool] = True

    def __init__(self, context: ProcessorContext) -> None:
        self.where, self.count = WHERE[context.params.seed or 0], 0
        self.fail("__init__", 0)

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        return params.presence_penalty == FAILING

    def fail(self, method: str, from_count: int = 2) -> None:
        if self.where == method and self.count >= from_count:
            raise KeyError(f"the secret of {method}")

    def edit(self, logits_V: torch.Tensor) -> None:
        logits_V[:10] = 3.0
        self.fail("edit")

    def accept(self, token_id: int) -> None:
        self.count += 1
        self.fail("accept")

    def rollback(self, count: int) -> None: ...

    def fork(self) -> Self:
        self.fail("fork", 0)
        other = type(self).__new__(type(self))
        other.where, other.count = self.where, self.count
        return other


WHERE = ("edit", "accept", "fork", "__init__")


class Keeps:
    """A cache policy that fails for contexts of more than 20 tokens."""

    def __init__(self, layers: range, page_size: int) -> None: ...

    def evict(self, blocks: Sequence[int], num_computed: int) -> Collection[int]:
        if num_computed > 20:
            raise OSError("no policy")
        return ()


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> LoadedModel:
    return load_model(make_checkpoint("llama"), progress=False, backend="torch", device="cpu")


def params(**settings: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, **settings)


def failing(method: str, **settings: Any) -> SamplingParams:
    return params(presence_penalty=FAILING, seed=WHERE.index(method), **settings)


PROMPTS = ((5, 6, 7), (8, 9), (10, 11, 12, 13))


def alone(model: LoadedModel, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[int]]:
    """The tokens of each prompt on an engine of its own."""
    return [next(iter(generate(Engine(model), {"a": (prompt, params())}).values()))[0] for prompt in prompts]


def generate(
    engine: Engine, requests: dict[str, tuple[Sequence[int], SamplingParams]]
) -> dict[str, tuple[list[int], str | None]]:
    """Tokens and error of each request."""
    found: dict[str, tuple[list[int], str | None]] = {name: ([], None) for name in requests}
    for name, (prompt, wanted) in requests.items():
        engine.add_request(name, prompt, wanted)
    while engine.has_unfinished():
        for delta in engine.step():
            tokens, error = found[delta.request_id]
            for completion in delta.completions:
                tokens += completion.token_ids
            found[delta.request_id] = tokens, error or delta.error
    return found


@pytest.mark.parametrize(("method", "tokens"), [("edit", 2), ("accept", 2), ("fork", None)])
def test_a_failing_logits_processor_ends_its_request_alone(
    model: LoadedModel, caplog: pytest.LogCaptureFixture, method: str, tokens: int | None
) -> None:
    engine = Engine(model, EngineConfig(logits_processors=(f"{__file__}:Fails",)))
    requests = {str(n): (prompt, params()) for n, prompt in enumerate(PROMPTS)}
    bad = {f"bad{n}": ((20, 21), failing(method, n=2 if method == "fork" else 1)) for n in range(3)}
    with caplog.at_level(logging.ERROR):
        found = generate(engine, requests | bad)
    assert [found[name] for name in requests] == [(expected, None) for expected in alone(model)]
    for name in bad:
        assert found[name][1] == "the server's plug-in Fails failed: KeyError"
        assert tokens is None or len(found[name][0]) == tokens
    assert engine.stats().kv_usage == 0
    assert len(caplog.records) == 1, "three failures of one kind are one line"
    assert "the secret of" in caplog.text


def test_a_failing_cache_policy_ends_its_request_alone(model: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(model, EngineConfig(cache_policy=f"{__file__}:Keeps", block_size=4, enable_prefix_caching=False))
    found = generate(engine, {"short": (PROMPTS[0], params()), "long": (range(5, 35), params())})
    assert found["short"] == (alone(model)[0], None)
    assert found["long"] == ([], "the server's plug-in Keeps failed: OSError")
    assert engine.stats().kv_usage == 0


async def tokens_of(submission: Submission) -> list[int]:
    return [
        token
        async for batch in submission.batches()
        for _, delta in batch
        for completion in delta.completions
        for token in completion.token_ids
    ]


def run(bridge: EngineBridge, scenario: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        bridge.start()
        async with asyncio.timeout(60):
            await scenario()
        assert await bridge.stop(timeout=10)

    asyncio.run(main())


def ask(bridge: EngineBridge, prompt: Sequence[int], wanted: SamplingParams | None = None) -> Awaitable[Submission]:
    return bridge.submit([EngineRequest(prompt_token_ids=prompt, params=wanted or params())])


def boom(*_arguments: object) -> bool:
    raise ZeroDivisionError("an observer's")


def test_streams_lose_no_token_to_an_observer_that_raises(model: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    bridge = EngineBridge(Engine(model), hang_timeout=60.0, on_delta=boom, on_abort=boom, idle_work=boom)

    async def scenario() -> None:
        submissions = [await ask(bridge, prompt) for prompt in PROMPTS]
        assert [await tokens_of(submission) for submission in submissions] == alone(model)
        left = await ask(bridge, PROMPTS[0])
        left.client_left()
        assert await tokens_of(await ask(bridge, PROMPTS[1])) == alone(model)[1]
        for _ in range(200):
            if bridge.stats.kv_usage == 0:
                break
            await asyncio.sleep(0.02)
        assert bridge.stats.kv_usage == 0, "the aborted request has given its pages back"

    with caplog.at_level(logging.ERROR):
        run(bridge, scenario)
    assert bridge.ended_well
    kinds = sorted(record.getMessage().partition(" failed")[0] for record in caplog.records)
    assert kinds == ["an observer of aborts", "an observer of deltas", "idle work"]


def test_a_request_that_cannot_be_made_is_refused_alone(model: LoadedModel) -> None:
    engine = Engine(model, EngineConfig(logits_processors=(f"{__file__}:Fails",)))
    bridge = EngineBridge(engine, hang_timeout=60.0, on_delta=lambda *_: None, on_abort=lambda _: None)

    async def scenario() -> None:
        first = await ask(bridge, PROMPTS[0])
        with pytest.raises(EngineFailure, match="KeyError") as refusal:
            await ask(bridge, PROMPTS[1], failing("__init__"))
        assert refusal.value.code == "request_failed"
        assert await tokens_of(first) == alone(model)[0]
        assert bridge.num_open == 0

    run(bridge, scenario)


class _Contracts:
    """Takes what the server tells its contracts."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.monitor = None

    def on_delta(self, delta: Any) -> None:
        self.seen.append(delta.request_id)

    def ended(self, request_ids: Sequence[str]) -> None:
        self.seen += request_ids


def test_the_monitor_sees_what_metrics_fail_to_count(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynamoe.serve.settings import ServerSettings

    contracts = _Contracts()
    context = make_context(Engine(model), ServerSettings(), contracts)  # type: ignore[arg-type]
    monkeypatch.setattr(context.metrics, "on_delta", boom)
    monkeypatch.setattr(context.metrics, "on_abort", boom)

    async def scenario() -> None:
        submission = await ask(context.bridge, PROMPTS[0])
        assert await tokens_of(submission) == alone(model)[0]
        assert contracts.seen == submission.ids * 8
        left = await ask(context.bridge, PROMPTS[1])
        left.client_left()
        assert contracts.seen[-1] == left.ids[0]

    run(context.bridge, scenario)


def test_a_fault_is_logged_once_a_minute_by_kind(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    log = FaultLog(logging.getLogger("dynamoe.test"), clock=lambda: now[0])
    for seconds in (0.0, 1.0, 59.0):
        now[0] = seconds
        log.report("one", ValueError("x"))
        log.report("other", ValueError("y"))
    assert [record.getMessage() for record in caplog.records] == [
        "one failed: ValueError: x",
        "other failed: ValueError: y",
    ]
    now[0] = 60.0
    log.report("one", ValueError("z"))
    assert caplog.records[-1].getMessage() == "one failed: ValueError: z (2 times more since the last such line)"
