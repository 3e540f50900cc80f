"""Every family against transformers: logits of prefill and of decode through scattered pages of the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamoe.dynamic.decoder import Decoder
from dynamoe.dynamic.loader import load_decoder
from dynamoe.kernels.types import AttentionBatch, KVLayer

PAGE_SIZE = 4
NUM_PAGES = 64
TOLERANCE = 1e-4  # max|Δ| / max|ref|, float32


class PagedSequences:
    """A cache of pages in random order that were filled with NaN, and the contexts of a few sequences in it."""

    def __init__(self, decoder: Decoder, num_sequences: int, seed: int = 0) -> None:
        spec = decoder.spec
        shape = (NUM_PAGES, spec.num_kv_heads, PAGE_SIZE, spec.head_dim)

        def poisoned() -> torch.Tensor:
            return torch.full(shape, float("nan"), dtype=decoder.dtype)

        self.decoder = decoder
        self.kv = [KVLayer(keys_BGPC=poisoned(), values_BGPC=poisoned()) for _ in range(spec.num_layers)]
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


def case_name(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join([case[0], *(f"{key}" for key in case[1])])


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_logits_equal_transformers(
    case: tuple[str, dict[str, Any]], make_checkpoint: Callable[..., Path], reference_model: Callable[[Path], Any]
) -> None:
    path = make_checkpoint(case[0], **case[1])
    decoder, reference = load_decoder(path, dtype="float32", device="cpu"), reference_model(path)
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
