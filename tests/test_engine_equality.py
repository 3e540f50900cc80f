"""The engine gives the tokens of transformers, however it cuts, caches, preempts and batches, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.kv_cache import bytes_per_page
from dynamoe.dynamic.model.loaded import LoadedModel
from engine_answers import answers
from family_parity import expected_tokens

FAMILIES = ("llama", "mistral", "mixtral", "qwen2_moe")  # one with windows, one with shared experts
OTHERS = ("qwen2", "qwen3", "qwen3_moe", "olmoe", "granitemoe")  # which differ within a layer
NEW_TOKENS = 24
MORE_TOKENS = 48  # in the slow run
FEW_TOKENS = 5  # of interpreted kernels
LENGTHS = (1, 3, 7, 16, 17, 33, 60, 90)


def random_prompts(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (n,), generator=generator).tolist() for n in lengths]


def run(engine: Engine, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]) -> list[list[int]]:
    return [answer.tokens for answer in answers(engine, prompts, params)]


@dataclass(frozen=True)
class Case:
    """A model on a backend, prompts, and the tokens that transformers generates for them, one by one."""

    model: LoadedModel
    prompts: list[list[int]]
    expected: list[list[int]]
    pages_too_few: int  # of 8 tokens: less than all sequences need in the end

    def check(self, config: EngineConfig | None = None) -> Engine:
        engine = Engine(self.model, config or EngineConfig())
        assert self.tokens(engine) == self.expected
        return engine

    def tokens(self, engine: Engine, given: int = 0) -> list[list[int]]:
        """What the engine answers when the first ``given`` tokens of the answers are part of the prompts."""
        prompts = [p + e[:given] for p, e in zip(self.prompts, self.expected, strict=True)]
        rest = len(self.expected[0]) - given
        return run(engine, prompts, SamplingParams(temperature=0.0, max_tokens=rest, ignore_eos=True))


# Every kind of block on the kernels of a CPU, a mixture on those of the others. Interpreted kernels take half a second
# per step, so there they run one layer, on short prompts.
BACKENDS = ("torch", "grouped_mm", "triton")
QUICK = [*((family, "cpu") for family in FAMILIES), *(("mixtral", backend) for backend in BACKENDS)]
SLOW = [*((family, "cpu") for family in OTHERS), *(("llama", backend) for backend in BACKENDS)]
SLOW += [case for case in QUICK if case != ("mixtral", "triton")]  # which has few tokens in any case
CASES = [
    *((*case, FEW_TOKENS if case[1] == "triton" else NEW_TOKENS) for case in QUICK),
    *(
        pytest.param((*case, FEW_TOKENS if case[1] == "triton" else MORE_TOKENS), marks=pytest.mark.slow)
        for case in SLOW
    ),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(
    request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path], reference_model: Callable[[Path], Any]
) -> Case:
    family, backend, new_tokens = request.param
    interpreted = backend == "triton"
    if interpreted and torch.cuda.is_available():
        pytest.skip("with a GPU at hand kernels are compiled, not interpreted")
    path = make_checkpoint(family, **({"num_hidden_layers": 1} if interpreted else {}))
    few = 20 if family == "mistral" else 26  # its window gives pages back
    prompts, pages_too_few = random_prompts(LENGTHS), few
    if interpreted:
        prompts, pages_too_few = random_prompts((6, 7, 15, 9)), 6
    expected = expected_tokens(reference_model(path), prompts, new_tokens)
    model = load_model(path, dtype="float32", device="cpu", backend=backend, progress=False)
    assert model.decoder.backend.name == backend
    return Case(model, prompts, expected, pages_too_few)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # lanes that the interpreter computes and a mask discards
class TestTokensOfTransformers:
    def test_prompts_of_different_lengths_together(self, case: Case) -> None:
        case.check()

    def test_with_chunked_prefill(self, case: Case) -> None:
        case.check(EngineConfig(max_num_batched_tokens=13, enable_prefix_caching=False))

    def test_with_prefix_cache_hits(self, case: Case) -> None:
        engine = case.check(EngineConfig(block_size=8))
        assert engine.stats().prefix_cache_hits == 0
        assert case.tokens(engine) == case.expected
        assert engine.stats().prefix_cache_hits == sum((len(p) - 1) // 8 * 8 for p in case.prompts)
        given = len(case.expected[0]) * 5 // 8
        assert case.tokens(engine, given) == [e[given:] for e in case.expected]

    @pytest.mark.parametrize("enable_prefix_caching", [True, False])
    def test_with_preemption(self, case: Case, enable_prefix_caching: bool) -> None:
        spec = case.model.spec
        page_bytes = bytes_per_page(spec, torch.float32, 8)
        engine = case.check(
            EngineConfig(
                block_size=8,
                kv_memory=case.pages_too_few * page_bytes,
                max_num_batched_tokens=64,
                enable_prefix_caching=enable_prefix_caching,
            )
        )
        assert engine.stats().preemptions > 0


@pytest.mark.parametrize(
    ("name", "kept"),
    [("llama", "float32"), *(("qwen2_moe", kept) for kept in ("float32", "int8", "w8a8", "int4", "fp8", "int8 cache"))],
)
@pytest.mark.parametrize("sampling", ["greedy", "seeded"])
@pytest.mark.parametrize("count", [NEW_TOKENS, pytest.param(MORE_TOKENS, marks=pytest.mark.slow)])
def test_a_request_gives_the_same_tokens_alone_and_among_15_others(
    name: str, kept: str, sampling: str, count: int, make_checkpoint: Callable[..., Path]
) -> None:
    settings = {"dtype": kept} if kept == "float32" else {"dtype": "bfloat16", "quantization": kept}
    if kept == "int8 cache":
        settings = {"dtype": "bfloat16", "kv_cache_dtype": "int8"}
    model = load_model(make_checkpoint(name), progress=False, **settings)
    prompts = random_prompts((5, 40, 17, 64, 3, 29, 31, 8, 100, 12, 50, 2, 77, 9, 21, 33), seed=1)
    params = [
        SamplingParams(
            temperature=0.0 if sampling == "greedy" else 0.9,
            top_p=0.95 if i % 2 else 1.0,
            top_k=30 if i % 3 else 0,
            repetition_penalty=1.1 if i % 5 == 0 else 1.0,
            seed=i,
            max_tokens=count,
            ignore_eos=True,
        )
        for i in range(16)
    ]
    together = run(Engine(model), prompts, params)
    alone = [run(Engine(model), [p], s)[0] for p, s in zip(prompts, params, strict=True)]
    assert together == alone


@pytest.mark.parametrize("count", [NEW_TOKENS, pytest.param(MORE_TOKENS, marks=pytest.mark.slow)])
def test_seeded_draws_go_on_where_they_were_after_a_preemption(
    count: int, make_checkpoint: Callable[..., Path]
) -> None:
    model = load_model(make_checkpoint("llama"), dtype="float32", progress=False)
    prompts = random_prompts(LENGTHS)
    params = [SamplingParams(seed=i, max_tokens=count, ignore_eos=True) for i in range(8)]
    roomy = run(Engine(model), prompts, params)
    small = Engine(model, EngineConfig(block_size=8, kv_memory=26 * 2 * 3 * 2 * 8 * 16 * 4))
    assert run(small, prompts, params) == roomy
    assert small.stats().preemptions > 0
