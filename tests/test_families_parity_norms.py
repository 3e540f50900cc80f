"""Families whose norms, caps and scales differ from Llama's, against transformers; and that each of these matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from family_parity import Variant, check_engine, check_logits

MOE = {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40}
GEMMA2 = {"head_dim": 24, "query_pre_attn_scalar": 30, "sliding_window": 8, "attn_logit_softcapping": 3.0}
PHIMOE = {"num_local_experts": 6, "intermediate_size": 40, "lm_head_bias": True, "attention_bias": True}
FIRST = [
    Variant(family="olmo2", config={"num_key_value_heads": 4}),
    Variant(family="flex_olmo", config=MOE),
    Variant(family="gemma2", config=GEMMA2),
    Variant(family="phimoe", config=PHIMOE),
]
MORE = [
    Variant(family="olmo2", config={"attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 0.1}),
    Variant(family="gemma2", config={**GEMMA2, "final_logit_softcapping": None, "tie_word_embeddings": False}),
    Variant(
        family="gemma2",
        config={
            **GEMMA2,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": 5.0,
            "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    Variant(family="phimoe", config={**PHIMOE, "lm_head_bias": False, "attention_bias": False, "sliding_window": 9}),
    Variant(family="flex_olmo", config={**MOE, "norm_topk_prob": True, "attention_bias": True}),
]
CASES = [*FIRST, *(pytest.param(variant, marks=pytest.mark.slow) for variant in MORE)]


@pytest.mark.parametrize("variant", CASES, ids=str)
def test_a_family_equals_transformers(variant: Variant, tmp_path: Path, reference_model: Any) -> None:
    directory = variant.save(tmp_path)
    reference = reference_model(directory)
    check_logits(directory, reference)
    check_engine(directory, reference)
