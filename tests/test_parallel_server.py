"""A server whose model is spread over processes, in every layout: it answers as a server of one process does."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from parallel_fleet import Fleet, run, settings_of

LAYOUTS: dict[str, dict[str, int]] = {
    "tensor": {"tensor": 2},
    "expert": {"expert": 2},
    "data": {"data": 2},
    "pipeline": {"pipeline": 2},
    "tensor-expert": {"tensor": 2, "expert": 2},
    "tensor-pipeline": {"tensor": 2, "pipeline": 2},
}
PROMPTS = [
    "The quick brown",
    "A list is",
    "In the beginning of the file there are some lines that say",
    "def",
    "When a function returns, its variables",
    "The",
    "Numbers, strings and lists are",
]
FEW_ROWS = ["engine.max_num_seqs=3", "engine.max_num_batched_tokens=24"]  # requests wait, join and leave


def certify(folder: Path, sizes: dict[str, int]) -> Path:
    """A directory with one certificate for ``tiny`` in a layout."""
    settings = ["dtype=float32", "requests=40", "test_requests=10", "max_tokens=12", "probabilities=[0.95,0.6]"]
    output = folder / "calibration"
    settings += [*settings_of(sizes), "alphas=[0.3]", f"output={output}"]
    run(math.prod(sizes.values()), "calibrate", "model=tiny", *settings)
    return output / "certificates"


@pytest.fixture(scope="module")
def made_by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates that a single process made."""
    return certify(tmp_path_factory.mktemp("one"), {})


def streams(fleet: Fleet) -> list[str]:
    """Text and end of streams of several lengths that were asked for at once."""

    def ask(number: int) -> str:
        lines = fleet.ask(10 + 4 * number, prompt=PROMPTS[number]).split("\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        choices = [choice for event in events for choice in event["choices"]]
        return "".join(choice["text"] for choice in choices) + f" ({choices[-1]['finish_reason']})"

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(ask, range(len(PROMPTS))))


@pytest.fixture(scope="module")
def answers_of_one(tmp_path_factory: pytest.TempPathFactory, made_by_one: Path) -> Callable[[str], list[str]]:
    """What a server of one process streams, by method of quantisation; there the certificate holds."""
    known: dict[str, list[str]] = {}

    def answers(method: str) -> list[str]:
        if method not in known:
            quality = f"quality.certificates={made_by_one}"
            folder = tmp_path_factory.mktemp("server")
            fleet = Fleet("tiny", folder, {}, f"quantization={method}", quality, *FEW_ROWS)
            try:
                known[method] = streams(fleet)
                asked = json.loads(fleet.ask(8, stream=False, ignore_eos=False, quality={"alpha": 0.3}))
                assert asked["usage"]["compute"]["quality"] == ("bounded" if method == "none" else "exact")
            finally:
                fleet.end()
        return known[method]

    return answers


CELLS = [
    pytest.param(layout, method, marks=() if (layout, method) == ("pipeline", "int8") else pytest.mark.slow)
    for layout in LAYOUTS
    for method in ("none", "int8")
]


@pytest.mark.parametrize(("layout", "method"), CELLS)
def test_streams_are_those_of_one_process(
    tmp_path: Path, made_by_one: Path, answers_of_one: Callable[[str], list[str]], layout: str, method: str
) -> None:
    quality = f"quality.certificates={made_by_one}"
    fleet = Fleet("tiny", tmp_path, LAYOUTS[layout], f"quantization={method}", quality, *FEW_ROWS)
    try:
        assert streams(fleet) == answers_of_one(method)
        plain = json.loads(fleet.ask(8, stream=False, ignore_eos=False))
        asked = json.loads(fleet.ask(8, stream=False, ignore_eos=False, quality={"alpha": 0.3}))
        compute = asked["usage"]["compute"]  # the certificate is not for this layout
        assert (compute["quality"], compute["certificates"]) == ("exact", [])
        assert "no certificate" in compute["reason"]
        assert asked["choices"] == plain["choices"]
        assert "processes" in fleet.log.read_text()
    finally:
        fleet.end()


@pytest.mark.slow
def test_a_server_counts_the_experts_that_move(tmp_path: Path, answers_of_one: Callable[[str], list[str]]) -> None:
    moving = ["parallel.rebalance_steps=30", "parallel.copies_memory=8MiB", "engine.enable_prefix_caching=false"]
    fleet = Fleet("tiny", tmp_path, {"expert": 2}, *moving, *FEW_ROWS)
    try:
        for _ in range(3):
            assert streams(fleet) == answers_of_one("none")
        metrics = fleet.metrics()
    finally:
        fleet.end()
    assert metrics["dynamoe:parallel_expert_moves_total"] > 0
    assert 1 <= metrics["dynamoe:parallel_expert_imbalance"] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_contract_holds_in_the_layout_that_it_was_made_in(tmp_path: Path, layout: str) -> None:
    sizes = LAYOUTS[layout]
    certificates = certify(tmp_path, sizes)
    (certificate,) = (json.loads(file.read_text()) for file in certificates.glob("*.json"))
    quality = [f"quality.certificates={certificates}", "quality.monitor.share=1"]
    quality.append(f"quality.monitor.file={tmp_path / 'monitor.sqlite'}")
    fleet = Fleet("tiny", tmp_path, sizes, *quality)
    try:
        plain: dict[str, Any] = {"stream": False, "ignore_eos": False}
        exact = json.loads(fleet.ask(12, **plain))
        with ThreadPoolExecutor(16) as pool:
            contract = plain | {"quality": {"alpha": 0.3}}
            asked = [pool.submit(fleet.ask, 12, **(contract if n % 2 else plain)) for n in range(16)]
            answers = [json.loads(one.result()) for one in asked]
        for answer in answers[::2]:
            assert answer["choices"][0]["text"] == exact["choices"][0]["text"]
        for answer in answers[1::2]:
            compute = answer["usage"]["compute"]
            assert compute["certificates"] == [certificate["id"]], compute
            assert compute["layer_rows"] < exact["usage"]["compute"]["layer_rows"]
        deadline = time.monotonic() + 60
        while (monitor := fleet.contracts()["data"][0]["monitor"])["pending"] + monitor["running"]:
            assert time.monotonic() < deadline, monitor
            time.sleep(0.1)
        assert monitor["losses"] == 8  # each was run again in full, by all processes
    finally:
        fleet.end()
