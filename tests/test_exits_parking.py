"""When rows wait for company: where a launch costs the same for one row as for many, and only then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dynamoe.dynamic.engine.parking import PATIENCE, Parking, SegmentTimes, measure_times
from dynamoe.dynamic.model.loader import load_decoder

SIZES = (1, 2, 4, 8, 16, 32)
FLAT = (0.01,) * len(SIZES)  # weights are read, and rows cost nothing
STEEP = tuple(0.01 * size for size in SIZES)  # every row costs the same
CHEAP = tuple(0.0001 * size for size in SIZES)


def parking(*segments: tuple[float, ...], going: float) -> Parking:
    """With a history in which this share of the rows went on at every exit."""
    made = Parking(SegmentTimes(sizes=SIZES, segments=segments, head=(0.001,) * len(SIZES)))
    for segment in range(1, len(segments)):
        made.observe(segment, 10_000, round(10_000 * going))
    return made


def waits_for(made: Parking, segment: int, running: int) -> int:
    """How many rows go on in the end."""
    return next(rows for rows in range(1, running + 1) if not made.should_wait(segment, rows, running, 0))


def test_few_rows_wait_where_a_launch_costs_the_same_for_many() -> None:
    cheap_start = parking(CHEAP, FLAT, going=0.1)
    assert 3 <= waits_for(cheap_start, 1, 32) <= 32
    assert waits_for(cheap_start, 1, 32) >= waits_for(cheap_start, 1, 8)


def test_nobody_waits_where_every_row_costs_the_same() -> None:
    assert waits_for(parking(STEEP, STEEP, going=0.1), 1, 32) == 1
    # What is missing from the steps in between costs more than what company saves.
    assert waits_for(parking(tuple(10 * t for t in FLAT), FLAT, going=0.5), 1, 32) == 1


def test_nobody_waits_alone_or_for_ever() -> None:
    made = parking(CHEAP, FLAT, going=0.1)
    assert made.should_wait(1, 1, 32, PATIENCE - 1)
    assert not made.should_wait(1, 1, 32, PATIENCE)
    assert not made.should_wait(1, 1, 1, 0)
    assert not made.should_wait(1, 0, 32, 0)


def test_dear_steps_speak_against_waiting() -> None:
    cheap, dear = parking(CHEAP, FLAT, going=0.1), parking(STEEP, FLAT, going=0.1)
    cheap.observe_step(0.0, 32)
    dear.observe_step(0.2, 32)
    assert waits_for(dear, 1, 32) < waits_for(cheap, 1, 32)


def test_times_are_measured_for_every_segment_and_size(make_exits: Callable[..., Path]) -> None:
    decoder = load_decoder(make_exits("mixtral", {1: 0.5, 2: 0.5}), dtype="float32")
    times = measure_times(decoder, page_size=8, max_rows=5)
    assert times.sizes == (1, 2, 4, 8)
    assert [len(seconds) for seconds in (*times.segments, times.head)] == [4] * 4
    assert all(second > 0 for seconds in (*times.segments, times.head) for second in seconds)
