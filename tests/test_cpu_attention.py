"""Attention and the cache write of the C++ kernels against the oracle, on every instruction set of this processor."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from coded_heads import decode, encode
from dynamoe.kernels.api.tolerance import TOLERANCE, error
from dynamoe.kernels.api.types import AttentionBatch, KVLayer
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.reference import operations as reference
from dynamoe.kernels.torch.backend import TorchBackend

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = [torch.float32, torch.bfloat16]
CACHES = [*DTYPES, torch.int8]


@pytest.fixture
def backend(cpu_backend: CpuBackend) -> CpuBackend:
    return cpu_backend


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    assert error(actual, expected) <= TOLERANCE[dtype]


def stored(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As a cache of this dtype keeps heads."""
    return encode(x) if dtype == torch.int8 else x.to(dtype)


def widened(layer: KVLayer) -> KVLayer:
    """The same cache in float32."""
    keys, values = (decode(t) if layer.coded else t.float() for t in (layer.keys_BGPC, layer.values_BGPC))
    return KVLayer(keys_BGPC=keys, values_BGPC=values)


def paged_problem(
    backend: CpuBackend, contexts: list[int], rows=None, heads=6, kv_heads=2, channels=40, page=16, cache=None
):
    """Queries of the last rows of every sequence, and a cache whose unused slots are NaN."""
    rows = rows or contexts
    pages = [-(-length // page) for length in contexts]
    order = torch.randperm(sum(pages)).int()
    table = torch.full((len(contexts), max(pages)), 10**9, dtype=torch.int32)
    shape = (sum(pages), kv_heads, page, channels)
    keys, values = (stored(torch.full(shape, float("nan")), cache or backend.dtype) for _ in range(2))
    positions, slots = [], []
    for s, length in enumerate(contexts):
        table[s, : pages[s]] = order[sum(pages[:s]) : sum(pages[: s + 1])]
        place = torch.arange(length)
        slot = table[s][place // page].long() * page + place % page
        for part in (keys, values):
            part[slot // page, :, slot % page] = stored(torch.randn(length, kv_heads, channels), part.dtype)
        positions.append(place[length - rows[s] :])
        slots.append(slot[length - rows[s] :])
    batch = AttentionBatch(
        positions_T=torch.cat(positions),
        slots_T=torch.cat(slots),
        query_start_S1=torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32),
        context_len_S=torch.tensor(contexts, dtype=torch.int32),
        block_table_SM=table,
        max_query_len=max(rows),
        max_context_len=max(contexts),
    )
    q = torch.randn(sum(rows), heads, channels).to(backend.dtype)
    return q, KVLayer(keys_BGPC=keys, values_BGPC=values), batch


def oracle_attention(q: torch.Tensor, layer: KVLayer, batch: AttentionBatch, **options) -> torch.Tensor:
    wide = widened(layer)
    wide = KVLayer(keys_BGPC=wide.keys_BGPC.nan_to_num(), values_BGPC=wide.values_BGPC.nan_to_num())
    return reference.paged_attention(q.float(), wide, batch, **options)


ATTENTION_EDGES: dict[str, dict] = {
    "one token of context": {"contexts": [1]},
    "decode": {"contexts": [5, 64, 65, 300], "rows": [1, 1, 1, 1]},
    "decode of one long context": {"contexts": [1100], "rows": [1]},
    "prefill": {"contexts": [130, 17]},
    "chunk of a prompt beside decodes": {"contexts": [200, 33, 90], "rows": [70, 1, 1]},
    "every head its own keys": {"contexts": [70, 9], "heads": 3, "kv_heads": 3, "channels": 64},
    "all heads one key": {"contexts": [70, 9], "heads": 16, "kv_heads": 1, "channels": 32},
    "odd page and head": {"contexts": [50, 23], "page": 5, "channels": 18},
    "wide head": {"contexts": [40], "heads": 2, "kv_heads": 1, "channels": 256},
}


@pytest.mark.parametrize("window", [None, 1, 20, 100])
@pytest.mark.parametrize("edge", ATTENTION_EDGES)
def test_attention(backend: CpuBackend, edge: str, window: int | None):
    q, layer, batch = paged_problem(backend, **ATTENTION_EDGES[edge])
    out = backend.attention(q, layer, batch, scale=0.2, window=window)
    assert_near(out, oracle_attention(q, layer, batch, scale=0.2, window=window), backend.dtype)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("edge", ATTENTION_EDGES)
def test_sinks_and_denominators(backend: CpuBackend, edge: str, window: int | None, softcap: float | None):
    q, layer, batch = paged_problem(backend, **ATTENTION_EDGES[edge])
    rows, heads, _ = q.shape
    options = {"scale": 0.2, "window": window, "softcap": softcap}
    plain = backend.attention(q, layer, batch, **options)
    uncapped = backend.attention(q, layer, batch, **{**options, "softcap": None})
    assert edge == "one token of context" or window == 1 or torch.equal(plain, uncapped) == (softcap is None)
    for sinks in (None, torch.linspace(-3, 5, heads), torch.full((heads,), -torch.inf), torch.full((heads,), 200.0)):
        lse, expected_lse = (torch.full((rows, heads), torch.nan) for _ in range(2))
        out = backend.attention(q, layer, batch, **options, sinks_H=sinks, lse_TH=lse)
        expected = oracle_attention(q, layer, batch, **options, sinks_H=sinks, lse_TH=expected_lse)
        assert out.isfinite().all()
        assert error(out, expected) <= TOLERANCE[backend.dtype] or (out.abs().max() == expected.abs().max() == 0)
        assert error(lse, expected_lse) <= TOLERANCE[backend.dtype]
        if sinks is None or sinks[0] == -torch.inf:
            assert torch.equal(out, plain)
        # A row's result is the same alone.
        last = AttentionBatch(
            positions_T=batch.positions_T[-1:],
            slots_T=batch.slots_T[-1:],
            query_start_S1=torch.tensor([0, 1], dtype=torch.int32),
            context_len_S=batch.context_len_S[-1:],
            block_table_SM=batch.block_table_SM[-1:],
            max_query_len=1,
            max_context_len=int(batch.context_len_S[-1]),
        )
        lse_1H = torch.full((1, heads), torch.nan)
        assert torch.equal(backend.attention(q[-1:], layer, last, **options, sinks_H=sinks, lse_TH=lse_1H), out[-1:])
        assert torch.equal(lse_1H, lse[-1:])


def test_sinks_and_denominators_of_another_shape_are_refused(backend: CpuBackend):
    q, layer, batch = paged_problem(backend, [5])
    with pytest.raises(ValueError, match="sinks must have one entry for each of 6 heads"):
        backend.attention(q, layer, batch, scale=0.2, sinks_H=torch.zeros(5))
    with pytest.raises(ValueError, match="lse must have one entry for each of 5 rows and 6 heads"):
        backend.attention(q, layer, batch, scale=0.2, lse_TH=torch.zeros(5, 5))
    with pytest.raises(ValueError, match="lse must be contiguous and of type Float"):
        backend.attention(q, layer, batch, scale=0.2, lse_TH=torch.zeros(5, 6, dtype=torch.float64))


@pytest.mark.parametrize("cache", DTYPES)
def test_attention_over_a_cache_of_another_dtype(backend: CpuBackend, cache: torch.dtype):
    q, layer, batch = paged_problem(backend, [90, 40], [30, 1], cache=cache)
    assert_near(
        backend.attention(q, layer, batch, scale=0.2), oracle_attention(q, layer, batch, scale=0.2), backend.dtype
    )


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("edge", ATTENTION_EDGES)
def test_attention_over_codes(backend: CpuBackend, edge: str, window: int | None):
    q, layer, batch = paged_problem(backend, **ATTENTION_EDGES[edge], cache=torch.int8)
    expected = oracle_attention(q, layer, batch, scale=0.2, window=window)
    assert_near(backend.attention(q, layer, batch, scale=0.2, window=window), expected, backend.dtype)
    plain = TorchBackend("cpu", backend.dtype).attention(q, layer, batch, scale=0.2, window=window)
    if not batch.query_start_S1.diff().gt(1).any():  # its prefill reads whole pages, which here hold NaN
        assert_near(plain, expected, backend.dtype)


def test_codes_are_as_near_as_their_scale_says():
    x = torch.randn(50, 3, 40) * torch.logspace(-20, 4, 50)[:, None, None]
    x[7], x[8, 1] = 0.0, torch.nan
    back = decode(encode(x))
    assert encode(x).shape[-1] == 42
    assert back[8, 1].isnan().all()
    assert back[7].eq(0).all()
    kept = torch.arange(50) != 8
    bound = x[kept].abs().amax(-1, keepdim=True) / 127 * (1 + 2**-7) / 2
    assert ((back - x)[kept].abs() <= bound * 1.0001).all()


def test_pages_behind_the_window_are_never_read(backend: CpuBackend):
    q, layer, batch = paged_problem(backend, [100], [1])
    expected = oracle_attention(q, layer, batch, scale=0.2, window=30)
    batch.block_table_SM[0, :4] = 10**9  # positions 0 to 63; the window starts at 70
    assert_near(backend.attention(q, layer, batch, scale=0.2, window=30), expected, backend.dtype)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("channels", [2, 40, 64])
def test_rope_and_write(backend: CpuBackend, channels: int, cache: torch.dtype):
    _, layer, batch = paged_problem(backend, [21, 3], [20, 2], channels=channels, cache=cache)
    rows = batch.positions_T.numel()
    # One projection holds queries, keys and values; its slices lie apart.
    qkv = torch.randn(rows, 10 * channels).to(backend.dtype)
    q, k, v = (part.unflatten(-1, (-1, channels)) for part in qkv.split((6 * channels, 2 * channels, 2 * channels), -1))
    cos_sin = torch.randn(64, channels)
    wide = widened(layer)
    expected = TorchBackend("cpu", torch.float32).rope_and_write(q.float(), k.float(), v.float(), cos_sin, batch, wide)
    assert_near(backend.rope_and_write(q, k, v, cos_sin, batch, layer), expected, backend.dtype)
    found = widened(layer)
    for got, wanted in ((found.keys_BGPC, wide.keys_BGPC), (found.values_BGPC, wide.values_BGPC)):
        assert torch.equal(got.isnan(), wanted.isnan())
        got, wanted = got.nan_to_num(), wanted.nan_to_num()
        if cache == torch.int8:
            step = (1 + 2**-7) / 127  # of the codes, in relation to the largest; rotated keys may be bfloat16 before
            most = 0.51 * step + (2**-8 if backend.dtype == torch.bfloat16 else 0)
            assert ((got - wanted).abs() <= wanted.abs().amax(-1, keepdim=True) * most).all()
        else:
            assert_near(got, wanted, torch.bfloat16 if torch.bfloat16 in (cache, backend.dtype) else torch.float32)


def test_positions_and_slots_outside_are_refused(backend: CpuBackend):
    q, layer, batch = paged_problem(backend, [4])
    k = torch.randn(4, 2, 40).to(backend.dtype)
    with pytest.raises(IndexError, match="rotary table"):
        backend.rope_and_write(q, k, k, torch.randn(3, 40), batch, layer)
    with pytest.raises(IndexError, match="not in the cache"):
        backend.rope_and_write(q, k, k, torch.randn(9, 40), replace(batch, slots_T=batch.slots_T + 1000), layer)
