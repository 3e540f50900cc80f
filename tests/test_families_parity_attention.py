"""Families whose layers differ in how they see positions, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COMMON, randomize
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.model.channel_order import in_order, inverse
from dynamoe.dynamic.model.families import model_spec
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.rope import RopeSpec, frequencies, rope_table, rotary_order
from dynamoe.kernels.reference.operations import rope
from family_parity import Variant, check_variant
from test_decoder import TOLERANCE, PagedSequences, error, random_prompts

WINDOWS = {"head_dim": 24, "sliding_window": 9}
GROWTH = {"llama_4_scaling_beta": 0.7}
FOUR = {"num_hidden_layers": 4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
LONGROPE = {
    **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 256, "factor": 2.0},
    **{"short_factor": [1.0, 1.5, 2.0, 4.0], "long_factor": [1.5, 2.0, 2.5, 9.0]},
}
SCALES = {
    **{"embedding_multiplier": 3.0, "attention_multiplier": 0.35, "residual_multiplier": 0.6, "logits_scaling": 1.7},
}
FULL, SLIDING = "full_attention", "sliding_attention"
ROUTED = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
ROPES = {
    FULL: {**YARN, "rope_theta": 5e3, "partial_rotary_factor": 1.0},
    SLIDING: {"rope_type": "default", "rope_theta": 1e3},
}
MIMO = {
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 24},
    **{"v_head_dim": 16, "sliding_window": 9},
}
LLAMA4 = {
    **{"num_local_experts": 6, "num_experts_per_tok": 1, "intermediate_size": 40, "intermediate_size_mlp": 72},
    **{"head_dim": 24, "attention_chunk_size": 32, "floor_scale": 8, "attn_scale": 0.6},
}


def random_tensors(model: torch.nn.Module) -> None:
    """Selection biases and sinks decide something; experts whose inputs are their first dimension."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
        if "e_score_correction_bias" in name:
            tensor.normal_(0.0, 0.3, generator=generator)
        elif "sinks" in name:
            tensor.normal_(1.0, 1.5, generator=generator)


def variant(family: str, **config: Any) -> Variant:
    return Variant(family=family, config=config, prepare=random_tensors)


VARIANTS = [
    variant("smollm3", **FOUR, no_rope_layers=[1, 0, 1, 0], use_sliding_window=True, sliding_window=11),
    variant("ministral3", head_dim=24, max_position_embeddings=128, rope_parameters={**YARN, **GROWTH}),
    variant("granite", **SCALES),
    variant("phi3", partial_rotary_factor=0.5, rope_parameters=LONGROPE, original_max_position_embeddings=256),
    variant("hunyuan_v1_dense", head_dim=24, rope_parameters={"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0}),
    variant("glm4", head_dim=24),
    variant("mellum", **ROUTED, **FOUR, **WINDOWS, layer_types=[SLIDING, FULL] * 2, rope_parameters=ROPES),
    variant("exaone_moe", **ROUTED, **FOUR, sliding_window_pattern=2, sliding_window=9),
    variant("mimo_v2_flash", **MIMO, layer_types=[FULL, SLIDING, SLIDING], rope_parameters=ROPES),
    variant("llama4_text", **LLAMA4, **FOUR, no_rope_layers=[1, 0, 1, 0], interleave_moe_layer_step=2),
]
MORE = [
    variant("smollm3", **FOUR, attention_bias=True, mlp_bias=True),
    variant("phi3", sliding_window=9),
    variant("glm", head_dim=24, attention_bias=True, partial_rotary_factor=1.0),
    variant("mellum", **ROUTED, mlp_layer_types=["sparse", "dense", "sparse"], attention_bias=True),
    variant("exaone_moe", **ROUTED, n_group=4, topk_group=2, num_shared_experts=2, sliding_window=9),
    variant("exaone_moe", **ROUTED, sliding_window=None, layer_types=[FULL] * 3),
    variant("mimo_v2_flash", **MIMO, attention_bias=True, attention_value_scale=None),
    variant("mimo_v2_flash", **MIMO, **FOUR, layer_types=[FULL, SLIDING] * 2, rope_parameters=ROPES),
    variant("llama4_text", **{**LLAMA4, "num_experts_per_tok": 2}, use_qk_norm=False, attention_bias=True),
    variant("llama4_text", **LLAMA4, attn_temperature_tuning=False, moe_layers=[1], no_rope_layer_interval=2),
]


@pytest.mark.parametrize(
    "variant", [*VARIANTS, *(pytest.param(variant, marks=pytest.mark.slow) for variant in MORE)], ids=str
)
def test_family(variant: Variant, tmp_path: Path, reference_model: Callable[[Path], Any]) -> None:
    check_variant(variant, tmp_path, reference_model)


@pytest.mark.parametrize(
    ("family", "rotated", "interleaved"),
    [("llama", 24, False), ("glm4_moe", 12, False), ("ernie4_5_moe", 24, True), ("glm4", 8, True), ("glm4", 24, True)],
)
def test_one_rotation_serves_all_layouts(family: str, rotated: int, interleaved: bool) -> None:
    """Scores of reordered heads, rotated in halves, are those of transformers' rotation of heads as they are stored."""
    channels, length = 24, 5
    theirs = import_module(f"transformers.models.{family}.modeling_{family}")
    q_THC, k_THC = torch.randn(2, length, 3, channels, generator=torch.Generator().manual_seed(0))
    angles = torch.outer(torch.arange(length).float(), frequencies(RopeSpec(head_dim=rotated)))
    tables = [torch.cat((part, part), -1)[None] for part in (angles.cos(), angles.sin())]
    rotated_q, rotated_k = theirs.apply_rotary_pos_emb(q_THC[None], k_THC[None], *tables, unsqueeze_dim=2)
    expected = torch.einsum("qhc,khc->hqk", rotated_q[0], rotated_k[0])

    order = rotary_order(channels, rotated, interleaved)
    assert bool(order) == (family != "llama")
    table_LC = rope_table(RopeSpec(head_dim=rotated, unrotated=channels - rotated), length)
    positions_T = torch.arange(length)
    ours = [
        rope(in_order(x_THC.reshape(length, -1).T, order).T.reshape(x_THC.shape), table_LC, positions_T)
        for x_THC in (q_THC, k_THC)
    ]
    torch.testing.assert_close(torch.einsum("qhc,khc->hqk", *ours), expected, rtol=1e-5, atol=1e-5)
    rows = torch.randn(3 * channels, 4)
    assert torch.equal(in_order(in_order(rows, order), inverse(order)), rows)


def test_channels_that_are_not_rotated_stay_bitwise() -> None:
    table_LC = rope_table(RopeSpec(head_dim=4, unrotated=8, attention_factor=1.3), 50)
    x_TGC = torch.randn(50, 2, 12)
    out_TGC = rope(x_TGC, table_LC, torch.arange(50))
    kept = [2, 3, 4, 5, 8, 9, 10, 11]
    assert torch.equal(out_TGC[..., kept], x_TGC[..., kept])
    assert torch.equal(rope(x_TGC, rope_table(RopeSpec(head_dim=0, unrotated=12), 50), torch.arange(50)), x_TGC)


def test_published_words_of_mimo() -> None:
    """Layers' types, keys and rotations under the published names load where they say what the family computes."""
    published = {
        **{"hybrid_layer_pattern": [0, 1, 1], "moe_layer_freq": [0, 1, 1], "swa_num_key_value_heads": 4},
        **{
            "swa_head_dim": 24,
            "swa_v_head_dim": 16,
            "rope_theta": 5e6,
            "swa_rope_theta": 1e4,
            "sliding_window_size": 8,
        },
        **{"add_swa_attention_sink_bias": True, "partial_rotary_factor": 0.334, "layernorm_epsilon": 1e-5},
    }
    config = {**COMMON, **MIMO, "model_type": "mimo_v2_flash"}
    assert model_spec({**config, **published}) == model_spec(config)
    for key, value in {"swa_head_dim": 16, "hybrid_layer_pattern": [1, 1, 1], "moe_layer_freq": [0]}.items():
        with pytest.raises(CheckpointError, match=f"{key} must be"):
            model_spec({**config, **published, key: value})


def test_text_part_of_llama4(tmp_path: Path) -> None:
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    sizes |= dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), 32)
    settings = Llama4Config(text_config={**COMMON, **LLAMA4}, vision_config={**sizes, "intermediate_size": 64})
    model = Llama4ForConditionalGeneration(settings).float().eval()
    randomize(model, 0)
    model.save_pretrained(tmp_path)
    prompt = random_prompts([60])[0]
    with torch.inference_mode():
        expected = model.language_model(torch.tensor([prompt])).logits[0]
    decoder = load_decoder(tmp_path, dtype="float32", device="cpu")
    assert error(PagedSequences(decoder, 1).run([prompt]), expected) < TOLERANCE
