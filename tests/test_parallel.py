"""One model over several processes: real ones, started by the launcher, compared with one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.families import family_of, model_spec
from dynamoe.dynamic.layout import plan_layout
from dynamoe.dynamic.parallel.config import ParallelConfig
from dynamoe.dynamic.parallel.decoder import held_here, local_numbers, rows_at
from dynamoe.dynamic.parallel.load import read_placement, spread
from dynamoe.dynamic.parallel.plan import FIRST, Message, Operation, decode, length
from dynamoe.dynamic.parallel.shards import part_of, split_heads
from dynamoe.dynamic.parallel.stages import micro_batches, split_into_stages
from dynamoe.dynamic.quantization import methods
from dynamoe.dynamic.weights import Checkpoint, read_json
from dynamoe.kernels.types import AttentionBatch, Routing
from parallel_jobs import compare, run_job, shard_of

CELLS = [("granitemoe", 1, 2), ("mixtral", 2, 1), ("qwen3_moe", 2, 1), ("mixtral", 2, 2), ("qwen3_moe", 1, 4)]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "tensor", "expert"), CELLS)
def test_tokens_are_those_of_one_process(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, tensor: int, expert: int
) -> None:
    path = make_checkpoint(family)
    found = compare(tmp_path, str(path), tensor, expert)
    # Two sums per layer with a tensor axis, and one of the embeddings; one sum per layer without.
    assert found["sums"] % (3 * 2 + 1 if tensor > 1 else 3) == 0
    config = read_json(path / "config.json")
    hidden, others = 4 * config["hidden_size"], tensor - 1
    per_row = 3 * hidden * ((others if tensor > 1 else 0) + tensor * expert - 1)
    wanted = {"sums": per_row * found["rows"][0], "embedding": others * hidden * found["rows"][0]}
    wanted["logits"] = others * 4 * -(-config["vocab_size"] // tensor) * sum(map(len, found["tokens"]))
    assert found["received"] == {purpose: count for purpose, count in wanted.items() if count}


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
    found = compare(tmp_path, str(model), tensor, 1, pipeline, thresholds=thresholds)
    if thresholds:
        assert found["rows"][0] > found["rows"][-1]
    else:  # a number for queries and one for keys, of each row and layer, from each of the others
        assert found["received"]["norms"] == (tensor - 1) * 3 * 2 * 4 * found["rows"][0]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "pipeline"), [("granitemoe", 1), ("mixtral", 2)])
def test_experts_are_placed_by_the_load_of_an_earlier_run(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, pipeline: int
) -> None:
    path, load = make_checkpoint(family), tmp_path / "load.json"
    recorded = {"expert": 2, "pipeline": pipeline, "record_load": str(load)}
    first = run_job(tmp_path / "first", 2 * pipeline, model=str(path), arguments={"parallel": recorded})
    counts = json.loads(load.read_text())["rows_by_expert"]
    config = read_json(path / "config.json")
    assert {sum(layer) for layer in counts} == {first["rows"][0] * config["num_experts_per_tok"]}
    placed = {"expert": 2, "pipeline": pipeline, "placement": str(load)}
    second = run_job(tmp_path / "second", 2 * pipeline, model=str(path), arguments={"parallel": placed})
    assert second["tokens"] == first["tokens"]
    assert sum(second["expert_rows"]) == sum(first["expert_rows"])
    first_stage = 1 if pipeline == 2 else len(counts)
    ideal = [max(sum(layer[e] for e in part) for part in spread(layer, 2)) for layer in counts[:first_stage]]
    assert max(second["expert_rows"]) <= sum(ideal)
    assert second["deployment"]["processes"].startswith(first["deployment"]["processes"] + ", experts placed as ")


def test_experts_are_spread_evenly_in_number_and_in_load() -> None:
    assert spread([10, 1, 1, 8, 1, 1], 2) == [[0, 4, 5], [1, 2, 3]]
    assert spread([0, 0, 0, 0, 0], 2) == [[0, 1, 2], [3, 4]]
    rows = [100, 90, 10, 5, 5, 4, 3, 2]
    parts = spread(rows, 4)
    assert sorted(e for part in parts for e in part) == list(range(8))
    assert [len(part) for part in parts] == [2] * 4


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ('{"format": 1, "rows_by_expert": [[1, 2]]}', "was not made by this model"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, content: str | None, fault: str
) -> None:
    file = tmp_path / "load.json"
    if content is not None:
        file.write_text(content)
    spec = model_spec(read_json(make_checkpoint("mixtral") / "config.json"))
    with pytest.raises(ValueError, match=rf"parallel\.placement=.*load\.json {fault}"):
        read_placement(file, spec, 2)


QUANTISED = [
    ("granitemoe", "int8", 2, 1),
    ("qwen2_moe", "int8", 1, 2),
    ("mixtral", "int8", 2, 2),
    ("mixtral", "fp8", 2, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "method", "tensor", "expert"), QUANTISED)
def test_tokens_with_quantised_weights(
    make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, method: str, tensor: int, expert: int
) -> None:
    compare(tmp_path, str(make_checkpoint(family)), tensor, expert, extra={"quantization": method})


@pytest.mark.slow
@pytest.mark.parametrize("family", ["granitemoe", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("tensor", [1, 2])
def test_tokens_of_stages(make_checkpoint: Callable[..., Path], tmp_path: Path, family: str, tensor: int) -> None:
    path = make_checkpoint(family)
    found = compare(tmp_path, str(path), tensor, 1, 2)
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
    found = compare(tmp_path, str(model), tensor, 1, pipeline, thresholds=thresholds)
    rows, row = found["rows"], found["row"]
    assert rows[0] > rows[1] > rows[2] > rows[3]
    assert found["stages"] == {2: [[0, 2], [2, 6]], 3: [[0, 2], [2, 4], [4, 6]]}[pipeline]
    # Between ranks 0 and 1: rows that go on run there, the others' vectors follow for their keys and values.
    assert found["ahead"] == rows[2] * row
    assert found["owed"] + found["still_owed"] == (rows[0] - rows[2]) * row
    # One vector comes back for every row that ends behind stage 0, wherever it does.
    assert found["back"] == rows[2] * row
    assert found["decisions"] > 0


STAGES_OF_TINY = [(1, 1, {}), (2, 1, {"experts_per_token": 1}), (1, 2, {}), (1, 2, {"experts_per_token": 1})]


@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "expert", "budget"), STAGES_OF_TINY)
def test_tiny_with_exits_in_stages(tmp_path: Path, tensor: int, expert: int, budget: dict[str, int]) -> None:
    thresholds = {"4": 0.4, "8": 0.6, "12": 0.6}
    found = compare(tmp_path, "tiny", tensor, expert, 2, thresholds=thresholds, budget=budget)
    assert found["rows"][0] > found["rows"][-1]


@pytest.mark.slow
def test_sizes_of_axes_are_arguments_of_their_own(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"tensor_parallel_size": 2, "expert_parallel_size": 1, "pipeline_parallel_size": 2}
    found = run_job(tmp_path / "job", 4, model=str(make_checkpoint("mixtral")), arguments=sizes)
    assert found["deployment"]["processes"] == "tensor 2, expert 1, pipeline 2"


def test_exits_and_budgets_are_decided_by_rank_0_alone(make_exits: Callable[..., Path], tmp_path: Path) -> None:
    model = make_exits("mixtral", {1: 0.5, 2: 0.5})
    job = {"thresholds": {"1": 0.5, "2": 0.5}, "budget": {"experts_per_token": 1}}
    found = compare(tmp_path, str(model), 2, 1, **job)
    assert found["rows"][0] > found["rows"][-1]


@pytest.mark.slow
def test_default_model_with_an_uneven_split(default_model: Path, tmp_path: Path) -> None:
    compare(tmp_path, str(default_model), 2, 1)


@pytest.mark.parametrize(
    ("method", "tensor", "expert", "fault"),
    [
        ("int8", 2, 1, None),
        ("int4", 1, 2, None),
        ("int4-g32", 2, 1, "'model.layers.0.block_sparse_moe.experts.0.w2.weight' at input 24"),
        ("w8a8", 2, 1, "has scales for 128 inputs each; tensor 2, expert 1 splits .* at input 32"),
        ("fp8-block", 2, 1, "blocks of outputs, which tensor 2, expert 1 splits"),
    ],
)
def test_scales_that_belong_to_several_ranks_are_refused(
    make_checkpoint: Callable[..., Path], method: str, tensor: int, expert: int, fault: str | None
) -> None:
    path = make_checkpoint("mixtral")
    config = read_json(path / "config.json")
    spec = model_spec(config)
    shards = [shard_of(spec, tensor, expert, rank) for rank in range(2)]
    for shard in shards:  # all ranks see it, and end
        shard.layout(plan_layout(spec, family_of(config), Checkpoint(path)))
        with pytest.raises(ValueError, match=fault) if fault else nullcontext():
            shard.check_quantization(method, methods()[method])


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe", "qwen2_moe"])
@pytest.mark.parametrize(("tensor", "expert"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_ranks_together_hold_every_split_weight_once(
    make_checkpoint: Callable[..., Path], family: str, tensor: int, expert: int
) -> None:
    path = make_checkpoint(family)
    config = read_json(path / "config.json")
    spec, whole = model_spec(config), Checkpoint(path)
    layout = plan_layout(spec, family_of(config), whole)
    parts: dict[str, list[torch.Tensor]] = {}
    read = []
    for rank in range(tensor * expert):
        shard = shard_of(spec, tensor, expert, rank)
        shard.layout(layout)
        checkpoint = shard.checkpoint(whole)
        for name in whole:
            expert_weight = any(part in name for part in (".experts.", "moe.input_linear", "moe.output_linear"))
            if expert_weight and name in shard.cuts:
                parts.setdefault(name, []).append(checkpoint.view(name))
        read.append(checkpoint.split_bytes)
    assert parts
    for name, found in parts.items():
        assert sum(part.numel() for part in found) == whole.view(name).numel()
        held, wanted = torch.cat([part.flatten() for part in found]), whole.view(name).flatten()
        assert torch.equal(held.sort().values, wanted.sort().values), name
    total = sum(whole.view(name).nbytes for name in parts)
    assert max(read) <= 1.1 * total / (tensor * expert)


@pytest.mark.parametrize(
    ("layers", "stages", "exits", "wanted"),
    [
        (3, 3, (), [1, 2, 3]),
        (7, 3, (), [2, 4, 7]),
        (16, 2, (4, 8, 12), [8, 16]),
        (16, 3, (4, 8, 12), [4, 8, 16]),
        (30, 2, (20, 24, 28), [20, 30]),
    ],
)
def test_stages_are_balanced_and_end_at_exits(
    make_checkpoint: Callable[..., Path], layers: int, stages: int, exits: tuple[int, ...], wanted: list[int]
) -> None:
    base = model_spec(read_json(make_checkpoint("mixtral") / "config.json"))
    spec = replace(base, layers=base.layers[:1] * layers)
    found = split_into_stages(spec, stages, exits)
    assert [part.stop for part in found.layers] == wanted
    assert [found.owner(part.start) for part in found.layers] == list(range(stages))
    with pytest.raises(ValueError, match=r"parallel\.pipeline=31.*" + ("segments" if exits else "layers")):
        split_into_stages(spec, 31, exits)


def test_a_first_layer_that_works_more_makes_a_short_stage(make_checkpoint: Callable[..., Path]) -> None:
    base = model_spec(read_json(make_checkpoint("mixtral") / "config.json"))
    light = base.layers[0]
    heavy = replace(light, moe=None, ffn_size=1000)
    spec = replace(base, layers=(heavy, light, light, light))
    assert split_into_stages(spec, 2).layers == (range(1), range(1, 4))


def test_micro_batches_do_not_tear_sequences_apart() -> None:
    counts = torch.tensor([1, 6, 1, 1, 3])
    starts = torch.cat((torch.zeros(1, dtype=torch.int32), counts.cumsum(0).int()))
    batch = AttentionBatch(
        positions_T=torch.arange(12),
        slots_T=torch.arange(100, 112),
        query_start_S1=starts,
        context_len_S=torch.tensor([9, 6, 4, 8, 3], dtype=torch.int32),
        block_table_SM=torch.arange(10, dtype=torch.int32).view(5, 2),
        max_query_len=6,
        max_context_len=9,
    )
    parts = micro_batches(batch, 2)
    assert [(rows.start, rows.stop) for rows, _ in parts] == [(0, 7), (7, 12)]
    assert torch.cat([part.slots_T for _, part in parts]).equal(batch.slots_T)
    assert parts[1][1].query_start_S1.tolist() == [0, 1, 2, 5]
    assert parts[1][1].block_table_SM.tolist() == [[4, 5], [6, 7], [8, 9]]
    assert [(part.max_query_len, part.max_context_len) for _, part in parts] == [(6, 9), (3, 8)]
    assert sum(len(part.slots_T) for _, part in micro_batches(batch, 9)) == 12
    assert len(micro_batches(batch, 1)) == 1


@pytest.mark.parametrize(
    ("heads", "groups", "ranks", "wanted"),
    [
        (9, 3, 2, [(6, 2), (3, 1)]),  # the default model: groups that do not divide evenly
        (8, 2, 4, [(2, 1)] * 4),  # more ranks than groups: keys are kept twice
        (6, 2, 4, [(2, 1), (1, 1)] * 2),  # and the queries of a group do not divide evenly
    ],
)
def test_heads_are_shared_by_group(
    make_checkpoint: Callable[..., Path], heads: int, groups: int, ranks: int, wanted: list[tuple[int, int]]
) -> None:
    base = model_spec(read_json(make_checkpoint("mixtral") / "config.json"))
    spec = replace(base, num_heads=heads, num_kv_heads=groups)
    found = [split_heads(spec, ranks, rank) for rank in range(ranks)]
    assert [(q.stop - q.start, k.stop - k.start) for q, k in found] == wanted
    assert [q.start for q, _ in found[1:]] == [q.stop for q, _ in found[:-1]]
    with pytest.raises(ValueError, match=r"parallel\.tensor=5"):
        split_heads(spec, 5, 0)


def test_a_message_survives_its_way() -> None:
    blocks = (torch.arange(FIRST), torch.tensor([-5, 7]))  # longer than the first broadcast
    sent = Message(operation=Operation.RUN, arguments=(1, 2, 3), blocks=blocks).encode()
    found = decode(sent)
    assert length(sent[:FIRST]) == len(sent) > FIRST
    assert found.arguments == (1, 2, 3, 0, 0, 0)
    assert [block.tolist() for block in found.blocks[:3]] == [blocks[0].tolist(), [-5, 7], []]


def test_routing_is_cut_to_the_experts_of_a_rank() -> None:
    ids = torch.tensor([[5, 0, 3], [2, 1, 0]], dtype=torch.int32)
    weights = torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]])
    counts = torch.tensor([3, 2], dtype=torch.int32)  # the second row's last slot is unused
    found = held_here(
        Routing(expert_ids_TK=ids, weights_TK=weights, counts_T=counts), local_numbers([0, 1, 2], 6, "cpu")
    )
    assert found.counts_T is not None
    assert found.counts_T.tolist() == [1, 2]
    assert found.expert_ids_TK[0, 0] == 0
    assert found.expert_ids_TK[1, :2].tolist() == [2, 1]
    assert torch.equal(found.weights_TK, torch.tensor([[0.3, 0, 0], [0.6, 0.3, 0]]))
    assert [part_of(6, 4, n).stop for n in range(4)] == [2, 4, 5, 6]
    assert rows_at(torch.tensor([40, 3, 17]), torch.tensor([17, 40])).tolist() == [2, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor": 0}, "tensor must be at least 1"),
        ({"data": 2}, "data=2"),
        ({"timeout": 0}, "timeout must"),
        ({"placement": "x"}, "needs parallel.expert"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings)
