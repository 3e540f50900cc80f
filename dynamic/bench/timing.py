"""Timings of a benchmark's requests, and their summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(kw_only=True)
class RequestTiming:
    """One request's times, in seconds of ``time.perf_counter``.

    Arguments:
        start: when it was handed over; waiting in a queue counts.
        arrivals: when each chunk of the output arrived.
        output_tokens: tokens in the output.
    """

    start: float
    arrivals: list[float] = field(default_factory=list)
    output_tokens: int = 0

    @property
    def ttft(self) -> float:
        """Time to the first token."""
        return self.arrivals[0] - self.start

    @property
    def latency(self) -> float:
        """Time to the last token."""
        return self.arrivals[-1] - self.start

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: the times between chunks."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False)]


@dataclass(frozen=True, kw_only=True)
class PointResult:
    """One point of the grid: times in milliseconds, throughputs in tokens or requests per second.

    ``user_tokens_per_second`` is what one request sees after its first token; its ``p99`` is the slowest 1 %.
    """

    concurrency: int
    input_tokens: float
    output_tokens: float
    requests: int
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    user_tokens_per_second_median: float
    user_tokens_per_second_p99: float
    ttft_ms_median: float
    ttft_ms_p99: float
    itl_ms_median: float
    itl_ms_p99: float
    latency_ms_median: float
    latency_ms_p99: float


def summarize(
    timings: Sequence[RequestTiming], *, concurrency: int, input_tokens: Sequence[int], seconds: float
) -> PointResult:
    """Reduce the records of one point.

    Arguments:
        timings: of every request; each has at least one arrival.
        concurrency: requests in flight.
        input_tokens: length of each prompt.
        seconds: from the first request's start to the last one's end.

    Raises:
        ValueError: for no requests, or one without output.
    """
    if not timings or not all(timing.arrivals for timing in timings):
        raise ValueError("a request returned no output: there is nothing to measure")
    output = sum(timing.output_tokens for timing in timings)
    gaps = [gap for timing in timings for gap in timing.gaps] or [float("nan")]
    speeds = [
        (timing.output_tokens - 1) / (timing.latency - timing.ttft)
        for timing in timings
        if timing.latency > timing.ttft
    ] or [float("nan")]
    ttft = [timing.ttft for timing in timings]
    latency = [timing.latency for timing in timings]
    return PointResult(
        concurrency=concurrency,
        input_tokens=float(np.mean(input_tokens)),
        output_tokens=output / len(timings),
        requests=len(timings),
        seconds=seconds,
        requests_per_second=len(timings) / seconds,
        output_tokens_per_second=output / seconds,
        total_tokens_per_second=(output + sum(input_tokens)) / seconds,
        user_tokens_per_second_median=_percentile(speeds, 50),
        user_tokens_per_second_p99=_percentile(speeds, 1),
        ttft_ms_median=1e3 * _percentile(ttft, 50),
        ttft_ms_p99=1e3 * _percentile(ttft, 99),
        itl_ms_median=1e3 * _percentile(gaps, 50),
        itl_ms_p99=1e3 * _percentile(gaps, 99),
        latency_ms_median=1e3 * _percentile(latency, 50),
        latency_ms_p99=1e3 * _percentile(latency, 99),
    )


def _percentile(values: Sequence[float], percent: float) -> float:
    return float(np.percentile(values, percent))


def table(points: Sequence[PointResult]) -> str:
    """The points as text, one line each."""
    head = f"{'in flight':>9} {'input':>6} {'output':>6} {'requests':>8} | {'tokens/s':>9} {'per user':>9} {'p99':>7}"
    head += "".join(f" | {name:>9} {'p99':>8}" for name in ("TTFT ms", "ITL ms", "total ms"))
    lines = [head, "-" * len(head)]
    for p in points:
        line = f"{p.concurrency:9d} {p.input_tokens:6.0f} {p.output_tokens:6.0f} {p.requests:8d}"
        line += f" | {p.output_tokens_per_second:9.1f} {p.user_tokens_per_second_median:9.1f}"
        line += f" {p.user_tokens_per_second_p99:7.1f}"
        pairs = (
            (p.ttft_ms_median, p.ttft_ms_p99),
            (p.itl_ms_median, p.itl_ms_p99),
            (p.latency_ms_median, p.latency_ms_p99),
        )
        line += "".join(f" | {median:9.1f} {p99:8.1f}" for median, p99 in pairs)
        lines.append(line)
    return "\n".join(lines)
