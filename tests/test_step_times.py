"""The table of step times: looked up between what was planted in it, and measured where it is asked for only."""

from __future__ import annotations

import pytest
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.step_times import StepTime, StepTimes
from dynamoe.dynamic.llm import LLM


def table(*points: tuple[int, float, float, float]) -> StepTimes:
    """Rows, experts, seconds of the layers, seconds of the head."""
    return StepTimes(tuple(StepTime(rows=r, experts=e, layers=s, head=h) for r, e, s, h in points))


PLANTED = table((8, 12.0, 9.0, 0.8), (1, 2.0, 2.0, 0.1), (4, 2.0, 4.0, 0.4), (4, 6.0, 6.0, 0.4), (8, 2.0, 5.0, 0.8))


def test_what_was_measured_is_found_again() -> None:
    for point in PLANTED.points:
        assert PLANTED.layers(point.rows, point.experts) == point.layers
        assert PLANTED.head(point.rows) == point.head


def test_between_measured_steps_lies_a_line() -> None:
    assert PLANTED.layers(4, 4.0) == 5.0
    assert PLANTED.layers(6, 2.0) == 4.5
    assert PLANTED.layers(2, 2.0) == pytest.approx(2 + 2 / 3)
    # At 7 experts: 4 rows have at most 6, 8 rows lie between 2 and 12.
    assert PLANTED.layers(6, 7.0) == (6.0 + 7.0) / 2
    assert PLANTED.head(6) == pytest.approx(0.6)


def test_rows_of_unrelated_tokens_use_the_most_experts() -> None:
    assert PLANTED.layers(4) == 6.0
    assert PLANTED.layers(8) == 9.0
    assert PLANTED.layers(8, 100.0) == 9.0
    assert PLANTED.layers(8, 0.0) == 5.0


def test_behind_the_largest_step_the_line_goes_on_and_never_falls() -> None:
    assert PLANTED.layers(16) == 9.0 + 3 / 4 * 8
    assert table((1, 0, 3.0, 0.1), (2, 0, 2.0, 0.1)).layers(9) == 2.0
    assert table((1, 0, 3.0, 0.1)).layers(9) == 3.0


def test_a_step_is_its_layers_and_the_head_on_sampled_rows() -> None:
    assert PLANTED.seconds(8) == 9.0 + 0.8
    assert PLANTED.seconds(8, 2.0, sampled=1) == 5.0 + 0.1
    assert PLANTED.seconds(8, 2.0, sampled=0) == 5.0
    with pytest.raises(ValueError, match="at least 1 row, not 0"):
        PLANTED.seconds(0)


def test_tiny_is_measured_where_it_is_asked_for() -> None:
    model = LLM("tiny", progress=False).model
    assert Engine(model).step_times is None
    times = Engine(model, EngineConfig(measure_step_times=True, max_num_batched_tokens=20)).step_times
    assert times is not None
    moe = model.spec.layers[0].moe
    assert moe is not None
    top_k, num_experts = moe.router.top_k, moe.router.num_experts
    assert sorted({point.rows for point in times.points}) == [1, 2, 4, 8, 16]
    for size in (1, 2, 4, 8, 16):
        experts = [point.experts for point in times.points if point.rows == size]
        assert experts[0] == top_k, "equal tokens use the same experts"
        assert experts == sorted(experts)
        assert experts[-1] <= min(size * top_k, num_experts)
    assert times.points[-1].experts > top_k
    assert all(point.layers > 0 and point.head > 0 for point in times.points)
