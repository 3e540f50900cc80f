"""A decode step on the Triton backend asks the host for nothing between embedding and logits, so that a CUDA graph can
record it; and what is computed on the device instead of the host equals what the host computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import models_table
import pytest
import torch
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.model.attention.chunks import within_chunks
from dynamoe.kernels.api.types import AttentionBatch
from host_reads import host_reads
from test_decoder import PagedSequences, random_prompts

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU at hand benchmarks/gpu_check.py captures a step"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # lanes that the interpreter computes and a mask discards
]


# Families with layers that no kernel runs; torch's own operations ask for the rows of each expert.
NO_KERNEL = {"nemotron_h": "experts without gates"}


def reads_of_a_decode(
    path: Path, monkeypatch: pytest.MonkeyPatch, backend: str = "triton", **options: Any
) -> Counter[str]:
    """Of one token of each of two sequences."""
    decoder = load_model(path, backend=backend, device="cpu", progress=False, **options).decoder
    sequences = PagedSequences(decoder, 2)
    sequences.run(random_prompts([1, 1]))
    embed, logits, counted = decoder.embed, decoder.logits, Counter[str]()
    with ExitStack() as between:

        def begins(ids_T: torch.Tensor) -> torch.Tensor:
            counted.update(["embedded"])
            between.enter_context(host_reads(decoder.backend, monkeypatch, counted))
            return embed(ids_T)

        def ends(x_TD: torch.Tensor) -> torch.Tensor:
            logits_TV = logits(x_TD)
            between.close()
            return logits_TV

        decoder.embed, decoder.logits = begins, ends  # type: ignore[method-assign]
        sequences.run([[7], [9]])
    assert counted.pop("embedded") == 1
    return counted


def test_a_quantised_mixture_reads_nothing(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint("qwen3_moe", num_hidden_layers=1)
    assert reads_of_a_decode(path, monkeypatch, dtype="float32", quantization="int4") == {}


def test_the_count_sees_what_torchs_own_experts_ask(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint("qwen3_moe", num_hidden_layers=1)
    assert reads_of_a_decode(path, monkeypatch, "torch", dtype="float32")["tolist"]


def test_the_count_sees_operations_whose_size_the_data_says(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask, found = torch.arange(6.0), torch.arange(6) > 2, Counter[str]()
    with host_reads(object.__new__(type("Backend", (), {})), monkeypatch, found):
        x[mask], x.nonzero(), x.repeat_interleave(torch.ones(6, dtype=torch.int64)), bool(x[0] > 1), x.tolist()
        torch.tensor(found.total(), device="cpu"), x[torch.arange(2)], torch.where(mask, x, 0.0)
    assert found == {"index": 1, "nonzero": 1, "repeat_interleave": 1, "__bool__": 1, "tolist": 1, "tensor": 1}


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["auto", "int8"])
@pytest.mark.parametrize("family", models_table.variants())
def test_families(family: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models_table.variants()[family].save(tmp_path / "model")
    try:
        reads = reads_of_a_decode(path, monkeypatch, dtype="bfloat16", kv_cache_dtype=cache)
    except ValueError as error:
        if cache == "auto" or "kv_cache_dtype" not in str(error):
            raise
        pytest.skip("refuses this cache")
    assert bool(reads) == (family in NO_KERNEL), reads


def batch_of(lengths: list[int], page_size: int, **more: Any) -> AttentionBatch:
    """A decode of sequences on pages in random order; entries beyond a context are no pages."""
    pages = [-(-length // page_size) for length in lengths]
    table_SM = torch.full((len(lengths), max(pages)), 10**6, dtype=torch.int32)
    order = torch.randperm(sum(pages)).int().split(pages)
    for row_M, own in zip(table_SM, order, strict=True):
        row_M[: len(own)] = own
    return AttentionBatch(
        positions_T=torch.tensor(lengths) - 1,
        slots_T=torch.zeros(len(lengths), dtype=torch.int64),
        query_start_S1=torch.arange(len(lengths) + 1, dtype=torch.int32),
        context_len_S=torch.tensor(lengths, dtype=torch.int32),
        block_table_SM=table_SM,
        max_query_len=1,
        max_context_len=max(lengths),
        **more,
    )


def test_last_chunks_on_the_device_are_those_of_the_host() -> None:
    batch = batch_of([1, 16, 17, 39, 48, 49], page_size=4)
    found, expected = (within_chunks(replace(batch, max_query_len=most), 16, 4) for most in (1, 2))
    assert torch.equal(found.context_len_S, expected.context_len_S)
    assert (found.context_len_S.dtype, found.block_table_SM.dtype) == (torch.int32, torch.int32)
    assert found.num_positions == expected.num_positions == 49
    for length, own, others in zip(
        found.context_len_S.tolist(), found.block_table_SM, expected.block_table_SM, strict=True
    ):
        assert torch.equal(own[: -(-length // 4)], others[: -(-length // 4)])
