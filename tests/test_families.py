"""config.json → ModelSpec: what is understood, what is refused, and that every error names the key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.model.attention.gqa import GqaSpec
from dynamoe.dynamic.model.families import FAMILIES, model_spec
from dynamoe.dynamic.model.family_tables.latent import LATENT
from dynamoe.dynamic.model.rope import RopeSpec, frequencies, rope_table
from dynamoe.dynamic.model.text_part import text_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
MOE = {**LLAMA, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def windows(**config: Any) -> list[int | None]:
    return [layer.window for layer in model_spec({**LLAMA, **config}).layers]


def test_defaults_are_those_of_transformers() -> None:
    spec = model_spec({key: value for key, value in LLAMA.items() if key != "num_key_value_heads"})
    attention = spec.layers[0].attention
    assert isinstance(attention, GqaSpec)
    assert (attention.num_kv_heads, attention.head_dim, spec.norm_eps, spec.activation) == (4, 16, 1e-6, "silu")
    assert (attention.qkv_bias, attention.o_bias, spec.mlp_bias, spec.tie_embeddings) == (False, False, False, False)
    assert spec.rope == RopeSpec(head_dim=16, theta=10000.0, original_max_position=256)
    assert attention.scale == 0.25
    assert spec.eos_token_ids == ()
    mixtral = model_spec({**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2})
    assert (mixtral.rope.theta, mixtral.norm_eps) == (1e6, 1e-5)


def test_end_of_sequence_ids_may_be_one_or_many() -> None:
    assert model_spec({**LLAMA, "eos_token_id": 7}).eos_token_ids == (7,)
    assert model_spec({**LLAMA, "eos_token_id": [7, 9]}).eos_token_ids == (7, 9)


def test_sliding_windows_follow_each_family() -> None:
    assert windows(model_type="mistral") == [4096] * 4
    assert windows(model_type="mistral", sliding_window=None) == [None] * 4
    assert windows(model_type="qwen2", sliding_window=8) == [None] * 4
    qwen = {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}
    assert windows(**qwen, max_window_layers=2) == [None, None, 8, 8]
    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows(**qwen, layer_types=kinds) == [8, None, 8, None]
    moe = {**MOE, **qwen, "model_type": "qwen2_moe", "max_window_layers": 3}
    assert windows(**moe) == [8, None, 8, None]
    assert windows(**{**moe, "model_type": "qwen3_moe"}) == [8] * 4


def test_layers_without_experts() -> None:
    def has_experts(**config: Any) -> list[bool]:
        return [layer.moe is not None for layer in model_spec({**MOE, "model_type": "qwen3_moe", **config}).layers]

    assert has_experts() == [True] * 4
    assert has_experts(mlp_only_layers=[0, 3]) == [False, True, True, False]
    assert has_experts(decoder_sparse_step=2) == [False, True, False, True]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama, mistral"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "64"}, "hidden_size must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        ({"head_dim": 0}, "head_dim must be at least 1, not '0'"),
        ({"head_dim": 15}, "even head_dim, not 15"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
        ({"hidden_act": "relu2"}, "hidden_act must be one of silu"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, not 'yes'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\} is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not supported"),
        ({"sliding_window": 64}, "sliding_window=64 is not supported for model_type 'llama'"),
        ({"residual_multiplier": 0.5}, "residual_multiplier=0.5 is not supported"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias=True is not supported"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a positive whole number or null"),
        ({"model_type": "mistral", "layer_types": ["sliding_attention"]}, "layer_types="),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}, "layer_types must be full_attention or"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "an entry for every layer"),
        ({"model_type": "mixtral"}, "lacks num_local_experts"),
        ({"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 5}, "top_k must be between 1 and"),
        ({"model_type": "dynamoe", "num_experts": 4, "num_always_on_experts": 4, "expert_size": 8}, "less than num_ex"),
        ({"model_type": "dynamoe", "num_experts": 4, "num_experts_per_tok": 5, "expert_size": 8}, "between 1 and 4"),
        ({"made_up": 3}, "made_up=3 is not supported for model_type 'llama', and ignoring it could give wrong"),
        ({"num_experts": 8}, "num_experts=8 is not supported for model_type 'llama'"),
        ({"per_layer_config": {"1": {"head_dim": 8}}}, "per_layer_config="),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers must be a whole number of at least 0 and at most 10000"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling",
        ),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2}}, "type must be the same as rope_type"),
        ({"rope_scaling": {"type": "longropes", "factor": 2}}, "type must be one of default, linear"),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2}},
            "short_factor must be a list of numbers",
        ),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": 2}}, "long_factor must be a list"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1], "attention_factor": 1}},
            "channels cannot have 1 factors",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope_parameters lacks factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor of the rotary embedding must be positive, not 0"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": [1]}}, r"mrope_section=\[1\]"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rotary_factor must be 1"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set of values for all layers"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "rope_parameters lacks low_freq_factor"),
    ],
)
def test_errors_name_what_is_wrong(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        model_spec({**LLAMA, **config})


def test_keys_at_their_neutral_value_are_accepted() -> None:
    neutral = {"attention_bias": False, "partial_rotary_factor": 1.0, "layer_types": ["full_attention"] * 4}
    harmless = {"quantization_config": None, "attention_dropout": 0.1, "use_cache": True, "_notes": 3}
    assert model_spec({**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, **neutral})
    assert model_spec({**LLAMA, **neutral, **harmless}) == model_spec(LLAMA)


@pytest.mark.parametrize(
    "new",
    [
        {"rope_type": "default", "rope_theta": 5e5},
        {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
        {
            **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        },
        {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda new: new["rope_type"],
)
def test_old_and_new_rope_keys_mean_the_same(new: dict[str, Any]) -> None:
    old = {key: value for key, value in new.items() if key not in ("rope_theta", "rope_type")}
    older = {"rope_theta": 5e5, "rope_scaling": {"type": new["rope_type"], **old}}
    spec = model_spec({**LLAMA, **older})
    assert spec == model_spec({**LLAMA, "rope_parameters": new})
    assert spec.rope.theta == 5e5
    assert spec.rope.rope_type == new["rope_type"]


FACTORS = [1.0 + 0.25 * pair for pair in range(64)]


@pytest.mark.parametrize(
    "values",
    [
        {"rope_type": "linear", "factor": 4.0},
        {
            **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 8192,
        },
        {
            **{"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0},
            "original_max_position_embeddings": 8192,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
        {
            **{"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False},
            **{"beta_fast": 24.0, "beta_slow": 2.0, "original_max_position_embeddings": 4096},
        },
        {
            **{"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.25},
            "original_max_position_embeddings": 128,
        },
        {
            **{
                "rope_type": "longrope",
                "factor": 1.0,
                "attention_factor": 1.5,
                "original_max_position_embeddings": 128,
            },
            **dict.fromkeys(("short_factor", "long_factor"), FACTORS),
        },
    ],
    ids=["linear", "llama3", "llama4", "yarn", "yarn-mscale", "yarn-attention-factor", "longrope"],
)
def test_scaled_frequencies_equal_transformers(values: dict[str, Any]) -> None:
    """At the sizes of real models: the tiny checkpoints have too few channels to meet every branch."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = {**LLAMA, "hidden_size": 512, "max_position_embeddings": 16384}
    parameters = {"rope_theta": 10000.0, **values}
    spec = model_spec({**config, "rope_parameters": parameters})
    reference = LlamaConfig(**{**config, "rope_parameters": dict(parameters)})
    expected, attention_factor = ROPE_INIT_FUNCTIONS[values["rope_type"]](reference, "cpu")
    torch.testing.assert_close(frequencies(spec.rope), expected, rtol=1e-6, atol=0)
    assert spec.rope.attention_factor == pytest.approx(attention_factor)


def test_the_table_holds_cosines_then_sines() -> None:
    table = rope_table(RopeSpec(head_dim=8, attention_factor=1.5), 20)
    assert table.shape == (20, 8)
    assert table.dtype == torch.float32
    angles = 13 * 10000.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(table[13], 1.5 * torch.cat((angles.cos(), angles.sin())))


def test_fewer_experts_per_token() -> None:
    spec = model_spec({**MOE, "model_type": "qwen3_moe", "mlp_only_layers": [0]})
    fewer = spec.with_experts_per_token(1)
    assert [layer.moe and layer.moe.router.top_k for layer in fewer.layers] == [None, 1, 1, 1]
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"between 1 and 2, not {count}"):
            spec.with_experts_per_token(count)
    with pytest.raises(ValueError, match="this llama model has no experts"):
        model_spec(LLAMA).with_experts_per_token(1)


# At least one layer has keys and values.
HYBRIDS: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {
        **{"mamba_n_heads": 8, "position_embedding_type": "rope"},
        "layer_types": ["mamba", "mamba", "attention", "mamba"],
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [2]},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "kimi_linear": {
        **{"layer_types": ["linear_attention", "full_attention"] * 2, "num_key_value_heads": 4, "num_experts": 8},
        "num_experts_per_tok": 2,
    },
}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "dynamoe"])
def test_every_key_of_transformers_is_known(family: str) -> None:
    """All that its configuration classes write, defaults too, and what older versions wrote into every file."""
    from transformers import AutoConfig, GenerationConfig

    sizes = {key: value for key, value in LLAMA.items() if key != "model_type"}
    if family in LATENT:
        sizes |= {"num_key_value_heads": 4, "num_experts_per_tok": 8}
    if family == "dots1":
        sizes |= {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2}
    if family == "gemma4_text":
        sizes |= {"hidden_size_per_layer_input": 0}
    sizes |= HYBRIDS.get(family, {})
    named = {"kimi_k2": "deepseek_v3", "qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
    whole = AutoConfig.for_model(named.get(family, family), **sizes).to_dict()
    older = GenerationConfig._get_default_generation_params()
    older |= {"torchscript": False, "use_bfloat16": False, "pruned_heads": {}, "tf_legacy_loss": False, "prefix": None}
    assert model_spec(text_config({**older, **whole, "model_type": family})).family == family


STRANGE = (None, True, "x", "", [], ["x"], {}, {"a": {}}, -1, 0, 1, 0.5, float("inf"), float("nan"), 10**30, -(10**400))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_value_crashes_the_parser(family: str) -> None:
    """Whatever one key holds, the answer is a spec or an error meant for people."""
    sizes = {
        **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 8),
        **{"moe_k": 2, "moe_topk": 2, "hidden_size_per_layer_input": 0},
        **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "shared_intermediate_size": 8},
    }
    read = {
        **{
            "mixtral": ("num_local_experts", "num_experts_per_tok"),
            "granitemoe": ("num_local_experts", "num_experts_per_tok"),
            "gpt_oss": ("num_local_experts", "num_experts_per_tok"),
            "granitemoe_swa": ("num_local_experts", "num_experts_per_tok"),
        },
        **dict.fromkeys(("olmoe", "flex_olmo", "dynamoe"), ("num_experts", "num_experts_per_tok")),
        "phimoe": ("num_local_experts", "num_experts_per_tok"),
        "gemma4_text": ("hidden_size_per_layer_input",),
        **dict.fromkeys(("cohere2_moe", "afmoe"), ("num_experts", "num_experts_per_tok")),
        **dict.fromkeys(
            ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "lfm2_moe", "hy_v3", "exaone_moe", "mellum"),
            ("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
        ),
        **dict.fromkeys(
            ("dots1", "solar_open", "glm4_moe", *LATENT),
            ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts"),
        ),
        "mimo_v2_flash": ("n_routed_experts",),
        "minimax_m2": ("num_local_experts", "num_experts_per_tok"),
        "ernie4_5_moe": ("moe_num_experts", "moe_k"),
        "hunyuan_v1_moe": ("num_experts", "moe_topk"),
        **dict.fromkeys(
            ("granitemoeshared", "granitemoehybrid"),
            ("num_local_experts", "num_experts_per_tok", "shared_intermediate_size"),
        ),
    }
    valid = {**LLAMA, "model_type": family, "rope_parameters": {}, **{key: sizes[key] for key in read.get(family, ())}}
    valid |= HYBRIDS.get(family, {})
    valid |= {"dynamoe": {"expert_size": 12}, "ministral3": {"rope_parameters": {"llama_4_scaling_beta": 0.1}}}.get(
        family, {}
    )
    if family in LATENT:
        valid |= {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 32, "v_head_dim": 20, "n_group": 1}
        valid |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "topk_group": 1}
    if family in ("deepseek_v32", "glm_moe_dsa"):
        valid |= {"index_topk": 128, "index_n_heads": 2, "index_head_dim": 16}
    keys = {
        *(*valid, "head_dim", "rms_norm_eps", "sliding_window", "use_sliding_window", "layer_types", "hidden_act"),
        *("max_window_layers", "decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "num_always_on_experts"),
        *("moe_layer_interval", "moe_layer_end_index", "sliding_window_pattern", "rotary_dim", "use_qk_norm"),
        *("first_k_dense_replace", "mlp_layer_types", "n_group", "topk_group", "routed_scaling_factor"),
        *("clip_qkv", "logits_scaling", "attention_multiplier", "rope_theta", "rope_scaling", "eos_token_id"),
        *("hybrid_override_pattern", "layers_block_type", "linear_attn_config", "attn_layer_indices", "mlp_hidden_act"),
        *("mamba_d_head", "mamba_d_conv", "mamba_n_groups", "time_step_limit", "position_embedding_type"),
    }
    assert model_spec(valid).family == family
    refused = 0
    for key in sorted(keys):
        for value in STRANGE:
            try:
                model_spec({**valid, key: value})
            except CheckpointError:
                refused += 1
    assert refused > 100
    for key in ("type", "rope_type", "factor", "rope_theta", "original_max_position_embeddings", "beta_fast"):
        for kind in ("linear", "llama3", "yarn"):
            for value in STRANGE:
                scaling = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
                try:
                    spec = model_spec({**valid, "rope_scaling": {**scaling, key: value}})
                except CheckpointError:
                    continue
                rotated = max(layer.attention.rotary_channels for layer in spec.layers) if spec.rope.head_dim else 0
                assert frequencies(spec.rope).shape == (rotated // 2,)
