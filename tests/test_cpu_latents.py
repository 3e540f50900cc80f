"""Multi-head latent attention in C++: products of every head, attention over latents in pages, and whole layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dynamoe.kernels.api.latents import entry_size, readable, write_entries
from dynamoe.kernels.api.types import AttentionBatch, KVLayer
from dynamoe.kernels.cpu.backend import CpuBackend
from dynamoe.kernels.cpu.vector_inputs import places
from dynamoe.kernels.reference import operations as reference
from test_cpu_attention import assert_near
from test_cpu_invariance import assert_same_in_all_parts

pytestmark = pytest.mark.usefixtures("poisoned_memory")
PAGE = 16


@pytest.fixture
def backend(cpu_backend: CpuBackend) -> CpuBackend:
    return cpu_backend


HEAD_LINEARS = {
    "one row, one head": (1, 1, 40, 24),
    "one row": (1, 16, 64, 32),
    "a row more than a tile": (33, 3, 96, 48),
    "outputs end inside a block": (7, 5, 33, 45),
    "one input and output": (2, 4, 1, 1),
    "no row": (0, 4, 32, 16),
}


@pytest.mark.parametrize("edge", HEAD_LINEARS)
def test_head_linear(backend: CpuBackend, edge: str) -> None:
    rows, heads, outputs, inputs = HEAD_LINEARS[edge]
    weight_HOI = torch.randn(heads, outputs, inputs).to(backend.dtype)
    packed = backend.pack_head_linear(weight_HOI.transpose(1, 2).contiguous().transpose(1, 2))  # inputs lie apart
    x_THX = torch.randn(rows, heads, inputs + 3).to(backend.dtype)
    x_THI = x_THX[..., :inputs]  # and so do heads
    found = backend.head_linear(x_THI, packed)
    assert found.shape == (rows, heads, outputs)
    if rows:
        assert_near(found, torch.einsum("thi,hoi->tho", x_THI.float(), weight_HOI.float()), backend.dtype)
    for head in range(heads):  # as a layer of its own
        alone = backend.linear(x_THI[:, head], backend.pack_linear(weight_HOI[head]))
        assert torch.equal(found[:, head], alone)


@pytest.mark.parametrize(("heads", "outputs", "inputs"), [(16, 64, 33), (3, 45, 577)])
def test_head_linear_of_any_rows(backend: CpuBackend, heads: int, outputs: int, inputs: int) -> None:
    packed = backend.pack_head_linear(torch.randn(heads, outputs, inputs))
    x_THI = torch.randn(150, heads, inputs).to(backend.dtype)
    assert_same_in_all_parts(lambda rows: backend.head_linear(x_THI[rows], packed))


def latents(
    backend: CpuBackend, contexts: list[int], rows: list[int], sizes: tuple[int, int, int], coded: bool
) -> tuple[torch.Tensor, KVLayer, AttentionBatch]:
    """Queries of the last rows of some contexts, and the cache, whose unused slots are NaN."""
    heads, latent, rotated = sizes
    kept = torch.int8 if coded else backend.dtype
    pages = sum(-(-length // PAGE) for length in contexts)
    entries = torch.zeros(pages, 1, PAGE, entry_size(latent, rotated, kept), dtype=kept)
    entries.view(torch.uint8).fill_(255)
    layer = KVLayer(keys_BGPC=entries, values_BGPC=entries)
    latent_TZ, key_TR = (torch.randn(sum(contexts), size).to(backend.dtype) for size in (latent, rotated))
    write_entries(latent_TZ, key_TR, layer, places(contexts, contexts, PAGE))
    q_THC = torch.randn(sum(rows), heads, latent + rotated).to(backend.dtype)
    return q_THC, layer, places(contexts, rows, PAGE)


LATENT_EDGES = {
    "one token of context": ([1], [1], (4, 32, 8)),
    "decode": ([5, 64, 65, 300], [1] * 4, (16, 64, 32)),
    "decode of one long context": ([1100], [1], (16, 64, 32)),
    "chunk of a prompt beside decodes": ([200, 33, 90], [70, 1, 1], (5, 40, 8)),
    "one head": ([70, 9], [70, 9], (1, 33, 2)),
    "as wide as DeepSeek's": ([70], [3], (16, 512, 64)),
    "more heads than a task has queries": ([70], [5], (128, 32, 8)),
    "nothing rotated": ([70], [5], (3, 32, 0)),
}


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("edge", LATENT_EDGES)
def test_attention_over_latents(backend: CpuBackend, edge: str, window: int | None, coded: bool) -> None:
    contexts, rows, sizes = LATENT_EDGES[edge]
    latent = sizes[1]
    q_THC, layer, batch = latents(backend, contexts, rows, sizes, coded)
    options = {"scale": 0.2, "window": window}
    found = backend.latent_attention(q_THC, layer, batch, latent=latent, **options)
    read, where = readable(layer, batch, latent, backend.dtype)
    # The bits of attention over the same numbers in a cache of keys and values, and nearly those of the oracle.
    assert torch.equal(found, backend.attention(q_THC, read, where, **options)[..., :latent])
    wide = read.keys_BGPC.float().nan_to_num()
    expected = reference.paged_attention(q_THC.float(), KVLayer(keys_BGPC=wide, values_BGPC=wide), where, **options)
    assert_near(found, expected[..., :latent], backend.dtype)


@pytest.mark.parametrize("coded", [False, True])
def test_attention_over_latents_of_any_rows(backend: CpuBackend, coded: bool) -> None:
    q_THC, layer, whole = latents(backend, [750, 40], [150, 1], (16, 64, 32), coded)

    def run(rows: slice) -> torch.Tensor:
        count = rows.stop - rows.start
        batch = replace(
            whole,
            query_start_S1=torch.tensor([0, count, count + 1], dtype=torch.int32),
            context_len_S=torch.tensor([600 + rows.stop, 40], dtype=torch.int32),
        )
        q_RHC = torch.cat((q_THC[rows], q_THC[150:]))
        return backend.latent_attention(q_RHC, layer, batch, latent=64, scale=0.1)[:count]

    assert_same_in_all_parts(run)


def test_what_does_not_fit_is_refused(backend: CpuBackend) -> None:
    q_THC, layer, batch = latents(backend, [40], [1], (4, 32, 8), coded=False)
    with pytest.raises(ValueError, match="a latent of 41 does not fit queries of 40 channels"):
        backend.latent_attention(q_THC, layer, batch, latent=41, scale=0.2)
    with pytest.raises(ValueError, match=r"entries of shape .* do not hold heads of 39 channels"):
        backend.latent_attention(q_THC[..., :39].contiguous(), layer, batch, latent=32, scale=0.2)
    two = torch.cat((layer.keys_BGPC, layer.keys_BGPC), 1)
    with pytest.raises(ValueError, match="entries must be of one head"):
        backend.latent_attention(q_THC, KVLayer(keys_BGPC=two, values_BGPC=two), batch, latent=32, scale=0.2)
    packed = backend.pack_head_linear(torch.randn(4, 32, 40))
    with pytest.raises(ValueError, match="weights must be"):
        backend.head_linear(q_THC[:, :3], packed)


@pytest.mark.parametrize("coded", [False, True])
def test_threads_share_a_long_context(backend: CpuBackend, coded: bool) -> None:
    q_THC, layer, batch = latents(backend, [4300], [1], (5, 40, 8), coded)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(backend.latent_attention(q_THC, layer, batch, latent=40, scale=0.2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
