"""``dynamoe bench``: latency and throughput over a grid of concurrencies and input lengths.

The load is closed-loop: ``concurrency`` requests are in flight, and a finished one is replaced at once.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ...kernels.api.disk import check_writable
from ...kernels.api.ranges import check_ranges
from ..convert.model_config import SharedModelConfig
from ..engine.config import EngineConfig
from ..engine.sampling_params import SamplingParams
from ..model.machine import run_facts
from .timing import PointResult, RequestTiming, summarize, table

if TYPE_CHECKING:
    from ..engine.engine import Engine

Measure = Callable[..., tuple[list[RequestTiming], float]]


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured.

    Arguments:
        concurrency: numbers of requests in flight.
        input_len: prompt lengths in tokens, of random tokens.
        output_len: tokens per output; end-of-sequence tokens do not end it.
        requests: requests per point; null takes twice the concurrency, at least 4.
        prompts_file: take prompts from this file, one per line, instead of random tokens.
        url: measure a running server instead of an engine in this process.
        api_key: the server's key; null takes ``OPENAI_API_KEY`` from the environment.
        seed: of the random tokens.
        json: file for the results.
    """

    concurrency: tuple[int, ...] = (1, 4, 16)
    input_len: tuple[int, ...] = (128,)
    output_len: int = 64
    requests: int | None = None
    prompts_file: str | None = None
    url: str | None = None
    api_key: str | None = None
    seed: int = 0
    json: str | None = None

    def __post_init__(self) -> None:
        for name in ("concurrency", "input_len"):
            if not getattr(self, name):
                raise ValueError(f"bench.{name} must be at least 1 number, not {getattr(self, name)}")
        check_ranges(self, "concurrency", "input_len", "output_len", "requests", where="bench.", least=1)


@dataclass(frozen=True, kw_only=True)
class BenchCommandConfig(SharedModelConfig):
    """``dynamoe bench``."""

    bench: BenchConfig = field(default_factory=BenchConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a benchmark runs against.

    Arguments:
        name: of the model.
        where: ``engine`` or the server's address.
        measure: see :func:`measure_engine`.
        token_pool: ids that random prompts are sampled from.
        encode: token ids of a text.
    """

    name: str
    where: str
    measure: Measure
    token_pool: Sequence[int]
    encode: Callable[[str], list[int]]


def bench(config: BenchCommandConfig) -> None:
    """Run the command.

    Raises:
        ValueError: for settings, a model or a server that cannot be used.
    """
    file = None if config.bench.json is None else Path(config.bench.json).expanduser()
    if file is not None:
        check_writable(file)
    target = _server_target(config.bench) if config.bench.url else _engine_target(config)
    points = run(target, config.bench)
    print(table(points))
    if file is not None:
        file.write_text(json.dumps(report(target, config, points), indent=2) + "\n")


def run(target: Target, config: BenchConfig) -> list[PointResult]:
    """Measure every point of the grid, with a progress bar on a terminal."""
    draw = random.Random(config.seed)
    texts = _read_prompts(config.prompts_file) if config.prompts_file else None
    points = []
    for input_len in config.input_len if texts is None else (0,):
        for concurrency in config.concurrency:
            count = config.requests or max(4, 2 * concurrency)
            if texts is None:
                # One more than is measured, as a warm-up for this size.
                prompts = [draw.choices(target.token_pool, k=input_len) for _ in range(count + 1)]
            else:
                prompts = [target.encode(texts[i % len(texts)]) for i in range(count + 1)]
            label = f"{concurrency} in flight, {input_len or 'given'} input tokens"
            with tqdm(total=count, desc=label, unit="request", disable=None, leave=False) as bar:
                target.measure(prompts[-1:], concurrency=1, output_len=min(4, config.output_len), done=lambda: None)
                timings, seconds = target.measure(
                    prompts[:-1], concurrency=concurrency, output_len=config.output_len, done=bar.update
                )
            lengths = [len(prompt) for prompt in prompts[:-1]]
            points.append(summarize(timings, concurrency=concurrency, input_tokens=lengths, seconds=seconds))
    return points


def report(target: Target, config: BenchCommandConfig, points: Sequence[PointResult]) -> dict[str, Any]:
    """The results with what they depend on, ready for JSON."""
    settings = asdict(config)
    settings["bench"].pop("api_key")
    if config.bench.url is not None:  # the server chose its model and how it runs
        settings = {"bench": settings["bench"]}
    return {
        "model": target.name,
        "target": target.where,
        "settings": settings,
        "machine": {"platform": platform.platform(), "cores": os.cpu_count(), **run_facts()},
        "points": [asdict(point) for point in points],
    }


def _engine_target(config: BenchCommandConfig) -> Target:
    from ..convert.load_model import load_model
    from ..engine.engine import Engine

    model = load_model(config.model, **config.load_arguments())
    special = model.tokenizer.special_ids
    return Target(
        name=model.name,
        where="engine",
        measure=functools.partial(measure_engine, Engine(model, config.engine)),
        token_pool=[i for i in range(model.tokenizer.vocab_size) if i not in special],
        encode=model.tokenizer.encode,
    )


def measure_engine(
    engine: Engine, prompts: Sequence[Sequence[int]], *, concurrency: int, output_len: int, done: Callable[[], object]
) -> tuple[list[RequestTiming], float]:
    """Keep ``concurrency`` requests in the engine until every prompt has been answered.

    Arguments:
        prompts: token ids.
        output_len: tokens per output, chosen greedily; end-of-sequence tokens do not end it.
        done: called after every request.

    Returns: the requests' timings in the prompts' order, and the elapsed seconds.

    Raises:
        ValueError: for a prompt that the engine refuses.
    """
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
    timings: list[RequestTiming] = []
    open_requests = 0
    begin = time.perf_counter()
    while len(timings) < len(prompts) or open_requests:
        while open_requests < concurrency and len(timings) < len(prompts):
            timings.append(RequestTiming(start=time.perf_counter()))
            engine.add_request(str(len(timings) - 1), prompts[len(timings) - 1], params)
            open_requests += 1
        deltas = engine.step()
        now = time.perf_counter()
        for delta in deltas:
            if delta.error is not None:
                raise ValueError(f"the engine failed a request: {delta.error}")
            timing = timings[int(delta.request_id)]
            tokens = sum(len(completion.token_ids) for completion in delta.completions)
            if tokens:
                timing.arrivals.append(now)
                timing.output_tokens += tokens
            if delta.finished:
                open_requests -= 1
                done()
    return timings, time.perf_counter() - begin


def _server_target(config: BenchConfig) -> Target:
    from .http_target import SAMPLE_TEXT, ServerTarget

    assert config.url is not None
    server = ServerTarget(config.url, config.api_key or os.environ.get("OPENAI_API_KEY"))
    return Target(
        name=server.model,
        where=server.url,
        measure=server.measure,
        token_pool=server.token_ids(SAMPLE_TEXT),
        encode=server.token_ids,
    )


def _read_prompts(file: str) -> list[str]:
    prompts = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"bench.prompts_file={file} holds no prompt")
    return prompts
