"""What binds a certificate to a model: all that its configuration says of the mathematics, and what it computes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from dynamoe.dynamic.checkpoint.config_reader import ConfigReader
from dynamoe.dynamic.contract.catalog import CertificateSource
from dynamoe.dynamic.contract.deployment import deployment
from dynamoe.dynamic.contract.model_check import logits_hash, spec_hash
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.model import families
from dynamoe.dynamic.model.families import model_spec

TINY = json.loads((resolve_model("tiny") / "config.json").read_text())
# Another value for every key that a qwen3_moe reads.
CHANGED: dict[str, Any] = {
    "vocab_size": 2049, "hidden_size": 384, "num_hidden_layers": 15, "num_attention_heads": 12,
    "num_key_value_heads": 3, "head_dim": 64, "hidden_act": "gelu", "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "attention_bias": True, "use_sliding_window": True, "decoder_sparse_step": 2, "mlp_only_layers": [3],
    "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 1, "norm_topk_prob": False,
    "tie_word_embeddings": False, "bos_token_id": 7, "eos_token_id": [0, 9],
}  # fmt: skip
NEUTRAL: dict[str, Any] = {
    "architectures": ["Other"], "attention_dropout": 0.1, "output_router_logits": True, "initializer_range": 0.5,
    "router_aux_loss_coef": 0.1, "use_cache": False, "transformers_version": "9.9", "torch_dtype": "float32",
    "intermediate_size": 97,  # of dense layers, of which there are none
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGED)
def test_every_key_that_the_model_reads_changes_the_hash(key: str) -> None:
    assert spec_hash(model_spec({**TINY, key: CHANGED[key]})) != spec_hash(model_spec(TINY))


@pytest.mark.parametrize("key", NEUTRAL)
def test_what_the_model_does_not_read_changes_nothing(key: str) -> None:
    assert spec_hash(model_spec({**TINY, key: NEUTRAL[key]})) == spec_hash(model_spec(TINY))


def test_no_key_is_forgotten_here(monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[ConfigReader] = []

    def remember(*arguments: Any) -> ConfigReader:
        readers.append(ConfigReader(*arguments))
        return readers[-1]

    monkeypatch.setattr(families, "ConfigReader", remember)
    model_spec(TINY)
    names = {
        "rope_parameters",
        "sliding_window",
        "num_local_experts",
        "original_max_position_embeddings",
    }  # with others
    assert readers[0]._read - names - {"model_type", "intermediate_size"} <= CHANGED.keys() | NEUTRAL.keys()


def test_every_field_of_a_specification_counts() -> None:
    """Also those that no configuration of today sets, at any depth."""
    spec = model_spec(TINY)

    def changed(part: Any) -> list[Any]:
        found = []
        for field in fields(part):
            value = getattr(part, field.name)
            if is_dataclass(value):
                found += [_with(part, field.name, other) for other in changed(value)]
            elif isinstance(value, bool):
                found.append(_with(part, field.name, not value))
            elif isinstance(value, int | float):
                found.append(_with(part, field.name, value + 1))
        return found

    def _with(part: Any, name: str, value: Any) -> Any:
        copy = object.__new__(type(part))
        for field in fields(part):
            object.__setattr__(copy, field.name, value if field.name == name else getattr(part, field.name))
        return copy

    others = changed(spec) + [_with(spec, "layers", (other, *spec.layers[1:])) for other in changed(spec.layers[0])]
    hashes = {spec_hash(other) for other in others}
    assert len(hashes) == len(others) > 40
    assert spec_hash(spec) not in hashes


@dataclass(frozen=True)
class Before:
    size: int = 1


def test_a_new_field_with_a_neutral_default_changes_nothing() -> None:
    @dataclass(frozen=True)
    class After:
        size: int = 1
        twist: float = 0.0

    After.__name__ = "Before"
    assert spec_hash(After()) == spec_hash(Before())  # type: ignore[arg-type]
    assert spec_hash(After(twist=0.5)) != spec_hash(Before())  # type: ignore[arg-type]
    assert spec_hash(replace(Before(), size=2)) != spec_hash(Before())  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["rope_theta", "norm_topk_prob"])
def test_a_copy_with_another_configuration_loses_its_certificates(
    key: str, certify: Callable[..., Any], tmp_path: Path
) -> None:
    engine = Engine(load_model("tiny"))
    certify(tmp_path / "certificates", deployment(engine.model, engine.runner.exits), 0.05, 0.9)
    assert CertificateSource(engine, tmp_path / "certificates").read().contracts.certificates
    copy = shutil.copytree(resolve_model("tiny"), tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps({**TINY, key: CHANGED[key]}))
    catalog = CertificateSource(Engine(load_model(copy)), tmp_path / "certificates").read()
    assert not catalog.contracts.certificates
    assert "model: certified for" in catalog.refused[0]
    assert "logits: certified for" in catalog.refused[0]


def test_logits_are_those_of_the_model_that_was_loaded(make_checkpoint: Callable[..., Path]) -> None:
    path = make_checkpoint("mixtral")
    first, again = (load_model(path, backend="cpu", dtype="bfloat16").decoder for _ in range(2))
    assert logits_hash(first, exact=True) == logits_hash(again, exact=True)
    kernels = {
        name: logits_hash(load_model(path, backend=name, dtype="float32").decoder, exact=True)
        for name in ("cpu", "cpu:portable", "torch")
    }
    assert len(set(kernels.values())) == 3
    again.cos_sin_LC[400, 0] += 1  # a position far behind the tokens that are run
    assert logits_hash(first, exact=True) != logits_hash(again, exact=True)
    assert logits_hash(first, exact=False) == logits_hash(again, exact=False)
