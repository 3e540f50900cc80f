"""Quality contracts with quantised weights: certificates of other weights are refused, their own are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from dynamoe.dynamic.contract.deployment import deployment
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.engine.quality import Quality
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.llm import LLM

ALPHA = 0.4
REASON = "quantisation: certified for 'none', '{}, LM head and embedding int8' runs"


@pytest.fixture(scope="module")
def of_plain_weights(certify: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of what runs when nothing is quantised."""
    root = tmp_path_factory.mktemp("certificates")
    engine = LLM("tiny", progress=False).engine
    certify(root / "plain", deployment(engine.model, engine.runner.exits), ALPHA, 0.3)
    return root / "plain"


@pytest.mark.parametrize("method", ["int8", "w8a8", "int4"])
def test_certificates_of_other_weights_are_refused(
    certify: Any, of_plain_weights: Path, tmp_path: Path, method: str
) -> None:
    llm = LLM("tiny", quantization=method, progress=False, certificates=of_plain_weights)
    output = ask(llm, Quality(alpha=ALPHA))
    assert output.contract.certificate is None
    assert REASON.format(method) in output.contract.reason
    exact = ask(llm, "exact")
    assert output.outputs[0].token_ids == exact.outputs[0].token_ids
    # And the other way round: a model that is not quantised refuses those of one that is.
    certify(tmp_path / "own", deployment(llm.engine.model, llm.engine.runner.exits), ALPHA, 0.3)
    plain = LLM("tiny", progress=False, certificates=tmp_path / "own")
    reason = ask(plain, Quality(alpha=ALPHA)).contract.reason
    assert f"quantisation: certified for '{method}, LM head and embedding int8', 'none' runs" in reason


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_their_own_certificates_hold_whoever_else_is_served(
    certify: Any, of_plain_weights: Path, tmp_path: Path, method: str
) -> None:
    engine = LLM("tiny", quantization=method, progress=False).engine
    own = certify(tmp_path / "own", deployment(engine.model, engine.runner.exits), ALPHA, 0.3)
    llm = LLM("tiny", quantization=method, progress=False, certificates=tmp_path / "own", enable_prefix_caching=False)
    params = [SamplingParams(temperature=0.0, max_tokens=12, quality=q) for q in (Quality(alpha=ALPHA), "exact")] * 2
    lines = (resolve_model("tiny") / "prompts.jsonl").read_text().splitlines()[:4]
    prompts = [json.loads(line)["prompt"] for line in lines]
    alone = [llm.generate([p], s, use_tqdm=False)[0] for p, s in zip(prompts, params, strict=True)]
    together = llm.generate(prompts, params, use_tqdm=False)
    for one, among in zip(alone, together, strict=True):
        assert (one.outputs[0].token_ids, one.outputs[0].layers) == (
            among.outputs[0].token_ids,
            among.outputs[0].layers,
        )
    contracts = [output.contract for output in together[::2]]
    assert [contract.certificate for contract in contracts] == [own.id] * 2
    assert any(depth < 16 for output in together[::2] for depth in output.outputs[0].layers), "some leave early"


def test_a_server_says_why_it_refuses(start_server: Any, of_plain_weights: Path) -> None:
    server = start_server(
        resolve_model("tiny"), f"quality.certificates={json.dumps(str(of_plain_weights))}", "quantization=int8"
    )
    body = {"model": "tiny", "prompt": "def f(x):", "max_tokens": 4, "temperature": 0, "quality": {"alpha": ALPHA}}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
    assert REASON.format("int8") in json.dumps(answer["usage"], ensure_ascii=False)


def ask(llm: LLM, quality: Any) -> Any:
    params = SamplingParams(temperature=0.0, max_tokens=8, quality=quality)
    return llm.generate(["def f(x):"], params, use_tqdm=False)[0]
