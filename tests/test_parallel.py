"""One model over several processes: real ones, started by the launcher, compared with one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import pytest
from dynamoe.dynamic.checkpoint.weights import Checkpoint, read_json
from dynamoe.dynamic.contract.model_check import CHECKED
from dynamoe.dynamic.parallel.config import ParallelConfig
from dynamoe.moe.placement import spread
from parallel_jobs import PATIENCE, compare, run_job


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_tokens_are_those_of_one_process(make_checkpoint: Callable[..., Path], tmp_path: Path, family: str) -> None:
    path = make_checkpoint(family)
    found = compare(tmp_path, str(path), {"tensor": 2})
    assert found["sums"] % (3 * 2 + 1) == 0  # two sums per layer, and one of the embeddings
    config = read_json(path / "config.json")
    hidden, rows = 4 * config["hidden_size"], found["rows"][0]
    logits = 4 * -(-config["vocab_size"] // 2) * sum(map(len, found["tokens"]))
    assert found["received"] == {"sums": 2 * 3 * hidden * rows, "embedding": hidden * rows, "logits": logits}


@pytest.mark.parametrize(
    ("sizes", "model"),
    [
        ({"tensor": 2}, "granitemoe"),
        pytest.param({"tensor": 2}, "qwen2_moe", marks=pytest.mark.slow),  # shared experts: operation by operation
        pytest.param({"tensor": 2, "expert": 2}, "mixtral", marks=pytest.mark.slow),
        pytest.param({"expert": 2}, "qwen2_moe", marks=pytest.mark.slow),
        pytest.param({"data": 2}, "mixtral", marks=pytest.mark.slow),
        pytest.param({"tensor": 2, "pipeline": 2}, "mixtral", marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_memory_and_messages_give_the_same_bits(
    make_exits: Callable[..., Path], tmp_path: Path, sizes: dict[str, int], model: str, dtype: str
) -> None:
    path = make_exits(model, {1: 0.3, 2: 0.3})

    def run(shared_memory: bool) -> dict[str, Any]:
        parallel = {**sizes, "shared_memory": shared_memory, "timeout": PATIENCE}
        job = {"thresholds": {"1": 0.5, "2": 0.5}, "budget": {"experts_per_token": 1}}
        arguments = {"parallel": parallel, "dtype": dtype}
        return run_job(tmp_path / str(shared_memory), prod(sizes.values()), model=str(path), arguments=arguments, **job)

    with ThreadPoolExecutor(2) as pool:
        memory, messages = pool.map(run, (True, False))
    assert (memory.pop("shared"), messages.pop("shared")) == (True, False)
    assert memory == messages  # tokens, logprobs, and what was counted


def test_what_the_experts_exchange(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Padded, split and mixed: the same bits, and the bytes that theory says."""
    path = make_checkpoint("qwen2_moe")

    def run(padded_rows: int) -> dict[str, Any]:
        arguments = {"parallel": {"expert": 2, "padded_rows": padded_rows}}
        return run_job(tmp_path / f"padded{padded_rows}", 2, model=str(path), arguments=arguments, watched=True)

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(run_job, tmp_path / "one", 1, model=str(path), arguments={})
        runs = {padded_rows: pool.submit(run, padded_rows) for padded_rows in (1000, 0, 16)}
        alone, found = one.result(), {padded_rows: done.result() for padded_rows, done in runs.items()}
    for several in found.values():
        assert several["tokens"] == alone["tokens"]
        assert several["logprobs"] == found[1000]["logprobs"]
        assert several["rows"] == alone["rows"]
        assert several["sums"] == 0
    records = [json.loads((tmp_path / "padded0" / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    config = read_json(path / "config.json")
    layers, hidden = config["num_hidden_layers"], 4 * config["hidden_size"]
    record = hidden + 2 * 8  # two slots: number and weight
    steps = records[0]["rows"]
    assert records[1]["rows"] == steps
    own, other = (sum(step[kv_shard] for step in steps) for kv_shard in (0, 1))
    assert own + other == alone["rows"][0]
    assert min(own, other) > 0
    apart = sum(step[1] > 0 for step in steps)  # steps in which the other KV shard has rows
    # All rows, and how many slots of them each rank ran.
    rows = other * hidden + apart * 2 * 4
    assert found[1000]["received"] == {
        "dispatch": layers * other * record,
        "combine": layers * own * hidden,
        "rows": rows,
    }
    (_, going), (coming, _) = (record["pairs"] for record in records)
    assert 0 < coming < layers * other
    assert found[0]["received"] == {
        "dispatch": coming * record,
        "combine": going * hidden,
        "rows": rows,
        "sizes": layers * apart * 8,
    }
    assert sum(found[0]["expert_rows"]) == layers * 2 * alone["rows"][0]
    assert found[16]["received"]["sizes"] == layers * 8 * sum(step[1] > 0 and sum(step) > 16 for step in steps)


PROMPTS = [[7] * 40 + [n, 9] for n in range(3)] + [[5] * 33, [9, 8, 7] * 12]
HOMES = [
    ("granitemoe", {"expert": 2}),
    ("qwen3_moe", {"expert": 4}),
    ("mixtral", {"data": 2}),
    ("qwen2_moe", {"tensor": 2, "expert": 2}),
    ("mixtral", {"data": 2, "expert": 2}),
    ("qwen3_moe", {"data": 2, "tensor": 2}),
    ("qwen2_moe", {"expert": 2, "pipeline": 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "sizes"), HOMES)
def test_tokens_of_kv_shards_with_shared_pages_and_preemption(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, sizes: dict[str, int]
) -> None:
    path = make_checkpoint(family)
    config = read_json(path / "config.json")
    channels = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    page = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * 16 * channels
    kv_shards = sizes.get("expert", 1) * sizes.get("data", 1)
    extra = {"kv_memory": 7 * kv_shards * page, "max_num_seqs": 6}
    job = {"prompts": PROMPTS * kv_shards, "max_tokens": 30}
    found = compare(tmp_path, str(path), sizes, extra, **job)
    assert found["cached_tokens"] > 0
    assert found["preemptions"] > 0


NORMS_OF_ALL_HEADS = [
    pytest.param(2, 1, {}, id="heads"),
    pytest.param(4, 1, {}, id="keys-on-two-ranks-each", marks=pytest.mark.slow),
    pytest.param(2, 2, {"1": 0.5, "2": 0.5}, id="exits-and-stages", marks=pytest.mark.slow),
    pytest.param(2, 1, {"1": 0.5, "2": 0.5}, id="exits", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("tensor", "pipeline", "thresholds"), NORMS_OF_ALL_HEADS)
def test_norms_that_go_over_the_heads_of_all_ranks(
    make_exits: Callable[..., Path], tmp_path: Path, tensor: int, pipeline: int, thresholds: dict[str, float]
) -> None:
    model = make_exits("olmoe", {1: 0.4, 2: 0.4}, clip_qkv=1.5)
    found = compare(tmp_path, str(model), {"tensor": tensor, "pipeline": pipeline}, thresholds=thresholds)
    if thresholds:
        assert found["rows"][0] > found["rows"][-1]
    else:  # a number for queries and one for keys, of each row and layer, from each of the others
        assert found["received"]["norms"] == (tensor - 1) * 3 * 2 * 4 * found["rows"][0]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "pipeline", "data"), [("granitemoe", 1, 1), ("mixtral", 2, 1), ("mixtral", 1, 2)])
def test_experts_are_placed_by_the_load_of_an_earlier_run(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, pipeline: int, data: int
) -> None:
    path, load = make_checkpoint(family), tmp_path / "load.json"
    sizes, processes = {"expert": 2, "pipeline": pipeline, "data": data}, 2 * pipeline * data
    recorded = sizes | {"record_load": str(load)}
    first = run_job(tmp_path / "first", processes, model=str(path), arguments={"parallel": recorded})
    counts = json.loads(load.read_text())["rows_by_expert"]
    config = read_json(path / "config.json")
    rows = first["rows"][0] + CHECKED  # naming the deployment checks the model
    assert {sum(layer) for layer in counts} == {rows * config["num_experts_per_tok"]}
    placed = sizes | {"placement": str(load)}
    second = run_job(tmp_path / "second", processes, model=str(path), arguments={"parallel": placed})
    assert second["tokens"] == first["tokens"]
    assert sum(second["expert_rows"]) == sum(first["expert_rows"])
    first_stage = 1 if pipeline == 2 else len(counts)
    ideal = [max(sum(layer[e] for e in part) for part in spread(layer, 2)) for layer in counts[:first_stage]]
    assert max(second["expert_rows"]) <= sum(ideal)
    assert second["deployment"]["processes"].startswith(first["deployment"]["processes"] + ", experts placed as ")


LAYOUTS = [
    {"tensor": 2},
    {"expert": 2},
    {"expert": 4},
    {"data": 2},
    {"pipeline": 2},
    {"tensor": 2, "expert": 2},
    {"tensor": 2, "pipeline": 2},
]


def named(sizes: dict[str, int]) -> str:
    return "-".join(f"{axis}{size}" for axis, size in sizes.items())


@pytest.mark.slow
@pytest.mark.parametrize("sizes", LAYOUTS, ids=named)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe"])
@pytest.mark.parametrize("method", ["none", "int8"])
def test_tokens_with_exits_in_every_layout(
    make_exits: Callable[..., Path], tmp_path: Path, sizes: dict[str, int], family: str, method: str
) -> None:
    model = make_exits(family, {1: 0.3, 2: 0.3})
    compare(tmp_path, str(model), sizes, {"quantization": method}, thresholds={"1": 0.5, "2": 0.5})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method", "sizes"),
    [
        ("qwen2_moe", "int8", {"expert": 2}),
        ("qwen2_moe", "int8", {"tensor": 2, "expert": 2}),
        ("mixtral", "fp8", {"tensor": 2}),
        ("mixtral", "w8a8", {"data": 2}),
    ],
)
def test_tokens_with_quantised_weights(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, method: str, sizes: dict[str, int]
) -> None:
    compare(tmp_path, str(make_checkpoint(family)), sizes, {"quantization": method})


@pytest.mark.slow
@pytest.mark.parametrize("family", ["granitemoe", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_tokens_of_stages(make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, tensor: int) -> None:
    path = make_checkpoint(family)
    found = compare(tmp_path, str(path), {"tensor": tensor, "pipeline": 2})
    assert found["stages"] == [[0, 1], [1, 3]]
    assert found["cached_layers"] == [0]
    # Every row crosses once, and comes back once: one vector of float32 each.
    assert found["ahead"] == found["back"] == found["rows"][0] * found["row"]
    assert found["owed"] == found["decisions"] == 0
    whole = Checkpoint(path)
    total = sum(whole.view(name).nbytes for name in whole)
    ends = sum(whole.view(name).nbytes for name in whole if ".layers." not in name)
    if tensor == 1:  # nothing is read twice, and layers are read where they run
        assert sum(found["read"]) == total
        assert found["read"][0] == ends + sum(whole.view(n).nbytes for n in whole if ".layers.0." in n)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 2), pytest.param(2, 2, marks=pytest.mark.slow), (1, 3)])
def test_rows_that_leave_never_run_on_the_next_stage(
    make_exits: Callable[..., Path], tmp_path: Path, tensor: int, pipeline: int
) -> None:
    probe = {"previous": True, "router_entropy": True}
    model = make_exits("mixtral", {1: 0.3, 2: 0.3, 4: 0.3}, probe, num_hidden_layers=6)
    thresholds = {"1": 0.5, "2": 0.5, "4": 0.5}
    found = compare(tmp_path, str(model), {"tensor": tensor, "pipeline": pipeline}, thresholds=thresholds)
    rows, row = found["rows"], found["row"]
    assert rows[0] > rows[1] > rows[2] > rows[3]
    assert found["stages"] == {2: [[0, 2], [2, 6]], 3: [[0, 2], [2, 4], [4, 6]]}[pipeline]
    # Between ranks 0 and 1: rows that go on run there, the others' vectors follow if a row reads their keys and values.
    assert found["ahead"] == rows[2] * row
    assert found["owed"] + found["unsent"][0] == (rows[0] - rows[2]) * row
    assert found["owed"] > 0
    assert found["unsent"][0] > 0
    # One vector comes back for every row that ends behind stage 0, wherever it does.
    assert found["back"] == rows[2] * row
    assert found["decisions"] > 0


def test_nothing_crosses_for_requests_that_always_leave(make_exits: Callable[..., Path], tmp_path: Path) -> None:
    """Behind their prompts the first request and both choices of the third leave on stage 0; the second never does."""
    model = make_exits("mixtral", {1: 0.3, 2: 0.3})
    prompts = [[5, 9, 200, 31], [7] * 40, [11, 12]]
    found = compare(tmp_path, str(model), {"pipeline": 2}, thresholds={"1": 0.0}, prompts=prompts, max_tokens=40)
    leaving, staying = 3 * 39, 4 + 40 + 2 * 2 + 39  # too short a prompt to share a page
    assert [found["rows"][0], found["rows"][-1]] == [leaving + staying, staying]
    assert found["ahead"] == found["back"] == staying * found["row"]
    assert found["owed"] == 0
    assert found["unsent"] == [leaving * found["row"]]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [*LAYOUTS, {"expert": 2, "pipeline": 2}], ids=named)
@pytest.mark.parametrize("budget", [{}, {"experts_per_token": 1}], ids=["", "budget"])
def test_tiny_with_exits(tmp_path: Path, sizes: dict[str, int], budget: dict[str, int]) -> None:
    thresholds = {"4": 0.4, "8": 0.6, "12": 0.6}
    found = compare(tmp_path, "tiny", sizes, thresholds=thresholds, budget=budget)
    assert found["rows"][0] > found["rows"][-1]


@pytest.mark.slow
def test_sizes_of_axes_are_arguments_of_their_own(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"tensor_parallel_size": 2, "expert_parallel_size": 1, "pipeline_parallel_size": 2}
    found = run_job(tmp_path / "job", 4, model=str(make_checkpoint("mixtral")), arguments=sizes)
    assert found["deployment"]["processes"] == str(ParallelConfig(tensor=2, pipeline=2))


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor": 2},
        {"expert": 2},
        pytest.param({"data": 2}, marks=pytest.mark.slow),
        pytest.param({"expert": 2, "pipeline": 2}, marks=pytest.mark.slow),
    ],
)
def test_exits_and_budgets_are_decided_by_rank_0_alone(
    make_exits: Callable[..., Path], tmp_path: Path, sizes: dict[str, int]
) -> None:
    probe = {"previous": True, "router_entropy": True}
    model = make_exits("mixtral", {1: 0.3, 2: 0.3}, probe)
    job = {"thresholds": {"1": 0.5, "2": 0.5}, "budget": {"experts_per_token": 1}}
    found = compare(tmp_path, str(model), sizes, **job)
    assert found["rows"][0] > found["rows"][-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "extra"),
    [
        ({"tensor": 2}, {}),  # an uneven split of heads
        ({"expert": 2}, {}),  # routers that decide nothing: each KV shard has all experts
        ({"expert": 2}, {"experts_per_token": 9}),  # and experts that are always on
    ],
)
def test_default_model(default_model: Path, tmp_path: Path, sizes: dict[str, int], extra: dict[str, int]) -> None:
    found = compare(tmp_path, str(default_model), sizes, extra)
    assert ("dispatch" in found["received"]) == ("experts_per_token" in extra)
