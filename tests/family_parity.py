"""A family's random checkpoint against transformers: logits of the decoder, tokens of the engine."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from conftest import COMMON, randomize, write_tokenizer
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.kv_cache import bytes_per_page, bytes_per_sequence
from dynamoe.dynamic.model.loader import load_decoder
from engine_answers import answers
from test_decoder import TOLERANCE, PagedSequences, error, random_prompts

LENGTHS = (37, 5, 18)
NEW_TOKENS = 24
PROMPT_LENGTHS = (1, 7, 16, 33, 60)
ENGINE_PATHS: dict[str, dict[str, Any]] = {
    "together": {},
    "chunked": {"max_num_batched_tokens": 13, "enable_prefix_caching": False},
    "preempted": {"block_size": 8, "max_num_batched_tokens": 64},
    "prefix": {"block_size": 8},
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One configuration of a family.

    Arguments:
        family: ``model_type`` for transformers.
        config: its keys beside :data:`conftest.COMMON`; None leaves a common key out.
        prepare: changes the random model before it is saved, for parameters that ``randomize`` does not fit.
        edit: changes the directory after it was saved, to what published checkpoints look like.
    """

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[torch.nn.Module], None] | None = None
    edit: Callable[[Path], None] | None = None

    def __str__(self) -> str:
        return "-".join([self.family, *list(self.config)[-2:]])

    def save(self, directory: Path, seed: int = 0) -> Path:
        """Write the random checkpoint with its tokenizer."""
        from transformers import AutoConfig, AutoModelForCausalLM

        keys = {key: value for key, value in {**COMMON, **self.config}.items() if value is not None}
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(self.family, **keys), dtype=torch.float32, attn_implementation="eager"
        )
        randomize(model, seed)
        if self.prepare is not None:
            with torch.no_grad():
                self.prepare(model)
        model.generation_config.update(eos_token_id=[2, 0], pad_token_id=0, bos_token_id=1)
        model.save_pretrained(directory)
        write_tokenizer(directory)
        if self.edit is not None:
            self.edit(directory)
        return directory


def check_logits(directory: Path, reference: Any, backend: str = "cpu", tolerance: float = TOLERANCE) -> Decoder:
    """Prefill, a second chunk beside a decode, and decodes through scattered pages, against transformers' logits."""
    decoder = load_decoder(directory, dtype="float32", device="cpu", backend=backend)
    prompts = random_prompts(list(LENGTHS))
    with torch.inference_mode():
        expected = [reference(torch.tensor([prompt])).logits[0] for prompt in prompts]
    sequences = PagedSequences(decoder, len(prompts))
    first = sequences.run([prompts[0][:30], prompts[1], prompts[2][:7]])
    assert error(first, torch.cat((expected[0][:30], expected[1], expected[2][:7]))) < tolerance
    mixed = sequences.run([prompts[0][30:31], [], prompts[2][7:14]])
    assert error(mixed, torch.cat((expected[0][30:31], expected[2][7:14]))) < tolerance
    for step in range(4):
        rows = sequences.run([prompts[0][31 + step : 32 + step], [], prompts[2][14 + step : 15 + step]])
        assert error(rows, torch.stack((expected[0][31 + step], expected[2][14 + step]))) < tolerance
    return decoder


def check_variant(variant: Variant, folder: Path, reference_model: Callable[[Path], Any], **engine: Any) -> Path:
    """Logits and tokens of a variant, which lies in ``folder / "model"`` then.

    Where the LM head is the embedding, random models repeat the last token whatever they attend to: tokens are then
    those of the same model with a head of its own.

    Arguments:
        engine: for :func:`check_engine`.
    """

    def save(given: Variant, name: str) -> tuple[Path, Any]:
        directory = plain = given.save(folder / name)
        if given.edit is not None:  # transformers may not know what that made of it
            plain = replace(given, edit=None).save(folder / f"{name}-unedited")
        return directory, reference_model(plain)

    directory, reference = save(variant, "model")
    check_logits(directory, reference)
    if json.loads((directory / "config.json").read_text()).get("tie_word_embeddings"):
        untied = replace(variant, config={**variant.config, "tie_word_embeddings": False})
        check_engine(*save(untied, "untied"), **engine)
    else:
        check_engine(directory, reference, **engine)
    return directory


def expected_tokens(reference: Any, prompts: Sequence[list[int]], count: int = NEW_TOKENS) -> list[list[int]]:
    """What transformers generates greedily for each prompt alone."""
    outputs = []
    for prompt in prompts:
        output = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


def check_engine(
    directory: Path,
    reference: Any,
    *,
    paths: Iterable[str] = ("together", "chunked"),
    lengths: Sequence[int] = PROMPT_LENGTHS,
    count: int = NEW_TOKENS,
) -> None:
    """Greedy tokens of prompts that run together equal transformers', on each path through the engine."""
    prompts = random_prompts(list(lengths), seed=0)
    expected = expected_tokens(reference, prompts, count)
    assert any(len(set(tokens)) > 2 for tokens in expected), (
        "answers that repeat a token would hide faults of the cache"
    )
    model = load_model(directory, dtype="float32", device="cpu", progress=False)
    for path in paths:
        settings = dict(ENGINE_PATHS[path])
        if path == "preempted":  # three pages more than the longest sequence needs
            pages = -(-(max(lengths) + count) // settings["block_size"]) + 3
            page, states = (
                bytes_per_page(model.spec, torch.float32, settings["block_size"]),
                EngineConfig().max_num_seqs,
            )
            settings["kv_memory"] = pages * page + states * bytes_per_sequence(model.spec)
            settings["enable_prefix_caching"] = not model.spec.has_states  # for which it would share the memory
        engine = Engine(model, EngineConfig(**settings))
        assert generate(engine, prompts, count) == expected, path
        if path == "preempted":
            assert engine.stats().preemptions > 0
        if path == "prefix":
            assert generate(engine, prompts, count) == expected, "with prefix hits"
            assert engine.stats().prefix_cache_hits > 0


def generate(
    engine: Engine, prompts: Sequence[list[int]], count: int = NEW_TOKENS, params: SamplingParams | None = None
) -> list[list[int]]:
    """Tokens of prompts that run together, greedy unless said otherwise."""
    params = params or SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    return [answer.tokens for answer in answers(engine, prompts, params)]
