"""A kind of attention from elsewhere: it registers itself, and runs through ``LLM`` without a change in the package.

Every head has a sink, and its output goes through the sigmoid of a gate. A plain-torch model without a cache says what
the tokens must be.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from dynamoe import LLM, SamplingParams
from dynamoe.dynamic.checkpoint.weights import Checkpoint, CheckpointError, read_json
from dynamoe.dynamic.model.attention import registry
from dynamoe.dynamic.model.attention.gqa import GqaSpec, GqaWeights, split_heads
from dynamoe.dynamic.model.attention.kind import (
    AttentionContext,
    AttentionCuts,
    AttentionLayout,
    LinearLayout,
    TensorLayout,
)
from dynamoe.dynamic.model.families import FAMILIES, family_of, model_spec
from dynamoe.dynamic.model.kv_cache import bytes_per_page
from dynamoe.dynamic.model.layout import plan_layout
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from dynamoe.kernels.api.types import AttentionBatch, KVLayer, LinearWeights
from parallel_jobs import shard_of
from safetensors.torch import load_file, save_file

LENGTHS = (1, 7, 16, 33, 60)
NEW_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class GatedWeights(GqaWeights):
    gate: LinearWeights
    sinks_H: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class GatedSpec(GqaSpec):
    kind: ClassVar[str] = "toy_gated"

    def layout(self, prefix: str, hidden_size: int, available: Container[str]) -> AttentionLayout:
        plain, name = super().layout(prefix, hidden_size, available), f"{prefix}self_attn."
        gate = LinearLayout(weights=(f"{name}g_proj.weight",), outputs=(self.q_size,), inputs=hidden_size)
        sinks = TensorLayout(name=f"{name}sinks", shape=(self.num_heads,), float32=True)
        return replace(plain, linears={**plain.linears, "gate": gate}, tensors={**plain.tensors, "sinks_H": sinks})

    def weights(self, parts: Mapping[str, Any]) -> GatedWeights:
        return GatedWeights(**parts)

    def forward(
        self, weights: Any, x_TD: torch.Tensor, kv: KVLayer, batch: AttentionBatch, context: AttentionContext
    ) -> torch.Tensor:
        backend, options = context.backend, {"scale": self.scale, "window": self.window}
        q_THC = self.rotated_queries(weights, x_TD, kv, batch, context)
        out_THC = backend.attention(q_THC, kv, batch, **options, sinks_H=weights.sinks_H)
        gate_TX = backend.linear(x_TD, weights.gate).sigmoid()
        return backend.linear(out_THC.flatten(1) * gate_TX, weights.o)

    def cuts(self, layout: AttentionLayout, parts: int, part: int) -> AttentionCuts:
        plain, heads = super().cuts(layout, parts, part), split_heads(self, parts, part)[0]
        rows = slice(heads.start * self.head_dim, heads.stop * self.head_dim)
        own = {layout.linears["gate"].weights[0]: rows, layout.tensors["sinks_H"].name: heads}
        return replace(plain, outputs={**plain.outputs, **own})

    def flops(self, hidden_size: int) -> int:
        return super().flops(hidden_size) + 2 * hidden_size * self.q_size


@dataclass(frozen=True, kw_only=True)
class UnknownToStacks(GqaSpec):
    """Computes what it inherits; but stacks know nothing of it."""

    kind: ClassVar[str] = "toy_unknown"


@pytest.fixture(autouse=True)
def families(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds and families that exist while these tests run."""
    monkeypatch.setattr(registry, "KINDS", dict(registry.KINDS))
    registry.register(GatedSpec)
    registry.register(UnknownToStacks)
    for kind in (GatedSpec.kind, UnknownToStacks.kind):
        monkeypatch.setitem(FAMILIES, kind, replace(FAMILIES["llama"], attention=lambda config, layer, kind=kind: kind))
    mixed = replace(FAMILIES["llama"], attention=lambda config, layer: ("gqa", GatedSpec.kind)[layer % 2])
    monkeypatch.setitem(FAMILIES, "toy_mixed", mixed)


@pytest.fixture
def make_toy(copy_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """A checkpoint of a family of this file; layers in ``gated`` have gates and sinks."""

    def make(family: str, gated: range, **config: Any) -> Path:
        path = copy_checkpoint("llama", **config)
        settings = read_json(path / "config.json")
        (path / "config.json").write_text(json.dumps({**settings, "model_type": family}))
        tensors, generator = load_file(path / "model.safetensors"), torch.Generator().manual_seed(7)
        for number in gated:
            name = f"model.layers.{number}.self_attn."
            tensors[f"{name}sinks"] = torch.randn(settings["num_attention_heads"], generator=generator) * 2
            shape = tensors[f"{name}q_proj.weight"].shape
            tensors[f"{name}g_proj.weight"] = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        save_file(tensors, path / "model.safetensors")
        return path

    return make


class Reference:
    """The model without a cache, one sequence at a time, float32."""

    def __init__(self, path: Path) -> None:
        self.config, self.tensors = read_json(path / "config.json"), load_file(path / "model.safetensors")

    def norm(self, x_TD: torch.Tensor, name: str) -> torch.Tensor:
        eps = self.config["rms_norm_eps"]
        return x_TD * torch.rsqrt(x_TD.square().mean(-1, keepdim=True) + eps) * self.tensors[f"{name}.weight"]

    def logits(self, tokens: list[int]) -> torch.Tensor:
        tensors, heads, groups = self.tensors, self.config["num_attention_heads"], self.config["num_key_value_heads"]
        x_TD = tensors["model.embed_tokens.weight"][tokens]
        for number in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{number}"
            x_TD = x_TD + self.attention(self.norm(x_TD, f"{name}.input_layernorm"), f"{name}.self_attn", heads, groups)
            normed_TD = self.norm(x_TD, f"{name}.post_attention_layernorm")
            gate, up, down = (tensors[f"{name}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
            x_TD = x_TD + (F.silu(normed_TD @ gate.T) * (normed_TD @ up.T)) @ down.T
        head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
        return self.norm(x_TD, "model.norm") @ head.T

    def attention(self, x_TD: torch.Tensor, name: str, heads: int, groups: int) -> torch.Tensor:
        q, k, v = (x_TD @ self.tensors[f"{name}.{part}_proj.weight"].T for part in "qkv")
        q_HTC, k_GTC, v_GTC = (
            part.unflatten(1, (count, -1)).transpose(0, 1)
            for part, count in zip((q, k, v), (heads, groups, groups), strict=True)
        )
        half, length = q_HTC.shape[-1] // 2, len(x_TD)
        angles = torch.outer(torch.arange(length).float(), 10000.0 ** (-torch.arange(half) / half))

        def rotated(x_XTC: torch.Tensor) -> torch.Tensor:
            a, b = x_XTC.chunk(2, -1)
            return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)

        k_HTC, v_HTC = (part.repeat_interleave(heads // groups, 0) for part in (rotated(k_GTC), v_GTC))
        scores_HTT = rotated(q_HTC) @ k_HTC.transpose(-1, -2) * q_HTC.shape[-1] ** -0.5
        scores_HTT = scores_HTT.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        sinks, gate = self.tensors.get(f"{name}.sinks"), self.tensors.get(f"{name}.g_proj.weight")
        if sinks is not None:
            scores_HTT = torch.cat((scores_HTT, sinks[:, None, None].expand(-1, length, 1)), -1)
        out_TX = (scores_HTT.softmax(-1)[..., :length] @ v_HTC).transpose(0, 1).flatten(1)
        if gate is not None:
            out_TX = out_TX * (x_TD @ gate.T).sigmoid()
        return out_TX @ self.tensors[f"{name}.o_proj.weight"].T

    def greedy(self, prompt: list[int]) -> tuple[list[int], list[float]]:
        tokens, logprobs = list(prompt), []
        for _ in range(NEW_TOKENS):
            logprobs_V = self.logits(tokens)[-1].log_softmax(-1)
            tokens.append(int(logprobs_V.argmax()))
            logprobs.append(float(logprobs_V.max()))
        return tokens[len(prompt) :], logprobs


def random_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in LENGTHS]


def answers(llm: LLM, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=1)
    found = []
    for output in llm.generate(prompts, params, use_tqdm=False):
        completion = output.outputs[0]
        assert completion.logprobs is not None
        rows = zip(completion.token_ids, completion.logprobs, strict=True)
        found.append((list(completion.token_ids), [row[token].logprob for token, row in rows]))
    return found


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize(("family", "gated"), [("toy_gated", range(3)), ("toy_mixed", range(1, 3, 2))])
def test_an_llm_gives_the_tokens_of_the_plain_model(
    make_toy: Callable[..., Path], family: str, gated: range, backend: str
) -> None:
    path, prompts = make_toy(family, gated), random_prompts()
    reference = Reference(path)
    expected = [reference.greedy(prompt) for prompt in prompts]
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "backend": backend, "progress": False}
    page = bytes_per_page(model_spec(read_json(path / "config.json")), torch.float32, 8)
    for limits in (
        {},
        {"max_num_batched_tokens": 13, "enable_prefix_caching": False},  # prompts in chunks, beside decodes
        {"kv_memory": 24 * page, "block_size": 8},  # too few pages for all: some are preempted
    ):
        llm = LLM(path, **options, **limits)
        assert llm.model.decoder.stack is None
        for (tokens, logprobs), (wanted, wanted_logprobs) in zip(answers(llm, prompts), expected, strict=True):
            assert tokens == wanted
            assert logprobs == pytest.approx(wanted_logprobs, abs=2e-4)
    assert answers(llm, prompts[-1:])[0][0] == expected[-1][0]  # alone, on pages that are cached


def test_gate_and_sinks_each_change_the_tokens(make_toy: Callable[..., Path]) -> None:
    reference, prompt = Reference(make_toy("toy_gated", range(3))), random_prompts()[2]
    full = reference.greedy(prompt)[0]
    for part in ("sinks", "g_proj.weight"):
        kept = reference.tensors
        reference.tensors = {name: tensor for name, tensor in kept.items() if not name.endswith(part)}
        assert reference.greedy(prompt)[0] != full
        reference.tensors = kept


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operation_by_operation_gives_the_bits_of_the_stack(make_toy: Callable[..., Path], dtype: str) -> None:
    path = make_toy("llama", range(0))
    known = load_decoder(path, dtype=dtype, backend="cpu")
    settings = {**read_json(path / "config.json"), "model_type": UnknownToStacks.kind}
    (path / "config.json").write_text(json.dumps(settings))
    unknown = load_decoder(path, dtype=dtype, backend="cpu")
    assert known.stack is not None
    assert unknown.stack is None
    found = []
    for decoder in (known, unknown):
        kv, batch = fresh_cache(decoder, [9, 1, 20])
        x_TD = decoder.embed(torch.arange(3, 33))
        for segment in decoder.segments:
            x_TD = decoder.run_segment(segment, x_TD, kv, batch)
        found.append(decoder.logits(x_TD))
    assert torch.equal(*found)


def test_tensors_of_the_kind_are_checked_quantised_and_split(make_toy: Callable[..., Path]) -> None:
    path = make_toy("toy_gated", range(3))
    config, whole = read_json(path / "config.json"), Checkpoint(path)
    spec, sinks = model_spec(config), "model.layers.1.self_attn.sinks"
    parts = []
    for rank in range(2):
        shard = shard_of(spec, 2, 1, rank)
        shard.layout(plan_layout(spec, family_of(config), whole))
        part = shard.checkpoint(whole)
        assert part.view("model.layers.0.self_attn.g_proj.weight").shape[0] == shard.spec.layers[0].attention.q_size  # type: ignore[attr-defined]
        parts.append(part.view(sinks))
    assert torch.equal(torch.cat(parts), whole.view(sinks))
    plain, coded = (load_decoder(path, backend="cpu", quantization=method) for method in ("none", "int8"))
    assert coded.layers[0].attention.nbytes < 0.6 * plain.layers[0].attention.nbytes
    with pytest.raises(ValueError, match="another attention kind 'toy_gated'"):
        registry.register(type("Other", (GatedSpec,), {}))
    tensors = load_file(path / "model.safetensors")
    del tensors[sinks]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"lacks the tensor '{sinks}'"):
        load_decoder(path)


def test_an_unknown_kind_is_refused(make_toy: Callable[..., Path]) -> None:
    path = make_toy("toy_gated", range(3))
    registry.KINDS.pop("toy_gated")
    with pytest.raises(CheckpointError, match=r"unknown attention kind 'toy_gated'; known: gqa, .*, toy_unknown"):
        load_decoder(path)
