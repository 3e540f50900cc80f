"""What warm-up and reports know of a model's layers and of an engine's steps, as tensors without storage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..api.kv_codes import stored_channels
from ..api.latents import entry_size
from ..api.router_spec import RouterSpec
from ..api.types import AttentionBatch, KVLayer


@dataclass(frozen=True, kw_only=True)
class WarmUpShape:
    """What a layer will be called with: enough to compile its kernels before the first request.

    Arguments:
        kv_dtype: what keys and values are kept in; None: the model's own.
        router, expert_size, activation: None, 0 and "" for a layer without a mixture.
        always_on: experts in front of the routed ones that every row uses.
        biased: whether the experts have biases.
        norm_widths: further widths of RMS norms, those of queries and keys.
        probes: (inner width, whether it has a second layer, previous, router_entropy) of the probes behind the layer.
        sinks: whether heads have them. softcap: of their scores.
        latent: so many of a key's first channels are the values, and no kernel writes keys; None: not so.
        max_tokens: most rows of a step. max_context: longest context in tokens.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    max_tokens: int
    max_context: int
    max_sequences: int
    router: RouterSpec | None = None
    expert_size: int = 0
    activation: str = ""
    always_on: int = 0
    biased: bool = False
    norm_widths: tuple[int, ...] = ()
    probes: tuple[tuple[int, bool, bool, bool], ...] = ()
    window: int | None = None
    sinks: bool = False
    softcap: float | None = None
    latent: int | None = None
    kv_dtype: torch.dtype | None = None

    def cache(self, dtype: torch.dtype) -> KVLayer:
        """Pages of the layer, as the engine allocates them for this backend."""
        kept = self.kv_dtype or dtype
        channels = stored_channels(self.head_dim, kept)
        if self.latent is not None:
            channels = entry_size(self.latent, self.head_dim - self.latent, kept)
        pages = meta(1024, self.num_kv_heads, self.page_size, channels, dtype=kept)
        return KVLayer(keys_BGPC=pages, values_BGPC=pages, scales_behind_page=True)

    def batch(self, sequences: int, query_len: int, context: int) -> AttentionBatch:
        """Equal sequences of ``query_len`` new tokens."""
        rows = sequences * query_len
        return AttentionBatch(
            positions_T=meta(rows, dtype=torch.int64),
            slots_T=meta(rows, dtype=torch.int64),
            query_start_S1=meta(sequences + 1, dtype=torch.int32),
            context_len_S=meta(sequences, dtype=torch.int32),
            block_table_SM=meta(sequences, -(-self.max_context // self.page_size), dtype=torch.int32),
            max_query_len=query_len,
            max_context_len=context,
        )


class Steps(NamedTuple):
    """The steps to plan for: their numbers of rows, and (sequences, new tokens of each, longest context)."""

    tokens: tuple[int, ...]
    batches: tuple[tuple[int, int, int], ...]

    @classmethod
    def up_to(cls, shape: WarmUpShape) -> Steps:
        """All powers of two up to the limits of a shape: decoding by any number of sequences, prompts of one."""
        tokens = _powers(shape.max_tokens)
        decodes = [(s, 1, c) for s in _powers(shape.max_sequences) for c in _powers(shape.max_context)]
        return cls(tokens, (*decodes, *((1, t, max(t, shape.max_context)) for t in tokens)))

    @classmethod
    def of(cls, tokens: int, shape: WarmUpShape) -> Steps:
        """One step of so many rows: a token of each sequence, or a prompt where there are more rows than sequences."""
        sequences, query_len = (tokens, 1) if tokens <= shape.max_sequences else (1, tokens)
        return cls((tokens,), ((sequences, query_len, shape.max_context),))


def meta(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without storage."""
    return torch.empty(sizes, dtype=dtype, device="meta")


def _powers(limit: int) -> tuple[int, ...]:
    return tuple(1 << i for i in range(max(limit - 1, 0).bit_length() + 1))
