"""Layers with a window keep pages of their own: the same tokens, fewer bytes, and nothing read that was given back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import add_exits
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.kv_cache import bytes_per_page, group_page_bytes
from dynamoe.dynamic.model.loaded import LoadedModel
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from dynamoe.exits.segments import Segment
from dynamoe.kernels.api.types import AttentionBatch, KVLayer
from dynamoe.kernels.reference import operations as reference
from dynamoe.kernels.select import select_backend
from engine_answers import Answer, answers, completions
from family_parity import Variant, check_engine
from parallel_jobs import compare
from test_decoder import random_prompts
from test_families_parity_attention import LLAMA4, MIMO, variant
from test_families_parity_gpt_oss import VARIANTS as GPT_OSS
from test_families_parity_norms import GEMMA3

slow = pytest.mark.slow
PAGE, ROWS = 4, 13
FEW = {"block_size": PAGE, "max_num_batched_tokens": ROWS, "max_num_seqs": 3}
PROMPTS = random_prompts([90, 5, 41, 17, 66], seed=3)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=0)
EARLY = SamplingParams(
    temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=0, quality=None, exit_thresholds={1: 0.5, 2: 0.5}
)
CHUNKS = variant("llama4_text", **LLAMA4, num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0], interleave_moe_layer_step=2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = GPT_OSS["plain"].save(tmp_path_factory.mktemp("groups"))
    add_exits(directory, {1: 0.4, 2: 0.4})
    return directory


@pytest.fixture(scope="module", params=["cpu", "torch"])
def model(request: pytest.FixtureRequest, path: Path) -> LoadedModel:
    return load_model(path, dtype="float32", device="cpu", backend=request.param, progress=False)


def poisoned(engine: Engine) -> Engine:
    """Numbers in pages that a group has given back become NaN after every step."""
    step = engine.step

    def poisoning() -> Any:
        found = step()
        for number, group in enumerate(engine.scheduler.windows, 1):
            empty = [page for pages in group._empty for page in pages]
            for layer in engine.runner.kv:
                if layer.group == number:
                    for tensor in layer.tensors:
                        tensor[empty] = float("nan")
        return found

    engine.step = poisoning  # type: ignore[method-assign]
    return engine


def alone(model: LoadedModel, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[Answer]:
    """What every prompt gives when nobody is beside it and nothing is cut."""
    return [
        answers(Engine(model, EngineConfig(enable_prefix_caching=False)), [prompt], params)[0] for prompt in prompts
    ]


@pytest.mark.parametrize("params", [GREEDY, EARLY], ids=["whole", "exits"])
def test_nothing_is_read_that_was_given_back(model: LoadedModel, params: SamplingParams) -> None:
    expected = alone(model, PROMPTS, params)
    page_bytes = bytes_per_page(model.spec, torch.float32, PAGE)
    for few_pages in ({}, {"kv_memory": 34 * page_bytes}):
        engine = poisoned(Engine(model, EngineConfig(**FEW, **few_pages, enable_prefix_caching=False)))
        found = answers(engine, PROMPTS, params)
        assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
        assert [answer.layers for answer in found] == [answer.layers for answer in expected]
        if model.decoder.backend.name == "cpu":  # bitwise, whatever runs beside it
            assert found == expected
        assert (engine.stats().preemptions > 0) == bool(few_pages)
        assert [group.held for group in engine.stats().cache_groups] == [0, 0]


def test_completions_of_one_prompt_copy_the_pages_that_they_write_to(model: LoadedModel) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=20, ignore_eos=True)
    whole, cut = (
        completions(engine, PROMPTS[:3], params)
        for engine in (Engine(model), poisoned(Engine(model, EngineConfig(**FEW, enable_prefix_caching=False))))
    )
    assert [{n: answer.tokens for n, answer in each.items()} for each in whole] == [
        {n: answer.tokens for n, answer in each.items()} for each in cut
    ]
    assert any(len({tuple(answer.tokens) for answer in each.values()}) > 1 for each in whole)


def test_prefixes_are_shared_where_what_windows_see_is_left(model: LoadedModel) -> None:
    engine = Engine(model, EngineConfig(**FEW))
    first = answers(engine, PROMPTS, GREEDY)
    assert first == alone(model, PROMPTS) or model.decoder.backend.name != "cpu"
    follow_ups = [prompt + answer.tokens + [7, 8] for prompt, answer in zip(PROMPTS, first, strict=True)]
    before = engine.stats().prefix_cache_hits
    found = answers(engine, follow_ups[-1:], GREEDY)
    assert engine.stats().prefix_cache_hits - before == (len(follow_ups[-1]) - 3) // PAGE * PAGE
    assert [answer.tokens for answer in found] == [answer.tokens for answer in alone(model, follow_ups[-1:])]
    assert [answer.tokens for answer in answers(engine, follow_ups, GREEDY)] == [
        answer.tokens for answer in alone(model, follow_ups)
    ]


def test_bytes_of_a_long_context_are_those_of_full_layers_and_a_window(model: LoadedModel) -> None:
    """33 pages of context: the window of 12 holds 8 of 4 tokens at most, while 13 rows are computed, and 4 behind."""
    engine = Engine(model, EngineConfig(**FEW))
    full, windowed = group_page_bytes(model.spec, torch.float32, PAGE)
    kept = model.spec.layers[0].attention.num_kv_heads * 16 * 2 * 4 * PAGE  # type: ignore[attr-defined]
    assert (full, windowed) == (2 * kept, 2 * kept)
    engine.add_request("long", random_prompts([120])[0], SamplingParams(max_tokens=12, ignore_eos=True))
    held = []
    while engine.has_unfinished():
        engine.step()
        held.append([group.held for group in engine.stats().cache_groups])
    assert held[-2] == [33 * full, 4 * windowed]
    assert max(windows for _, windows in held) <= (12 + ROWS - 3) // PAGE * windowed + 2 * windowed
    assert held[-1] == [0, 0]
    seen, total = 3 * (12 // PAGE + 2) + -(-ROWS // PAGE), engine.stats().cache_groups
    assert [group.window for group in total] == [None, 12]
    assert total[1].total == 2 * seen * windowed < total[0].total == engine.stats().total_pages * full


def test_memory_goes_to_full_layers_when_windows_have_what_they_need(model: LoadedModel) -> None:
    full, windowed = group_page_bytes(model.spec, torch.float32, PAGE)
    for pages in (8, 38, 39, 100):
        engine = Engine(model, EngineConfig(**FEW, kv_memory=pages * (full + windowed)))
        assert sum(group.total for group in engine.stats().cache_groups) <= pages * (full + windowed)
        beyond = max(pages - 38, 0)  # pages that a window needs not
        assert engine.stats().total_pages == pages + beyond * windowed // full
        assert engine.stats().cache_groups[1].total == min(pages, 38) * windowed


@pytest.mark.parametrize("windows", [(None, 12, 5, 12), (12, 5, 12, 9)], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_several_windows_with_full_layers_or_without(path: Path, backend: str, windows: tuple[int | None, ...]) -> None:
    model = load_model(path, dtype="float32", device="cpu", backend=backend, progress=False)
    decoder = model.decoder
    layers = zip(model.spec.layers, windows, strict=True)
    own = tuple(replace(layer, attention=replace(layer.attention, window=seen)) for layer, seen in layers)
    decoder.spec = replace(model.spec, layers=own)
    decoder.stack = decoder.make_stack()
    engine = poisoned(Engine(replace(model, spec=decoder.spec), EngineConfig(**FEW)))
    assert [group.window for group in engine.stats().cache_groups] == list(decoder.spec.page_windows)
    assert len(decoder.spec.page_windows) == 3
    found = answers(engine, PROMPTS, GREEDY)
    assert [answer.tokens for answer in answers(engine, PROMPTS, GREEDY)] == [answer.tokens for answer in found]
    assert engine.stats().prefix_cache_hits > 0
    for prompt, answer in zip(PROMPTS, found, strict=True):
        kv, batch = fresh_cache(decoder, [len(prompt) + len(answer.tokens) - 1])  # pages of one kind
        tokens_T = torch.tensor(prompt + answer.tokens[:-1])
        x_TD = decoder.run_segment(Segment(index=0, layers=range(4)), decoder.embed(tokens_T), kv, batch)
        assert decoder.logits(x_TD[len(prompt) - 1 :]).argmax(-1).tolist() == answer.tokens


def test_an_int8_cache(path: Path) -> None:
    model = load_model(path, dtype="float32", device="cpu", kv_cache_dtype="int8", progress=False)
    engine = Engine(model, EngineConfig(**FEW))
    assert answers(engine, PROMPTS, GREEDY) == alone(model, PROMPTS)


@pytest.mark.parametrize(
    "made",
    [
        Variant(family="gemma3_text", config={**GEMMA3, "tie_word_embeddings": False}),
        pytest.param(CHUNKS, marks=slow),
        pytest.param(variant("mimo_v2_flash", **MIMO), marks=slow),
        pytest.param(GPT_OSS["plain"], marks=slow),
    ],
    ids=str,
)
def test_tokens_are_those_of_transformers(
    made: Variant, tmp_path: Path, reference_model: Callable[[Path], Any]
) -> None:
    directory = made.save(tmp_path / "model")
    paths = ("chunked", "preempted", "prefix")
    check_engine(directory, reference_model(directory), paths=paths, lengths=(33, 100), count=48)


@pytest.mark.parametrize("backend", ["cpu", "torch", pytest.param("triton", marks=slow)])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # lanes that the interpreter computes and a mask discards
def test_nothing_behind_a_window_is_read(backend: str, rows: int) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("with a GPU at hand kernels are compiled, not interpreted")
    window, length, generator = 7, 150, torch.Generator().manual_seed(0)
    pages = -(-length // 16)
    keys, values = (torch.randn(pages + 1, 2, 16, 32, generator=generator) for _ in range(2))
    keys[0] = values[0] = float("nan")
    queries = torch.randn(rows, 4, 32, generator=generator)
    table = torch.arange(1, pages + 1, dtype=torch.int32)[None]
    first = (length - rows - window + 1) // 16
    behind = table.clone()
    behind[:, :first] = 0
    kernels = select_backend("cpu", torch.float32, backend)

    def run(table: torch.Tensor, attention: Callable[..., torch.Tensor]) -> torch.Tensor:
        batch = AttentionBatch(
            positions_T=torch.arange(length - rows, length),
            slots_T=torch.zeros(rows, dtype=torch.int64),
            query_start_S1=torch.tensor([0, rows], dtype=torch.int32),
            context_len_S=torch.tensor([length], dtype=torch.int32),
            block_table_SM=table,
            max_query_len=rows,
            max_context_len=length,
        )
        return attention(queries, KVLayer(keys_BGPC=keys, values_BGPC=values), batch, scale=0.2, window=window)

    whole = run(table, kernels.attention)
    assert first > 0
    assert torch.equal(run(behind, kernels.attention), whole)
    torch.testing.assert_close(run(behind, reference.paged_attention), whole)


@pytest.mark.parametrize(
    "sizes", [{"expert": 2}, *(pytest.param({axis: 2}, marks=slow) for axis in ("tensor", "pipeline", "data"))], ids=str
)
def test_several_processes(path: Path, sizes: dict[str, int], tmp_path: Path) -> None:
    job: dict[str, Any] = {"thresholds": {"1": 0.5, "2": 0.5}}
    found = compare(tmp_path, str(path), sizes, **job)
    assert found["rows"][0] > found["rows"][-1], "no row exits"
