"""Keys and values in int8: half the memory, the same tokens however the engine cuts, caches and preempts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from dynamoe.dynamic.deployment import deployment
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.llm import LLM
from dynamoe.dynamic.loader import LoadedModel, load_decoder, load_model
from dynamoe.dynamic.model_store import resolve_model
from dynamoe.dynamic.prompt_pass import fresh_cache
from dynamoe.dynamic.sampling_params import SamplingParams
from dynamoe.exits.segments import Segment
from dynamoe.kernels.tolerance import error

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


@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_logits_are_near_those_of_an_unquantised_cache(make_checkpoint: Callable[..., Path], backend: str) -> None:
    path = make_checkpoint("llama")  # without routers, whose choices may flip

    def logits(kv_cache_dtype: str) -> torch.Tensor:
        decoder = load_decoder(path, dtype="float32", backend=backend, device="cpu", kv_cache_dtype=kv_cache_dtype)
        tokens_T = torch.tensor(prompts(1, 50)[0])
        kv, batch = fresh_cache(decoder, [50])
        assert kv[0].coded == (kv_cache_dtype == "int8")
        whole = Segment(index=0, layers=range(decoder.spec.num_layers))
        return decoder.logits(decoder.run_segment(whole, decoder.embed(tokens_T), kv, batch))

    assert 1e-5 < error(logits("int8"), logits("auto")) < 0.03


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
    with pytest.raises(ValueError, match="kv_cache_dtype must be auto, int8, not 'int7'"):
        load_model(path, kv_cache_dtype="int7", progress=False)
