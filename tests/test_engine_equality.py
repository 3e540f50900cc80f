"""The engine gives the tokens of transformers, however it cuts, caches, preempts and batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.loader import LoadedModel, load_model
from dynamoe.dynamic.sampling_params import SamplingParams

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe")
NEW_TOKENS = 48
LENGTHS = (1, 3, 7, 16, 17, 33, 60, 90)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)


def random_prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (n,), generator=generator).tolist() for n in lengths]


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[list[int]]:
    every = params if isinstance(params, list) else [params] * len(prompts)
    for number, (prompt, settings) in enumerate(zip(prompts, every, strict=True)):
        engine.add_request(str(number), prompt, settings)
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    while engine.has_unfinished():
        for delta in engine.step():
            tokens[delta.request_id] += delta.completions[0].token_ids
    assert engine.stats().free_pages == engine.stats().total_pages
    return list(tokens.values())


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], reference_model: Callable[[Path], Any]
) -> tuple[LoadedModel, list[list[int]]]:
    """A model, and the tokens that transformers generates for the prompts, one by one."""
    path = make_checkpoint(request.param)
    reference = reference_model(path)
    expected = []
    for prompt in random_prompts(LENGTHS):
        output = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(output[0, len(prompt) :].tolist())
    return load_model(path, dtype="float32", progress=False), expected


def test_prompts_of_different_lengths_together(family: tuple[LoadedModel, list[list[int]]]) -> None:
    model, expected = family
    assert run(Engine(model), random_prompts(LENGTHS), GREEDY) == expected


def test_with_chunked_prefill(family: tuple[LoadedModel, list[list[int]]]) -> None:
    model, expected = family
    engine = Engine(model, EngineConfig(max_num_batched_tokens=13, enable_prefix_caching=False))
    assert run(engine, random_prompts(LENGTHS), GREEDY) == expected


def test_with_prefix_cache_hits(family: tuple[LoadedModel, list[list[int]]]) -> None:
    model, expected = family
    engine = Engine(model, EngineConfig(block_size=8))
    assert run(engine, random_prompts(LENGTHS), GREEDY) == expected
    assert engine.stats().prefix_cache_hits == 0
    assert run(engine, random_prompts(LENGTHS), GREEDY) == expected
    assert engine.stats().prefix_cache_hits == sum((n - 1) // 8 * 8 for n in LENGTHS)
    longer = [p + e[:30] for p, e in zip(random_prompts(LENGTHS), expected, strict=True)]
    rest = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS - 30, ignore_eos=True)
    assert run(engine, longer, rest) == [e[30:] for e in expected]


@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_with_preemption(family: tuple[LoadedModel, list[list[int]]], enable_prefix_caching: bool) -> None:
    model, expected = family
    spec = model.spec
    page_bytes = 2 * spec.num_layers * spec.num_kv_heads * 8 * spec.head_dim * 4
    config = EngineConfig(
        block_size=8,
        kv_memory=40 * page_bytes,  # all prompts together need 78 pages in the end
        max_num_batched_tokens=64,
        enable_prefix_caching=enable_prefix_caching,
    )
    engine = Engine(model, config)
    assert run(engine, random_prompts(LENGTHS), GREEDY) == expected
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
@pytest.mark.parametrize("sampling", ["greedy", "seeded"])
def test_a_request_gives_the_same_tokens_alone_and_among_15_others(
    name: str, sampling: str, make_checkpoint: Callable[..., Path]
) -> None:
    model = load_model(make_checkpoint(name), dtype="float32", progress=False)
    prompts = random_prompts((5, 40, 17, 64, 3, 29, 31, 8, 100, 12, 50, 2, 77, 9, 21, 33), seed=1)
    params = [
        SamplingParams(
            temperature=0.0 if sampling == "greedy" else 0.9,
            top_p=0.95 if i % 2 else 1.0,
            top_k=30 if i % 3 else 0,
            repetition_penalty=1.1 if i % 5 == 0 else 1.0,
            seed=i,
            max_tokens=NEW_TOKENS,
            ignore_eos=True,
        )
        for i in range(16)
    ]
    together = run(Engine(model), prompts, params)
    alone = [run(Engine(model), [p], s)[0] for p, s in zip(prompts, params, strict=True)]
    assert together == alone


def test_seeded_draws_go_on_where_they_were_after_a_preemption(make_checkpoint: Callable[..., Path]) -> None:
    model = load_model(make_checkpoint("llama"), dtype="float32", progress=False)
    prompts = random_prompts(LENGTHS)
    params = [SamplingParams(seed=i, max_tokens=NEW_TOKENS, ignore_eos=True) for i in range(8)]
    roomy = run(Engine(model), prompts, params)
    small = Engine(model, EngineConfig(block_size=8, kv_memory=40 * 2 * 3 * 2 * 8 * 16 * 4))
    assert run(small, prompts, params) == roomy
    assert small.stats().preemptions > 0
