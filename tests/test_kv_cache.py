"""Keys and values in 8 bits: half the memory, the same tokens however the engine cuts, caches and preempts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from dynamoe.dynamic.contract.deployment import deployment
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.llm import LLM
from dynamoe.dynamic.model.kv_cache import allocate_layers, bytes_per_page, copy_pages
from dynamoe.dynamic.model.loaded import LoadedModel
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from dynamoe.exits.segments import Segment
from dynamoe.kernels.api.kv_codes import read_pages
from dynamoe.kernels.api.tolerance import QUANTIZED_TOLERANCE, error
from dynamoe.kernels.reference import operations as reference

GREEDY = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
HALF = (64 + 2) / (2 * 64)  # of bfloat16's bytes, for heads of 64 channels


@pytest.fixture(scope="module")
def path(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("mixtral", num_hidden_layers=2, head_dim=64)


@pytest.fixture(scope="module")
def model(path: Path) -> LoadedModel:
    return load_model(path, dtype="bfloat16", kv_cache_dtype="int8", progress=False)


def prompts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for _ in range(count)]


def run(engine: Engine, requests: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    for number, prompt in enumerate(requests):
        engine.add_request(str(number), prompt, params)
    tokens: dict[str, list[int]] = {str(n): [] for n in range(len(requests))}
    while engine.has_unfinished():
        for delta in engine.step():
            tokens[delta.request_id] += delta.completions[0].token_ids
    return list(tokens.values())


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(max_num_batched_tokens=13, enable_prefix_caching=False),
        EngineConfig(block_size=4),
        EngineConfig(block_size=8, kv_memory=2 * 2 * 2 * 66 * 8 * 24, max_num_batched_tokens=64),
    ],
    ids=["chunks", "small pages", "preemption"],
)
def test_tokens_do_not_depend_on_how_the_engine_works(model: LoadedModel, config: EngineConfig) -> None:
    requests = prompts(6, 40)
    expected = [run(Engine(model), [prompt])[0] for prompt in requests]
    engine = Engine(model, config)
    assert run(engine, requests) == expected
    assert (engine.stats().preemptions > 0) == (config.kv_memory is not None)
    assert run(engine, requests) == expected
    assert (engine.stats().prefix_cache_hits > 0) == config.enable_prefix_caching


def logits(path: Path, backend: str, kv_cache_dtype: str) -> torch.Tensor:
    decoder = load_decoder(path, dtype="float32", backend=backend, device="cpu", kv_cache_dtype=kv_cache_dtype)
    tokens_T = torch.tensor(prompts(1, 50)[0])
    kv, batch = fresh_cache(decoder, [50])
    assert kv[0].coded == (kv_cache_dtype == "int8")
    whole = Segment(index=0, layers=range(decoder.spec.num_layers))
    return decoder.logits(decoder.run_segment(whole, decoder.embed(tokens_T), kv, batch))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # lanes that Triton's interpreter computes and a mask discards
@pytest.mark.parametrize(
    ("backend", "kept", "most"),
    [
        ("cpu", "int8", 0.03),
        ("torch", "int8", 0.03),
        pytest.param("triton", "int8", 0.03, marks=pytest.mark.slow),  # the next test compares them with the others
        ("torch", "fp8", 0.3),
        pytest.param("triton", "fp8", 0.3, marks=pytest.mark.slow),
    ],
)
def test_logits_are_near_those_of_an_unquantised_cache(
    make_checkpoint: Callable[..., Path], backend: str, kept: str, most: float
) -> None:
    path = make_checkpoint("llama")  # without routers, whose choices may flip
    assert 1e-5 < error(logits(path, backend, kept), logits(path, backend, "auto")) < most


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted kernels run without a GPU")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("kept", "other"), [("int8", "cpu"), ("fp8", "torch")])
def test_logits_of_a_gpus_kernels_are_those_of_the_other_backends(
    make_checkpoint: Callable[..., Path], kept: str, other: str
) -> None:
    path = make_checkpoint("mistral")  # with a sliding window
    # A number near the middle between two codes may become either: int8 steps are 1/127 of a head's largest value.
    limit = QUANTIZED_TOLERANCE[kept, torch.float32]
    assert error(logits(path, "triton", kept), logits(path, other, kept)) <= limit


@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted kernels run without a GPU")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kept", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_an_engine_on_a_gpus_kernels_gives_the_tokens_of_one_on_torchs_operations(
    make_checkpoint: Callable[..., Path], kept: str
) -> None:
    path = make_checkpoint("mixtral", num_hidden_layers=1)
    short, requests = replace(GREEDY, max_tokens=5), [p[:n] for p, n in zip(prompts(3, 15), (6, 15, 9), strict=True)]
    models = [
        load_model(path, dtype="float32", device="cpu", backend=b, kv_cache_dtype=kept, progress=False)
        for b in ("torch", "triton")
    ]
    expected = [run(Engine(models[0]), [prompt], short)[0] for prompt in requests]
    page_bytes = bytes_per_page(models[1].spec, models[1].decoder.kv_dtype, 4)
    settings = {
        "chunks": EngineConfig(max_num_batched_tokens=7, block_size=4),
        "preemption": EngineConfig(block_size=4, kv_memory=7 * page_bytes),
    }
    for name, config in settings.items():
        engine = Engine(models[1], config)
        assert run(engine, requests, short) == expected
        assert (engine.stats().preemptions > 0) == (name == "preemption")
    assert models[1].decoder.backend._said == set(), "torch's operations ran in place of kernels"


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kept", [torch.int8, torch.float8_e4m3fn])
def test_a_copied_page_holds_what_its_source_held(model: LoadedModel, kept: torch.dtype, behind: bool) -> None:
    layer = allocate_layers(model.spec, 4, 8, kept, torch.device("cpu"), behind)[0]
    x_TGC = torch.randn(32, layer.keys_BGPC.shape[1], model.spec.layers[0].attention.rotary_channels)
    reference.write_kv(x_TGC, -x_TGC, layer, torch.arange(32))
    copy_pages([layer], [(3, 0), (0, 1)])
    for stored in (layer.keys_BGPC, layer.values_BGPC):
        pages = read_pages(stored, torch.arange(4), layer)
        before = read_pages(stored, torch.tensor([3, 2]), layer)
        assert torch.equal(pages[0], before[0])
        assert not torch.equal(pages[1], before[0])


def test_fp8_on_the_cpus_kernels_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype=fp8 does not run on the cpu backend; auto, int8 do"):
        load_model(path, dtype="bfloat16", kv_cache_dtype="fp8", backend="cpu", device="cpu", progress=False)


def test_the_same_memory_holds_twice_the_requests_before_one_is_preempted(path: Path, model: LoadedModel) -> None:
    plain = load_model(path, dtype="bfloat16", progress=False)
    config = EngineConfig(kv_memory=512 * 1024, max_num_seqs=64, enable_prefix_caching=False)
    engines = [Engine(model, config), Engine(plain, config)]
    pages = [engine.stats().total_pages for engine in engines]
    assert pages[0] == pytest.approx(pages[1] / HALF, abs=1)
    held = []
    for engine in engines:
        for count in range(1, 20):  # requests that begin small and grow to 8 pages each
            fresh = Engine(engine.model, config)
            run(fresh, prompts(count, 8), replace(GREEDY, max_tokens=120))
            if fresh.stats().preemptions:
                held.append(count - 1)
                break
    plain_requests = pages[1] // 8
    assert held[1] == plain_requests
    assert held[0] >= 1.75 * plain_requests


def test_certificates_are_refused_across_cache_formats(certify: Any, start_server: Any, tmp_path: Path) -> None:
    engine = LLM("tiny", progress=False).engine
    certify(tmp_path / "plain", deployment(engine.model, engine.runner.exits), 0.4, 0.3)
    server = start_server(
        resolve_model("tiny"), f"quality.certificates={json.dumps(str(tmp_path / 'plain'))}", "kv_cache_dtype=int8"
    )
    body = {"model": "tiny", "prompt": "def f(x):", "max_tokens": 4, "temperature": 0, "quality": {"alpha": 0.4}}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    reason = "keys_and_values: certified for 'bfloat16, nothing evicted', 'int8, nothing evicted' runs"
    assert reason in json.dumps(answer["usage"])


def test_an_unknown_format_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype must be auto, int8, fp8, not 'int7'"):
        load_model(path, kv_cache_dtype="int7", progress=False)
