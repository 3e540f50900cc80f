"""The parts that processes keep of a model, the rows that stages and KV shards run, and the messages between them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.checkpoint.weights import Checkpoint, read_json
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.attention.gqa import split_heads
from dynamoe.dynamic.model.families import family_of, model_spec
from dynamoe.dynamic.model.kv_cache import bytes_per_page
from dynamoe.dynamic.model.layout import plan_layout
from dynamoe.dynamic.model.parts import part_of
from dynamoe.dynamic.model.quantization import methods
from dynamoe.dynamic.parallel.config import ParallelConfig
from dynamoe.dynamic.parallel.data_ranks import SharedCache, rows_at, spread
from dynamoe.dynamic.parallel.plan import (
    FIRST,
    Message,
    Operation,
    copy_message,
    decode,
    exit_message,
    length,
    read_copies,
    read_exited,
    rows_to_write,
)
from dynamoe.dynamic.parallel.stages import micro_batches, split_into_stages
from dynamoe.kernels.api.types import AttentionBatch, KVLayer
from dynamoe.moe.placement import read_placement
from dynamoe.moe.placement import spread as spread_experts
from parallel_jobs import shard_of


def test_experts_are_spread_evenly_in_number_and_in_load() -> None:
    assert spread_experts([10, 1, 1, 8, 1, 1], 2) == [[0, 4, 5], [1, 2, 3]]
    assert spread_experts([0, 0, 0, 0, 0], 2) == [[0, 1, 2], [3, 4]]
    rows = [100, 90, 10, 5, 5, 4, 3, 2]
    parts = spread_experts(rows, 4)
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
        read_placement(file, spec.experts_by_layer, 2)


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
    spec = replace(base.layers[0].attention, num_heads=heads, num_kv_heads=groups)
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


def test_copies_and_rows_that_exit_survive_their_way() -> None:
    for copies in ([[], [(3, 4), (9, 2)]], [[(1, 0)], []], [[], [(5, 6)], [(0, 1)], [(2, 0), (7, 7)]]):
        assert read_copies(decode(copy_message(1, *copies).encode())) == copies
    # Two rows of one sequence, and one of another.
    batch = rows_to_write(torch.tensor([5, 6, 2]), torch.tensor([21, 22, 9]), 6, torch.tensor([3, 3, 0]))
    found = read_exited(decode(exit_message(1, 2, batch).encode()))
    assert found.state_runs == batch.state_runs == [(3, 0, 2, False, -1), (0, 2, 3, False, -1)]
    assert found.max_query_len == batch.max_query_len == 2  # by which kernels of GPUs size their grids
    assert (found.positions_T.tolist(), found.slots_T.tolist()) == ([5, 6, 2], [21, 22, 9])
    plain = rows_to_write(torch.tensor([5]), torch.tensor([21]), 6)
    assert read_exited(decode(exit_message(1, 2, plain).encode())).state_slots_S is None


def test_parts_and_rows_are_found() -> None:
    assert [part_of(6, 4, n).stop for n in range(4)] == [2, 4, 5, 6]
    assert rows_at(torch.tensor([40, 3, 17]), torch.tensor([17, 40])).tolist() == [2, 0]


def test_every_home_finds_its_rows_and_its_own_pages() -> None:
    def cache(kv_shard: int, kv_shards: int = 2) -> SharedCache:
        pages = torch.zeros(10 if kv_shard < kv_shards else 0, 1, 4, 1)
        return SharedCache([KVLayer(keys_BGPC=pages, values_BGPC=pages)], 1, [20 // kv_shards], kv_shard, 4)

    batch = AttentionBatch(
        positions_T=torch.tensor([5, 0, 1, 2, 7]),
        slots_T=torch.tensor([13 * 4 + 1, 0, 1, 2, 19 * 4 + 3]),
        query_start_S1=torch.tensor([0, 1, 4, 5], dtype=torch.int32),
        context_len_S=torch.tensor([6, 3, 8], dtype=torch.int32),
        block_table_SM=torch.tensor([[12, 13], [0, 0], [15, 19]], dtype=torch.int32),
        max_query_len=3,
        max_context_len=8,
        state_slots_S=torch.tensor([7, 4, 2]),
    )
    first, second = spread(batch, cache(0), 2), spread(batch, cache(1), 2)
    assert first.counts == second.counts == [3, 2]
    assert [rows.tolist() for rows in first.rows] == [[1, 2, 3], [0, 4]]
    assert first.own is not None
    assert second.own is not None
    assert first.own.slots_T.tolist() == [0, 1, 2]
    assert first.own.query_start_S1.tolist() == [0, 3]
    assert (first.own.max_query_len, first.own.max_context_len) == (3, 3)
    assert second.own.slots_T.tolist() == [3 * 4 + 1, 9 * 4 + 3]
    assert second.own.positions_T.tolist() == [5, 7]
    assert second.own.query_start_S1.tolist() == [0, 1, 2]
    assert second.own.block_table_SM.tolist() == [[2, 3], [5, 9]]
    assert (second.own.max_query_len, second.own.max_context_len) == (1, 8)
    assert first.own.state_runs == [(4, 0, 3, True, -1)]
    assert second.own.state_runs == [(7, 0, 1, False, -1), (2, 1, 2, False, -1)]
    rows, writing = cache(1).own_rows(batch)
    assert (rows.tolist(), writing.slots_T.tolist()) == ([0, 4], second.own.slots_T.tolist())
    assert writing.state_runs == second.own.state_runs
    shared = cache(1)
    assert shared.own_copies([(3, 4), (12, 19)]) == [[(2, 9)]]
    assert shared.held(range(1)) is shared.held(range(1))  # with what a backend made of it
    assert [*shared.held(range(1))] == [*shared]
    alone = spread(batch, cache(1, kv_shards=1), 2)  # a cache that lies in the first KV shard alone
    assert (alone.counts, alone.own) == ([5, 0], None)


def test_an_engine_of_kv_shards_answers_as_one_of_one_and_refuses_what_none_holds(
    make_checkpoint: Callable[..., Path],
) -> None:
    model = load_model(make_checkpoint("mixtral"), dtype="float32", progress=False)
    page = bytes_per_page(model.spec, torch.float32, 8)
    prompts = [[7] * 20 + [n] for n in range(6)] + [[n] * 30 for n in range(3, 6)]
    answers = []
    for kv_shards, pages in ((1, 200), (3, 3 * 9 + 2)):  # two pages are of no use
        model.decoder.kv_shards = kv_shards
        engine = Engine(model, EngineConfig(kv_memory=pages * page, block_size=8))
        tokens: dict[str, list[int]] = {str(n): [] for n in range(len(prompts))}
        for n, prompt in enumerate(prompts):
            engine.add_request(str(n), prompt, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        while engine.has_unfinished():
            for delta in engine.step():
                tokens[delta.request_id] += delta.completions[0].token_ids
        answers.append(tokens)
    assert answers[0] == answers[1]
    stats = engine.stats()
    assert stats.free_pages == stats.total_pages == 27
    assert stats.preemptions > 0
    assert stats.prefix_cache_hits > 0
    with pytest.raises(ValueError, match="at most 71 fit"):
        engine.check([5] * 72, SamplingParams())
    with pytest.raises(ValueError, match="holds no 3 pages, one for each KV shard"):
        Engine(model, EngineConfig(kv_memory=2 * page, block_size=8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor": 0}, "tensor must be at least 1"),
        ({"data": 0}, "data must be at least 1"),
        ({"padded_rows": -1}, "padded_rows must be at least 0"),
        ({"timeout": 0}, "timeout must"),
        ({"placement": "x"}, "needs parallel.expert"),
        ({"rebalance_steps": 5}, "parallel.rebalance_steps=5 needs parallel.expert"),
        ({"expert": 2, "copies_memory": "1MiB"}, "copies_memory=1MiB needs parallel.rebalance_steps"),
        ({"expert": 2, "rebalance_steps": 5, "copies_memory": "much"}, "copies_memory must be a number of bytes"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**settings)
