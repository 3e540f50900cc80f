"""The benchmark's load on an engine in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..engine.engine import Engine
from ..engine.sampling_params import SamplingParams
from .timing import RequestTiming


def measure_engine(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    concurrency: int,
    output_len: int,
    done: Callable[[], object],
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
