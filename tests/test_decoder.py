"""Every family against transformers: logits of prefill and of decode through scattered pages of the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.kv_cache import allocate_layers
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.kernels.api.types import AttentionBatch, StateLayer

PAGE_SIZE = 4
NUM_PAGES = 64
FAMILY_NAMES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe")
TOLERANCE = 1e-4  # max|Δ| / max|ref|, float32


class PagedSequences:
    """A cache of pages in random order that were filled with NaN, and the contexts of a few sequences in it."""

    def __init__(self, decoder: Decoder, num_sequences: int, seed: int = 0) -> None:
        self.decoder = decoder
        spec, device = decoder.spec, torch.device("cpu")
        self.kv = allocate_layers(spec, NUM_PAGES, PAGE_SIZE, decoder.dtype, device, num_states=num_sequences)
        for layer in self.kv:
            for tensor in (*layer.tensors, *(layer.states if isinstance(layer, StateLayer) else ())):
                tensor.fill_(float("nan"))
        self.free = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(seed)).tolist()
        self.pages: list[list[int]] = [[] for _ in range(num_sequences)]
        self.lengths = [0] * num_sequences

    def run(self, new_tokens: list[list[int]]) -> torch.Tensor:
        """One step that appends tokens to the sequences (none to some): logits of every row."""
        active = [s for s, tokens in enumerate(new_tokens) if tokens]
        positions, slots, starts = [], [], [0]
        for s in active:
            for _ in new_tokens[s]:
                position = self.lengths[s]
                if position % PAGE_SIZE == 0:
                    self.pages[s].append(self.free.pop())
                positions.append(position)
                slots.append(self.pages[s][position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE)
                self.lengths[s] += 1
            starts.append(len(positions))
        width = max(len(self.pages[s]) for s in active)
        # Entries beyond a context are never read: they point outside the cache.
        table = [self.pages[s] + [NUM_PAGES + 99] * (width - len(self.pages[s])) for s in active]
        batch = AttentionBatch(
            positions_T=torch.tensor(positions),
            slots_T=torch.tensor(slots),
            query_start_S1=torch.tensor(starts, dtype=torch.int32),
            context_len_S=torch.tensor([self.lengths[s] for s in active], dtype=torch.int32),
            block_table_SM=torch.tensor(table, dtype=torch.int32),
            max_query_len=max(len(new_tokens[s]) for s in active),
            max_context_len=max(self.lengths[s] for s in active),
            state_slots_S=torch.tensor(active),
        )
        x_TD = self.decoder.embed(torch.tensor([token for s in active for token in new_tokens[s]]))
        for segment in self.decoder.segments:
            x_TD = self.decoder.run_segment(segment, x_TD, self.kv, batch)
        return self.decoder.logits(x_TD)


def greedy(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    sequences, tokens, output = PagedSequences(decoder, 1), prompt, []
    for _ in range(count):
        output.append(int(sequences.run([tokens])[-1].argmax()))
        tokens = output[-1:]
    return output


def random_prompts(lengths: list[int], seed: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (length,), generator=generator).tolist() for length in lengths]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"num_key_value_heads": 4, "hidden_act": "gelu", "head_dim": 32}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh", "rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    (
        "llama",
        {
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0},
                **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
            }
        },
    ),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None, "num_key_value_heads": 4}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    (
        "qwen2",
        {
            "rope_parameters": {
                **{"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0},
                **{"original_max_position_embeddings": 64},
            }
        },
    ),
    ("qwen3", {}),
    ("qwen3", {"attention_bias": True, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    (
        "qwen3",
        {
            **{"use_sliding_window": True, "sliding_window": 7},
            **{"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        },
    ),
    ("mixtral", {}),
    ("mixtral", {"sliding_window": 11, "num_experts_per_tok": 1, "num_key_value_heads": 4}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"norm_topk_prob": True, "qkv_bias": False, "mlp_only_layers": [1]}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ("qwen3_moe", {}),
    ("qwen3_moe", {"norm_topk_prob": False, "attention_bias": True, "mlp_only_layers": [0, 2]}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 10, "num_experts_per_tok": 8}),
    ("olmoe", {}),
    ("olmoe", {"norm_topk_prob": True, "clip_qkv": 0.7, "num_key_value_heads": 4, "attention_bias": True}),
    ("granitemoe", {}),
    ("granitemoe", {"attention_bias": True, "tie_word_embeddings": True, "num_experts_per_tok": 6}),
]


def case_name(value: tuple[str, dict[str, Any]] | str) -> str:
    return value if isinstance(value, str) else "-".join([value[0], *value[1]])


# Interpreting kernels takes many seconds per case: a few run always, the rest with the slow tests.
INTERPRETED: list[tuple[str, dict[str, Any]]] = [("llama", {}), ("qwen2_moe", {})]
RUNS = [
    pytest.param(case, backend, marks=[pytest.mark.slow] if backend == "triton" and case not in INTERPRETED else [])
    for case in CASES
    for backend in ("torch", "cpu", "grouped_mm", "triton")
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # lanes that the interpreter computes and a mask discards
@pytest.mark.parametrize(("case", "backend"), RUNS, ids=case_name)
def test_logits_equal_transformers(
    case: tuple[str, dict[str, Any]],
    backend: str,
    make_checkpoint: Callable[..., Path],
    reference_model: Callable[[Path], Any],
) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("with a GPU at hand kernels are compiled, not interpreted")
    path = make_checkpoint(case[0], **case[1])
    decoder, reference = load_decoder(path, dtype="float32", device="cpu", backend=backend), reference_model(path)
    assert decoder.backend.name == backend
    prompts = random_prompts([37, 5, 18])
    with torch.inference_mode():
        expected = [reference(torch.tensor([prompt])).logits[0] for prompt in prompts]
    sequences = PagedSequences(decoder, 3)

    # Prefill of different lengths in one step: all of one, parts of the others.
    first = sequences.run([prompts[0][:30], prompts[1], prompts[2][:7]])
    assert error(first, torch.cat((expected[0][:30], expected[1], expected[2][:7]))) < TOLERANCE
    # A second chunk for one while another decodes.
    mixed = sequences.run([prompts[0][30:31], [], prompts[2][7:14]])
    assert error(mixed, torch.cat((expected[0][30:31], expected[2][7:14]))) < TOLERANCE
    # Decode steps only.
    for step in range(4):
        rows = sequences.run([prompts[0][31 + step : 32 + step], [], prompts[2][14 + step : 15 + step]])
        assert error(rows, torch.stack((expected[0][31 + step], expected[2][14 + step]))) < TOLERANCE


def without_rope(decoder: Decoder) -> None:
    half = decoder.cos_sin_LC.shape[1] // 2
    decoder.cos_sin_LC[:, :half], decoder.cos_sin_LC[:, half:] = 1.0, 0.0


def without_norm(name: str) -> Callable[[Decoder], None]:
    """Drop the norm itself, not only its weights, in every layer."""

    def drop(decoder: Decoder) -> None:
        if name == "final":
            dropped = [decoder.final_norm_D]
        elif name in ("q_norm", "k_norm"):
            dropped = [getattr(layer.attention, name) for layer in decoder.layers]
        else:
            dropped = [layer.norms[name] for layer in decoder.layers]
        assert all(weight is not None for weight in dropped)
        full = decoder.backend.rms_norm

        def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
            return x if any(weight is other for other in dropped) else full(x, weight, eps)

        decoder.backend.rms_norm = rms_norm  # type: ignore[method-assign]

    return drop


def without_bias(name: str) -> Callable[[Decoder], None]:
    def drop(decoder: Decoder) -> None:
        for number, layer in enumerate(decoder.layers):
            packed = getattr(layer.attention, name)
            weight, bias = packed.data
            assert bias is not None
            layers = list(decoder.layers)
            unbiased = replace(layer.attention, **{name: replace(packed, data=(weight, None))})
            layers[number] = replace(layer, attention=unbiased)
            decoder.layers = tuple(layers)

    return drop


def without_mlp_bias(decoder: Decoder) -> None:
    biases = {"gate_bias_EF": None, "up_bias_EF": None, "down_bias_ED": None}
    decoder.layers = tuple(
        replace(layer, ffn=replace(layer.ffn, data=replace(layer.ffn.data, **biases))) for layer in decoder.layers
    )


def without_router(decoder: Decoder) -> None:
    """The first experts for every token, equally weighted: what a router of zeros would choose."""
    full = decoder.backend.route
    decoder.backend.route = lambda logits, *rest: full(torch.zeros_like(logits), *rest)  # type: ignore[method-assign]


def without_shared_expert(decoder: Decoder) -> None:
    decoder.layers = tuple(replace(layer, shared=None) for layer in decoder.layers)


def without_shared_gate(decoder: Decoder) -> None:
    decoder.layers = tuple(replace(layer, shared_gate=None) for layer in decoder.layers)


def without_window(decoder: Decoder) -> None:
    assert any(layer.window for layer in decoder.spec.layers)
    without_attention("window", None)(decoder)


def without_attention(name: str, neutral: float | None) -> Callable[[Decoder], None]:
    def drop(decoder: Decoder) -> None:
        layers = decoder.spec.layers
        assert all(getattr(layer.attention, name) != neutral for layer in layers)
        changed = [replace(layer, attention=replace(layer.attention, **{name: neutral})) for layer in layers]
        decoder.spec = replace(decoder.spec, layers=tuple(changed))

    return drop


def without_scale(name: str, neutral: float | None = 1.0) -> Callable[[Decoder], None]:
    def drop(decoder: Decoder) -> None:
        assert getattr(decoder.spec, name) != neutral
        decoder.spec = replace(decoder.spec, **{name: neutral})

    return drop


ABLATIONS: dict[str, tuple[str, dict[str, Any], Callable[[Decoder], None]]] = {
    "rope": ("llama", {}, without_rope),
    "attention norm": ("llama", {}, without_norm("attention")),
    "ffn norm": ("llama", {}, without_norm("ffn")),
    "final norm": ("llama", {}, without_norm("final")),
    "qkv bias": ("qwen2", {}, without_bias("qkv")),
    "o bias": ("llama", {"attention_bias": True}, without_bias("o")),
    "mlp bias": ("llama", {"mlp_bias": True}, without_mlp_bias),
    "window": ("mistral", {}, without_window),
    "query norm per head": ("qwen3", {}, without_norm("q_norm")),
    "key norm per head": ("qwen3", {}, without_norm("k_norm")),
    "query norm, full width": ("olmoe", {}, without_norm("q_norm")),
    "key norm, full width": ("olmoe", {}, without_norm("k_norm")),
    "clip": ("olmoe", {"clip_qkv": 0.7}, without_attention("clip", None)),
    "router of mixtral": ("mixtral", {}, without_router),
    "router of qwen2_moe": ("qwen2_moe", {}, without_router),
    "router of qwen3_moe": ("qwen3_moe", {}, without_router),
    "router of olmoe": ("olmoe", {}, without_router),
    "router of granitemoe": ("granitemoe", {}, without_router),
    "shared expert": ("qwen2_moe", {}, without_shared_expert),
    "gate of the shared expert": ("qwen2_moe", {}, without_shared_gate),
    "embedding scale": ("granitemoe", {}, without_scale("embedding_scale")),
    "residual scale": ("granitemoe", {}, without_scale("residual_scale")),
    "attention scale": ("granitemoe", {}, without_attention("scale", 1.0)),
}


@pytest.mark.parametrize("part", ABLATIONS)
def test_dropping_a_part_changes_the_tokens(part: str, make_checkpoint: Callable[..., Path]) -> None:
    """The random weights make every part matter, so that equality with transformers proves every part."""
    family, config, drop = ABLATIONS[part]
    path = make_checkpoint(family, **config)
    prompt = random_prompts([40])[0]
    decoder = load_decoder(path, dtype="float32", device="cpu", backend="torch")
    full = greedy(decoder, prompt, 16)
    assert greedy(decoder, prompt, 16) == full
    drop(decoder)
    assert greedy(decoder, prompt, 16) != full


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_greedy_tokens_equal_transformers(
    family: str, make_checkpoint: Callable[..., Path], reference_model: Callable[[Path], Any]
) -> None:
    path = make_checkpoint(family)
    prompt = random_prompts([40])[0]
    expected = reference_model(path).generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=16, eos_token_id=None
    )
    decoder = load_decoder(path, dtype="float32", device="cpu")
    assert greedy(decoder, prompt, 16) == expected[0, 40:].tolist()


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe"])
def test_segments_are_the_whole_model_cut_up(
    family: str, make_checkpoint: Callable[..., Path], make_exits: Callable[..., Path]
) -> None:
    prompt = random_prompts([12])
    whole = load_decoder(make_checkpoint(family), dtype="float32", device="cpu", backend="cpu")
    cut = load_decoder(make_exits(family, {1: 0.5, 2: 0.5}), dtype="float32", device="cpu", backend="cpu")
    assert [segment.layers for segment in cut.segments] == [range(0, 1), range(1, 2), range(2, 3)]
    assert torch.equal(PagedSequences(cut, 1).run(prompt), PagedSequences(whole, 1).run(prompt))


def test_the_table_of_rotations_grows_with_the_context(
    make_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, prompt = make_checkpoint("llama"), random_prompts([50])
    expected = PagedSequences(load_decoder(path, dtype="float32", device="cpu"), 1).run(prompt)
    monkeypatch.setattr("dynamoe.dynamic.model.decoder.FIRST_TABLE_LENGTH", 8)
    decoder = load_decoder(path, dtype="float32", device="cpu")
    assert decoder.cos_sin_LC.shape[0] == 8
    assert torch.equal(PagedSequences(decoder, 1).run(prompt), expected)
    assert 50 <= decoder.cos_sin_LC.shape[0] <= decoder.spec.max_position
    with pytest.raises(ValueError, match="513 tokens exceeds the model's maximum of 512"):
        decoder.reserve_positions(513)


def test_bfloat16_stays_close_to_float32(
    make_checkpoint: Callable[..., Path], reference_model: Callable[[Path], Any]
) -> None:
    path, prompt = make_checkpoint("mixtral", dtype="bfloat16", num_experts_per_tok=6), random_prompts([20])
    decoder = load_decoder(path, device="cpu")
    assert decoder.dtype == torch.bfloat16
    logits = PagedSequences(decoder, 1).run(prompt)
    assert logits.dtype == torch.float32
    with torch.inference_mode():
        expected = reference_model(path)(torch.tensor(prompt)).logits[0]
    # All experts are used, so that no near-tie of the router can turn rounding into another choice.
    assert error(logits, expected) < 0.1
