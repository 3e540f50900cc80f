"""Test vectors of latents in pages: attention over them, and a small stack whose layers write them (:mod:`.vectors`).

Shape suffixes as in ``kernels/api/types.py``; N plain channels of a query, Z of a latent, R of the key behind it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..api.latents import entry_size, write_entries
from ..api.stack import StackBlock, StackExperts, StackLatentAttention, StackNorm, StackShape
from ..api.types import KVLayer, KVLayers
from ..torch.backend import TorchBackend
from .vector_inputs import EPS, Numbers, places, rotations

PAGE = 16
_CONTEXTS = (1, 2, 15, 16, 17, 63, 64, 65, 130, 300)
_NEW_ROWS = (1, 2, 7, 16, 17, 1, 2, 7, 16, 17)  # of each context's end
_SIZES = ((20, 24, 40, 8), (4, 33, 64, 32), (1, 5, 33, 2))  # heads, N, Z, R


def latent_vectors(backend: TorchBackend) -> Iterator[torch.Tensor]:
    numbers = Numbers()
    for kept in (backend.dtype, torch.int8):
        for sizes in _SIZES:
            yield from _attention(backend, numbers, sizes, kept)
            for interleaved in (False, True):
                yield from _stack(backend, numbers, sizes, kept, interleaved)


def _entries(contexts: tuple[int, ...], latent: int, rotated: int, kept: torch.dtype) -> KVLayer:
    pages = sum(-(-length // PAGE) for length in contexts)
    keys = torch.zeros(pages, 1, PAGE, entry_size(latent, rotated, kept), dtype=kept)
    return KVLayer(keys_BGPC=keys, values_BGPC=keys)


def _attention(
    backend: TorchBackend, numbers: Numbers, sizes: tuple[int, int, int, int], kept: torch.dtype
) -> Iterator[torch.Tensor]:
    heads, plain, latent, rotated = sizes
    layer, count = _entries(_CONTEXTS, latent, rotated, kept), sum(_CONTEXTS)
    latent_TZ, key_TR = (numbers.floats(count, size).to(backend.dtype) for size in (latent, rotated))
    write_entries(latent_TZ, key_TR, layer, places(_CONTEXTS, _CONTEXTS, PAGE))
    rows = sum(_NEW_ROWS)
    up = backend.pack_head_linear(numbers.floats(heads, latent, plain))
    plain_THN, rotated_THR = (numbers.floats(rows, heads, size).to(backend.dtype) for size in (plain, rotated))
    q_THC = torch.cat((backend.head_linear(plain_THN, up), rotated_THR), -1)
    yield q_THC
    for window in (None, 1, 16, 65):
        asked = places(_CONTEXTS, _NEW_ROWS, PAGE)
        yield backend.latent_attention(q_THC, layer, asked, latent=latent, scale=latent**-0.5, window=window)


def _stack(
    backend: TorchBackend, numbers: Numbers, sizes: tuple[int, int, int, int], kept: torch.dtype, interleaved: bool
) -> Iterator[torch.Tensor]:
    """Two layers, the first with a projection in front of that of the queries: prompts, then their last rows again."""
    heads, plain, latent, rotated = sizes
    hidden, values, rank, contexts = 64, 20, 24, (17, 1, 70)

    def norm(width: int) -> torch.Tensor:
        return (1 + numbers.floats(width, scale=0.5)).to(backend.dtype)

    layers: list[list[StackBlock]] = []
    for window in (None, 20):
        made_of = hidden if window else rank
        attention = StackLatentAttention(
            num_heads=heads,
            latent=latent,
            plain_dim=plain,
            rotated_dim=rotated,
            value_dim=values,
            q_a=None if window else backend.pack_linear(numbers.floats(rank, hidden, scale=0.3), numbers.floats(rank)),
            q_norm=None if window else norm(rank),
            q=backend.pack_linear(numbers.floats(heads * (plain + rotated), made_of, scale=0.3)),
            kv_a=backend.pack_linear(numbers.floats(latent + rotated, hidden, scale=0.3)),
            kv_norm=norm(latent),
            key_up=backend.pack_head_linear(numbers.floats(heads, latent, plain, scale=0.3)),
            value_up=backend.pack_head_linear(numbers.floats(heads, values, latent, scale=0.3)),
            o=backend.pack_linear(numbers.floats(hidden, heads * values, scale=0.2)),
            norm_eps=EPS / 2,
            scale=(plain + rotated) ** -0.5,
            interleaved=interleaved,
            window=window,
        )
        gate, up = (numbers.floats(1, 48, hidden, scale=0.4) for _ in range(2))
        ffn = backend.pack_experts(gate, up, numbers.floats(1, hidden, 48, scale=0.4), "silu")
        mixture = StackExperts(ffn=ffn, router=None, rule=None)
        layers.append([StackNorm(weight_D=norm(hidden)), attention, StackNorm(weight_D=norm(hidden)), mixture])
    stack = backend.make_stack(StackShape(hidden_size=hidden, norm_eps=EPS, residual_scale=0.7), layers, ())
    assert stack is not None
    kv, table_LC = (
        KVLayers(_entries(contexts, latent, rotated, kept) for _ in layers),
        rotations(rotated, max(contexts)),
    )
    for rows in (contexts, (1, 1, 1)):
        x_TD = numbers.floats(sum(rows), hidden, scale=2)
        yield stack.run(range(2), x_TD, kv, [table_LC], places(contexts, rows, PAGE))
        yield from (layer.keys_BGPC for layer in kv)
