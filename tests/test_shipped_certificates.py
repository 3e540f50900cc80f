"""The certificates that ship with tiny: valid for what runs here, and kept on prompts that made none of them."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from dynamoe.dynamic.contract.bounds import betting
from dynamoe.dynamic.contract.calibration_runs import prompts_hash
from dynamoe.dynamic.contract.catalog import CERTIFICATES, spent_under
from dynamoe.dynamic.contract.certificate import Certificate, load_certificate
from dynamoe.dynamic.contract.served_loss import token_losses
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.llm import LLM
from dynamoe.dynamic.model.machine import processor
from dynamoe.dynamic.studies.ledger import LEDGER
from dynamoe.dynamic.studies.requests import draw
from dynamoe.dynamic.text.prompt_file import read_prompts

DIRECTORY = resolve_model("tiny") / CERTIFICATES
CERTIFICATES_BY_ISA: dict[str, list[Certificate]] = {}
for file in sorted(DIRECTORY.glob("*.json")):
    found = load_certificate(file)
    CERTIFICATES_BY_ISA.setdefault(str(found.deployment["backend"]).removeprefix("cpu "), []).append(found)
ISAS = sorted(CERTIFICATES_BY_ISA)


@pytest.fixture(scope="module")
def tiny() -> Callable[[str], LLM]:
    models: dict[str, LLM] = {}

    def load(isa: str) -> LLM:
        LLM("tiny", progress=False)  # builds the kernels
        if torch.ops.dynamoe_cpu.find_isa(isa) < 0:
            pytest.skip(f"this processor has no {isa}")
        if isa not in models:
            models[isa] = LLM("tiny", backend=f"cpu:{isa}", progress=False)
        return models[isa]

    return load


def unseen(llm: LLM, certificate: Certificate) -> list[list[int]]:
    """Prompts of the file that neither chose nor tested the certificate's setting."""
    prompts = read_prompts(resolve_model("tiny") / "prompts.jsonl", llm.get_tokenizer())
    order, used = draw(prompts, len(prompts), 0, "the file"), certificate.requests + certificate.held_out.requests
    assert prompts_hash(order[:used]) == certificate.scope.prompts_hash
    return order[used:]


@pytest.mark.parametrize("isa", ISAS)
def test_they_hold_for_what_runs_here(isa: str, tiny: Callable[[str], LLM]) -> None:
    """Fails when the kernels compute something else, or tiny has changed: then `make certificates` makes new ones."""
    catalog = tiny(isa).catalog
    if catalog.refused and "Intel" not in processor():
        # torch's cosines, for one, may differ in the last bit there, and then the contracts do not hold.
        pytest.skip(f"calibrated on a processor of Intel, refused on {processor()}: {catalog.refused[0]}")
    assert catalog.refused == ()
    assert {c.id for c in catalog.contracts.certificates} == {c.id for c in CERTIFICATES_BY_ISA[isa]}
    assert {c.alpha for c in catalog.contracts.certificates} >= {0.02, 0.05, 0.1}


def test_the_ledger_has_every_one_of_them() -> None:
    entries = [json.loads(line) for line in (DIRECTORY / LEDGER).read_text().splitlines()]
    shipped = {c.id for certificates in CERTIFICATES_BY_ISA.values() for c in certificates}
    assert shipped <= {entry["proved"] for entry in entries}
    assert len(entries) >= 4 * len(ISAS)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_the_loss_on_other_prompts_is_within_the_level_at_every_length(isa: str, tiny: Callable[[str], LLM]) -> None:
    llm = tiny(isa)
    for certificate in CERTIFICATES_BY_ISA[isa]:
        longest = certificate.scope.max_tokens
        params = SamplingParams(temperature=0.0, max_tokens=longest, detokenize=False)
        prompts = [list(prompt) for prompt in unseen(llm, certificate)[:300]]
        outputs = llm.generate(prompts, spent_under(certificate, params), use_tqdm=False)
        losses = [losses_T for (losses_T,) in token_losses(llm.model.decoder, outputs, 0.0)]
        for length in (8, 16, 64, longest):
            loss_N = np.array([losses_T[:length].mean() for losses_T in losses])
            # The p-value of "the loss is at most alpha": bets that the agreement is below 1 - alpha.
            p = betting(1 - loss_N[None], 1 - certificate.alpha, 0.01)[0]
            assert p > 0.01, f"{certificate.alpha} at {length} tokens: {loss_N.mean():.4f}"
            assert loss_N.mean() > 0


def test_an_output_without_a_limit_is_certified_at_its_beginning(tiny: Callable[[str], LLM]) -> None:
    llm = tiny(ISAS[-1])
    params = SamplingParams(temperature=0.0, max_tokens=None, quality={"alpha": 0.1})
    (output,) = llm.generate([unseen(llm, CERTIFICATES_BY_ISA[ISAS[-1]][0])[0]], params, use_tqdm=False)
    assert output.contract is not None
    assert output.contract.certificate is not None
    longest = output.contract.certified_tokens
    assert longest is not None
    layers = output.outputs[0].layers
    assert min(layers[:longest]) < 16
    assert set(layers[longest:]) <= {16}
    assert output.contract.exact_after == (longest if len(layers) > longest else None)
