"""Attention in ``gpu_check.py``: every cache format against the oracle, then their times at long contexts."""

from dataclasses import replace
from typing import Any

import moe_layer
import torch
from dynamoe.kernels.api.kv_codes import KV_DTYPES, read_pages, stored_channels, write_heads
from dynamoe.kernels.api.types import AttentionBatch, KVLayer
from dynamoe.kernels.reference import operations as reference
from dynamoe.kernels.torch.backend import TorchBackend

PAGE = 16
# Norm of the error over the result's: for large shapes and a GPU's own order of sums, unlike kernels/api/tolerance.py.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# query heads, key/value heads, channels; the first one is checked with every cache format
SHAPES = ((32, 4, 128), (9, 3, 64), (8, 8, 80))
# name: context of each sequence, sequences, rows of each
LONG = {
    "decode of 64 sequences": (4096, 64, 1),
    "decode of 8 sequences": (32768, 8, 1),
    "decode of 1 sequence": (131072, 1, 1),
    "prefill of 2048 rows": (32768, 1, 2048),
}


def expect(ours: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    """Raise AssertionError when a result is off (NaN is)."""
    error = ((ours.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()
    assert error < TOLERANCE[dtype], f"{what}: relative error {error:.1e}"


def make_batch(contexts: list[int], queries: list[int], device: torch.device) -> tuple[AttentionBatch, torch.Tensor]:
    """Sequences on shuffled pages, and the slots of all their tokens."""
    pages = [-(-n // PAGE) for n in contexts]
    order = torch.randperm(sum(pages)).int()
    table_SM = torch.zeros(len(contexts), max(pages), dtype=torch.int32)
    positions, slots, everything, first = [], [], [], 0
    for s, (length, rows) in enumerate(zip(contexts, queries, strict=True)):
        table_SM[s, : pages[s]] = order[first : first + pages[s]]
        first += pages[s]
        position = torch.arange(length)
        everything.append(table_SM[s, position // PAGE].long() * PAGE + position % PAGE)
        positions.append(position[length - rows :])
        slots.append(everything[-1][length - rows :])
    batch = AttentionBatch(
        positions_T=torch.cat(positions).to(device),
        slots_T=torch.cat(slots).to(device),
        query_start_S1=torch.tensor([0, *queries]).cumsum(0).int().to(device),
        context_len_S=torch.tensor(contexts, dtype=torch.int32, device=device),
        block_table_SM=table_SM.to(device),
        max_query_len=max(queries),
        max_context_len=max(contexts),
    )
    return batch, torch.cat(everything).to(device)


def filled(backend: TorchBackend, slots_L: torch.Tensor, heads: int, head_dim: int, kept: torch.dtype) -> KVLayer:
    """Random keys and values in some slots, as a cache of this backend keeps them."""
    pages = int(slots_L.max()) // PAGE + 1
    width = stored_channels(head_dim, kept)
    stored = [
        torch.zeros(pages, heads, PAGE, width * kept.itemsize, dtype=torch.uint8, device=backend.device).view(kept)
        for _ in range(2)
    ]
    layer = KVLayer(keys_BGPC=stored[0], values_BGPC=stored[1], scales_behind_page=backend.scales_behind_page)
    for some_L in slots_L.split(1 << 16):
        for pages_BGPX in stored:
            x_LGC = torch.randn(len(some_L), heads, head_dim, device=backend.device).to(backend.dtype)
            write_heads(pages_BGPX, x_LGC, some_L // PAGE, some_L % PAGE, layer)
    return layer


def in_float32(layer: KVLayer) -> KVLayer:
    """The same numbers."""
    everything = torch.arange(layer.keys_BGPC.shape[0], device=layer.keys_BGPC.device)
    keys, values = (read_pages(t, everything, layer).float() for t in (layer.keys_BGPC, layer.values_BGPC))
    return KVLayer(keys_BGPC=keys, values_BGPC=values)


def check_attention(backend: TorchBackend, small: bool) -> None:
    """Rotation, cache write, norms, and attention of decoding, prefill and mixed batches."""
    batches = [([33, 5], [1, 1]), ([20, 9], [7, 1])]
    if not small:
        batches += [([4000, 1, 517], [1, 1, 1]), ([900, 300], [900, 1]), ([3000] * 64, [1] * 64)]
    shapes = ((4, 2, 16),) if small else SHAPES
    cases = [(shape, backend.dtype) for shape in shapes]
    cases += [(shapes[0], kept) for kept in map(KV_DTYPES.get, backend.kv_formats) if kept is not None]
    for shape, kept in cases:
        for window in (None, 6):
            for contexts, queries in batches:
                check_one(backend, shape, kept, contexts, queries, window)
    for width in (48,) if small else (48, 577, 2048, 8192):
        x, residual, weight = (torch.randn(5, width, device=backend.device).to(backend.dtype) for _ in range(3))
        expect(backend.rms_norm(x, weight[0], 1e-5), reference.rms_norm(x, weight[0], 1e-5), backend.dtype, "rms norm")
        normed, total = backend.add_rms_norm(x, residual.clone(), weight[0], 1e-5, 0.5)
        expect(total, residual + x * 0.5, backend.dtype, "add")
        expect(normed, reference.rms_norm(residual + x * 0.5, weight[0], 1e-5), backend.dtype, "add and norm")


def check_one(
    backend: TorchBackend,
    shape: tuple[int, int, int],
    kept: torch.dtype,
    contexts: list[int],
    queries: list[int],
    window: int | None,
) -> None:
    """One batch against the oracle."""
    heads, kv_heads, head_dim = shape
    batch, slots_L = make_batch(contexts, queries, backend.device)
    layer = filled(backend, slots_L, kv_heads, head_dim, kept)
    q, k, v = (
        torch.randn(sum(queries), n, head_dim, device=backend.device).to(backend.dtype)
        for n in (heads, kv_heads, kv_heads)
    )
    table_LC = torch.randn(max(contexts), head_dim, device=backend.device)
    what = f"{heads}/{kv_heads}/{head_dim} over {kept}, {contexts}, {window}"
    copies = [t.view(torch.uint8).clone().view(kept) for t in (layer.keys_BGPC, layer.values_BGPC)]
    copy = replace(layer, keys_BGPC=copies[0], values_BGPC=copies[1])
    rotated = backend.rope_and_write(q, k, v, table_LC, batch, layer)
    expect(rotated, reference.rope(q, table_LC, batch.positions_T), backend.dtype, f"rope {what}")
    reference.write_kv(reference.rope(k, table_LC, batch.positions_T), v, copy, batch.slots_T)
    # Where rotations are a rounding apart, a number near the middle between two codes becomes either.
    near = torch.float16 if kept.itemsize == 1 and backend.dtype == torch.float32 else backend.dtype
    wide, expected = in_float32(layer), in_float32(copy)
    expect(wide.keys_BGPC, expected.keys_BGPC, near, f"written keys {what}")
    expect(wide.values_BGPC, expected.values_BGPC, near, f"written values {what}")
    out = backend.attention(rotated, layer, batch, scale=head_dim**-0.5, window=window)
    oracle = reference.paged_attention(rotated.float(), wide, batch, scale=head_dim**-0.5, window=window)
    expect(out, oracle, backend.dtype, f"attention {what}")


def measure_caches(backend: TorchBackend, small: bool) -> list[dict[str, Any]]:
    """Seconds of attention over long contexts, and bytes of keys and values per second, for every cache format."""
    heads, kv_heads, head_dim = (4, 2, 16) if small else SHAPES[0]
    found = []
    for name, (context, sequences, rows) in LONG.items():
        if small:
            context, sequences, rows = 40, min(sequences, 2), min(rows, 3)
        batch, slots_L = make_batch([context] * sequences, [rows] * sequences, backend.device)
        q_THC = torch.randn(sequences * rows, heads, head_dim, device=backend.device).to(backend.dtype)
        usual = None
        for kind in backend.kv_formats:
            layer = filled(backend, slots_L, kv_heads, head_dim, KV_DTYPES[kind] or backend.dtype)

            def attention(layer: KVLayer = layer) -> torch.Tensor:
                return backend.attention(q_THC, layer, batch, scale=head_dim**-0.5)  # noqa: B023

            seconds, fastest, slowest = moe_layer.time_calls(attention, backend.device, 3 if small else 20)
            read = 2 * sequences * context * kv_heads * layer.keys_BGPC.shape[-1] * layer.keys_BGPC.itemsize
            usual = usual or seconds
            found.append({
                "name": name, "context": context, "sequences": sequences, "rows": rows, "cache": kind,
                "seconds": seconds, "fastest": fastest, "slowest": slowest, "bytes_per_second": read / seconds,
                "times_faster": usual / seconds,
            })  # fmt: skip
            print(
                f"{name}, context {context}, cache {kind}: {seconds * 1e6:.0f} µs, {read / seconds / 1e9:.0f} GB/s, "
                f"{usual / seconds:.2f} times as fast as auto",
                flush=True,
            )
    return found
