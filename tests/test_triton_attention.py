"""Attention, rotation with cache write, and norms on Triton against the oracles."""

from __future__ import annotations

import pytest
import torch
from dynamoe.kernels import reference
from dynamoe.kernels.tolerance import TOLERANCE, error
from dynamoe.kernels.triton_attention import AttentionConfig, plan_attention
from dynamoe.kernels.triton_norm import plan_rms_norm, plan_rope_and_write
from dynamoe.kernels.types import AttentionBatch, KVLayer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = list(TOLERANCE)


def make_batch(
    contexts: list[int], queries: list[int], page: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> tuple[KVLayer, AttentionBatch]:
    """Sequences on shuffled pages; everything outside their contexts is NaN, unused table entries are far outside."""
    counts = [-(-n // page) for n in contexts]
    total = sum(counts)
    order = torch.randperm(total)
    table_SM = torch.full((len(contexts), max(counts)), 1 << 30, dtype=torch.int32)
    positions, slots = [], []
    keys = torch.full((total, num_kv_heads, page, head_dim), float("nan"))
    values = keys.clone()
    first = 0
    for s, (length, rows) in enumerate(zip(contexts, queries, strict=True)):
        pages = order[first : first + counts[s]]
        first += counts[s]
        table_SM[s, : counts[s]] = pages.int()
        p = torch.arange(length)
        keys[pages[p // page], :, p % page] = torch.randn(length, num_kv_heads, head_dim)
        values[pages[p // page], :, p % page] = torch.randn(length, num_kv_heads, head_dim)
        positions.append(p[length - rows :])
        slots.append(pages[positions[-1] // page] * page + positions[-1] % page)
    layer = KVLayer(keys_BGPC=keys.to(DEVICE, dtype), values_BGPC=values.to(DEVICE, dtype))
    batch = AttentionBatch(
        positions_T=torch.cat(positions).to(DEVICE),
        slots_T=torch.cat(slots).to(DEVICE),
        query_start_S1=torch.tensor([0, *queries]).cumsum(0).int().to(DEVICE),
        context_len_S=torch.tensor(contexts, dtype=torch.int32, device=DEVICE),
        block_table_SM=table_SM.to(DEVICE),
        max_query_len=max(queries),
        max_context_len=max(contexts),
    )
    return layer, batch


def check(
    contexts: list[int],
    queries: list[int],
    *,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 16,
    page: int = 4,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    block_q: int = 1,
    splits: int = 1,
) -> None:
    torch.manual_seed(3)
    layer, batch = make_batch(contexts, queries, page, heads[1], head_dim, dtype)
    q_THC = torch.randn(sum(queries), heads[0], head_dim).to(DEVICE, dtype)
    out_THC = torch.full_like(q_THC, float("nan"))
    config = AttentionConfig(block_q=block_q, block_l=16, splits=splits, num_warps=4, num_stages=2)
    scale = head_dim**-0.5
    for launch in plan_attention(q_THC, layer, batch, out_THC, scale=scale, window=window, config=config):
        launch.run()
    wide = KVLayer(keys_BGPC=layer.keys_BGPC.double(), values_BGPC=layer.values_BGPC.double())
    oracle_THC = reference.paged_attention(q_THC.double(), wide, batch, scale=scale, window=window)
    assert error(out_THC, oracle_THC) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("splits", [1, 4])
def test_decode(dtype: torch.dtype, splits: int) -> None:
    check([1, 33, 16], [1, 1, 1], dtype=dtype, splits=splits)  # edges: a single token, a page that is exactly full


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_and_decode_in_one_batch(dtype: torch.dtype) -> None:
    check([21, 9, 30], [21, 1, 7], dtype=dtype, block_q=4)  # edges: whole prompt, decode, chunk with a past


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("window", [1, 5, 64])
def test_sliding_window(window: int, splits: int) -> None:
    check([40, 7], [6, 2], window=window, block_q=2, splits=splits)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (9, 3), (7, 1)])
def test_heads_per_group(heads: tuple[int, int]) -> None:
    check([18, 5], [3, 1], heads=heads, block_q=2)


@pytest.mark.parametrize("head_dim", [8, 24, 40])
def test_head_sizes_that_are_no_power_of_two(head_dim: int) -> None:
    check([18, 5], [1, 1], head_dim=head_dim, splits=2)


def test_more_splits_than_tiles() -> None:
    check([3, 20], [1, 1], splits=8)


def test_a_page_of_one_token_and_one_longer_than_a_tile() -> None:
    check([9], [2], page=1)
    check([70], [2], page=64)


def test_strided_channels_are_refused() -> None:
    layer, batch = make_batch([4], [1], 4, 1, 8, torch.float32)
    q_THC = torch.randn(1, 8, 1, device=DEVICE).transpose(1, 2)[..., ::2]
    config = AttentionConfig(block_q=1, block_l=16, splits=1, num_warps=4, num_stages=2)
    with pytest.raises(ValueError, match="q_THC must have contiguous channels"):
        plan_attention(q_THC, layer, batch, q_THC, scale=1.0, window=None, config=config)
    other = KVLayer(
        keys_BGPC=layer.keys_BGPC, values_BGPC=layer.values_BGPC.transpose(1, 2).contiguous().transpose(1, 2)
    )
    if other.values_BGPC.stride() != layer.keys_BGPC.stride():
        with pytest.raises(ValueError, match="laid out alike"):
            plan_attention(
                torch.randn(1, 1, 8), other, batch, torch.empty(1, 1, 8), scale=1.0, window=None, config=config
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim"), [((3, 1), 16), ((5, 5), 12)])
def test_rope_and_write(dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> None:
    torch.manual_seed(1)
    layer, batch = make_batch([9, 3], [4, 1], 4, heads[1], head_dim, dtype)
    rows = 5
    fused = torch.randn(rows, (heads[0] + 2 * heads[1]) * head_dim).to(DEVICE, dtype)  # q, k and v of one product
    q, k, v = (
        part.unflatten(1, (-1, head_dim))
        for part in fused.split((heads[0] * head_dim, heads[1] * head_dim, heads[1] * head_dim), 1)
    )
    table_LC = torch.randn(16, head_dim, device=DEVICE)
    out_THC = torch.full((rows, heads[0], head_dim), float("nan"), device=DEVICE, dtype=dtype)
    expected = KVLayer(keys_BGPC=layer.keys_BGPC.clone(), values_BGPC=layer.values_BGPC.clone())
    plan_rope_and_write(q, k, v, table_LC, batch, layer, out_THC).run()
    oracle_THC = reference.rope(q, table_LC, batch.positions_T)
    reference.write_kv(reference.rope(k, table_LC, batch.positions_T), v, expected, batch.slots_T)
    close = {"rtol": 1.6e-2 if dtype == torch.bfloat16 else 2e-3, "atol": 1e-2, "equal_nan": True}
    torch.testing.assert_close(out_THC, oracle_THC, **close)
    torch.testing.assert_close(layer.keys_BGPC, expected.keys_BGPC, **close)
    assert torch.equal(layer.values_BGPC.nan_to_num(7.0), expected.values_BGPC.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stream", [None, torch.float32])  # a residual stream wider than the activations
@pytest.mark.parametrize("width", [1, 48, 577])
def test_norms(dtype: torch.dtype, width: int, stream: torch.dtype | None) -> None:
    torch.manual_seed(2)
    x_TD = torch.randn(3, width).to(DEVICE, dtype)
    residual_TD = torch.randn(3, width).to(DEVICE, stream or dtype)
    weight_D = torch.randn(width).to(DEVICE, dtype)
    close = {"rtol": 1.6e-2 if dtype == torch.bfloat16 else 2e-3, "atol": 1e-2}
    out_TD, sum_TD = torch.full_like(x_TD, float("nan")), torch.full_like(residual_TD, float("nan"))
    plan_rms_norm(residual_TD, weight_D, 1e-5, out_TD).run()
    torch.testing.assert_close(out_TD, reference.rms_norm(residual_TD, weight_D, 1e-5), **close)
    plan_rms_norm(x_TD, weight_D, 1e-5, out_TD).run()
    torch.testing.assert_close(out_TD, reference.rms_norm(x_TD, weight_D, 1e-5), **close)
    for scale in (1.0, 0.3):
        plan_rms_norm(x_TD, weight_D, 1e-5, out_TD, residual_TD, sum_TD, scale).run()
        added_TD = x_TD.to(residual_TD.dtype)
        expected_TD = residual_TD + (added_TD if scale == 1.0 else added_TD * scale)
        torch.testing.assert_close(sum_TD, expected_TD, **close)
        torch.testing.assert_close(out_TD, reference.rms_norm(sum_TD, weight_D, 1e-5), **close)


def test_norm_of_rows_that_are_part_of_wider_ones() -> None:
    wide = torch.randn(3, 80, device=DEVICE)
    weight_D, out_TD = torch.randn(48, device=DEVICE), torch.empty(3, 48, device=DEVICE)
    plan_rms_norm(wide[:, 16:64], weight_D, 1e-5, out_TD).run()
    torch.testing.assert_close(out_TD, reference.rms_norm(wide[:, 16:64], weight_D, 1e-5))
    with pytest.raises(ValueError, match="contiguous rows"):
        plan_rms_norm(wide.t(), weight_D, 1e-5, out_TD)
