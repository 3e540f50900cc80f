"""Families with shared experts, dense layers in front and selection biases against transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import COMMON
from dynamoe.dynamic.checkpoint.config_reader import ConfigReader
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.families import FAMILIES, model_spec
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.moe_spec import MoESpec
from dynamoe.kernels.api.types import Routing
from family_parity import Variant, check_variant
from safetensors.torch import load_file, save_file
from test_decoder import PagedSequences, greedy, random_prompts

ROUTED = {"moe_intermediate_size": 40, "n_routed_experts": 8, "num_experts_per_tok": 3, "routed_scaling_factor": 1.7}
GRANITE = {
    **{"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40, "shared_intermediate_size": 72},
    **{"embedding_multiplier": 3.0, "attention_multiplier": 0.35, "residual_multiplier": 0.6, "logits_scaling": 1.7},
}
HY = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 24}

MINIMAX = {"num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 40, "head_dim": 24}
ERNIE = {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 40, "moe_norm_min": 0.4}

HUNYUAN = {"num_experts": 8, "intermediate_size": 40, "head_dim": 24}
EXAONE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
MELLUM = {**EXAONE, "head_dim": 24}
SLIDES = "sliding_attention"


def variant(family: str, **config: Any) -> Variant:
    return Variant(family=family, config=config)


VARIANTS = [
    variant("granitemoeshared", **GRANITE),
    variant("dots1", **ROUTED, n_shared_experts=2, first_k_dense_replace=1, norm_topk_prob=True),
    variant("solar_open", **ROUTED, n_shared_experts=1, head_dim=24),
    variant("hy_v3", **HY),
    variant("minimax_m2", **MINIMAX, rotary_dim=8),
    variant("ernie4_5_moe", **ERNIE),
    variant("glm4_moe", **ROUTED, use_qk_norm=True, partial_rotary_factor=0.5),
    variant("hunyuan_v1_moe", **HUNYUAN, moe_topk=[2, 3, 1]),
    variant("exaone_moe", **EXAONE, sliding_window=9, sliding_window_pattern=2),
    variant("mellum", **MELLUM, sliding_window=9, layer_types=[SLIDES, "full_attention", SLIDES]),
]
MORE = [
    variant("granitemoeshared", **GRANITE, attention_bias=True, tie_word_embeddings=True),
    variant("granitemoeshared", **{**GRANITE, "shared_intermediate_size": 0}),
    variant("dots1", **ROUTED, n_shared_experts=1, n_group=4, topk_group=2, attention_bias=True),
    variant(
        "dots1", **ROUTED, n_shared_experts=1, sliding_window=9,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    variant("solar_open", **ROUTED, n_shared_experts=2, head_dim=24, attention_bias=True, norm_topk_prob=False),
    variant("hy_v3", **HY, mlp_layer_types=["sparse", "dense", "sparse"], num_shared_experts=2),
    variant("glm4_moe", **ROUTED, n_group=4, topk_group=2, n_shared_experts=2, attention_bias=True, head_dim=24),
    variant("hunyuan_v1_moe", **HUNYUAN, moe_topk=2, attention_bias=True,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0}),
    variant("exaone_moe", **EXAONE, sliding_window=None, layer_types=["full_attention"] * 3, n_group=2),
    variant("exaone_moe", **EXAONE, mlp_layer_types=["sparse", "dense", "sparse"], num_shared_experts=2,
            layer_types=["full_attention", SLIDES, SLIDES], sliding_window=7),
    variant("mellum", **MELLUM, mlp_layer_types=["sparse", "dense", "sparse"], norm_topk_prob=False),
    variant("minimax_m2", **MINIMAX, num_key_value_heads=1),
    variant("ernie4_5_moe", **ERNIE, use_bias=True, tie_word_embeddings=False, moe_layer_interval=2,
            moe_layer_start_index=0, num_hidden_layers=4),
    variant("ernie4_5_moe", **ERNIE, moe_layer_end_index=1, moe_num_shared_experts=0, tie_word_embeddings=False),
    variant("hy_v3", **HY, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, router_scaling_factor=0.7),
]  # fmt: skip


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Variant], Path]:
    return lambda variant: variant.save(tmp_path)


@pytest.mark.parametrize("variant", [*VARIANTS, *(pytest.param(v, marks=pytest.mark.slow) for v in MORE)], ids=str)
def test_logits_and_tokens_equal_transformers(
    variant: Variant, tmp_path: Path, reference_model: Callable[[Path], Any]
) -> None:
    check_variant(variant, tmp_path, reference_model)


def changed_layers(**fields: Any) -> Callable[[Decoder], None]:
    def change(decoder: Decoder) -> None:
        decoder.layers = tuple(
            replace(layer, **{name: make(getattr(layer, name)) for name, make in fields.items()})
            if layer.router is not None
            else layer
            for layer in decoder.layers
        )

    return change


def changed_rule(**fields: Any) -> Callable[[Decoder], None]:
    def change(decoder: Decoder) -> None:
        layers = []
        for layer in decoder.spec.layers:
            moe = layer.moe and replace(layer.moe, router=replace(layer.moe.router, **fields))
            layers.append(replace(layer, moe=moe))
        decoder.spec = replace(decoder.spec, layers=tuple(layers))

    return change


GROUPED = variant("dots1", **ROUTED, n_shared_experts=1, n_group=4, topk_group=2)
PARTS: dict[str, tuple[Variant, Callable[[Decoder], None]]] = {
    "shared expert, fused": (VARIANTS[0], changed_layers(shared=lambda _: None)),
    "shared experts": (VARIANTS[1], changed_layers(shared=lambda _: None)),
    "selection bias": (VARIANTS[2], changed_layers(selection_bias_E=torch.zeros_like)),
    "selection bias beside the router": (VARIANTS[3], changed_layers(selection_bias_E=torch.zeros_like)),
    "groups": (GROUPED, changed_rule(num_groups=1, top_groups=1)),
    "scale of the routed experts": (VARIANTS[3], changed_rule(scale=1.0)),
}


@pytest.mark.parametrize("part", PARTS)
def test_dropping_a_part_changes_the_tokens(part: str, tmp_path: Path) -> None:
    chosen, drop = PARTS[part]
    decoder = load_decoder(chosen.save(tmp_path), dtype="float32", device="cpu")
    decoder.stack = None  # operation by operation, so that dropping a part drops it
    prompt = random_prompts([40])[0]
    full = greedy(decoder, prompt, 16)
    drop(decoder)
    assert greedy(decoder, prompt, 16) != full


@pytest.mark.parametrize("chosen", [VARIANTS[1], GROUPED], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rows_logits_are_the_same_alone_and_in_a_batch(chosen: Variant, dtype: str, tmp_path: Path) -> None:
    decoder = load_decoder(chosen.save(tmp_path), dtype=dtype, device="cpu", backend="cpu")
    prompts = random_prompts([23, 1, 40])
    together = PagedSequences(decoder, 3).run(prompts).split([23, 1, 40])
    for prompt, logits in zip(prompts, together, strict=True):
        alone = PagedSequences(decoder, 1)
        steps = [alone.run([prompt[:7]]), *(alone.run([[token]]) for token in prompt[7:])]
        assert torch.equal(torch.cat(steps), logits)


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        ("dots1", "scoring_func", "softmax", "scoring_func='softmax'|scoring_func=softmax"),
        ("dots1", "n_group", 3, "num_groups=3 does not divide"),
        ("dots1", "norm_topk_prob", "yes", "norm_topk_prob must be true or false"),
        ("solar_open", "first_k_dense_replace", -1, "first_k_dense_replace must be a whole number"),
        ("hy_v3", "mlp_layer_types", ["sparse"], "mlp_layer_types must be a list with an entry for every layer"),
        ("hy_v3", "mlp_layer_types", ["odd"] * 3, "mlp_layer_types must be dense or sparse"),
        ("hy_v3", "router_scaling_factor", "x", "router_scaling_factor must be a finite number"),
        ("hy_v3", "num_local_experts", 5, "num_experts must be the same as num_local_experts, 5"),
        ("granitemoeshared", "shared_intermediate_size", 1.5, "shared_intermediate_size must be a whole number"),
        ("granitemoeshared", "n_shared_experts", 2, "n_shared_experts=2 is not supported"),
    ],
)
def test_what_cannot_be_honoured_is_refused(family: str, key: str, value: Any, message: str) -> None:
    config = next(v.config for v in VARIANTS if v.family == family)
    with pytest.raises(CheckpointError, match=message):
        model_spec({**COMMON, "model_type": family, **config, key: value})


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = change(load_file(path / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_layers_for_further_tokens_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = VARIANTS[2].save(tmp_path)
    expected = PagedSequences(load_decoder(path, dtype="float32", device="cpu"), 1).run(random_prompts([9]))
    layer, size = "model.layers.3.", COMMON["hidden_size"]

    def add(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last = {name: tensor for name, tensor in weights.items() if name.startswith("model.layers.2.")}
        copied = {name.replace("layers.2.", "layers.3."): tensor.clone() for name, tensor in last.items()}
        joins = {f"{layer}eh_proj.weight": torch.ones(size, 2 * size), "mtp.fc.weight": torch.ones(size, size)}
        return {**weights, **copied, **joins}

    rewrite(path, add)
    with pytest.raises(CheckpointError, match="num_hidden_layers must be 4, which is how many layers the files hold"):
        load_decoder(path, dtype="float32", device="cpu")
    edit_config(path, num_nextn_predict_layers=1)
    with caplog.at_level("INFO"):
        decoder = load_decoder(path, dtype="float32", device="cpu")
    assert caplog.text.count("layers that predict further tokens are left out") == 1
    assert torch.equal(PagedSequences(decoder, 1).run(random_prompts([9])), expected)
    # One of the model's own layers is not taken for such a layer.
    rewrite(path, lambda weights: {name: t for name, t in weights.items() if "eh_proj" not in name})
    with pytest.raises(CheckpointError, match="num_hidden_layers must be 4"):
        load_decoder(path, dtype="float32", device="cpu")


def test_fused_and_transposed_experts_are_the_same_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = VARIANTS[2].save(tmp_path)
    prompts = random_prompts([12, 5])
    expected = PagedSequences(load_decoder(path, dtype="float32", device="cpu"), 2).run(prompts)

    def fuse(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        def stacked(layer: int, part: str) -> torch.Tensor:
            names = [f"model.layers.{layer}.mlp.experts.{e}.{part}_proj.weight" for e in range(8)]
            return torch.stack([weights.pop(name) for name in names])

        for layer in range(3):
            prefix = f"model.layers.{layer}.mlp.experts."
            gate_up = torch.cat((stacked(layer, "gate"), stacked(layer, "up")), 1)
            weights |= {f"{prefix}gate_up_proj": gate_up, f"{prefix}down_proj": stacked(layer, "down")}
        return weights

    rewrite(path, fuse)
    fused = load_decoder(path, dtype="float32", device="cpu")
    assert torch.equal(PagedSequences(fused, 2).run(prompts), expected)
    rewrite(path, lambda ws: {n: t.transpose(1, 2) if "experts." in n and t.dim() == 3 else t for n, t in ws.items()})
    names = replace(FAMILIES["solar_open"].experts[1], transposed=True)
    monkeypatch.setitem(FAMILIES, "solar_open", replace(FAMILIES["solar_open"], experts=(names,)))
    transposed = load_decoder(path, dtype="float32", device="cpu")
    assert torch.equal(PagedSequences(transposed, 2).run(prompts), expected)


def test_a_routers_bias_is_part_of_the_logits(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(make_checkpoint("mixtral"), tmp_path / "model")
    mixtral = FAMILIES["mixtral"]

    def biased(config: ConfigReader, layer: int) -> MoESpec:
        moe = mixtral.moe(config, layer)
        assert moe is not None
        return replace(moe, router_bias=True)

    prompt = random_prompts([6])[0]

    def run(*bias: float) -> tuple[torch.Tensor, set[int]]:
        """Logits, and the experts that were chosen."""
        names = [f"model.layers.{layer}.block_sparse_moe.gate.bias" for layer in range(3)]
        rewrite(path, lambda weights: {**weights, **{name: torch.tensor(bias) for name in names}})
        decoder, chosen = load_decoder(path, dtype="float32", device="cpu"), set()
        decoder.stack = None  # so that the choice can be watched
        route = decoder.backend.route

        def watched(*arguments: Any) -> Routing:
            routing = route(*arguments)
            chosen.update(routing.expert_ids_TK.flatten().tolist())
            return routing

        monkeypatch.setattr(decoder.backend, "route", watched)
        return PagedSequences(decoder, 1).run([prompt]), chosen

    plain = load_decoder(path, dtype="float32", device="cpu")
    monkeypatch.setitem(FAMILIES, "mixtral", replace(mixtral, moe=biased))
    logits, chosen = run(*[0.0] * 6)
    assert torch.equal(PagedSequences(plain, 1).run([prompt]), logits)
    assert len(chosen) > 2
    other, chosen = run(0.0, 99.0, 0.0, 0.0, 99.0, 0.0)
    assert chosen == {1, 4}
    assert not torch.equal(other, logits)
