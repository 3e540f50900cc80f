"""Which families run all layers of a step in one call of the C++ kernels, with the bits of single operations; and why
the others do not. A family that falls back one day fails here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import FAMILIES as PLAIN
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.families import FAMILIES
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.stack import build_stack
from dynamoe.kernels.api.stack import NotStacked
from family_parity import Variant
from parallel_jobs import compare
from test_cpu_stack import assert_equal_steps, steps
from test_families_parity_attention import MORE as MORE_ATTENTION
from test_families_parity_attention import VARIANTS as ATTENTION
from test_families_parity_gpt_oss import VARIANTS as GPT_OSS
from test_families_parity_granite_swa import FIRST as GRANITE_SWA
from test_families_parity_granite_swa import MORE as MORE_GRANITE_SWA
from test_families_parity_latent import FAST as LATENT
from test_families_parity_nemotron import VARIANTS as NEMOTRON
from test_families_parity_norms import FIRST as NORMS
from test_families_parity_norms import MORE as MORE_NORMS
from test_families_parity_shared import MORE as MORE_SHARED
from test_families_parity_shared import VARIANTS as SHARED
from test_families_parity_states import MORE as MORE_STATES
from test_families_parity_states import VARIANTS as STATES
from test_fingerprint import Watch
from test_loader import as_dynamoe

# Families that run operation by operation, by the first reason; all others run in the stack.
UNSTACKED: dict[str, set[str]] = {
    "experts that read and give latents": {"nemotron_h"},
    "attention of kind 'mamba1'": {"jamba"},
    "attention of kind 'kimi_delta'": {"kimi_linear"},
}
OWN = {"dynamoe", "kimi_k2"}  # which transformers does not write: tests of their own


def family_of(variant: Variant) -> str:
    """By our name: the text parts of larger models go by theirs."""
    return variant.family.removesuffix("_text") if "qwen3_5" in variant.family else variant.family


FIRST: dict[str, Variant] = {
    family_of(variant): variant
    for variant in reversed(
        [
            *(Variant(family=family, config=config) for family, config in PLAIN.items()),
            *(
                *SHARED,
                *ATTENTION,
                *NORMS,
                *NEMOTRON,
                *STATES,
                *MORE_STATES,
                GRANITE_SWA,
                GPT_OSS["mxfp4"],
                *LATENT.values(),
            ),
            *(variant for variant in MORE_ATTENTION if variant.family == "glm"),
        ]
    )
}
# The longest context of `steps` has 16 tokens.
FIRST["llama4_text"] = replace(
    FIRST["llama4_text"], config={**FIRST["llama4_text"].config, "attention_chunk_size": 8, "floor_scale": 4}
)
MORE = [
    *(*MORE_SHARED, *MORE_ATTENTION, *MORE_NORMS, *MORE_GRANITE_SWA, GPT_OSS["unbiased"]),
    Variant(family="olmoe", config={**PLAIN["olmoe"], "clip_qkv": 0.7}),
    Variant(
        family="llama4_text",
        config={**FIRST["llama4_text"].config, "layer_types": ["chunked_attention"] * 4, "no_rope_layers": [1] * 4},
    ),
]
CASES = [*FIRST, *(pytest.param(variant, marks=pytest.mark.slow, id=str(variant)) for variant in MORE)]


def reason_of(family: str) -> str:
    return next((reason for reason, families in UNSTACKED.items() if family in families), "")


def test_every_family_is_counted() -> None:
    assert {*FIRST, *OWN} == set(FAMILIES)
    counts = Counter(reason_of(family) for family in FIRST)
    assert counts == {"": 51, **{reason: len(families) for reason, families in UNSTACKED.items()}}


@pytest.mark.parametrize("case", CASES)
def test_a_family_runs_in_one_call_or_says_why_not(case: str | Variant, tmp_path: Path) -> None:
    variant = FIRST[case] if isinstance(case, str) else case
    directory = variant.save(tmp_path)
    for dtype in ("bfloat16",) if isinstance(case, str) else ("float32", "bfloat16"):
        decoder = load_decoder(directory, dtype=dtype, backend="cpu")
        if reason := why_not(decoder, variant):
            with pytest.raises(NotStacked) as refused:
                build_stack(decoder.backend, decoder.spec, decoder.layers, decoder.held, ())
            assert str(refused.value) == reason
            assert decoder.stack is None
            continue
        assert decoder.stack is not None
        with Watch() as watch:
            steps(decoder)
        assert set(watch.calls) <= {"embed"}  # all else is in the stack's own call
        assert_equal_steps(decoder, limited=any(layer.moe for layer in decoder.spec.layers))


def why_not(decoder: Decoder, variant: Variant) -> str:
    rules = [layer.moe.router for layer in decoder.spec.layers if layer.moe]
    if any(rule.weight_on_input and rule.top_k > 1 for rule in rules):
        return "weights on the input of several experts"
    return reason_of(family_of(variant))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_that_are_always_on_run_in_one_call(copy_checkpoint: Callable[..., Path], dtype: str) -> None:
    path = copy_checkpoint("llama")
    as_dynamoe(path, num_experts=8, always_on=2, per_token=3)
    decoder = load_decoder(path, dtype=dtype, backend="cpu")
    assert decoder.stack is not None
    assert_equal_steps(decoder, limited=True)


@pytest.mark.slow  # processes
@pytest.mark.parametrize("family", ["gemma4_text", "afmoe", "mimo_v2_flash"])
def test_several_processes_run_their_heads_and_neurons_in_the_stack(family: str, tmp_path: Path) -> None:
    """What each leaves is added up before it is normed."""
    compare(tmp_path, str(FIRST[family].save(tmp_path / "model")), {"tensor": 2})
