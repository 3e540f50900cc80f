"""Families whose norms, caps and scales differ from Llama's, against transformers; and that each of these matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from family_parity import Variant, check_engine, check_logits

MOE = {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40}
GEMMA2 = {"head_dim": 24, "query_pre_attn_scalar": 30, "sliding_window": 8, "attn_logit_softcapping": 3.0}
PHIMOE = {"num_local_experts": 6, "intermediate_size": 40, "lm_head_bias": True, "attention_bias": True}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA3 = {"head_dim": 24, "query_pre_attn_scalar": 30, "sliding_window": 8, "layer_types": KINDS}
COHERE = {
    **{**MOE, "head_dim": 24, "sliding_window": 8, "logit_scale": 0.7, "num_shared_experts": 2},
    **{"layer_types": ["full_attention", "sliding_attention", "full_attention"], "prefix_dense_intermediate_size": 56},
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
AFMOE = {
    **{"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_shared_experts": 2},
    **{"head_dim": 24, "sliding_window": 8, "layer_types": KINDS, "mup_enabled": True, "route_scale": 2.2},
}
FIRST = [
    Variant(family="olmo2", config={"num_key_value_heads": 4}),
    Variant(family="flex_olmo", config=MOE),
    Variant(family="gemma2", config=GEMMA2),
    Variant(family="phimoe", config=PHIMOE),
    Variant(family="olmo3", config={"sliding_window": 8, "layer_types": KINDS}),
    Variant(family="gemma3_text", config=GEMMA3),
    Variant(family="cohere2_moe", config=COHERE),
    Variant(family="afmoe", config=AFMOE),
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
    Variant(
        family="olmo3",
        config={
            **{"sliding_window": 8, "num_hidden_layers": 4, "attention_bias": True},
            "rope_parameters": {
                "full_attention": {
                    **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
                    "rope_theta": 3000.0,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
            },
        },
    ),
    Variant(
        family="gemma3_text",
        config={
            **{**GEMMA3, "layer_types": None, "num_hidden_layers": 7, "final_logit_softcapping": 4.0},
            **{"attention_bias": True, "tie_word_embeddings": False},
        },
    ),
    Variant(family="cohere2_moe", config={**COHERE, "mlp_layer_types": None, "num_shared_experts": 0}),
    Variant(
        family="cohere2_moe",
        config={
            **{**COHERE, "layer_types": None, "num_hidden_layers": 4, "rms_norm_eps": 1e-3, "attention_bias": True},
            **{"mlp_layer_types": ["dense", "dense", "sparse", "sparse"], "expert_selection_fn": "sigmoid"},
            **{"shared_expert_combination_strategy": "sum", "prefix_dense_sliding_window_pattern": 2},
        },
    ),
    Variant(
        family="cohere2_moe",
        config={**COHERE, "expert_selection_fn": "sigmoid", "norm_topk_prob": False, "tie_word_embeddings": False},
    ),
    Variant(
        family="afmoe",
        config={**AFMOE, "layer_types": None, "num_hidden_layers": 4, "num_dense_layers": 2, "attention_bias": True},
    ),
    Variant(family="afmoe", config={**AFMOE, "mup_enabled": False, "num_dense_layers": 0, "tie_word_embeddings": True}),
    Variant(family="flex_olmo", config={**MOE, "norm_topk_prob": True, "attention_bias": True}),
]
CASES = [*FIRST, *(pytest.param(variant, marks=pytest.mark.slow) for variant in MORE)]


@pytest.mark.parametrize("variant", CASES, ids=str)
def test_a_family_equals_transformers(variant: Variant, tmp_path: Path, reference_model: Any) -> None:
    directory = variant.save(tmp_path)
    reference = reference_model(directory)
    check_logits(directory, reference)
    check_engine(directory, reference)
