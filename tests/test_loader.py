"""Loading: every layout that checkpoints come in, every setting, and our own family."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.kv_cache import allocate_layers
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.kernels.api.types import AttentionBatch
from dynamoe.serve.sampling import sampling_params
from dynamoe.serve.wire.openai import CompletionRequest
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def load(path: Path, **options: Any) -> Decoder:
    return load_decoder(path, **{"dtype": "float32", "device": "cpu", **options})


def prompt_logits(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    """Logits of one prompt in one step: float32, (T, V)."""
    spec, length = decoder.spec, len(tokens)
    kv = allocate_layers(spec, 1, length, decoder.dtype, torch.device("cpu"))
    batch = AttentionBatch(
        positions_T=torch.arange(length),
        slots_T=torch.arange(length),
        query_start_S1=torch.tensor([0, length], dtype=torch.int32),
        context_len_S=torch.tensor([length], dtype=torch.int32),
        block_table_SM=torch.zeros(1, 1, dtype=torch.int32),
        max_query_len=length,
        max_context_len=length,
    )
    x_TD = decoder.embed(torch.tensor(tokens))
    for segment in decoder.segments:
        x_TD = decoder.run_segment(segment, x_TD, kv, batch)
    return decoder.logits(x_TD)


TOKENS = [5, 260, 17, 99, 301, 44, 8]


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(path / WEIGHTS)
    change(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / WEIGHTS)


def fuse_experts(weights: dict[str, torch.Tensor], prefix: str, target: str, names: tuple[str, str, str]) -> None:
    """Per-expert tensors → the two fused ones that transformers 5 keeps in memory and some checkpoints store."""
    count = sum(name.startswith(prefix) and name.endswith(f"{names[0]}.weight") for name in weights)
    gate, up, down = (
        torch.stack([weights.pop(f"{prefix}{expert}.{part}.weight") for expert in range(count)]) for part in names
    )
    weights[f"{target}.gate_up_proj"], weights[f"{target}.down_proj"] = torch.cat((gate, up), 1), down


def test_a_sharded_checkpoint_equals_a_single_file(make_checkpoint: Callable[..., Path]) -> None:
    single, sharded = make_checkpoint("qwen3_moe"), make_checkpoint("qwen3_moe", max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert (sharded / INDEX).is_file()
    assert torch.equal(prompt_logits(load(sharded), TOKENS), prompt_logits(load(single), TOKENS))


@pytest.mark.parametrize(
    ("family", "old", "new", "names"),
    [
        ("qwen3_moe", "mlp.experts.", "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral", "block_sparse_moe.experts.", "mlp.experts", ("w1", "w3", "w2")),
    ],
)
def test_fused_expert_tensors(
    family: str, old: str, new: str, names: tuple[str, str, str], copy_checkpoint: Callable[..., Path]
) -> None:
    path = copy_checkpoint(family)
    expected = prompt_logits(load(path), TOKENS)

    def change(weights: dict[str, torch.Tensor]) -> None:
        for layer in range(3):
            prefix = f"model.layers.{layer}."
            fuse_experts(weights, prefix + old, prefix + new, names)
            if family == "mixtral":
                weights[f"{prefix}mlp.gate.weight"] = weights.pop(f"{prefix}block_sparse_moe.gate.weight")

    edit_weights(path, change)
    assert torch.equal(prompt_logits(load(path), TOKENS), expected)


def test_granite_under_the_names_of_transformers_5(copy_checkpoint: Callable[..., Path]) -> None:
    path = copy_checkpoint("granitemoe")
    expected = prompt_logits(load(path), TOKENS)
    renamed = {
        "input_linear.weight": "experts.gate_up_proj",
        "output_linear.weight": "experts.down_proj",
        "router.layer.weight": "router.weight",
    }

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            for old, new in renamed.items():
                if name.endswith(old):
                    weights[name.replace(old, new)] = weights.pop(name)

    edit_weights(path, change)
    assert torch.equal(prompt_logits(load(path), TOKENS), expected)


def test_a_tied_head_that_is_stored_as_well(copy_checkpoint: Callable[..., Path]) -> None:
    """Equal to the table it stays tied; different, it is a head of its own (as transformers 5 decides)."""
    path = copy_checkpoint("llama", tie_word_embeddings=True)
    expected, tied = prompt_logits(load(path), TOKENS), load(path)
    assert tied.spec.tie_embeddings
    edit_weights(path, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    assert torch.equal(prompt_logits(load(path), TOKENS), expected)
    assert load(path).weight_bytes == tied.weight_bytes
    edit_weights(path, lambda weights: weights.update({"lm_head.weight": weights["lm_head.weight"] * 2}))
    torch.testing.assert_close(prompt_logits(load(path), TOKENS), 2 * expected)


def test_the_weights_take_their_size_once(make_checkpoint: Callable[..., Path]) -> None:
    path = make_checkpoint("qwen2_moe", tie_word_embeddings=True)
    stored = sum(tensor.nbytes for tensor in load_file(path / WEIGHTS).values())
    assert load(path, backend="torch").weight_bytes == stored
    assert load(path, backend="torch", dtype="bfloat16").weight_bytes == stored // 2


def test_dtype_auto_is_the_checkpoints_own(copy_checkpoint: Callable[..., Path]) -> None:
    path = copy_checkpoint("llama", dtype="bfloat16")
    assert load(path, dtype="auto").dtype == torch.bfloat16
    edit_json(path / "config.json", dtype=None, torch_dtype="float32")
    assert load(path, dtype="auto").dtype == torch.float32
    edit_json(path / "config.json", torch_dtype=None)
    assert load(path, dtype="auto").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be auto, float32, bfloat16, float16, not 'int3'"):
        load(path, dtype="int3")


def test_tensors_that_nothing_uses_are_refused_unless_they_say_nothing(
    copy_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = copy_checkpoint("llama")
    expected = prompt_logits(load(path), TOKENS)
    bias = "model.layers.1.self_attn.q_proj.bias"
    # Buffers of older libraries, and biases of zeros as some quantisers store them.
    harmless = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), bias: torch.zeros(64)}
    edit_weights(path, lambda weights: weights.update(harmless))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(prompt_logits(load(path), TOKENS), expected)
    assert not caplog.records
    for name, message in (
        (bias, f"tensor '{bias}' in model.safetensors belongs to no part of the model"),
        ("model.layers.3.mlp.up_proj.weight", "num_hidden_layers must be 4, which is how many layers the files hold"),
        ("model.layers.1.mlp.experts.0.up_proj.weight", "layer 1 has 0 experts; the files hold 1 of it"),
        ("model.layers.1.self_attn.sinks", "tensor 'model.layers.1.self_attn.sinks' in model.safetensors belongs to"),
    ):
        edit_weights(path, lambda weights, name=name: weights.update({name: torch.ones(8)}))
        with pytest.raises(CheckpointError, match=message):
            load(path)
        edit_weights(path, lambda weights, name=name: weights.pop(name))


@pytest.mark.parametrize("field", ["num_experts", "num_attention_heads", "vocab_size", "head_dim", "num_hidden_layers"])
def test_counts_that_the_files_cannot_hold_are_named_at_once(copy_checkpoint: Callable[..., Path], field: str) -> None:
    path = copy_checkpoint("qwen3_moe")
    changes = {"num_experts": {"num_local_experts": None}, "head_dim": {"head_dim": 2**31 - 2}}.get(field, {})
    edit_json(path / "config.json", **{field: 2**31 - 1, **changes})
    with pytest.raises(
        CheckpointError, match=r"num_hidden_layers must be 3|experts; the files hold 8|config.json implies|multiple"
    ):
        load(path)


def test_experts_that_only_the_configuration_names_are_missed_at_once(copy_checkpoint: Callable[..., Path]) -> None:
    path = copy_checkpoint("llama")
    edit_json(
        path / "config.json", model_type="mixtral", num_local_experts=2**31 - 1, num_experts_per_tok=2, mlp_bias=None
    )
    with pytest.raises(CheckpointError, match=r"lacks the tensor 'model\.layers\.0\."):
        load(path)
    # The highest number is no count either.
    names = [f"model.layers.1.block_sparse_moe.experts.{e}.w{part}.weight" for e in (0, 999_999) for part in (1, 2, 3)]
    edit_json(path / "config.json", num_local_experts=1_000_000)
    edit_weights(path, lambda weights: weights.update({name: torch.ones(8) for name in names}))
    with pytest.raises(CheckpointError, match="layer 1 has 1000000 experts; the files hold 2 of it"):
        load(path)


def test_code_of_its_own_is_named_and_never_run(
    copy_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = copy_checkpoint("llama")
    expected = prompt_logits(load(path), TOKENS)
    edit_json(path / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Model"})
    (path / "modeling.py").write_text("raise SystemExit('this was run')")
    assert torch.equal(prompt_logits(load(path), TOKENS), expected)
    assert "names code of its own (auto_map), which is never run" in caplog.text


def test_an_adapter_beside_the_weights_is_refused(copy_checkpoint: Callable[..., Path]) -> None:
    path = copy_checkpoint("llama", num_hidden_layers=1)
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: adapters are not supported"):
        load(path)


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model.", "language_model."])
def test_other_names_of_the_same_tensors(prefix: str, copy_checkpoint: Callable[..., Path]) -> None:
    path = copy_checkpoint("llama", tie_word_embeddings=prefix == "")
    expected = prompt_logits(load(path), TOKENS)
    head = "language_model.lm_head.weight" if prefix.startswith("language_model") else "lm_head.weight"
    names = {"lm_head.weight": head}

    def change(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[names.get(name, prefix + name.removeprefix("model."))] = weights.pop(name)

    edit_weights(path, change)
    assert torch.equal(prompt_logits(load(path), TOKENS), expected)


def test_two_text_models_in_one_file_are_refused(copy_checkpoint: Callable[..., Path]) -> None:
    path = copy_checkpoint("llama")
    edit_weights(path, lambda weights: weights.update({"embed_tokens.weight": torch.ones(8)}))
    with pytest.raises(CheckpointError, match=r"two text models: model\.embed_tokens and embed_tokens"):
        load(path)


def test_the_files_may_vanish_after_loading(copy_checkpoint: Callable[..., Path]) -> None:
    path = copy_checkpoint("mixtral")
    decoder = load(path)
    expected = prompt_logits(decoder, TOKENS)
    (path / WEIGHTS).write_bytes(b"\0" * (path / WEIGHTS).stat().st_size)
    assert torch.equal(prompt_logits(decoder, TOKENS), expected)


def test_load_model_brings_tokenizer_and_generation_defaults(copy_checkpoint: Callable[..., Path]) -> None:
    path = copy_checkpoint("qwen2")
    edit_json(path / "generation_config.json", temperature=0.7, top_k=20, do_sample=True, max_new_tokens=64)
    model = load_model(str(path), device="cpu", progress=False)
    assert model.path == path
    assert model.generation_defaults == {"temperature": 0.7, "top_k": 20, "max_new_tokens": 64}
    assert model.spec.eos_token_ids == (2, 0)
    assert model.spec is model.decoder.spec
    text = "The capital of France"
    assert model.tokenizer.decode(model.tokenizer.encode(text, add_special_tokens=False)) == text


def test_generation_config_may_be_missing_or_wrong(copy_checkpoint: Callable[..., Path]) -> None:
    path = copy_checkpoint("llama")
    edit_json(path / "generation_config.json", eos_token_id="two")
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id must be a whole number or a list"):
        load_model(path, device="cpu", progress=False)
    (path / "generation_config.json").unlink()
    assert load(path).spec.eos_token_ids == (2,)


RECOMMENDED = [
    ({"top_k": -1, "top_p": 0, "temperature": 0}, {"top_p": 1e-9, "temperature": 0}, ""),
    ({"top_k": 0, "max_new_tokens": 0, "min_p": None, "repetition_penalty": 1.1}, {"repetition_penalty": 1.1}, ""),
    ({"top_k": 50.0, "top_p": 1, "min_p": 0.05}, {"top_k": 50, "top_p": 1, "min_p": 0.05}, ""),
    ({"temperature": -1, "top_p": 1.5}, {}, "not applied to requests: temperature=-1, top_p=1.5"),
    ({"top_k": -7, "min_p": 2, "repetition_penalty": 0}, {}, "top_k=-7, min_p=2, repetition_penalty=0"),
    ({"temperature": float("inf"), "max_new_tokens": 1.5}, {}, "temperature=inf, max_new_tokens=1.5"),
    ({"num_beams": 4, "suppress_tokens": [3], "forced_bos_token_id": 5}, {}, r"num_beams=4, suppress_tokens=\[3\], fo"),
    ({"num_beams": 1, "suppress_tokens": [], "typical_p": 1.0, "max_length": 20, "do_sample": False}, {}, ""),
    ({"made_up": [1]}, {}, r"made_up=\[1\]"),
    ({"temperature": "0.7", "top_p": 1e31, "top_k": [5], "min_p": True}, {}, r"0\.7.*top_p=1e\+31, top_k=\[5\], min_p"),
]


@pytest.mark.parametrize(("given", "expected", "warning"), RECOMMENDED)
def test_recommendations_are_read_as_they_are_meant(
    given: dict[str, Any],
    expected: dict[str, Any],
    warning: str,
    copy_checkpoint: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """None of them stops the model, or the requests that take its defaults; what is not applied is named once."""
    path = copy_checkpoint("llama", num_hidden_layers=1)
    edit_json(path / "generation_config.json", **given)
    with caplog.at_level(logging.WARNING):
        model = load_model(path, device="cpu", progress=False, backend="torch")
    assert model.generation_defaults == expected
    assert model.spec.eos_token_ids == (2, 0)
    said = [record.getMessage() for record in caplog.records if "generation_config.json" in record.getMessage()]
    assert len(said) == bool(warning)
    assert re.search(warning, "".join(said))
    params = sampling_params(CompletionRequest(model="m", prompt="a"), model.generation_defaults)
    assert params.greedy == (expected.get("temperature") == 0)
    assert params.top_p == expected.get("top_p", 1)


def test_stop_tokens_that_only_the_tokenizer_names(copy_checkpoint: Callable[..., Path]) -> None:
    path = copy_checkpoint("llama", num_hidden_layers=1)
    edit_json(path / "config.json", eos_token_id=5)
    edit_json(path / "generation_config.json", eos_token_id=[-1, 7])
    model = load_model(path, device="cpu", progress=False, backend="torch")
    assert model.tokenizer.eos_token_id == 2
    assert model.spec.eos_token_ids == (7, 5, 2)


def test_float16_becomes_a_dtype_that_cpus_compute_in(
    copy_checkpoint: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = copy_checkpoint("llama", dtype="float16")
    with caplog.at_level(logging.WARNING):
        decoder = load(path, dtype="auto")
    assert (decoder.dtype, decoder.backend.name) == (torch.float32, "cpu")
    assert "it runs in float32, which holds the same numbers" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert load(path, dtype="auto", quantization="int8").dtype == torch.bfloat16
    assert "it runs in bfloat16, which leaves codes and scales as they are" in caplog.text
    with pytest.warns(RuntimeWarning, match="dtype=float16 has no CPU kernels"):
        assert load(path, dtype="float16").dtype == torch.float16
    edit_json(path / "config.json", dtype="float17")
    with pytest.raises(CheckpointError, match="dtype must be the name of a dtype, not 'float17'"):
        load(path, dtype="auto")


def test_fewer_experts_per_token_equals_a_model_made_for_fewer(
    copy_checkpoint: Callable[..., Path], make_checkpoint: Callable[..., Path]
) -> None:
    path = copy_checkpoint("mixtral", num_experts_per_tok=3)
    fewer = prompt_logits(load(path, experts_per_token=1), TOKENS)
    assert not torch.equal(fewer, prompt_logits(load(path), TOKENS))
    edit_json(path / "config.json", num_experts_per_tok=1)
    assert torch.equal(fewer, prompt_logits(load(path), TOKENS))
    with pytest.raises(ValueError, match="this llama model has no experts"):
        load(make_checkpoint("llama"), experts_per_token=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "potato"}, "unknown device 'potato'"),
        ({"backend": "magic"}, "unknown backend 'magic'"),
    ],
)
def test_unknown_settings(options: dict[str, str], message: str, make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=message):
        load(make_checkpoint("llama"), **options)


def as_dynamoe(path: Path, *, num_experts: int, always_on: int, per_token: int | None = None) -> None:
    """Turn a dense Llama checkpoint into one of ours: the same weights, neurons read as experts, a random router."""
    config = json.loads((path / "config.json").read_text())
    size = config["intermediate_size"] // num_experts
    generator = torch.Generator().manual_seed(0)
    routers = {
        f"model.layers.{layer}.mlp.router.weight": torch.randn(num_experts - always_on, 64, generator=generator)
        for layer in range(config["num_hidden_layers"])
    }
    edit_weights(path, lambda weights: weights.update(routers))
    keys = {"num_experts": num_experts, "num_always_on_experts": always_on, "expert_size": size}
    edit_json(path / "config.json", model_type="dynamoe", num_experts_per_tok=per_token, **keys)


def test_dynamoe_with_all_experts_is_the_dense_model(
    copy_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_checkpoint("llama")
    expected = prompt_logits(load(path), TOKENS)
    as_dynamoe(path, num_experts=8, always_on=2)
    decoder = load(path)

    def no_route(*arguments: Any) -> None:
        raise AssertionError("the router has nothing to decide")

    monkeypatch.setattr(decoder.backend, "route", no_route)
    torch.testing.assert_close(prompt_logits(decoder, TOKENS), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_dynamoe_with_fewer_experts_leaves_out_the_others(backend: str, copy_checkpoint: Callable[..., Path]) -> None:
    """Against the definition: neurons of experts that the router did not choose are silent."""
    path = copy_checkpoint("llama", num_hidden_layers=1)
    as_dynamoe(path, num_experts=8, always_on=2, per_token=3)
    decoder = load(path, backend=backend)
    got = prompt_logits(decoder, TOKENS)
    decoder.stack = None  # so that the experts' operation can be replaced
    w = load_file(path / WEIGHTS)
    seen: list[torch.Tensor] = []

    def definition(x_TD: torch.Tensor, *_: Any) -> torch.Tensor:
        chosen_TK = (x_TD @ w["model.layers.0.mlp.router.weight"].T).topk(3).indices + 2
        on_TE = torch.zeros(len(x_TD), 8).scatter(1, chosen_TK, 1.0)
        on_TE[:, :2] = 1.0
        gate = torch.nn.functional.silu(x_TD @ w["model.layers.0.mlp.gate_proj.weight"].T)
        hidden = gate * (x_TD @ w["model.layers.0.mlp.up_proj.weight"].T)
        seen.append(on_TE)
        return (hidden * on_TE.repeat_interleave(12, 1)) @ w["model.layers.0.mlp.down_proj.weight"].T

    decoder.backend.experts = definition  # type: ignore[method-assign]
    torch.testing.assert_close(got, prompt_logits(decoder, TOKENS), rtol=1e-4, atol=1e-4)
    assert len(seen[0].unique(dim=0)) > 1, "the rows choose differently"


def test_dynamoe_override_equals_its_own_setting(copy_checkpoint: Callable[..., Path]) -> None:
    path = copy_checkpoint("llama")
    as_dynamoe(path, num_experts=8, always_on=2)
    override = prompt_logits(load(path, experts_per_token=4), TOKENS)
    edit_json(path / "config.json", num_experts_per_tok=4)
    assert torch.equal(prompt_logits(load(path), TOKENS), override)


PEAK = """
import resource, sys
from pathlib import Path
from dynamoe.dynamic.model.loader import load_decoder
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decoder = load_decoder(Path(sys.argv[1]), dtype="float32", device="cpu", backend="torch")
print(decoder.weight_bytes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak in Linux units")
def test_peak_memory_stays_near_the_weights(make_checkpoint: Callable[..., Path]) -> None:
    path = make_checkpoint("mixtral", hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_local_experts=4)
    output = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    weights, peak = map(int, output.split())
    assert weights > 200e6
    assert peak < 1.3 * weights + 30e6  # a layer is an eighth, and its source pages are mapped beside it
