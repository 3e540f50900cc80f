"""Layers that predict further tokens: left out unless they are asked for, and then those of transformers."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import test_families_parity_attention as attention
import torch
from conftest import FAMILIES, randomize
from dynamoe.dynamic.checkpoint.weights import CheckpointError, read_json
from dynamoe.dynamic.convert.gguf_import import import_gguf
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.layer_weights import MtpWeights
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.model_files import open_files
from dynamoe.dynamic.model.norms import run_norm
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from family_parity import Variant
from gguf_files import write_gguf
from safetensors.torch import load_file, save_file
from test_decoder import PagedSequences, error, random_prompts
from test_families_parity_states import NEXT

FULL, SLIDING = "full_attention", "sliding_attention"
LATENT = {
    **{"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_shared_experts": 1},
    **{"kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 20},
    **{"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4},
}
DEEPSEEK = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "post_norm": "shared_head.norm"}
QWEN = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "post_norm": "norm"}
ERNIE = {"enorm": "mtp_emb_norm.0", "hnorm": "mtp_hidden_norm.0", "eh_proj": "mtp_linear_proj.0"}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family's layers for further tokens, as its published files call them.

    Arguments:
        layer: what is in front of the layer's own tensors; parts: of the others.
        names: of these, by transformers' names.
        settings: of the layer, as transformers' configuration has them.
        own: renamed inside the layer.
    """

    variant: Variant
    layer: str
    parts: str
    names: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    own: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.variant.family


MIMO = next(variant for variant in attention.VARIANTS if variant.family == "mimo_v2_flash")
FURTHER = {"num_nextn_predict_layers": 1}
CASES = [
    Case(
        variant=Variant(family="deepseek_v3", config={**LATENT, **FURTHER}),
        **{"layer": "model.layers.3.", "parts": "model.layers.3.", "names": DEEPSEEK},
        settings={"first_k_dense_replace": 0},
    ),
    Case(
        variant=Variant(family="glm4_moe", config={**FAMILIES["glm4_moe"], "num_mtp_layers": 1}),
        **{"layer": "model.layers.3.", "parts": "model.layers.3.", "names": DEEPSEEK},
        settings={"first_k_dense_replace": 0},
    ),
    Case(
        variant=Variant(family="qwen3_next", config=NEXT),
        **{"layer": "mtp.layers.0.", "parts": "mtp.", "names": QWEN},
        settings={"layer_types": [FULL]},
    ),
    Case(
        variant=Variant(family="qwen3_5_moe_text", config=NEXT),
        **{"layer": "mtp.layers.0.", "parts": "mtp.", "names": QWEN},
        settings={"layer_types": [FULL]},
    ),
    Case(
        variant=MIMO,
        **{"layer": "model.mtp.layers.0.", "parts": "model.mtp.layers.0."},
        names={**DEEPSEEK, "post_norm": "final_layernorm"},
        settings={"layer_types": [SLIDING], "mlp_layer_types": ["dense"]},
        own={"post_attention_layernorm": "pre_mlp_layernorm"},
    ),
    Case(
        variant=Variant(family="ernie4_5_moe", config=FAMILIES["ernie4_5_moe"]),
        **{"layer": "model.mtp_block.0.", "parts": "model.", "names": ERNIE},
        settings={"moe_layer_start_index": 99},
    ),
]
Made = tuple[Path, Any, Any, torch.nn.Module]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Made]:
    """A checkpoint with such a layer, transformers' model of it without, its settings, and transformers' layer."""
    known: dict[str, Made] = {}

    def make(case: Case) -> Made:
        from transformers import AutoModelForCausalLM
        from transformers.modeling_layers import MtpLayer

        if str(case) not in known:
            path = case.variant.save(tmp_path_factory.mktemp(str(case)))
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
            decoder: Any = model.get_decoder()
            settings = copy.deepcopy(model.config)
            for key, value in case.settings.items():
                setattr(settings, key, value)
            kinds = type(decoder.layers[-1]), type(decoder.norm)
            layer = MtpLayer(settings, *kinds, 0, "post_norm" in case.names).eval()
            randomize(layer, 5)
            save_file(load_file(path / "model.safetensors") | stored(case, layer), path / "model.safetensors")
            known[str(case)] = path, model, settings, layer
        return known[str(case)]

    return make


def stored(case: Case, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A layer's tensors as files have them, experts one by one."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in layer.state_dict().items():
        module, _, rest = name.partition(".")
        if module != "mtp_block":
            tensors[f"{case.parts}{case.names[module]}.{rest}"] = tensor
        elif rest.startswith("mlp.experts."):
            for expert, weight in enumerate(tensor):
                parts = {"gate": weight[: len(weight) // 2], "up": weight[len(weight) // 2 :]}
                for part, own in (parts if "gate_up" in rest else {"down": weight}).items():
                    tensors[f"{case.layer}mlp.experts.{expert}.{part}_proj.weight"] = own.contiguous()
        else:
            for theirs, published in case.own.items():
                rest = rest.replace(theirs, published)
            tensors[case.layer + rest] = tensor
    return {re.sub(r"\.sinks$", ".attention_sink_bias", name): tensor for name, tensor in tensors.items()}


def expected_logits(made: Made, embedded_TD: torch.Tensor, hidden_TD: torch.Tensor) -> torch.Tensor:
    """What transformers' layer predicts."""
    _, model, settings, layer = made
    decoder, count = model.get_decoder(), len(embedded_TD)
    positions = torch.arange(count)[None]
    kinds = {"layer_type": settings.layer_types[0]} if settings.model_type == "mimo_v2_flash" else {}
    table = decoder.rotary_emb(embedded_TD[None], position_ids=positions, **kinds)
    behind = positions[0][:, None] - positions[0]
    window = settings.sliding_window if kinds else count
    mask = torch.where((behind >= 0) & (behind < window), 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.inference_mode():
        out = layer(
            embedded_TD[None],
            hidden_TD[None],
            position_embeddings=table,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=None,
        )
        return model.lm_head(out if layer.use_post_norm else decoder.norm(out))[0]


def own_logits(
    decoder: Decoder, weights: MtpWeights, embedded_TD: torch.Tensor, hidden_TD: torch.Tensor
) -> torch.Tensor:
    """The same of the weights that were loaded, as a model of one layer."""
    spec, backend = decoder.spec, decoder.backend
    assert weights.spec.rope is not None
    alone = Decoder(
        replace(spec, layers=(weights.spec,), rope=weights.spec.rope),
        backend,
        embedding_VD=decoder.embedding_VD,
        layers=[weights.layer],
        final_norm_D=weights.norms.get("final", decoder.final_norm_D),
        lm_head=decoder.lm_head,
    )
    kv, batch = fresh_cache(alone, [len(embedded_TD)])
    normed = [
        run_norm(backend, spec.norm, x_TD, weights.norms[name], None, spec.norm_eps)
        for name, x_TD in (("embedding", embedded_TD), ("hidden", hidden_TD))
    ]
    x_TD = backend.linear(torch.cat(normed, -1), weights.join).float()
    return alone.logits(alone.run_segment(alone.segments[0], x_TD, kv, batch))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_they_predict_what_transformers_predicts(made: Callable[[Case], Made], case: Case) -> None:
    found = made(case)
    path, model = found[:2]
    decoder = load_decoder(path, dtype="float32", device="cpu", load_mtp=True)
    (weights,) = decoder.mtp
    tokens, hidden_TD = torch.tensor(random_prompts([33])[0]), torch.randn(33, decoder.spec.hidden_size)
    embedded_TD = model.get_input_embeddings()(tokens).detach()
    expected = expected_logits(found, embedded_TD, hidden_TD)
    assert error(own_logits(decoder, weights, embedded_TD, hidden_TD), expected) < 1e-4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_they_take_no_memory_and_change_nothing_unless_they_are_asked_for(
    made: Callable[[Case], Made], case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    path = made(case)[0]
    with caplog.at_level("INFO"):
        plain = load_decoder(path, dtype="float32", device="cpu")
    assert "tensors of layers that predict further tokens are left out" in caplog.text
    asked = load_decoder(path, dtype="float32", device="cpu", load_mtp=True)
    assert plain.mtp == ()
    assert asked.weight_bytes == plain.weight_bytes + asked.mtp[0].nbytes
    prompt = random_prompts([9])
    assert torch.equal(PagedSequences(plain, 1).run(prompt), PagedSequences(asked, 1).run(prompt))


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_every_tensor_is_needed_in_its_shape(made: Callable[[Case], Made], case: Case, tmp_path: Path) -> None:
    path = made(case)[0]
    weights = load_file(path / "model.safetensors")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    own = [
        name for name in weights if name.startswith((case.layer, case.parts)) and not re.search(r"experts\.[1-9]", name)
    ]
    own = [name for name in own if not re.match(r"model\.layers\.[012]\.", name)]
    assert own
    for name in own:
        wrong = {**weights, name: torch.ones(*weights[name].shape[:-1], weights[name].shape[-1] + 1)}
        changes = [wrong]
        if not name.startswith(f"{case.parts}{case.names['post_norm']}."):  # there may be none
            changes.append({other: tensor for other, tensor in weights.items() if other != name})
        for change in changes:
            save_file(change, tmp_path / "model.safetensors")
            with pytest.raises(
                CheckpointError, match=r"lacks the tensor|config.json implies|experts|num_hidden_layers"
            ):
                open_files(tmp_path, mtp=True)
    save_file({**weights, f"{case.layer}made_up": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="made_up"):
        open_files(tmp_path, mtp=True)
    open_files(tmp_path)


def test_copies_of_the_models_tensors_are_kept_once(made: Callable[[Case], Made], tmp_path: Path) -> None:
    path = made(CASES[0])[0]
    weights = load_file(path / "model.safetensors")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    more = {CASES[0].layer + name: weights[model].clone() for name, model in copies.items()}
    save_file(weights | more, tmp_path / "model.safetensors")
    (same,) = load_decoder(tmp_path, dtype="float32", device="cpu", load_mtp=True).mtp
    assert (same.embedding, same.head) == (None, None)
    save_file(weights | {name: tensor + 1 for name, tensor in more.items()}, tmp_path / "model.safetensors")
    decoder = load_decoder(tmp_path, dtype="float32", device="cpu", load_mtp=True)
    (own,) = decoder.mtp
    assert isinstance(own.embedding, torch.Tensor)
    assert torch.equal(own.embedding, weights["model.embed_tokens.weight"] + 1)
    assert own.head is not None
    assert own.nbytes == same.nbytes + own.embedding.nbytes + own.head.nbytes


def test_quantised_with_the_model(made: Callable[[Case], Made]) -> None:
    path = made(CASES[1])[0]
    (plain,), (coded,) = (
        load_decoder(path, dtype="float32", device="cpu", load_mtp=True, quantization=name).mtp
        for name in ("none", "int8")
    )
    assert coded.nbytes < 0.5 * plain.nbytes


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[4]], ids=str)
def test_gguf_files_have_them_as_blocks_behind_the_layers(
    made: Callable[[Case], Made], case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = made(case)
    path, config = found[0], read_json(found[0] / "config.json")
    own, block = stored(case, found[3]), config["num_hidden_layers"]
    own_parts = {f"{case.parts}{name}.weight": part for part, name in case.names.items()}
    longer, target = tmp_path / "longer", tmp_path / "imported"
    shutil.copytree(path, longer)
    target.mkdir()

    def as_layer(name: str) -> str:
        for ours, published in case.own.items():
            name = name.replace(published, ours)
        return name.replace(case.layer, f"model.layers.{block}.", 1)

    layers = {as_layer(name): tensor for name, tensor in own.items() if name not in own_parts}
    model = {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if name not in own}
    save_file(model | layers, longer / "model.safetensors")

    def edit(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        count = next(key for key in values if key.endswith(".block_count"))
        values |= {count: block + 1, count.replace("block_count", "nextn_predict_layers"): 1}
        for name, part in own_parts.items():
            theirs = {"eh_proj": "eh_proj", "post_norm": "shared_head_norm"}.get(part, part)
            offset = case.names is QWEN and part != "eh_proj"  # a norm that adds one to its weight
            tensors[f"blk.{block}.nextn.{theirs}.weight"] = own[name] + float(offset)

    import_gguf(write_gguf(longer, tmp_path / "tiny.gguf", edit=edit), target)
    decoders = [load_decoder(folder, dtype="float32", device="cpu", load_mtp=True) for folder in (path, target)]
    rows = torch.randn(2, 33, decoders[0].spec.hidden_size)
    expected, logits = (own_logits(decoder, decoder.mtp[0], *rows) for decoder in decoders)
    assert error(logits, expected) < 1e-5
    assert load_decoder(target, dtype="float32", device="cpu").mtp == ()

    def damage(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        edit(values, tensors)
        del tensors[f"blk.{block}.nextn.hnorm.weight"]

    (bare := tmp_path / "bare").mkdir()
    with caplog.at_level("WARNING"):
        import_gguf(write_gguf(longer, tmp_path / "tiny.gguf", edit=damage), bare)
    assert f"is left out: {tmp_path / 'tiny.gguf'}: the checkpoint lacks" in caplog.text
    assert f"'blk.{block}.nextn.hnorm.weight'" in caplog.text
    assert load_decoder(bare, dtype="float32", device="cpu", load_mtp=True).mtp == ()


def test_families_without_a_description_refuse_by_name(tmp_path: Path) -> None:
    path = Variant(family="qwen3_moe", config=FAMILIES["qwen3_moe"]).save(tmp_path)
    assert load_decoder(path, dtype="float32", device="cpu", load_mtp=True).mtp == ()
    weights = load_file(path / "model.safetensors")
    save_file(weights | {"mtp.fc.weight": torch.ones(64, 128)}, path / "model.safetensors")
    open_files(path)
    with pytest.raises(CheckpointError, match="further tokens are not known of qwen3_moe models"):
        open_files(path, mtp=True)
