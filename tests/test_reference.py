"""The oracles against independent definitions, and the torch backend against the oracles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.api.types import AttentionBatch, KVLayer, Routing
from dynamoe.kernels.reference import operations as reference
from dynamoe.kernels.select import select_backend
from dynamoe.kernels.torch.backend import TorchBackend
from dynamoe.kernels.torch.experts import grouped_products, products_one_by_one, slots_by_expert

BACKEND = TorchBackend("cpu", torch.float32)
close = torch.testing.assert_close


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rms_norm_equals_torch() -> None:
    x, weight = randn(5, 24), randn(24, seed=1)
    close(reference.rms_norm(x, weight, 1e-5), F.rms_norm(x, (24,), weight, 1e-5))
    assert reference.rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5).dtype == torch.bfloat16


def test_add_rms_norm_returns_norm_and_sum() -> None:
    x, residual, weight = randn(5, 24), randn(5, 24, seed=1), randn(24, seed=2)
    normed, total = BACKEND.add_rms_norm(x, residual.clone(), weight, 1e-6, 0.5)
    close(total, residual + 0.5 * x)
    close(normed, F.rms_norm(residual + 0.5 * x, (24,), weight, 1e-6))


def test_rope_is_a_rotation_of_channel_pairs() -> None:
    x, positions = randn(3, 2, 8), torch.tensor([0, 5, 11])
    angles = torch.outer(torch.arange(12.0), 100.0 ** (-torch.arange(4) / 4))
    table = torch.cat((angles.cos(), angles.sin()), -1)
    rotated = reference.rope(x, table, positions)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(3, 1, 4), angles[positions][:, None])
    close(rotated, torch.cat((turned.real, turned.imag), -1))
    close(rotated[0], x[0])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations(activation: str) -> None:
    from transformers.activations import ACT2FN

    name = {"gelu_tanh": "gelu_pytorch_tanh"}.get(activation, activation)
    gate, up = randn(4, 6), randn(4, 6, seed=1)
    close(reference.activate(gate, up, activation), ACT2FN[name](gate) * up)


def test_the_activation_without_a_gate() -> None:
    from transformers.activations import ACT2FN

    up, gate = randn(4, 6), randn(4, 6, seed=1)
    assert torch.equal(reference.activate(None, up, "relu2"), ACT2FN["relu2"](up))
    for args in ((gate, up, "relu2"), (None, up, "silu")):
        with pytest.raises(ValueError, match=f"activation '{args[2]}': relu2 has no gate, all others have one"):
            reference.activate(*args)
    x, down, routing = (
        randn(4, 6, seed=2),
        randn(3, 6, 5, seed=3),
        reference.route(randn(4, 3), RouterSpec(num_experts=3, top_k=2)),
    )
    ups = randn(3, 5, 6, seed=4)
    expected = sum(
        routing.weights_TK[:, k, None]
        * torch.stack(
            [down[e] @ (ups[e] @ row).relu().square() for e, row in zip(routing.expert_ids_TK[:, k], x, strict=True)]
        )
        for k in range(2)
    )
    close(reference.experts(x, None, ups, down, routing, "relu2"), expected)
    backend = TorchBackend("cpu", torch.float32)
    linears = ([backend.pack_linear(weight) for weight in weights] for weights in (ups, down))
    close(backend.experts(x, backend.join_experts((), *linears, "relu2"), routing), expected)


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="unknown activation 'relu9'; known: silu, gelu, gelu_tanh"):
        reference.activate(randn(1, 1), randn(1, 1), "relu9")


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="unknown backend 'magic'"):
        select_backend("cpu", torch.float32, "magic")


EXPERTS, SIZE, HIDDEN = 5, 8, 16


def expert_tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    gate, up = randn(EXPERTS, SIZE, HIDDEN, seed=1), randn(EXPERTS, SIZE, HIDDEN, seed=2)
    return [tensor.to(dtype) for tensor in (gate, up, randn(EXPERTS, HIDDEN, SIZE, seed=3))]


def bias_tensors() -> list[torch.Tensor]:
    return [randn(EXPERTS, SIZE, seed=4), randn(EXPERTS, SIZE, seed=5), randn(EXPERTS, HIDDEN, seed=6)]


def routing(num_rows: int, top_k: int, seed: int = 7, **fields: Any) -> Routing:
    scores = randn(num_rows, EXPERTS, seed=seed).softmax(-1)
    weights, ids = scores.topk(top_k)
    return Routing(expert_ids_TK=ids.int(), weights_TK=weights, **fields)


def every_expert(x: torch.Tensor, tensors: list[torch.Tensor], biases: list[torch.Tensor]) -> torch.Tensor:
    """Outputs of all experts for all rows, (T, E, D)."""
    gate = torch.einsum("td,efd->tef", x, tensors[0]) + (biases[0] if biases else 0)
    up = torch.einsum("td,efd->tef", x, tensors[1]) + (biases[1] if biases else 0)
    return torch.einsum("tef,edf->ted", F.silu(gate) * up, tensors[2]) + (biases[2] if biases else 0)


def run(how: str, x: torch.Tensor, tensors: list[torch.Tensor], plan: Routing, biases: list[torch.Tensor]) -> Any:
    if how == "oracle":
        return reference.experts(x, *tensors, plan, "silu", *biases)
    return BACKEND.experts(x, BACKEND.pack_experts(*tensors, "silu", *biases), plan)


@pytest.mark.parametrize("how", ["oracle", "torch backend"])
@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "top_k"),
    [(9, 2), (1, 1), (1, EXPERTS), (2, 1), (0, 2)],  # one row, K = 1, K = E, experts without rows, no rows at all
)
def test_experts_are_a_weighted_sum(how: str, with_biases: bool, num_rows: int, top_k: int) -> None:
    x, tensors, plan = randn(num_rows, HIDDEN), expert_tensors(), routing(num_rows, top_k)
    biases = bias_tensors() if with_biases else []
    weights_TE = torch.zeros(num_rows, EXPERTS).scatter(1, plan.expert_ids_TK.long(), plan.weights_TK)
    expected = torch.einsum("te,ted->td", weights_TE, every_expert(x, tensors, biases))
    close(run(how, x, tensors, plan, biases), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["oracle", "torch backend"])
def test_unused_slots_are_never_computed(how: str) -> None:
    """Slots beyond a row's count name an expert that does not exist, or one whose weights are NaN."""
    x, tensors, full = randn(6, HIDDEN), expert_tensors(), routing(6, 3)
    counts = torch.tensor([3, 1, 0, 2, 3, 1], dtype=torch.int32)
    used = torch.arange(3) < counts[:, None]
    weights_TE = torch.zeros(6, EXPERTS).scatter(1, full.expert_ids_TK.long(), full.weights_TK * used)
    expected = torch.einsum("te,ted->td", weights_TE, every_expert(x, tensors, []))
    plan = Routing(
        expert_ids_TK=torch.where(used, full.expert_ids_TK, 10**6).int(),
        weights_TK=full.weights_TK.masked_fill(~used, float("nan")),
        counts_T=counts,
    )
    close(run(how, x, tensors, plan, []), expected, rtol=1e-4, atol=1e-5)
    assert run(how, x, tensors, plan, [])[2].eq(0).all()


@pytest.mark.parametrize("how", ["oracle", "torch backend"])
def test_weights_on_the_input_and_identity_experts(how: str) -> None:
    x, tensors = randn(6, HIDDEN), expert_tensors()
    plan = routing(6, 2, weight_on_input=True, identity_weights_T=randn(6, seed=9))
    expected = plan.identity_weights_T[:, None] * x
    for k in range(2):
        outputs = every_expert(x * plan.weights_TK[:, k, None], tensors, [])
        expected = expected + outputs[torch.arange(6), plan.expert_ids_TK[:, k].long()]
    close(run(how, x, tensors, plan, []), expected, rtol=1e-4, atol=1e-5)


def test_rows_do_not_see_each_other() -> None:
    x, tensors, plan = randn(9, HIDDEN), expert_tensors(), routing(9, 2)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    shuffled = Routing(expert_ids_TK=plan.expert_ids_TK[order], weights_TK=plan.weights_TK[order])
    together = run("torch backend", x, tensors, plan, [])
    close(run("torch backend", x[order], tensors, shuffled, []), together[order])


def test_all_experts_are_one_dense_ffn_over_strided_storage() -> None:
    """``down`` is a view of one dense matrix, as in our own checkpoints; packing keeps it one."""
    x, (gate, up, _) = randn(4, HIDDEN), expert_tensors()
    dense = randn(HIDDEN, EXPERTS * SIZE, seed=3)
    packed = BACKEND.pack_experts(gate, up, dense.view(HIDDEN, EXPERTS, SIZE).transpose(0, 1), "silu")
    expected = F.linear(F.silu(F.linear(x, gate.flatten(0, 1))) * F.linear(x, up.flatten(0, 1)), dense)
    close(BACKEND.all_experts(x, packed), expected)
    assert packed.data.down_EDF.permute(1, 0, 2).flatten(1).data_ptr() == packed.data.down_EDF.data_ptr()
    everyone = Routing(
        expert_ids_TK=torch.arange(EXPERTS, dtype=torch.int32).expand(4, -1), weights_TK=torch.ones(4, EXPERTS)
    )
    close(BACKEND.experts(x, packed, everyone), expected, rtol=1e-4, atol=1e-5)


def test_all_experts_with_biases() -> None:
    x, tensors, biases = randn(4, HIDDEN), expert_tensors(), bias_tensors()
    expected = every_expert(x, tensors, biases).sum(1)
    close(BACKEND.all_experts(x, BACKEND.pack_experts(*tensors, "silu", *biases)), expected, rtol=1e-4, atol=1e-5)


def test_grouped_products_equal_single_ones() -> None:
    """The GPU's path, on the CPU, where torch offers it as well."""
    tensors = expert_tensors(torch.bfloat16)
    weights = TorchBackend("cpu", torch.bfloat16).pack_experts(*tensors, "silu").data
    plan = routing(9, 2, counts_T=torch.tensor([2, 1, 0, 2, 2, 2, 1, 2, 2], dtype=torch.int32))
    order, ends = slots_by_expert(plan, EXPERTS)
    rows, used = randn(9, HIDDEN).bfloat16()[order // 2], int(ends[-1])
    assert used == 14
    grouped = grouped_products(rows, weights, ends, "silu")[:used]
    close(grouped, products_one_by_one(rows, weights, ends, "silu")[:used], rtol=0.02, atol=0.02)


PAGE, HEADS, GROUPS, CHANNELS = 4, 4, 2, 8


def paged(contexts: list[int], queries: list[int]) -> tuple[torch.Tensor, KVLayer, AttentionBatch, list[Any]]:
    """Queries, a cache with scattered pages full of NaN where nothing was written, and the plain keys and values."""
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0)).tolist()
    layer = KVLayer(
        keys_BGPC=torch.full((32, GROUPS, PAGE, CHANNELS), float("nan")),
        values_BGPC=torch.full((32, GROUPS, PAGE, CHANNELS), float("nan")),
    )
    width = max(-(-length // PAGE) for length in contexts)
    table = torch.full((len(contexts), width), 10**6, dtype=torch.int32)
    plain, positions = [], []
    for s, (length, rows) in enumerate(zip(contexts, queries, strict=True)):
        pages = [order.pop() for _ in range(-(-length // PAGE))]
        table[s, : len(pages)] = torch.tensor(pages)
        k, v = randn(length, GROUPS, CHANNELS, seed=s), randn(length, GROUPS, CHANNELS, seed=50 + s)
        slots = torch.tensor([pages[p // PAGE] * PAGE + p % PAGE for p in range(length)])
        reference.write_kv(k, v, layer, slots)
        plain.append((k, v))
        positions.append(torch.arange(length - rows, length))
    batch = AttentionBatch(
        positions_T=torch.cat(positions),
        slots_T=torch.zeros(sum(queries), dtype=torch.long),
        query_start_S1=torch.tensor([0, *queries]).cumsum(0).int(),
        context_len_S=torch.tensor(contexts, dtype=torch.int32),
        block_table_SM=table,
        max_query_len=max(queries),
        max_context_len=max(contexts),
    )
    return randn(sum(queries), HEADS, CHANNELS, seed=99), layer, batch, plain


@pytest.mark.parametrize("how", ["oracle", "torch backend"])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize(
    ("contexts", "queries"),
    [
        ([9, 1, 16, 30], [1, 1, 1, 1]),  # decode, contexts on and off page borders
        ([9, 5], [9, 5]),  # whole prompts
        ([21, 7, 12], [6, 1, 12]),  # a chunk with a past, a decode, a whole prompt
    ],
)
def test_paged_attention(how: str, window: int | None, contexts: list[int], queries: list[int]) -> None:
    q, layer, batch, plain = paged(contexts, queries)
    attend = reference.paged_attention if how == "oracle" else BACKEND.attention
    got = attend(q, layer, batch, scale=0.3, window=window)
    begin = 0
    for (k, v), length, rows in zip(plain, contexts, queries, strict=True):
        behind = torch.arange(length - rows, length)[:, None] - torch.arange(length)
        mask = (behind >= 0) & (behind < (window or length))
        expected = F.scaled_dot_product_attention(
            q[begin : begin + rows].transpose(0, 1),
            k.repeat_interleave(HEADS // GROUPS, 1).transpose(0, 1),
            v.repeat_interleave(HEADS // GROUPS, 1).transpose(0, 1),
            attn_mask=mask,
            scale=0.3,
        ).transpose(0, 1)
        close(got[begin : begin + rows], expected, rtol=1e-4, atol=1e-5)
        begin += rows


def test_a_sink_takes_part_in_the_softmax_and_has_no_value() -> None:
    q, layer, batch, plain = paged([9, 16], [1, 3])
    sinks, lse = torch.tensor([0.5, -3.0, 40.0, -torch.inf] * 9)[:HEADS], torch.full((4, HEADS), torch.nan)
    got = reference.paged_attention(q, layer, batch, scale=0.3, sinks_H=sinks, lse_TH=lse)
    (k, v), repeats = plain[0], HEADS // GROUPS
    scores = torch.einsum("hc,lhc->hl", q[0], k.repeat_interleave(repeats, 1)) * 0.3
    total = scores.exp().sum(-1) + sinks.exp()
    close(got[0], torch.einsum("hl,lhc->hc", scores.exp() / total[:, None], v.repeat_interleave(repeats, 1)))
    close(lse[0], total.log())
    assert lse.isfinite().all()


def test_parts_of_a_context_are_joined_by_their_denominators() -> None:
    q, layer, batch, _ = paged([12], [1])
    whole, sinks = torch.empty(1, HEADS), randn(HEADS, seed=4)
    expected = reference.paged_attention(q, layer, batch, scale=0.3, sinks_H=sinks, lse_TH=whole)
    parts = []
    for first, count, sink in ((0, 8, None), (8, 4, sinks)):  # pages of four tokens; the sink is one part's alone
        lse, table = torch.empty(1, HEADS), batch.block_table_SM[:, first // 4 :]
        short = {"context_len_S": torch.tensor([count], dtype=torch.int32), "positions_T": torch.tensor([count - 1])}
        some = AttentionBatch(**{**vars(batch), **short, "block_table_SM": table, "max_context_len": count})
        out = reference.paged_attention(q, layer, some, scale=0.3, sinks_H=sink, lse_TH=lse)
        parts.append((out, lse))
    close(torch.logaddexp(parts[0][1], parts[1][1]), whole)
    close(sum(out * (lse - whole).exp()[..., None] for out, lse in parts), expected)


def test_rope_and_write_puts_rotated_keys_and_plain_values_in_place() -> None:
    _, layer, batch, _ = paged([5], [2])
    q, k, v = randn(2, HEADS, CHANNELS), randn(2, GROUPS, CHANNELS, seed=1), randn(2, GROUPS, CHANNELS, seed=2)
    angles = torch.outer(torch.arange(8.0), torch.arange(1.0, 5.0))
    table = torch.cat((angles.cos(), angles.sin()), -1)
    slots = torch.tensor([4 * 7 + 1, 4 * 3 + 2])
    moved = AttentionBatch(**{**vars(batch), "slots_T": slots})
    close(BACKEND.rope_and_write(q, k, v, table, moved, layer), reference.rope(q, table, batch.positions_T))
    rotated = reference.rope(k, table, batch.positions_T)
    close(layer.keys_BGPC[7, :, 1], rotated[0])
    close(layer.keys_BGPC[3, :, 2], rotated[1])
    close(layer.values_BGPC[[7, 3], :, [1, 2]], v)
