"""Checkpoints of families without exits whose logits are peaked, so that little of the work can be left out at a loss.

Random weights alone choose tokens by a hair, so that every rounding changes them. Here the LM head knows one successor
of every token, and attention and experts only add to that: a stranger to the model's text, but as sure of most tokens
as trained models are, and not of all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import COMMON, FAMILIES, VOCAB_SIZE, randomize, write_tokenizer

# Family → how much attention and experts add, by which the median margin becomes about one.
ADDED = {"qwen3_moe": 0.5, "granitemoe": 1.6, "gpt_oss": 0.4}
GPT_OSS = {"num_local_experts": 6, "intermediate_size": 48, "head_dim": 16, "sliding_window": 12}
PROMPT_TOKENS = 6


def peaked_checkpoint(directory: Path, family: str) -> Path:
    """Write a random model of a family, with its tokenizer and 400 prompts of token ids (``prompts.jsonl``)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config: dict[str, Any] = {**COMMON, **FAMILIES.get(family, GPT_OSS), "num_experts_per_tok": 3}
    settings = AutoConfig.for_model(family, **config | {"tie_word_embeddings": False})
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    randomize(model, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("down_proj", "o_proj", "output_linear")):
                parameter *= ADDED[family]
        embedding_VD, head_VD = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        order = 3 + torch.randperm(VOCAB_SIZE - 3, generator=torch.Generator().manual_seed(1))
        head_VD.zero_()
        head_VD[order.roll(1)] = embedding_VD[order] / 4
    model.generation_config.update(eos_token_id=[2, 0], pad_token_id=0, bos_token_id=1)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    ids = np.random.default_rng(0).integers(3, VOCAB_SIZE, (400, PROMPT_TOKENS)).tolist()
    (directory / "prompts.jsonl").write_text("".join(json.dumps({"prompt_token_ids": one}) + "\n" for one in ids))
    return directory
