"""The benchmark: its arithmetic on known times, a real engine, a real server, and its report."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dynamoe.dynamic.bench.command import BenchConfig
from dynamoe.dynamic.bench.timing import RequestTiming, summarize, table
from dynamoe.dynamic.cli.main import main
from dynamoe.dynamic.engine.config import EngineConfig


def test_summary_of_known_times() -> None:
    # Each request waits for its first token, then gets one every 10 ms (100 a second) or every 20 ms.
    quick = RequestTiming(start=0.0, arrivals=[0.1, 0.11, 0.12, 0.13, 0.14], output_tokens=5)
    slow = RequestTiming(start=1.0, arrivals=[1.3, 1.32, 1.34, 1.36, 1.38], output_tokens=5)
    result = summarize([quick, slow], concurrency=2, input_tokens=[30, 50], seconds=2.0)
    assert (result.requests, result.input_tokens, result.output_tokens) == (2, 40, 5)
    assert result.output_tokens_per_second == pytest.approx(5)
    assert result.total_tokens_per_second == pytest.approx(45)
    assert result.requests_per_second == pytest.approx(1)
    assert result.ttft_ms_median == pytest.approx(200)
    assert result.ttft_ms_p99 == pytest.approx(100 + 0.99 * 200)
    assert result.itl_ms_median == pytest.approx(15)
    assert result.itl_ms_p99 == pytest.approx(20)
    assert result.latency_ms_median == pytest.approx((140 + 380) / 2)
    # The slowest percent of the users, not the fastest.
    assert result.user_tokens_per_second_median == pytest.approx(75)
    assert 50 <= result.user_tokens_per_second_p99 < 51


def test_one_token_has_no_gaps() -> None:
    timing = RequestTiming(start=0.0, arrivals=[0.5], output_tokens=1)
    result = summarize([timing], concurrency=1, input_tokens=[4], seconds=0.5)
    assert result.ttft_ms_median == pytest.approx(500)
    assert math.isnan(result.itl_ms_median)
    assert math.isnan(result.user_tokens_per_second_median)


def test_request_without_output_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="no output"):
        summarize([RequestTiming(start=0.0)], concurrency=1, input_tokens=[4], seconds=1.0)


def test_table_has_a_line_per_point() -> None:
    timing = RequestTiming(start=0.0, arrivals=[0.1, 0.2], output_tokens=2)
    point = summarize([timing], concurrency=3, input_tokens=[77], seconds=0.2)
    head, rule, line = table([point]).splitlines()
    assert len(head) == len(rule) == len(line)
    assert line.split("|")[0].split() == ["3", "77", "2", "1"]
    assert line.split("|")[1].split()[0] == "10.0"


@pytest.mark.parametrize("setting", [{"concurrency": ()}, {"input_len": (0,)}, {"output_len": 0}, {"requests": -1}])
def test_nonsense_is_refused(setting: dict[str, object]) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"bench.{name} must be at least 1"):
        BenchConfig(**setting)  # type: ignore[arg-type]


def check_report(file: Path, where: str) -> None:
    report = json.loads(file.read_text())
    assert report["target"] == where
    assert "api_key" not in report["settings"]["bench"]
    assert {"git_revision", "version", "date", "torch", "processor", "threads"} <= set(report["machine"])
    assert [(p["concurrency"], p["input_tokens"], p["requests"]) for p in report["points"]] == [
        (1, 8, 6),
        (3, 8, 6),
        (1, 24, 6),
        (3, 24, 6),
    ]
    for point in report["points"]:
        assert point["output_tokens"] == 5
        assert 0 < point["ttft_ms_median"] <= point["ttft_ms_p99"] <= point["latency_ms_p99"]
        assert 0 < point["itl_ms_median"] <= point["itl_ms_p99"]
        busy = point["seconds"] * point["concurrency"]
        # Little's law: the requests' times fill the slots, all but the last ones' idle time.
        assert point["latency_ms_median"] / 1e3 * point["requests"] < 3 * busy


GRID = ["bench.concurrency=[1,3]", "bench.input_len=[8,24]", "bench.output_len=5", "bench.requests=6"]


def test_engine(make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = make_checkpoint("mixtral"), tmp_path / "bench.json"
    assert main(["bench", f"model={model}", *GRID, f"bench.json={file}"]) == 0
    check_report(file, "engine")
    assert json.loads(file.read_text())["settings"]["engine"]["max_num_seqs"] == EngineConfig().max_num_seqs
    head, rule, *points = capsys.readouterr().out.splitlines()[-6:]
    assert "TTFT" in head
    assert set(rule) == {"-"}
    assert [line.split()[:2] for line in points] == [["1", "8"], ["3", "8"], ["1", "24"], ["3", "24"]]


def test_prompts_from_a_file(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    prompts, file = tmp_path / "prompts.txt", tmp_path / "bench.json"
    prompts.write_text("The capital of France\n\nOne, two, three\n")
    settings = [f"bench.prompts_file={prompts}", f"bench.json={file}", "bench.concurrency=[2]", "bench.output_len=3"]
    assert main(["bench", f"model={make_checkpoint('mixtral')}", *settings]) == 0
    (point,) = json.loads(file.read_text())["points"]
    assert point["requests"] == 4
    assert point["input_tokens"] > 1


def test_server(server: Any, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    assert main(["bench", f"bench.url={server.url}", *GRID, f"bench.json={file}"]) == 0
    check_report(file, server.url)
    report = json.loads(file.read_text())
    assert report["model"] == "tiny"
    assert set(report["settings"]) == {"bench"}, "how the server loaded its model is not known here"


def test_refusal_of_the_server_is_one_line(server: Any, capfd: pytest.CaptureFixture[str]) -> None:
    settings = ["bench.input_len=[4000]", "bench.requests=2", "bench.concurrency=[2]"]
    assert main(["bench", f"bench.url={server.url}", *settings]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"dynamoe bench: {server.url} answered 400: ")
    assert err.count("\n") == 1


def test_no_server_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert main(["bench", f"bench.url=http://127.0.0.1:{unused.getsockname()[1]}"]) == 2
    assert "no server answers" in capfd.readouterr().err
