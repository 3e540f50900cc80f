"""Families whose norms, caps and scales differ from Llama's, against transformers; and that each of these matters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COMMON, add_exits
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.model.blocks import Add, Norm, OutNorm
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.families import model_spec
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.norms import run_norm
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from dynamoe.dynamic.train.exit_states import served_backbone
from dynamoe.kernels.torch.backend import TorchBackend
from family_parity import Variant, check_logits, check_variant
from test_decoder import PagedSequences, error, random_prompts

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
GEMMA4 = {
    **{"head_dim": 24, "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    **{"hidden_size_per_layer_input": 0, "final_logit_softcapping": 4.0, "global_head_dim": 32},
}
GEMMA4_MOE = {
    **{**GEMMA4, "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 40},
    **{"attention_k_eq_v": True, "num_global_key_value_heads": 1},
}


def with_layer_scales(model: torch.nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.5, 1.5)


FIRST = [
    Variant(family="olmo2", config={"num_key_value_heads": 4}),
    Variant(family="flex_olmo", config=MOE),
    Variant(family="gemma2", config=GEMMA2),
    Variant(family="phimoe", config=PHIMOE),
    Variant(family="olmo3", config={"sliding_window": 8, "layer_types": KINDS}),
    Variant(family="gemma3_text", config=GEMMA3),
    Variant(family="cohere2_moe", config=COHERE),
    Variant(family="afmoe", config=AFMOE),
    Variant(family="gemma4_text", config=GEMMA4_MOE, prepare=with_layer_scales),
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
    Variant(
        family="phimoe",
        config={
            **PHIMOE,
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 256},
                **{"short_factor": [1.0 + 0.2 * pair for pair in range(8)], "long_factor": [4.0] * 8},
                **{"short_mscale": 1.2, "long_mscale": 1.4},
            },
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
    Variant(family="gemma4_text", config=GEMMA4, prepare=with_layer_scales),
    Variant(
        family="gemma4_text",
        prepare=with_layer_scales,
        config={
            **{**GEMMA4_MOE, "attention_k_eq_v": False, "attention_bias": True, "tie_word_embeddings": False},
            **{"layer_types": None, "num_hidden_layers": 7},
        },
    ),
    Variant(family="afmoe", config={**AFMOE, "mup_enabled": False, "num_dense_layers": 0, "tie_word_embeddings": True}),
    Variant(family="flex_olmo", config={**MOE, "norm_topk_prob": True, "attention_bias": True}),
]
CASES = [*FIRST, *(pytest.param(variant, marks=pytest.mark.slow) for variant in MORE)]


@pytest.mark.parametrize("variant", CASES, ids=str)
def test_a_family_equals_transformers(variant: Variant, tmp_path: Path, reference_model: Any) -> None:
    check_variant(variant, tmp_path, reference_model)


def of_family(family: str) -> Variant:
    return next(variant for variant in FIRST if variant.family == family)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma2", "gemma4_text"])
def test_on_triton(family: str, tmp_path: Path, reference_model: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Capped scores, and heads of 512 channels beside others."""
    variant = of_family(family)
    if family == "gemma4_text":
        variant = replace(variant, config={**variant.config, "global_head_dim": 512})
    directory = variant.save(tmp_path / "model")
    check_logits(directory, reference_model(directory), backend="triton", tolerance=1e-3)
    assert "no kernel for attention" not in caplog.text


def changed_spec(**fields: Any) -> Callable[[Decoder], None]:
    def change(decoder: Decoder) -> None:
        decoder.spec = replace(decoder.spec, **fields)

    return change


def changed_layers(change_layer: Callable[[Any], Any]) -> Callable[[Decoder], None]:
    def change(decoder: Decoder) -> None:
        layers = tuple(change_layer(layer) for layer in decoder.spec.layers)
        decoder.spec = replace(decoder.spec, layers=layers)

    return change


def without_block(block: Any) -> Callable[[Decoder], None]:
    return changed_layers(lambda layer: replace(layer, blocks=tuple(b for b in layer.blocks if b != block)))


def changed_attention(**fields: Any) -> Callable[[Decoder], None]:
    return changed_layers(lambda layer: replace(layer, attention=replace(layer.attention, **fields)))


def changed_norms(change_norm: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[[Decoder], None]:
    def change(decoder: Decoder) -> None:
        decoder.layers = tuple(
            replace(layer, norms={name: change_norm(name, norm) for name, norm in layer.norms.items()})
            for layer in decoder.layers
        )

    return change


def with_blocks(layer: Any) -> Any:
    """A norm where attention and FFN read the same one's output."""
    return replace(layer, blocks=tuple(Norm("attention") if block == Add() else block for block in layer.blocks))


def without_expert_scales(decoder: Decoder) -> None:
    scales = [layer.expert_scale_E for layer in decoder.layers]
    decoder.layers = tuple(
        replace(layer, expert_scale_E=None if scale_E is None else torch.ones_like(scale_E))
        for layer, scale_E in zip(decoder.layers, scales, strict=True)
    )


def with_ones(dropped: str) -> Callable[[Decoder], None]:
    return changed_norms(lambda name, norm: torch.ones_like(norm) if name == dropped else norm)


def without_head_bias(decoder: Decoder) -> None:
    packed = decoder.lm_head.data
    decoder.lm_head = replace(decoder.lm_head, data=(packed[0], None))


PARTS: dict[str, tuple[str, Callable[[Decoder], None]]] = {
    "norm of what attention adds": ("olmo2", without_block(OutNorm("attention_out"))),
    "norm of what the FFN adds": ("flex_olmo", without_block(OutNorm("ffn_out"))),
    "norm in front of the FFN": ("gemma2", without_block(Norm("ffn"))),
    "norm behind attention": ("afmoe", without_block(OutNorm("attention_out"))),
    "offset of the weights": ("gemma3_text", changed_norms(lambda name, norm: norm - 1)),
    "centre of layer norms": ("cohere2_moe", changed_spec(norm="rms_float32")),
    "biases of layer norms": ("phimoe", changed_norms(lambda name, norm: norm * (not name.endswith("_bias")))),
    "capped scores": ("gemma2", changed_attention(softcap=None)),
    "capped logits": ("gemma2", changed_spec(logits_cap=None)),
    "scale of scores": ("gemma3_text", changed_attention(scale=24**-0.5)),
    "scale of embeddings": ("gemma2", changed_spec(embedding_scale=1.0, rounded_embedding_scale=False)),
    "mup's scale of embeddings": ("afmoe", changed_spec(embedding_scale=1.0)),
    "bias of the LM head": ("phimoe", without_head_bias),
    "scale of logits": ("cohere2_moe", changed_spec(logits_divisor=1.0)),
    "one norm for attention and FFN": ("cohere2_moe", changed_layers(with_blocks)),
    "average with the shared experts": (
        "cohere2_moe",
        changed_layers(lambda layer: replace(layer, moe=layer.moe and replace(layer.moe, shared_scale=1.0))),
    ),
    "scale of a layer": (
        "gemma4_text",
        with_ones("layer_scale"),
    ),
    "norm of the mixture": (
        "gemma4_text",
        with_ones("mixture"),
    ),
    "norm of values": ("gemma4_text", changed_attention(value_norm=False)),
    "scale of experts": ("gemma4_text", without_expert_scales),
    "output gate": ("afmoe", changed_attention(output_gate=False)),
}


@pytest.mark.parametrize("part", PARTS)
def test_dropping_a_part_changes_the_logits(part: str, tmp_path: Path) -> None:
    family, drop = PARTS[part]
    decoder = load_decoder(of_family(family).save(tmp_path), dtype="float32", device="cpu", backend="torch")
    prompts = random_prompts([40])
    full = PagedSequences(decoder, 1).run(prompts)
    if part == "output gate":
        decoder.layers = tuple(replace(n, attention=replace(n.attention, gate=None)) for n in decoder.layers)
    drop(decoder)
    assert error(PagedSequences(decoder, 1).run(prompts), full) > 1e-2


@pytest.mark.parametrize("family", ["olmo3", "gemma2", "phimoe", "cohere2_moe", "afmoe", "gemma4_text"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_rows_logits_are_the_same_alone_and_in_a_batch(family: str, dtype: str, tmp_path: Path) -> None:
    decoder = load_decoder(of_family(family).save(tmp_path), dtype=dtype, device="cpu", backend="cpu")
    prompts = random_prompts([23, 1, 40])
    together = PagedSequences(decoder, 3).run(prompts).split([23, 1, 40])
    for prompt, logits in zip(prompts, together, strict=True):
        alone = PagedSequences(decoder, 1)
        steps = [alone.run([prompt[:7]]), *(alone.run([[token]]) for token in prompt[7:])]
        assert torch.equal(torch.cat(steps), logits)


@pytest.mark.parametrize("family", [variant.family for variant in FIRST])
@pytest.mark.parametrize("method", ["int8", pytest.param("int4-g32", marks=pytest.mark.slow)])
def test_weights_can_be_quantised_while_they_are_loaded(family: str, method: str, tmp_path: Path) -> None:
    directory, prompts = of_family(family).save(tmp_path), random_prompts([40])
    exact = PagedSequences(load_decoder(directory, dtype="float32", device="cpu"), 1).run(prompts)
    decoder = load_decoder(directory, dtype="float32", device="cpu", quantization=method)
    # A router may choose others where two experts are nearly as good: the middle of the rows counts.
    errors = (PagedSequences(decoder, 1).run(prompts) - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 0 < float(errors.median()) < (0.1 if method == "int8" else 0.5)


@pytest.mark.parametrize("kind", ["rms_offset", "layer_bias"])
def test_norms_in_bfloat16_lose_no_bits_of_their_weights(kind: str) -> None:
    """As transformers: in float32 up to the end, where 1 + w rounded to bfloat16 would be 1 for small weights."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    backend, x_TD = TorchBackend("cpu", torch.bfloat16), torch.randn(5, 64).bfloat16()
    small_D = (torch.randn(64) * 2.0**-10).bfloat16()
    if kind == "rms_offset":
        theirs = Gemma2RMSNorm(64)
        theirs.weight.data = small_D
        weights: tuple[Any, ...] = (1 + small_D.float(), None)
    else:
        theirs = torch.nn.LayerNorm(64, dtype=torch.bfloat16)
        theirs.weight.data, theirs.bias.data = 1 + small_D, small_D
        weights = (theirs.weight.data.float(), theirs.bias.data.float())
    found_TD = run_norm(backend, kind, x_TD, *weights, 1e-6 if kind == "rms_offset" else 1e-5)
    assert found_TD.dtype == torch.bfloat16
    assert torch.equal(found_TD, theirs(x_TD))


@pytest.mark.parametrize("family", ["olmo2", "gemma2", "gemma3_text", "cohere2_moe", "phimoe"])
def test_exits_make_keys_and_values_of_the_stream(family: str, tmp_path: Path, reference_model: Any) -> None:
    directory = of_family(family).save(tmp_path)
    reference = reference_model(directory)
    add_exits(directory, {1: 0.5})
    for backend in ("torch", "cpu"):
        decoder = load_decoder(directory, dtype="float32", device="cpu", backend=backend)
        x_TD = torch.randn(7, decoder.spec.hidden_size)
        kv, batch = fresh_cache(decoder, [7])
        decoder.propagate_kv(decoder.exits[1], x_TD, kv, batch)
        for number in (1, 2):
            layer = reference.model.layers[number]
            read = x_TD if family == "olmo2" else layer.input_layernorm(x_TD)
            values = layer.self_attn.v_proj(read).view(7, -1, decoder.spec.layers[0].attention.head_dim)
            stored = kv[number].values_BGPC.transpose(1, 2).flatten(0, 1)[:7]
            torch.testing.assert_close(stored, values, rtol=1e-4, atol=1e-4)
            assert not torch.equal(kv[number].keys_BGPC[0], torch.zeros_like(kv[number].keys_BGPC[0]))


@pytest.mark.parametrize("family", ["gemma2", "phimoe", "cohere2_moe"])
def test_exits_are_trained_on_the_logits_that_are_served(family: str, tmp_path: Path) -> None:
    """Caps, layer norms with biases, a head with a bias, divided logits."""
    decoder = load_decoder(of_family(family).save(tmp_path), dtype="float32", device="cpu")
    x_RD = torch.randn(5, decoder.spec.hidden_size) * 3
    trained = served_backbone(decoder, [1], 4, 0).logits(x_RD)
    torch.testing.assert_close(trained, decoder.logits(x_RD), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        ("gemma2", "query_pre_attn_scalar", 0, "query_pre_attn_scalar must be greater than 0"),
        ("gemma2", "final_logit_softcapping", -1.0, "final_logit_softcapping must be greater than 0 or null"),
        ("gemma2", "attn_logit_softcapping", "x", "attn_logit_softcapping must be a finite number"),
        ("gemma2", "use_bidirectional_attention", True, "use_bidirectional_attention must be false"),
        ("gemma2", "hidden_activation", "relu", "hidden_activation must be one of"),
        ("gemma3_text", "attn_logit_softcapping", 5.0, "attn_logit_softcapping=5.0 is not supported"),
        ("gemma3_text", "layer_types", ["odd"] * 3, "layer_types must be full_attention or sliding_attention"),
        ("olmo3", "sliding_window", 0, "sliding_window must be a positive whole number"),
        ("olmo2", "clip_qkv", 3.0, "clip_qkv=3.0 is not supported"),
        ("phimoe", "rope_parameters", {"rope_type": "linear", "factor": 2.0}, "rope_parameters lacks short_mscale"),
        ("phimoe", "num_experts_per_tok", 3, "num_experts_per_tok must be 2"),
        ("cohere2_moe", "expert_selection_fn", "odd", "expert_selection_fn must be softmax or sigmoid"),
        ("cohere2_moe", "shared_expert_combination_strategy", "max", "must be one of average, sum"),
        ("cohere2_moe", "logit_scale", 0, "logit_scale must be greater than 0"),
        ("cohere2_moe", "mlp_layer_types", ["odd"] * 3, "mlp_layer_types must be dense or sparse"),
        ("gemma4_text", "hidden_size_per_layer_input", 256, "hidden_size_per_layer_input=256 is not supported"),
        ("gemma4_text", "num_kv_shared_layers", 1, "num_kv_shared_layers=1 is not supported"),
        ("gemma4_text", "use_bidirectional_attention", "all", "use_bidirectional_attention must be one of vision"),
        ("gemma4_text", "per_layer_config", {"0": {"window": 3}}, "window=3 is not supported"),
        ("gemma4_text", "per_layer_config", [1], "per_layer_config must be an object for each layer"),
        ("afmoe", "score_func", "softmax", "score_func='?softmax'? is not supported"),
        ("afmoe", "route_norm", False, "route_norm=False is not supported"),
        ("afmoe", "global_attn_every_n_layers", 0, "global_attn_every_n_layers must be at least 1"),
    ],
)
def test_what_cannot_be_honoured_is_refused(family: str, key: str, value: Any, message: str) -> None:
    config = {name: v for name, v in of_family(family).config.items() if v is not None}
    if key == "global_attn_every_n_layers":
        del config["layer_types"]
    with pytest.raises(CheckpointError, match=message):
        model_spec({**COMMON, "model_type": family, **config, key: value})
