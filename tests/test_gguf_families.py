"""GGUF files of further families, laid out as llama.cpp's converters do: the same model as the checkpoint's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.checkpoint.gguf_blocks import block_sizes
from dynamoe.dynamic.checkpoint.weights import CheckpointError, read_json
from dynamoe.dynamic.convert.gguf_import import import_gguf
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.text.tokenizer import Tokenizer
from family_parity import Variant, check_logits
from gguf_files import write_gguf
from safetensors.torch import load_file
from test_decoder import PagedSequences, error, random_prompts
from test_families_parity_attention import FULL, LONGROPE, ROUTED, SCALES, SLIDING, YARN, random_tensors
from test_families_parity_gpt_oss import SMALL as GPT_OSS
from test_families_parity_gpt_oss import prepare as gpt_oss
from test_families_parity_granite_swa import SIZES as GRANITE_SWA
from test_families_parity_granite_swa import prepare as with_sinks
from test_families_parity_nemotron import BAMBA, JAMBA, KIMI, NEMOTRON, STATES
from test_families_parity_norms import AFMOE, COHERE, GEMMA2, GEMMA3, GEMMA4, GEMMA4_MOE, PHIMOE, with_layer_scales
from test_families_parity_shared import EXAONE, HY, MELLUM, MINIMAX
from test_families_parity_shared import ROUTED as DEEPSEEK
from test_families_parity_states import GRANITE, LFM2_MOE, LINEAR, NEXT

FOUR = {"num_hidden_layers": 4}
SOME_TURN = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e3},
    "layer_rope_theta": [5e3, 0.0, 5e3, 5e3, 0.0],
}
KINDS = [SLIDING, FULL, SLIDING]
# Mamba2's and Gated DeltaNet's layers as files name them: in every so many layers one has keys.
ATTENTION_LAST = ["mamba", "mamba", "attention", "mamba"]
WINDOWS = {"head_dim": 24, "sliding_window": 9}
UNTIED = {"tie_word_embeddings": False}
OLMO3_ROPES = {
    FULL: {**YARN, "rope_theta": 5e3, "attention_factor": None},
    SLIDING: {"rope_type": "default", "rope_theta": 5e3},
}
MELLUM_ROPES = {FULL: {**YARN, "rope_theta": 5e3}, SLIDING: {"rope_type": "default", "rope_theta": 5e3}}
MIMO = {
    **{"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 24},
    **{"v_head_dim": 16, "sliding_window": 9, "layer_types": [FULL, SLIDING, SLIDING]},
}
MIMO_ROPES = {
    FULL: {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.334},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.334},
}
LLAMA4 = {
    **{"num_local_experts": 6, "num_experts_per_tok": 1, "intermediate_size": 40, "intermediate_size_mlp": 72},
    **{"head_dim": 24, **FOUR},
}
GEMMA3_ROPES = {
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
GROWTH = {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.7}


def variant(family: str, **config: Any) -> Variant:
    return Variant(family=family, config=config, prepare=random_tensors)


FIRST = [
    variant("qwen3_next", **{**NEXT, "linear_value_head_dim": 16}, num_hidden_layers=4),
    variant("qwen3_5_text", **LINEAR, full_attention_interval=3),
    variant("qwen3_5_moe_text", **NEXT, **UNTIED),
    variant("granitemoehybrid", **{**GRANITE, "layer_types": ATTENTION_LAST}),
    variant("lfm2", layer_types=LFM2_MOE["layer_types"], block_multiple_of=16),
    variant("lfm2_moe", **LFM2_MOE),
    variant("granite", **SCALES),
    variant("smollm3", **FOUR),
    variant("phi3", partial_rotary_factor=0.5, rope_parameters=LONGROPE, original_max_position_embeddings=256),
    variant("phimoe", **PHIMOE),
    variant("glm", head_dim=16, attention_bias=True),
    variant("glm4", head_dim=24),
    variant("gemma2", **{**GEMMA2, "query_pre_attn_scalar": 24}),
    variant("gemma3_text", **{**GEMMA3, "query_pre_attn_scalar": 24, "layer_types": [SLIDING] * 3}),
    Variant(family="gemma4_text", config=GEMMA4_MOE, prepare=with_layer_scales),
    variant("olmo2", num_key_value_heads=4),
    variant("olmo3", **FOUR, sliding_window=8),
    variant("ernie4_5", head_dim=24, use_bias=True),
    variant("exaone_moe", **EXAONE, **FOUR, sliding_window=9, sliding_window_pattern=2),
    variant("afmoe", **{**AFMOE, **FOUR, "layer_types": None}),
    variant("hunyuan_v1_dense", head_dim=24, rope_parameters={"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0}),
    variant("minimax_m2", **MINIMAX, rotary_dim=8),
    variant("llama4_text", **LLAMA4, interleave_moe_layer_step=2),
    variant("mimo_v2_flash", **MIMO, rope_parameters=MIMO_ROPES),
    variant("ministral3", head_dim=24, rope_parameters={**YARN, **GROWTH}),
    variant("mellum", **ROUTED, **FOUR, **WINDOWS, layer_types=[SLIDING, FULL] * 2, rope_parameters=MELLUM_ROPES),
    variant("cohere2_moe", **{**COHERE, "expert_selection_fn": "sigmoid"}),
    variant("hy_v3", **HY),
    variant("solar_open", **DEEPSEEK, n_shared_experts=1, head_dim=24),
    Variant(family="granitemoe_swa", prepare=with_sinks,
            config={**GRANITE_SWA, "sliding_window": 9, "shared_intermediate_size": 72, **SOME_TURN}),
    Variant(family="gpt_oss", prepare=gpt_oss,
            config={**GPT_OSS, "rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}),
    variant("bamba", **BAMBA),
    variant("jamba", **JAMBA, **FOUR),
    variant("nemotron_h", **NEMOTRON),
    variant("kimi_linear", **KIMI),
]  # fmt: skip
MORE = [
    variant("qwen3_next", **{**NEXT, "linear_num_value_heads": 2, "attention_bias": True}),
    variant("qwen3_5_text", **{**LINEAR, "linear_num_value_heads": 6}, full_attention_interval=3, **UNTIED),
    variant("granitemoehybrid", **{**GRANITE, "mamba_n_groups": 2}),
    variant("granitemoehybrid", **{**GRANITE, "layer_types": ["attention"] * 4, "position_embedding_type": "rope"}),
    variant("granitemoehybrid", **{**GRANITE, "num_local_experts": 0, "mamba_conv_bias": False}),
    variant("granitemoehybrid", **{**GRANITE, "mamba_proj_bias": True, "attention_bias": True}),
    variant("lfm2_moe", **{**LFM2_MOE, "conv_bias": True, "use_expert_bias": False, "conv_L_cache": 4}),
    variant("granite", **SCALES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    variant("smollm3", **FOUR, attention_bias=True, mlp_bias=True, **UNTIED),
    variant("phi3", sliding_window=9),
    variant("phimoe", **{**PHIMOE, "lm_head_bias": False, "attention_bias": False, "sliding_window": 9}),
    variant("glm", head_dim=24, attention_bias=False, partial_rotary_factor=1.0),
    variant("glm4", attention_bias=False, partial_rotary_factor=1.0),
    variant("gemma2", **{**GEMMA2, "query_pre_attn_scalar": 24, "attention_bias": True}),
    variant("gemma3_text", **{**GEMMA3, "query_pre_attn_scalar": 24, "layer_types": None, "num_hidden_layers": 7},
            final_logit_softcapping=4.0, rope_parameters=GEMMA3_ROPES),
    Variant(family="gemma4_text", config=GEMMA4, prepare=with_layer_scales),
    Variant(family="gemma4_text", prepare=with_layer_scales,
            config={**GEMMA4_MOE, "attention_k_eq_v": False, "num_global_key_value_heads": None, **UNTIED}),
    variant("olmo2", attention_bias=True, tie_word_embeddings=True),
    variant("olmo3", **FOUR, sliding_window=8, rope_parameters=OLMO3_ROPES),
    variant("exaone_moe", **EXAONE, n_group=4, topk_group=2, num_shared_experts=2, sliding_window=9),
    variant("afmoe", **{**AFMOE, **FOUR, "layer_types": None}, num_dense_layers=2, attention_bias=True),
    variant("hunyuan_v1_dense", head_dim=24, attention_bias=True),
    variant("minimax_m2", **MINIMAX, num_key_value_heads=1),
    variant("llama4_text", **{**LLAMA4, "num_experts_per_tok": 2}, attention_bias=True),
    variant("mimo_v2_flash", **MIMO, attention_bias=True, attention_value_scale=None, rope_parameters=MIMO_ROPES),
    variant("mellum", **MELLUM, sliding_window=9, layer_types=KINDS, norm_topk_prob=True),
    variant("cohere2_moe", **{**COHERE, "num_shared_experts": 0, "expert_selection_fn": "sigmoid"}, **UNTIED),
    Variant(family="granitemoe_swa",
            config={**GRANITE_SWA, "attention_bias": True, "layer_types": [SLIDING, FULL] * 2 + [FULL]}),
    variant("bamba", **BAMBA, mamba_proj_bias=True, attention_bias=True, mlp_bias=True),
    variant("jamba", **{**JAMBA, "num_experts": 1, "mamba_d_conv": 2, "mamba_expand": 3, "mamba_conv_bias": False}),
    variant("nemotron_h", **{**NEMOTRON, "moe_latent_size": None, "use_bias": True, "mlp_bias": False}),
    variant("nemotron_h", **{**NEMOTRON, "use_conv_bias": False, "layers_block_type": [STATES, "moe", FULL, "moe"]}),
    variant("kimi_linear", **KIMI, q_lora_rank=24, linear_conv_kernel_dim=2),
    variant("hy_v3", **HY, mlp_layer_types=["sparse", "dense", "sparse"], num_shared_experts=2),
    variant("solar_open", **DEEPSEEK, n_shared_experts=2, attention_bias=True, n_group=4, topk_group=2),
]  # fmt: skip
# By the names of docs/models.md.
FAMILIES = {v.family.removesuffix("_text") if "qwen3_5" in v.family else v.family for v in FIRST}


def imported(checkpoint: Path, folder: Path, kinds: Any = None, *, keep_codes: bool = True, **writing: Any) -> Path:
    """The directory that a checkpoint's GGUF file becomes."""
    target = folder / "imported"
    target.mkdir()
    import_gguf(write_gguf(checkpoint, folder / "tiny.gguf", kinds, **writing), target, keep_codes=keep_codes)
    return target


@pytest.mark.parametrize("given", [*FIRST, *(pytest.param(v, marks=pytest.mark.slow) for v in MORE)], ids=str)
def test_a_file_is_the_model_it_was_made_of(
    given: Variant, tmp_path: Path, reference_model: Callable[[Path], Any]
) -> None:
    checkpoint = given.save(tmp_path / "checkpoint")
    target = imported(checkpoint, tmp_path)
    check_logits(target, reference_model(checkpoint))
    text, found = "The router, chooses them<|im_end|>\nall 123.", Tokenizer.from_directory(target)
    source = Tokenizer.from_directory(checkpoint)
    assert found.encode(text, add_special_tokens=False) == source.encode(text, add_special_tokens=False)


def of_family(family: str, **config: Any) -> Variant:
    given = next(v for v in FIRST if v.family == family)
    return replace(given, config={**given.config, **config})


# Sizes of whole blocks of 32.
BLOCKS = {"head_dim": 32, "intermediate_size": 64, "moe_intermediate_size": 64}
QUANTISED = {
    "qwen3_next": of_family(
        "qwen3_next", **BLOCKS, linear_value_head_dim=32, linear_key_head_dim=32, shared_expert_intermediate_size=64
    ),
    "qwen3_5_moe": of_family(
        "qwen3_5_moe_text", **BLOCKS, linear_value_head_dim=32, shared_expert_intermediate_size=64
    ),
    "granitemoehybrid": of_family("granitemoehybrid", intermediate_size=64, shared_intermediate_size=64),
    "lfm2_moe": of_family("lfm2_moe", intermediate_size=64, moe_intermediate_size=64),
    "phi3": of_family("phi3", intermediate_size=64),
    "llama4": of_family("llama4_text", head_dim=32, intermediate_size=64, intermediate_size_mlp=96),
    "gemma4": of_family("gemma4_text", **BLOCKS),
    "cohere2_moe": of_family("cohere2_moe", head_dim=32, intermediate_size=64, prefix_dense_intermediate_size=64),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_rows_that_move_keep_their_codes(name: str, tmp_path: Path) -> None:
    """Of fused, cut and reordered tensors too: the same model as the dequantised file, and nearly all of it codes."""
    checkpoint, decoders = QUANTISED[name].save(tmp_path / "checkpoint"), []
    for folder, keep in (("codes", True), ("numbers", False)):
        (tmp_path / folder).mkdir()
        target = imported(checkpoint, tmp_path / folder, "Q8_0", keep_codes=keep)
        decoders.append(load_decoder(target, dtype="float32", device="cpu"))
    stored = load_file(tmp_path / "codes" / "imported" / "model.safetensors")
    codes = [t.numel() for t in stored.values() if t.dtype == torch.uint8]
    _, size = block_sizes()["Q8_0"]
    assert sum(codes) > 0.9 * sum(t.numel() * size // 32 for t in stored.values() if t.dim() > 1)
    prompt = random_prompts([40])
    assert error(*(PagedSequences(decoder, 1).run(prompt) for decoder in decoders)) < 1e-5


def test_heads_that_do_not_begin_at_blocks_are_widened(tmp_path: Path) -> None:
    """Blocks of 256 inputs hold two heads of 128, which the file has in another order."""
    sizes = {"hidden_size": 256, "linear_value_head_dim": 128, "linear_num_value_heads": 4, "head_dim": 64}
    checkpoint = of_family("qwen3_5_text", **sizes, intermediate_size=256, num_hidden_layers=3).save(tmp_path / "model")
    decoders = []
    for folder, keep in (("codes", True), ("numbers", False)):
        (tmp_path / folder).mkdir()
        target = imported(checkpoint, tmp_path / folder, "Q4_K", keep_codes=keep)
        decoders.append(load_decoder(target, dtype="float32", device="cpu"))
    stored = load_file(tmp_path / "codes" / "imported" / "model.safetensors")
    prefix = "model.layers.0.linear_attn."
    assert stored[f"{prefix}out_proj.weight"].dtype == torch.float32
    assert stored[f"{prefix}in_proj_qkv.weight_q4_k"].dtype == torch.uint8
    prompt = random_prompts([20])
    assert error(*(PagedSequences(decoder, 1).run(prompt) for decoder in decoders)) < 1e-5


def test_the_first_files_of_qwen3_next_are_the_same_model(tmp_path: Path) -> None:
    """They had queries, keys, values and gates in one tensor, group by group; later ones may have gates and ups so."""
    checkpoint = of_family("qwen3_next").save(tmp_path / "model")
    weights = load_file(checkpoint / "model.safetensors")

    def as_at_first(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("attn_qkv.weight")]:
            block = name.split(".")[1]
            del tensors[name], tensors[name.replace("attn_qkv", "attn_gate")]
            tensors[f"blk.{block}.ssm_in.weight"] = weights[f"model.layers.{block}.linear_attn.in_proj_qkvz.weight"]
        for name in [name for name in tensors if name.endswith("ffn_gate_exps.weight")]:
            both = torch.cat((tensors.pop(name), tensors.pop(name.replace("_gate_", "_up_"))), 1)
            tensors[name.replace("_gate_", "_gate_up_")] = both

    decoders = []
    for folder, edit in (("now", None), ("first", as_at_first)):
        (tmp_path / folder).mkdir()
        target = imported(checkpoint, tmp_path / folder, edit=edit)
        decoders.append(load_decoder(target, dtype="float32", device="cpu"))
    now, at_first = (PagedSequences(decoder, 1).run(random_prompts([20])) for decoder in decoders)
    assert torch.equal(now, at_first)


def test_nemotron_without_mixtures_is_an_architecture_of_its_own(
    tmp_path: Path, reference_model: Callable[[Path], Any]
) -> None:
    def edit(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in values if key.startswith("nemotron_h_moe.")]:
            value = values.pop(key)
            if ".expert_" not in key and "latent" not in key:
                values[key.replace("_moe.", ".")] = value
        values |= {"general.architecture": "nemotron_h", "nemotron_h.feed_forward_length": [0, 0, 72]}

    checkpoint = of_family("nemotron_h", layers_block_type=[STATES, FULL, "mlp"]).save(tmp_path / "model")
    check_logits(imported(checkpoint, tmp_path, edit=edit), reference_model(checkpoint))


def test_the_first_files_of_gemma_2_have_its_caps_and_window(tmp_path: Path) -> None:
    left_away = [f"gemma2.{name}" for name in ("attn_logit_softcapping", "final_logit_softcapping")]

    def edit(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for name in [*left_away, "gemma2.attention.sliding_window"]:
            del values[name]

    config = read_json(imported(of_family("gemma2").save(tmp_path / "model"), tmp_path, edit=edit) / "config.json")
    found = config["attn_logit_softcapping"], config["final_logit_softcapping"], config["sliding_window"]
    assert found == (50.0, 30.0, 4096)


@pytest.mark.parametrize(
    "family",
    ["qwen3_5_moe_text", "granitemoehybrid", "lfm2_moe", "phi3", "gemma4_text", "afmoe",
     "granitemoe_swa", "bamba", "jamba", "nemotron_h", "kimi_linear"],
)  # fmt: skip
def test_every_tensor_must_be_there(family: str, tmp_path: Path) -> None:
    checkpoint, names = of_family(family).save(tmp_path / "model"), list[str]()
    write_gguf(checkpoint, tmp_path / "all.gguf", edit=lambda values, tensors: names.extend(tensors))
    assert len(names) > 20
    # A head may be the embedding, and values may be keys.
    for name in names:
        if name.startswith(("output.", "rope_")) or (family == "gemma4_text" and name.endswith("attn_v.weight")):
            continue
        folder = tmp_path / name
        folder.mkdir()
        with pytest.raises(CheckpointError) as caught:
            imported(checkpoint, folder, edit=lambda values, tensors, name=name: tensors.pop(name))
        assert name in str(caught.value) or name.replace("gate_up", "gate") in str(caught.value)
        assert not (folder / "imported" / "model.safetensors").exists()


def key(name: str, value: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    def edit(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        architecture = next(iter(k for k in values if k.endswith(".block_count"))).partition(".")[0]
        values[f"{architecture}.{name}"] = value

    return edit


def tensor(name: str, *shape: int, value: float = 1.0) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    return lambda values, tensors: tensors.update({name: torch.full(shape, value)})


@pytest.mark.parametrize(
    ("family", "edit", "fault"),
    [
        ("qwen3_5_moe_text", key("full_attention_interval", 0), "full_attention_interval must be at least 1"),
        ("qwen3_5_moe_text", key("ssm.inner_size", 95), "ssm.inner_size must be a multiple of"),
        ("qwen3_5_moe_text", key("ssm.group_count", 3), "shape|linear_num_value_heads"),
        ("qwen3_5_moe_text", key("ssm.dt_b_c_rms", True), "ssm.dt_b_c_rms' = True is not supported"),
        ("qwen3_5_moe_text", key("expert_weights_norm", False), "expert_weights_norm must be true"),
        ("qwen3_5_moe_text", tensor("blk.0.ssm_a", 4), "'blk.0.ssm_a' must hold negative numbers"),
        ("qwen3_5_moe_text", tensor("blk.0.ssm_x.weight", 4, 4), "'blk.0.ssm_x.weight' is not one of the model's"),
        ("qwen3_next", tensor("blk.0.ssm_ba.weight", 6, 64), "'blk.0.ssm_ba.weight' has shape"),
        ("granitemoehybrid", key("ssm.inner_size", 100), "ssm.inner_size must be a multiple of .embedding_length=64"),
        ("granitemoehybrid", key("attention.head_count_kv", [0, 0, 2]), "head_count_kv must be an array of 4 numbers"),
        ("granitemoehybrid", key("attention.head_count_kv", [0, 1, 2, 0]), "head_count_kv must be the same"),
        ("lfm2", key("attention.sliding_window", 8), "attention.sliding_window' = 8"),
        ("lfm2_moe", key("expert_gating_func", 1), "expert_gating_func must be 2"),
        ("granite", key("rope.scaling.finetuned", False), "rope.scaling.finetuned must be true"),
        ("smollm3", key("attention.sliding_window", 8), "attention.sliding_window' = 8"),
        ("phi3", tensor("blk.0.attn_qkv.weight", 64, 64), "'blk.0.attn_qkv.weight' has shape .* 64 [+] 32 [+] 32 rows"),
        ("phi3", tensor("rope_freqs.weight", 4), "'rope_factors_short.weight' and .* go with each other alone"),
        ("phimoe", key("expert_used_count", 3), "num_experts_per_tok must be 2"),
        ("glm4", key("rope.dimension_sections", [1, 1, 1, 0]), "rope.dimension_sections' = an array of 4"),
        ("glm4", key("rope.dimension_count", 0), "rope.dimension_count must be between 1 and the width of a head"),
        ("gemma2", key("attention.scale", 0.5), "attention.scale' = 0.5"),
        ("gemma2", key("attention.sliding_window_pattern", 0), "sliding_window_pattern must be at least 1"),
        ("gemma3_text", key("rope.scaling.type", "su"), "rope.scaling.type must be none, linear, yarn or longrope"),
        ("gemma4_text", key("embedding_length_per_layer_input", 64), "embedding_length_per_layer_input must be 0"),
        ("gemma4_text", key("attention.shared_kv_layers", 1), "attention.shared_kv_layers must be 0"),
        ("gemma4_text", key("attention.value_length_swa", 8), "attention.value_length_swa must be the width of a head"),
        ("olmo3", key("attention.sliding_window_pattern", [True]), "sliding_window_pattern must be an array of 4"),
        ("exaone_moe", key("expert_gating_func", 1), "expert_gating_func must be 2"),
        ("afmoe", key("expert_weights_norm", False), "expert_weights_norm must be true"),
        ("minimax_m2", key("expert_gating_func", 1), "expert_gating_func must be 2"),
        ("llama4_text", key("attention.sliding_window", 0), "attention.sliding_window must be 8192, or left away"),
        ("mimo_v2_flash", key("attention.head_count_kv", [2, 2, 2]), "head_count_kv must be twice as large"),
        ("mimo_v2_flash", key("attention.head_count_kv", [1, 2]), "head_count_kv must be an array of 3 numbers"),
        ("gemma4_text", key("attention.head_count_kv", [2, 1]), "head_count_kv must be an array of 3 numbers"),
        ("glm4", key("attention.head_count_kv", [2]), "head_count_kv must be an array of 3 numbers"),
        ("phi3", key("feed_forward_length", [96] * 4), "feed_forward_length must be an array of 3 numbers"),
        ("qwen3_5_moe_text", key("attention.recurrent_layers", [True]), "recurrent_layers must be an array of 3"),
        ("mimo_v2_flash", key("leading_dense_block_count", 2), "leading_dense_block_count must be 1, as the tensors"),
        ("ministral3", key("rope.scaling.type", "linear"), "yarn_log_multiplier must be left|type must be yarn"),
        ("cohere2_moe", key("expert_gating_func", 1), "expert_gating_func must be 2 .sigmoid. or 3"),
        ("cohere2_moe", tensor("blk.0.ffn_norm.weight", 64), "'blk.0.ffn_norm.weight'"),
        ("hy_v3", key("expert_weights_norm", False), "expert_weights_norm must be true"),
        ("hy_v3", key("expert_shared_feed_forward_length", 41), "must be a multiple of .expert_feed_forward_length=40"),
        ("bamba", key("rope.dimension_count", 16), "rope.dimension_count must be half the width of a head, 8"),
        ("granitemoehybrid", key("rope.scaling.finetuned", True), "must be half the width of a head, 8"),
        ("granitemoe_swa", key("attention.rope_pattern", [True]), "rope_pattern must be an array of 5 numbers"),
        ("granitemoe_swa", key("expert_count", 0), "expert_count must be between 1"),
        ("jamba", key("attention.head_count_kv", [2, 2, 0, 0]), "head_count_kv must be there for every so many layers"),
        ("jamba", key("ssm.inner_size", 100), "ssm.inner_size must be a multiple of .embedding_length=64"),
        ("jamba", key("rope.dimension_count", 8), "rope.dimension_count' = 8 is not supported"),
        ("nemotron_h", key("ssm.inner_size", 100), "ssm.inner_size must be a multiple of .ssm.time_step_rank=8"),
        ("nemotron_h", key("expert_shared_count", 2), "expert_shared_count must be 1"),
        ("nemotron_h", key("feed_forward_length", [0, 40, 0, 72, 0]), "feed_forward_length must be the same"),
        ("kimi_linear", key("kda.head_dim", 7), "kda.head_dim must be a divisor of 48"),
        ("kimi_linear", key("kda.safe_gate", True), "kda.safe_gate' = True is not supported"),
        ("kimi_linear", key("expert_gating_func", 1), "expert_gating_func must be 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(family: str, edit: Any, fault: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=fault) as caught:
        imported(of_family(family).save(tmp_path / "model"), tmp_path, edit=edit)
    assert "tiny.gguf" in str(caught.value)
