"""Outputs that are longer than their certificate: certified up to there, then computed anew and exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from dynamoe.dynamic.contract.deployment import deployment
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.outputs import RequestOutput
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.llm import LLM
from dynamoe.dynamic.model.load_config import LoadConfig

COVERED, WHOLE, LAYERS = 12, 60, 16
PROMPTS = [[5, 9, 33, 100, 7], list(range(40, 70)), [200] * 17]
BOUNDED: dict[str, Any] = {"temperature": 0.0, "ignore_eos": False, "detokenize": False, "quality": {"alpha": 0.5}}


@pytest.fixture(scope="module")
def certificates(certify: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    llm, directory = LLM("tiny", progress=False), tmp_path_factory.mktemp("certificates")
    running = deployment(llm.model, llm.engine.runner.exits)
    certify(directory, running, 0.5, 0.6, keep=0.6, max_tokens=COVERED)
    certify(directory, running, 0.5, 0.6, max_tokens=COVERED, lowest_temperature=0.9, highest_temperature=0.9)
    return directory


def loaded(certificates: Path, **engine: Any) -> LLM:
    path = resolve_model("tiny")
    llm = LLM.from_config(path, LoadConfig(), EngineConfig(**engine), certificates=certificates, progress=False)
    assert llm.catalog.contracts.certificates
    return llm


def generate(llm: LLM, prompts: list[list[int]], **params: Any) -> list[RequestOutput]:
    return llm.generate([list(p) for p in prompts], SamplingParams(**{**BOUNDED, **params}), use_tqdm=False)


def check(llm: LLM, outputs: list[RequestOutput], **params: Any) -> None:
    """What was served is the bounded output's beginning, then what the full model says behind it."""
    short = generate(llm, PROMPTS, max_tokens=COVERED, **params)
    for output, bounded in zip(outputs, short, strict=True):
        assert output.contract is not None
        assert (output.contract.certified_tokens, output.contract.exact_after) == (COVERED, COVERED)
        assert bounded.contract is not None
        assert bounded.contract.exact_after is None
        for completion, beginning in zip(output.outputs, bounded.outputs, strict=True):
            assert completion.token_ids[:COVERED] == beginning.token_ids
            assert completion.layers[:COVERED] == beginning.layers
            assert set(completion.layers[COVERED:]) == {LAYERS}
    assert any(min(output.outputs[0].layers) < LAYERS for output in outputs)


def test_behind_the_certified_length_every_token_is_the_full_models(certificates: Path) -> None:
    llm = loaded(certificates)
    outputs = generate(llm, PROMPTS, max_tokens=WHOLE)
    check(llm, outputs)
    begun = [[*output.prompt_token_ids, *output.outputs[0].token_ids[:COVERED]] for output in outputs]
    exact = generate(llm, begun, max_tokens=WHOLE - COVERED, quality="exact")
    assert [output.outputs[0].token_ids[COVERED:] for output in outputs] == [e.outputs[0].token_ids for e in exact]


@pytest.mark.parametrize(
    "engine",
    [
        {"max_num_seqs": 2},  # a sequence waits until there is room for it again
        {"kv_memory": 16 * 2 * 2 * 32 * 2 * 16 * 8, "max_model_len": 96},  # eight pages: sequences take each other's
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 16},  # computed again in chunks
    ],
)
def test_neighbours_and_lost_pages_change_no_token(certificates: Path, engine: dict[str, Any]) -> None:
    expected = generate(loaded(certificates), PROMPTS, max_tokens=WHOLE)
    llm = loaded(certificates, **engine)
    outputs = generate(llm, PROMPTS, max_tokens=WHOLE)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    assert all(o.contract is not None and o.contract.exact_after == COVERED for o in outputs)
    if "kv_memory" in engine:
        assert llm.engine.stats().preemptions > 0
    assert llm.engine.stats().free_pages == llm.engine.stats().total_pages


def test_every_completion_goes_on_exactly_for_itself(certificates: Path) -> None:
    llm = loaded(certificates)
    drawn = {"temperature": 0.9, "seed": 4, "n": 3}
    outputs = generate(llm, PROMPTS, max_tokens=WHOLE, **drawn)
    check(llm, outputs, **drawn)


def test_an_output_that_ends_in_time_runs_nothing_again(certificates: Path) -> None:
    llm = loaded(certificates)
    (output,) = generate(llm, PROMPTS[:1], max_tokens=COVERED)
    assert output.contract is not None
    assert (output.contract.certified_tokens, output.contract.exact_after) == (COVERED, None)
    assert output.compute is not None
    assert output.compute.segment_rows[0] == len(PROMPTS[0]) + COVERED - 1
    (longer,) = generate(llm, PROMPTS[:1], max_tokens=COVERED + 1)
    assert longer.compute is not None
    cached = longer.num_cached_tokens
    again = longer.compute.segment_rows[0] + cached - (len(PROMPTS[0]) + COVERED - 1)
    assert again == len(PROMPTS[0]) + COVERED  # the prompt and all certified tokens


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"max_tokens": 7}, "covers max_tokens from 8 on, not max_tokens=7"),
        ({"max_tokens": WHOLE, "stop": ("x",), "detokenize": True}, "not at stop strings or tokens"),
        ({"max_tokens": WHOLE, "stop_token_ids": (9,)}, "not at stop strings or tokens"),
    ],
)
def test_other_ends_are_outside(certificates: Path, params: dict[str, Any], reason: str) -> None:
    (output,) = generate(loaded(certificates), PROMPTS[:1], **params)
    assert output.contract is not None
    assert output.contract.certificate is None
    assert reason in output.contract.reason


def test_usage_says_where(start_server: Callable[..., Any], certificates: Path, tmp_path: Path) -> None:
    file = f"quality.monitor.file={json.dumps(str(tmp_path / 'monitor.db'))}"
    options = [f"quality.certificates={json.dumps(str(certificates))}", file, "quality.monitor.share=1"]
    server = start_server(resolve_model("tiny"), *options)
    chat = {"messages": [{"role": "user", "content": "Options"}], "temperature": 0, "quality": {"alpha": 0.5}}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=chat | {"max_tokens": WHOLE}, timeout=60).json()
    compute = answer["usage"]["compute"]
    assert (compute["quality"], compute["certified_tokens"]) == ("bounded", COVERED)
    assert compute["exact_after"] == COVERED
    body = {"prompt": PROMPTS[0], "max_tokens": COVERED, "temperature": 0, "quality": {"alpha": 0.5}}
    compute = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["usage"]["compute"]
    assert (compute["quality"], compute["certified_tokens"], compute["exact_after"]) == ("bounded", COVERED, None)
    exact = httpx.post(f"{server.url}/v1/completions", json=body | {"quality": "exact"}, timeout=60).json()
    assert exact["usage"]["compute"]["certified_tokens"] is None
