"""Attention, rotation with cache write, and norms on Triton against the oracles; caches of 16, 32 and 8 bits."""

from __future__ import annotations

import pytest
import torch
from dynamoe.kernels.api.kv_codes import codes_and_scales, quantize, read_pages, stored_channels
from dynamoe.kernels.api.latents import readable
from dynamoe.kernels.api.tolerance import TOLERANCE, error
from dynamoe.kernels.api.types import AttentionBatch, KVLayer
from dynamoe.kernels.reference import operations as reference
from dynamoe.kernels.triton.attention import AttentionConfig
from dynamoe.kernels.triton.device import A100, H100
from dynamoe.kernels.triton.norm import NormCall, RopeCall, RowNorm, RowRope
from dynamoe.kernels.triton.paged_attention import AttentionCall, PagedAttention
from dynamoe.kernels.triton.variants import Call, OpVariant, ResultT

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = list(TOLERANCE)
FP8 = torch.float8_e4m3fn
# What a cache keeps, and whether scales lie behind the page.
NARROW = {"int8": (torch.int8, True), "int8, scales behind their codes": (torch.int8, False), "fp8": (FP8, False)}
# contexts, rows of this step, (query heads, key/value heads), channels of a head, tokens of a page
EDGES = {
    "one token": ([1], [1], (2, 1), 64, 16),
    "a page exactly full, one token more, one less": ([16, 17, 15], [1, 1, 1], (4, 2), 128, 16),
    "contexts longer than one split": ([150, 33], [1, 1], (4, 2), 24, 16),
    "prefill, decode and a chunk with a past": ([9, 7, 20], [9, 1, 5], (4, 2), 16, 4),
    "nine heads in groups of three, an odd number of channel pairs": ([18, 5], [3, 1], (9, 3), 18, 4),
    "no groups": ([18], [2], (3, 3), 40, 8),
    "one group of seven": ([18], [2], (7, 1), 32, 8),
    "pages of one token": ([9], [2], (2, 1), 16, 1),
}
BOTH = ("contexts longer than one split", "prefill, decode and a chunk with a past")
# All edges in one precision, and those with several tiles and rows in every one.
CELLS = [
    pytest.param(edge, dtype, marks=[] if dtype == torch.float32 or edge in BOTH else [pytest.mark.slow])
    for edge in EDGES
    for dtype in DTYPES
]


def kept_as(x_BGPC: torch.Tensor, kept: torch.dtype, behind: bool) -> torch.Tensor:
    """Pages of heads as a cache keeps them; where a head is NaN, its codes are as large as its scale is wrong."""
    if kept != torch.int8:
        return x_BGPC.to(kept)
    pages, heads, page, channels = x_BGPC.shape
    stored = torch.zeros(pages, heads, page, stored_channels(channels, kept), dtype=kept)
    codes, scales = codes_and_scales(stored, behind)
    codes[:], scales[:] = quantize(x_BGPC)
    codes[scales.isnan()] = 127
    return stored


def widened(layer: KVLayer) -> KVLayer:
    """The same numbers in float64."""
    everything = torch.arange(layer.keys_BGPC.shape[0], device=layer.keys_BGPC.device)
    keys, values = (read_pages(t, everything, layer).double() for t in (layer.keys_BGPC, layer.values_BGPC))
    return KVLayer(keys_BGPC=keys, values_BGPC=values)


def make_batch(
    contexts: list[int],
    queries: list[int],
    page: int,
    num_kv_heads: int,
    head_dim: int,
    kept: torch.dtype,
    behind: bool = False,
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
    stored = [kept_as(x, kept, behind).to(DEVICE) for x in (keys, values)]
    layer = KVLayer(keys_BGPC=stored[0], values_BGPC=stored[1], scales_behind_page=behind)
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


def latent_codes(layer: KVLayer, latent: int) -> KVLayer:
    """Entries with int8 latents; where nothing was written, scales and keys are NaN."""
    latent_BGPZ, key_BGPR = layer.keys_BGPC.split((latent, layer.keys_BGPC.shape[-1] - latent), -1)
    codes_BGPZ, scale_BGP = quantize(latent_BGPZ)
    parts = scale_BGP[..., None].view(torch.int8), key_BGPR.bfloat16().contiguous().view(torch.int8)
    entries = torch.cat((codes_BGPZ, *parts), -1)
    return KVLayer(keys_BGPC=entries, values_BGPC=entries)


def run(
    variant: OpVariant, call: Call[ResultT], config: AttentionConfig | None = None, native_fp8: bool = False
) -> ResultT:
    """What a variant makes of a call; tensors that it makes are NaN until a launch writes them."""
    result, launches = variant.plan(call, {"attention": config}, H100 if native_fp8 else A100)
    for launch in launches:
        launch.run()
    return result


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
    cache: str | None = None,
    native_fp8: bool = False,
    sinks_H: torch.Tensor | None = None,
    lse: bool = False,
    softcap: float | None = None,
    latent: int | None = None,
    coded_latents: bool = False,
    block_h: int = 16,
) -> None:
    torch.manual_seed(3)
    layer, batch = make_batch(contexts, queries, page, heads[1], head_dim, *(NARROW[cache] if cache else (dtype,)))
    if latent is not None:
        layer = KVLayer(keys_BGPC=layer.keys_BGPC, values_BGPC=layer.keys_BGPC)
    read, places = widened(layer), batch
    if coded_latents:
        layer = latent_codes(layer, latent)
        read, places = readable(layer, batch, latent, torch.float64)
    q_THC = torch.randn(sum(queries), heads[0], head_dim).to(DEVICE, dtype)
    tiling = {"block_q": block_q, "block_l": 16, "block_h": block_h}
    config = AttentionConfig(**tiling, splits=splits, num_warps=4, num_stages=2)
    scale = head_dim**-0.5 if softcap is None else 1.0  # far into the cap
    lse_TH, oracle_lse_TH = (torch.full(q_THC.shape[:2], float("nan"), device=DEVICE) for _ in range(2))
    call = AttentionCall(q_THC, layer, batch, scale, window, sinks_H, lse_TH if lse else None, softcap, latent)
    out_THC = run(PagedAttention(), call, config, native_fp8)
    oracle_THC = reference.paged_attention(
        q_THC.double(),
        read,
        places,
        scale=scale,
        window=window,
        sinks_H=sinks_H,
        lse_TH=oracle_lse_TH,
        softcap=softcap,
    )
    assert error(out_THC, oracle_THC[..., :latent]) <= TOLERANCE[dtype]
    if lse:
        assert error(lse_TH, oracle_lse_TH) <= TOLERANCE[dtype]


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


@pytest.mark.parametrize(("edge", "dtype"), CELLS)
def test_sinks_and_denominators(edge: str, dtype: torch.dtype) -> None:
    contexts, queries, heads, head_dim, page = EDGES[edge]
    sinks_H = torch.linspace(-3, 5, heads[0], device=DEVICE)
    sinks_H[0] = -torch.inf  # no sink
    shape = {"heads": heads, "head_dim": head_dim, "page": page, "dtype": dtype}
    for splits in {1, 3 if max(contexts) > 32 else 2}:
        for sinks, lse in ((sinks_H, True), (sinks_H, False), (None, True))[: 3 if dtype == torch.float32 else 1]:
            check(contexts, queries, splits=splits, block_q=2, sinks_H=sinks, lse=lse, **shape)


@pytest.mark.parametrize("splits", [1, 3])
def test_sinks_with_a_sliding_window(splits: int) -> None:
    sinks_H = torch.tensor([0.5, -2.0, 90.0, 1.0], device=DEVICE)  # one takes nearly all
    check([40, 7], [6, 2], window=5, block_q=2, splits=splits, sinks_H=sinks_H, lse=True)
    check([40, 7], [6, 2], window=5, block_q=2, splits=splits, sinks_H=sinks_H, lse=True, cache="int8")


@pytest.mark.parametrize(("edge", "dtype"), CELLS)
def test_capped_scores(edge: str, dtype: torch.dtype) -> None:
    contexts, queries, heads, head_dim, page = EDGES[edge]
    shape = {"heads": heads, "head_dim": head_dim, "page": page, "dtype": dtype, "block_q": 2, "softcap": 1.5}
    check(contexts, queries, **shape)
    if edge in BOTH and dtype == torch.float32:
        sinks_H = torch.linspace(-3, 5, heads[0], device=DEVICE)
        for splits, cache in ((1, "int8"), (3, None)):
            check(contexts, queries, splits=splits, sinks_H=sinks_H, lse=True, window=7, cache=cache, **shape)


def test_a_cap_far_beyond_the_scores_changes_nothing() -> None:
    torch.manual_seed(3)
    layer, batch = make_batch([40, 7], [6, 2], 4, 2, 16, torch.float32)
    q_THC = torch.randn(8, 4, 16, device=DEVICE) / 4
    config = AttentionConfig(block_q=2, block_l=16, splits=1, num_warps=4, num_stages=2)
    plain, far, near = (
        run(PagedAttention(), AttentionCall(q_THC, layer, batch, 1.0, softcap=cap), config)
        for cap in (None, 300.0, 0.5)
    )
    torch.testing.assert_close(far, plain, rtol=1e-3, atol=1e-3)
    assert (near - plain).abs().max() > 0.01


# Channels of a latent and of the key behind it: as in DeepSeek-V3; neither a power of two, the key below a tile's edge.
LATENTS = {"as in DeepSeek-V3": (512, 64), "no powers of two": (40, 6), "one channel behind": (32, 1)}


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sizes", LATENTS)
@pytest.mark.parametrize("splits", [1, 3])
def test_values_that_are_the_first_channels_of_their_keys(splits: int, sizes: str, dtype: torch.dtype) -> None:
    latent, behind = LATENTS[sizes]
    # Edges: heads that no tile divides; a whole prompt, a decode, a chunk with a past.
    for heads, block_h in ((18, 16), (5, 2)):
        shape = {"heads": (heads, 1), "head_dim": latent + behind, "latent": latent, "dtype": dtype, "block_h": block_h}
        for coded in (False, True):
            check([3, 40, 21], [3, 1, 2], page=16, splits=splits, block_q=2, lse=True, coded_latents=coded, **shape)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("head_dim", [257, 512])
def test_wide_heads(head_dim: int, dtype: torch.dtype) -> None:
    for splits, more in ((1, {"softcap": 2.0}), (3, {"window": 5})):
        check([18, 40], [3, 1], head_dim=head_dim, dtype=dtype, splits=splits, block_q=2, page=16, **more)


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


@pytest.mark.parametrize(("edge", "dtype"), CELLS)
@pytest.mark.parametrize("cache", NARROW)
def test_8_bit_caches(cache: str, edge: str, dtype: torch.dtype) -> None:
    contexts, queries, heads, head_dim, page = EDGES[edge]
    shape = {"heads": heads, "head_dim": head_dim, "page": page, "dtype": dtype, "cache": cache}
    for splits in {1, 3 if max(contexts) > 32 else 1}:
        check(contexts, queries, splits=splits, block_q=2 if max(queries) > 1 else 1, **shape)


@pytest.mark.parametrize("window", [1, 5, 64])
@pytest.mark.parametrize("cache", NARROW)
def test_8_bit_caches_with_a_sliding_window(cache: str, window: int) -> None:
    for splits in (1, 3):
        check([40, 7], [6, 2], window=window, block_q=2, splits=splits, cache=cache, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_that_the_hardware_converts(dtype: torch.dtype) -> None:
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no e4m3")
    check([33, 5], [1, 1], dtype=dtype, cache="fp8", native_fp8=True)


def test_a_key_that_is_not_finite_spoils_its_own_head_only() -> None:
    layer, batch = make_batch([9], [1], 4, 2, 16, torch.int8, True)
    _, scales_BGP = codes_and_scales(layer.keys_BGPC, True)
    scales_BGP[batch.block_table_SM[0, 1].item(), 1, 2] = float("nan")
    config = AttentionConfig(block_q=1, block_l=16, splits=1, num_warps=4, num_stages=2)
    out_THC = run(PagedAttention(), AttentionCall(torch.randn(1, 4, 16, device=DEVICE), layer, batch, 1.0), config)
    assert out_THC[:, :2].isfinite().all()
    assert out_THC[:, 2:].isnan().all()


def test_strided_channels_are_refused() -> None:
    layer, batch = make_batch([4], [1], 4, 1, 8, torch.float32)
    q_THC = torch.randn(1, 8, 1, device=DEVICE).transpose(1, 2)[..., ::2]
    config = AttentionConfig(block_q=1, block_l=16, splits=1, num_warps=4, num_stages=2)
    with pytest.raises(ValueError, match="q_THC must have contiguous channels"):
        run(PagedAttention(), AttentionCall(q_THC, layer, batch, 1.0), config)
    other = KVLayer(
        keys_BGPC=layer.keys_BGPC, values_BGPC=layer.values_BGPC.transpose(1, 2).contiguous().transpose(1, 2)
    )
    if other.values_BGPC.stride() != layer.keys_BGPC.stride():
        with pytest.raises(ValueError, match="laid out alike"):
            run(PagedAttention(), AttentionCall(torch.randn(1, 1, 8), other, batch, 1.0), config)


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
    expected = KVLayer(keys_BGPC=layer.keys_BGPC.clone(), values_BGPC=layer.values_BGPC.clone())
    out_THC = run(RowRope(), RopeCall(q, k, v, table_LC, batch, layer))
    oracle_THC = reference.rope(q, table_LC, batch.positions_T)
    reference.write_kv(reference.rope(k, table_LC, batch.positions_T), v, expected, batch.slots_T)
    close = {"rtol": 1.6e-2 if dtype == torch.bfloat16 else 2e-3, "atol": 1e-2, "equal_nan": True}
    torch.testing.assert_close(out_THC, oracle_THC, **close)
    torch.testing.assert_close(layer.keys_BGPC, expected.keys_BGPC, **close)
    assert torch.equal(layer.values_BGPC.nan_to_num(7.0), expected.values_BGPC.nan_to_num(7.0))


def extreme_heads(channels: int) -> torch.Tensor:
    """Zeros, one sign, tiny and huge numbers, numbers beyond 448, NaN, infinity, ties of both formats."""
    ties_of_int8 = torch.cat((torch.tensor([127.0]), torch.arange(channels - 1) - 20.5))
    bits = torch.arange(127, dtype=torch.uint8)
    e4m3 = bits.view(FP8).float()
    middles = ((e4m3[1:] + e4m3[:-1]) / 2)[torch.randperm(126)]
    whole = 126 // channels * channels
    some = torch.randn(4, channels)
    rows = [
        torch.zeros(channels), torch.full((channels,), -3.0), some[0] * 1e-30, some[0] * 1e-3, some[1] * 1e4,
        torch.linspace(-600, 600, channels), ties_of_int8, some[2], some[3],
        *(-middles[:whole]).view(-1, channels), *e4m3[:whole].view(-1, channels),
    ]  # fmt: skip
    rows[7][3], rows[8][5] = torch.nan, -torch.inf
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", NARROW)
def test_8_bit_caches_are_written_bit_by_bit_as_the_oracle_does(cache: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    channels, heads, page = 18, 3, 4
    kept, behind = NARROW[cache]
    v_TGC = extreme_heads(channels).repeat(heads, 1).unflatten(0, (heads, -1)).transpose(0, 1).to(DEVICE, dtype)
    rows = v_TGC.shape[0]
    k_TGC = torch.randn(rows, heads, channels).to(DEVICE, dtype)
    layer, batch = make_batch([rows], [rows], page, heads, channels, kept, behind)
    table_LC = torch.randn(rows, channels, device=DEVICE)
    copies = [t.view(torch.uint8).clone().view(kept) for t in (layer.keys_BGPC, layer.values_BGPC)]
    expected = KVLayer(keys_BGPC=copies[0], values_BGPC=copies[1], scales_behind_page=behind)
    out_TGC = run(RowRope(), RopeCall(k_TGC, k_TGC, v_TGC, table_LC, batch, layer))
    # The keys went along as queries: what came back is what the cache was to keep.
    reference.write_kv(out_TGC, v_TGC, expected, batch.slots_T)
    for ours, oracle in ((layer.keys_BGPC, expected.keys_BGPC), (layer.values_BGPC, expected.values_BGPC)):
        parts = [(ours, oracle)]
        if kept == torch.int8:
            parts = list(zip(codes_and_scales(ours, behind), codes_and_scales(oracle, behind), strict=True))
        for got, wanted in parts:  # NaN has several bit patterns
            assert torch.equal(got.float().nan_to_num(nan=9e9), wanted.float().nan_to_num(nan=9e9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stream", [None, torch.float32])  # a residual stream wider than the activations
@pytest.mark.parametrize("width", [1, 48, 577])
def test_norms(dtype: torch.dtype, width: int, stream: torch.dtype | None) -> None:
    torch.manual_seed(2)
    x_TD = torch.randn(3, width).to(DEVICE, dtype)
    residual_TD = torch.randn(3, width).to(DEVICE, stream or dtype)
    weight_D = torch.randn(width).to(DEVICE, dtype)
    close = {"rtol": 1.6e-2 if dtype == torch.bfloat16 else 2e-3, "atol": 1e-2}
    for rows_TD in (residual_TD, x_TD):
        out_TD, _ = run(RowNorm(), NormCall(rows_TD, weight_D, 1e-5))
        torch.testing.assert_close(out_TD, reference.rms_norm(rows_TD, weight_D, 1e-5), **close)
    for scale in (1.0, 0.3):
        out_TD, sum_TD = run(RowNorm(), NormCall(x_TD, weight_D, 1e-5, residual_TD, scale))
        added_TD = x_TD.to(residual_TD.dtype)
        expected_TD = residual_TD + (added_TD if scale == 1.0 else added_TD * scale)
        torch.testing.assert_close(sum_TD, expected_TD, **close)
        torch.testing.assert_close(out_TD, reference.rms_norm(sum_TD, weight_D, 1e-5), **close)


def test_norm_of_rows_that_are_part_of_wider_ones() -> None:
    wide = torch.randn(3, 80, device=DEVICE)
    weight_D = torch.randn(48, device=DEVICE)
    out_TD, _ = run(RowNorm(), NormCall(wide[:, 16:64], weight_D, 1e-5))
    torch.testing.assert_close(out_TD, reference.rms_norm(wide[:, 16:64], weight_D, 1e-5))
    with pytest.raises(ValueError, match="contiguous rows"):
        run(RowNorm(), NormCall(wide.t(), weight_D, 1e-5))
