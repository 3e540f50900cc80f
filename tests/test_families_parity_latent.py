"""Families with multi-head latent attention against transformers; what of it matters, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import add_exits
from dynamoe.dynamic.checkpoint.weights import Checkpoint, CheckpointError, read_json
from dynamoe.dynamic.convert.gguf_import import import_gguf
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.attention.mla import MlaSpec
from dynamoe.dynamic.model.families import family_of, model_spec
from dynamoe.dynamic.model.kv_cache import bytes_per_page
from dynamoe.dynamic.model.layout import plan_layout
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from family_parity import ENGINE_PATHS, Variant, check_engine, check_logits, generate
from gguf_files import write_gguf
from parallel_jobs import compare, shard_of
from safetensors.torch import load_file, save_file
from test_cpu_stack import assert_equal_steps
from test_decoder import TOLERANCE, PagedSequences, error, random_prompts

SIZES = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "n_group": 4,
    "topk_group": 2,
    "rms_norm_eps": 1e-2,  # far from that of the latent's norm, which no configuration sets
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}


DENSE_FIRST = {"first_k_dense_replace": 1}
INDEXER = {"index_topk": 128, "index_n_heads": 2, "index_head_dim": 16}


def random_selection_bias(model: torch.nn.Module) -> None:
    """Selection biases are buffers of zeros."""
    generator = torch.Generator().manual_seed(5)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.normal_(0.0, 0.3, generator=generator)


def variant(family: str, **config: Any) -> Variant:
    return Variant(family=family, config={**SIZES, **config}, prepare=random_selection_bias)


def as_kimi_k2(directory: Path) -> None:
    """The same mathematics under the name that Kimi K2's own code has."""
    file = directory / "config.json"
    config = {**read_json(file), "model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration_deepseek.X"}}
    config |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "seq_aux": True, "aux_loss_alpha": 0.001}
    file.write_text(json.dumps(config))


FAST = {
    "v3": variant("deepseek_v3", **DENSE_FIRST, attention_bias=True),
    "v2": variant("deepseek_v2", **DENSE_FIRST, topk_method="group_limited_greedy", rope_parameters=YARN),
    "v3.2": variant("deepseek_v32", **DENSE_FIRST, **INDEXER),
    "glm-lite": variant("glm4_moe_lite"),
    "glm-5": variant("glm_moe_dsa", **DENSE_FIRST, **INDEXER, indexer_types=["full", "full", "shared"]),
}
SLOW = {
    "v3-half-split": variant(
        "deepseek_v3", **DENSE_FIRST, q_lora_rank=None, attention_bias=True, rope_interleave=False, n_shared_experts=2
    ),
    "v3-yarn": variant("deepseek_v3", **DENSE_FIRST, rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "kimi-k2": replace(variant("deepseek_v3", n_group=1, topk_group=1, **DENSE_FIRST), edit=as_kimi_k2),
    "v2-lite": variant(
        "deepseek_v2", **DENSE_FIRST, q_lora_rank=None, n_group=1, topk_group=1, attention_bias=True, mlp_bias=True
    ),
    "v3.2-yarn": variant(
        "deepseek_v32", **INDEXER, mlp_layer_types=["sparse", "dense", "sparse"], rope_parameters=YARN
    ),
    "glm-lite-types": variant("glm4_moe_lite", q_lora_rank=None, mlp_layer_types=["sparse", "dense", "sparse"]),
    "glm-5-bias": variant("glm_moe_dsa", **INDEXER, n_group=1, topk_group=1, attention_bias=True),
}


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_logits_and_tokens_are_those_of_transformers(
    name: str, tmp_path: Path, reference_model: Callable[[Path], Any]
) -> None:
    given = {**FAST, **SLOW}[name]
    reference = reference_model(replace(given, edit=None).save(tmp_path / "theirs"))
    directory = given.save(tmp_path / "ours")
    for backend in ("cpu", "torch", "triton") if name in SLOW else ("cpu",):
        check_logits(directory, reference, backend)
    check_engine(directory, reference, paths=tuple(ENGINE_PATHS) if name in SLOW else ("chunked", "preempted"))


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAST["v3"].save(tmp_path_factory.mktemp("latent"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rows_bits_do_not_depend_on_how_it_is_scheduled(latent: Path, dtype: str) -> None:
    decoder = load_decoder(latent, dtype=dtype, backend="cpu")
    prompts = random_prompts([33, 60, 7])
    together = PagedSequences(decoder, 3).run(prompts).split([33, 60, 7])
    alone, chunked, one_by_one = (PagedSequences(decoder, 3, seed) for seed in (1, 2, 3))
    assert torch.equal(alone.run([[], prompts[1], []]), together[1])
    cuts = ((0, 13), (13, 14), (14, 60))
    parts = [chunked.run([prompts[0][start % 33 : start % 33 + 1], prompts[1][start:stop], []]) for start, stop in cuts]
    assert torch.equal(torch.cat([part[1:] for part in parts]), together[1])
    rows = [one_by_one.run([prompts[0][i : i + 1], [], prompts[2][i : i + 1]])[:1] for i in range(33)]
    assert torch.equal(torch.cat(rows), together[0])


@pytest.mark.parametrize(
    "part", ["kv_a_layernorm.weight", "q_a_layernorm.weight", "kv_a_proj_with_mqa.bias", "q_a_proj.bias", "o_proj.bias"]
)
def test_every_tensor_changes_the_logits(latent: Path, tmp_path: Path, part: str) -> None:
    tensors = load_file(latent / "model.safetensors")
    name = f"model.layers.1.self_attn.{part}"
    tensors[name] = torch.ones_like(tensors[name]) if "norm" in part else torch.zeros_like(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((latent / "config.json").read_text())
    prompt = random_prompts([20])
    logits = [PagedSequences(load_decoder(path, dtype="float32"), 1).run(prompt) for path in (latent, tmp_path)]
    assert error(*logits) > 1e-2


@pytest.mark.parametrize(
    "change",
    [{"interleaved": False}, {"latent_eps": 1e-2}, {"scale": 0.9 * 24**-0.5}],
    ids=lambda change: next(iter(change)),
)
def test_every_number_changes_the_logits(latent: Path, change: dict[str, Any]) -> None:
    decoder, prompt = load_decoder(latent, dtype="float32"), random_prompts([20])
    logits = PagedSequences(decoder, 1).run(prompt)
    layers = [replace(layer, attention=replace(layer.attention, **change)) for layer in decoder.spec.layers]
    decoder.spec = replace(decoder.spec, layers=tuple(layers))
    decoder.stack = decoder.make_stack()
    assert error(PagedSequences(decoder, 1).run(prompt), logits) > 1e-3


@pytest.mark.parametrize("kept", ["auto", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [{}, {"q_lora_rank": None, "rope_interleave": False}], ids=str)
def test_layers_in_one_call_give_the_bits_of_their_operations(
    tmp_path: Path, config: dict[str, Any], dtype: str, kept: str
) -> None:
    directory = variant("deepseek_v3", **DENSE_FIRST, attention_bias=True, **config).save(tmp_path)
    for method in ("none", "int8"):
        decoder = load_decoder(directory, dtype=dtype, backend="cpu", kv_cache_dtype=kept, quantization=method)
        assert decoder.stack is not None
        assert_equal_steps(decoder, limited=False)


def test_a_token_takes_one_entry_in_the_cache(latent: Path) -> None:
    decoder = load_decoder(latent, dtype="bfloat16")
    assert bytes_per_page(decoder.spec, torch.bfloat16, 16) == 3 * 16 * (32 + 8) * 2
    cache = decoder.allocate_cache(4, 16)
    cache[0].keys_BGPC[:2] = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    decoder.copy_pages(cache, [(0, 1), (1, 2)])  # read before it is written, once
    assert cache[0].keys_BGPC[:3, 0, 0, 0].tolist() == [1.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_lora_rank": ...}, "lacks q_lora_rank"),
        ({"kv_lora_rank": None}, "lacks kv_lora_rank"),
        ({"v_head_dim": 0}, "value_dim must be at least 1"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must be 4 with this attention, not '2'"),
        ({"head_dim": 16}, "head_dim must be 8 with this attention, not '16'"),
        ({"qk_head_dim": 16}, "qk_head_dim must be 24 with this attention, not '16'"),
        ({"qk_rope_head_dim": 7, "head_dim": 7, "qk_head_dim": 23}, "even head_dim, not 7"),
        ({"rope_parameters": {"rope_type": "yarn", "mscale_all_dim": 1.0}}, "lacks factor"),
        ({"rope_scaling": 3, "rope_parameters": None}, "one set of values for all layers"),
        ({"model_type": "deepseek_v2", "rope_interleave": False}, "rope_interleave must be true, not 'False'"),
        ({"sliding_window": 8}, "sliding_window=8 is not supported"),
        ({"index_topk": 8}, "index_topk=8 is not supported"),
        ({"scoring_func": "softmax"}, "scoring_func=softmax is not supported"),
        ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"}, "topk_method must be one of greedy, group_limited"),
        (
            {"model_type": "deepseek_v2", "n_group": 1, "topk_group": 1, "norm_topk_prob": True},
            "norm_topk_prob=True is not supported",
        ),
        ({"model_type": "glm4_moe_lite", "first_k_dense_replace": 2}, "first_k_dense_replace=2 is not supported"),
        ({"model_type": "deepseek_v32"}, "lacks index_topk"),
        ({"model_type": "deepseek_v32", **INDEXER, "index_topk": 0}, "index_topk must be at least 1"),
        ({"model_type": "deepseek_v32", **INDEXER, "layer_types": ["full_attention"] * 3}, "indexed_attention for ev"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused(latent: Path, change: dict[str, Any], message: str) -> None:
    config = {**read_json(latent / "config.json"), **change}
    with pytest.raises(CheckpointError, match=message):
        model_spec({key: value for key, value in config.items() if value is not ...})


def test_rows_that_exit_leave_their_entries_behind(latent: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(latent, tmp_path / "exits")
    add_exits(copy, {1: 0.5, 2: 0.5})
    model = load_model(copy, dtype="float32", device="cpu", progress=False)
    thresholds = {1: 0.5, 2: 0.5}
    early = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, quality=None, exit_thresholds=thresholds)
    prompts, found = random_prompts([9, 30]), []
    for requests in (prompts, prompts[:1], prompts[1:]):  # together, then alone
        engine = Engine(model, EngineConfig())
        found.append(generate(engine, requests, params=early))
        assert engine.stats().compute.projected_rows > 0
    assert found[0] == found[1] + found[2]
    # Behind one layer the state at the exit is what the next layer reads: its entries are those of the full model.
    decoder, (ran, batch), (propagated, _) = model.decoder, *(fresh_cache(model.decoder, [9]) for _ in range(2))
    x_TD = decoder.embed(torch.tensor(prompts[0]))
    first, *rest = decoder.segments
    x_TD = decoder.run_segment(first, x_TD, ran, batch)
    decoder.propagate_kv(decoder.exits[1], x_TD, propagated, batch)
    for segment in rest:
        x_TD = decoder.run_segment(segment, x_TD, ran, batch)
    entries = [[layer.keys_BGPC for layer in cache] for cache in (ran, propagated)]
    assert not entries[1][0].any()
    assert entries[0][1].any()
    assert torch.equal(entries[0][1], entries[1][1])
    assert not torch.equal(entries[0][2], entries[1][2])


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"expert": 2}, {"pipeline": 2}], ids=str)
def test_tokens_of_two_ranks_are_those_of_one_process(latent: Path, tmp_path: Path, sizes: dict[str, int]) -> None:
    compare(tmp_path, str(latent), sizes)


def test_ranks_share_the_heads_and_each_has_the_latent(latent: Path) -> None:
    config, whole = read_json(latent / "config.json"), Checkpoint(latent)
    spec, name = model_spec(config), "model.layers.0.self_attn."
    parts: list[dict[str, torch.Tensor]] = []
    for rank in range(2):
        shard = shard_of(spec, 2, 1, rank)
        shard.layout(plan_layout(spec, family_of(config), whole))
        part = shard.checkpoint(whole)
        parts.append({key: part.view(key) for key in whole if key.startswith(name)})
        attention = shard.spec.layers[0].attention
        assert isinstance(attention, MlaSpec)
        assert attention.num_heads == 2
        assert attention.cache_shapes(16, torch.bfloat16) == spec.layers[0].attention.cache_shapes(16, torch.bfloat16)
    for split, axis in (("q_b_proj", 0), ("kv_b_proj", 0), ("o_proj", 1)):
        key = f"{name}{split}.weight"
        assert torch.equal(torch.cat([part[key] for part in parts], axis), whole.view(key))
    for key in (f"{name}{part}" for part in ("kv_a_proj_with_mqa.weight", "q_a_proj.weight", "kv_a_layernorm.weight")):
        assert torch.equal(parts[1][key], whole.view(key))
    with pytest.raises(ValueError, match=r"parallel\.tensor=5 does not go with 4 heads"):
        spec.layers[0].attention.part(5, 0)


@pytest.mark.parametrize("method", ["int8", "int4-g32"])
def test_quantised_at_load(latent: Path, method: str) -> None:
    plain, coded = (load_decoder(latent, dtype="bfloat16", quantization=name) for name in ("none", method))
    sizes = [(d.layers[1].attention.q.nbytes, d.layers[1].attention.key_up.nbytes) for d in (plain, coded)]  # type: ignore[attr-defined]
    assert sizes[1][0] < 0.7 * sizes[0][0]
    assert sizes[1][1] == sizes[0][1]  # what reads and makes latents stays as it is
    backends = [load_decoder(latent, dtype="float32", quantization=method, backend=name) for name in ("cpu", "torch")]
    logits = [PagedSequences(decoder, 1).run(random_prompts([40])) for decoder in (plain, *backends)]
    assert error(*logits[1:]) < TOLERANCE
    assert error(*logits[:2]) > 1e-3


def test_longer_contexts_than_an_indexer_would_leave_whole_are_refused(tmp_path: Path) -> None:
    directory = variant("deepseek_v32", **DENSE_FIRST, **{**INDEXER, "index_topk": 32}).save(tmp_path)
    model = load_model(directory, dtype="float32", device="cpu", progress=False)
    assert Engine(model, EngineConfig()).max_model_len == 32
    message = "exceeds the model's maximum of 32 positions, its index_topk: attention that chooses among more is not"
    with pytest.raises(ValueError, match=f"engine.max_model_len=33 {message}"):
        Engine(model, EngineConfig(max_model_len=33))
    with pytest.raises(ValueError, match=f"a context of 33 tokens {message}"):
        PagedSequences(model.decoder, 1).run(random_prompts([33]))
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.self_attn.indexer.wk.weight"
    save_file({**tensors, name: tensors[name][:8].contiguous()}, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}.* has shape .8, 64.; config.json implies .16, 64."):
        load_decoder(directory)


def test_a_cache_in_8_bits_keeps_the_rotated_key(latent: Path) -> None:
    decoders = [load_decoder(latent, dtype="float32", kv_cache_dtype=kept) for kept in ("auto", "int8")]
    assert bytes_per_page(decoders[1].spec, torch.int8, 16) == 3 * 16 * (32 + 2 + 2 * 8)
    found, entries, prompt = [], [], random_prompts([50])[0]
    for decoder in decoders:
        kv, batch = fresh_cache(decoder, [50])
        x_TD = decoder.embed(torch.tensor(prompt))
        for segment in decoder.segments:
            x_TD = decoder.run_segment(segment, x_TD, kv, batch)
        found.append(decoder.logits(x_TD))
        entries.append(kv[0].keys_BGPC)
    off_T = (found[1] - found[0]).abs().amax(-1) / found[0].abs().max()
    assert 1e-4 < off_T.median() < 0.05  # a few rows are routed to other experts
    plain, coded = entries
    assert torch.equal(coded[..., 34:].contiguous().view(torch.bfloat16), plain[..., 32:].bfloat16())
    codes, scale = coded[..., :32].float(), coded[..., 32:34].contiguous().view(torch.bfloat16).float()
    assert ((codes * scale - plain[..., :32]).abs() <= 0.5 * scale).all()
    with pytest.raises(ValueError, match="kv_cache_dtype=fp8 does not go with 'mla' attention; auto, int8 do"):
        load_decoder(latent, dtype="float32", kv_cache_dtype="fp8", backend="torch")


def test_tokens_on_a_cache_in_8_bits_do_not_depend_on_the_schedule(latent: Path) -> None:
    model = load_model(latent, dtype="bfloat16", kv_cache_dtype="int8", device="cpu", progress=False)
    prompts = random_prompts([1, 40, 17])
    together = generate(Engine(model, EngineConfig()), prompts)
    assert [generate(Engine(model, EngineConfig()), [prompt])[0] for prompt in prompts] == together
    chunked = EngineConfig(
        max_num_batched_tokens=7, block_size=8, kv_memory=14 * bytes_per_page(model.spec, torch.int8, 8)
    )
    engine = Engine(model, chunked)
    assert generate(engine, prompts) == together
    assert engine.stats().preemptions > 0
    assert generate(engine, prompts) == together  # on pages that are found again
    assert engine.stats().prefix_cache_hits > 0


def one_tensor_for_keys_and_values(values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """As files were before keys and values came apart; there the sizes of heads are under the plain keys."""
    for part in ("key", "value"):
        values[f"deepseek2.attention.{part}_length"] = values.pop(f"deepseek2.attention.{part}_length_mla")
    values["deepseek2.attention.head_count_kv"] = values["deepseek2.attention.head_count"]
    for name in [name for name in tensors if name.endswith("attn_k_b.weight")]:
        keys, v_HVZ = tensors.pop(name), tensors.pop(name.replace("_k_b", "_v_b"))
        tensors[name.replace("_k_b", "_kv_b")] = torch.cat((keys.transpose(1, 2), v_HVZ), 1).flatten(0, 1)


GGUF = {
    "v3": (variant("deepseek_v3", **DENSE_FIRST, rope_parameters={**YARN, "mscale": 0.9}), {}),
    "v3-older": (variant("deepseek_v3", **DENSE_FIRST), {"edit": one_tensor_for_keys_and_values}),
    "v2": (replace(FAST["v2"], config={**FAST["v2"].config, "rope_parameters": {**YARN, "mscale": 0.9}}), {}),
    "v2-lite": (variant("deepseek_v2", **DENSE_FIRST, q_lora_rank=None, n_group=1, topk_group=1), {}),
    "v3.2": (FAST["v3.2"], {}),
    "glm-lite": (variant("glm4_moe_lite", n_group=1, topk_group=1), {}),
    "glm-5": (FAST["glm-5"], {}),
    "kimi-k2": (SLOW["kimi-k2"], {"pre": "kimi-k2"}),
}


@pytest.mark.parametrize("name", GGUF)
def test_gguf_files_compute_what_the_checkpoint_does(name: str, tmp_path: Path) -> None:
    given, writing = GGUF[name]
    checkpoint, target = given.save(tmp_path / "checkpoint"), tmp_path / "imported"
    target.mkdir()
    import_gguf(write_gguf(checkpoint, tmp_path / "tiny.gguf", **writing), target, progress=False)
    decoders = [load_decoder(path, dtype="float32") for path in (checkpoint, target)]
    assert error(*(PagedSequences(decoder, 1).run(random_prompts([40])) for decoder in decoders)) < 1e-5


def test_quantised_gguf_files_run_on_their_codes(tmp_path: Path) -> None:
    sizes = {"q_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "moe_intermediate_size": 64}
    given, decoders = Variant(family="deepseek_v3", config={**SIZES, **DENSE_FIRST, **sizes}), []
    file = write_gguf(given.save(tmp_path / "checkpoint"), tmp_path / "tiny.gguf", "Q8_0")
    for keep_codes in (True, False):
        target = tmp_path / str(keep_codes)
        target.mkdir()
        import_gguf(file, target, keep_codes=keep_codes, progress=False)
        decoders.append(load_decoder(target, dtype="float32"))
    coded, plain = ([getattr(d.layers[1].attention, p).nbytes for p in ("q", "o", "key_up")] for d in decoders)
    assert coded[0] < plain[0] / 3
    assert coded[1] < plain[1] / 3
    assert coded[2] == plain[2]
    assert error(*(PagedSequences(decoder, 1).run(random_prompts([40])) for decoder in decoders)) < TOLERANCE


@pytest.mark.parametrize(("latent", "rotated", "left"), [(256, 16, False), (40, 80, True), (520, 8, True)])
def test_triton_leaves_wide_entries_to_torch(
    latent: int, rotated: int, left: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"kv_lora_rank": latent, "qk_rope_head_dim": rotated, "num_hidden_layers": 1, "first_k_dense_replace": 0}
    directory = variant("deepseek_v3", **sizes).save(tmp_path)
    decoders = [load_decoder(directory, dtype="bfloat16", backend=name) for name in ("triton", "torch")]
    assert error(*(PagedSequences(decoder, 1).run(random_prompts([9])) for decoder in decoders)) < 0.1
    assert (f"no kernel for attention over heads of {latent + rotated} channels" in caplog.text) == left
