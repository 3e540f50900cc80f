"""The embedded default against its dense parent, which transformers reads from the same GGUF file on its own."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamoe import LLM, SamplingParams
from dynamoe.dynamic.convert.default_model import dense_default_file
from dynamoe.dynamic.text.calibration_text import reference_pages, token_windows
from dynamoe.dynamic.text.tokenizer import Tokenizer

# Making the model takes a minute on two idle cores, and the first test that wants it pays for that.
pytestmark = pytest.mark.timeout(1200)

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain photosynthesis to a child.",
    "List three prime numbers larger than 20.",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into Spanish.",
    "How do I boil an egg?",
    "What does a router do in a mixture of experts?",
    "Give me a recipe for pancakes.",
    "Why is the sky blue?",
)
BEGINNINGS = (
    "Once upon a time, in a small village by the river,",
    "The three laws of motion are",
    "def fibonacci(n):\n    ",
    "In 1969, the first humans",
    "The most important ingredient of bread is",
    "Dear Sir or Madam,\n\nI am writing to",
    "import numpy as np\n\n# Multiply two matrices\n",
    "The mitochondrion is",
    "Breaking news: scientists have discovered",
    "1, 1, 2, 3, 5, 8,",
)
TEXTS = (
    "Hello, world! It's a test: don't panic; they'll see what I've done.",
    "Ünïcödé, 日本語, עברית, emoji 😀👩‍👩‍👧 and a\ttab",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|im_start",
    "def f(x):\n    return [x ** 2 for _ in range(x)]  # comment\n\n\nclass A:\n\tpass\n",
    "3.14159 is 22/7 - 0.00126, in 2024 or 1,000,000 BC",
    "   leading and trailing spaces   ",
)


@pytest.fixture(scope="module")
def dense_parent() -> Any:
    """The dense model as transformers reads the GGUF file: (model in float32, tokenizer)."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = dense_default_file()
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    unpacked = GgufConfig(dequantize=True)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("get_tensor_name_map", "GGUFReader"):  # called for every module, and whenever the file is opened
            patch.setattr(gguf, name, cache(getattr(gguf, name)))
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, quantization_config=unpacked)
        return model.eval(), AutoTokenizer.from_pretrained(**where)


@pytest.fixture(scope="module")
def llm(default_model: Path) -> LLM:
    """The default in float32."""
    return LLM(default_model, dtype="float32", progress=False, max_model_len=1024)


def prompt_ids(tokenizer: Tokenizer) -> list[list[int]]:
    """Ten chats and ten beginnings of texts, alternating, of different lengths."""
    chats = [tokenizer.chat_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    texts = [text for pair in zip(chats, BEGINNINGS, strict=True) for text in pair]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


@torch.inference_mode()
def dense_greedy(model: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The parent's greedy continuations, with no end of sequence, in one batch padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    model.generation_config.eos_token_id = None
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return out[:, longest:].tolist()


@pytest.mark.parametrize(("count", "tokens"), [(8, 16), pytest.param(20, 32, marks=pytest.mark.slow)])
def test_with_all_experts_on_it_generates_what_its_dense_parent_does(
    llm: LLM, dense_parent: Any, count: int, tokens: int
) -> None:
    prompts = prompt_ids(llm.get_tokenizer())[:count]
    assert len(prompts) == count
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    wanted = dense_greedy(dense_parent[0], prompts, tokens)
    assert [list(output.outputs[0].token_ids) for output in outputs] == wanted


def test_every_neuron_of_the_parent_is_there_once(default_model: Path, dense_parent: Any) -> None:
    from safetensors import safe_open

    parent = dense_parent[0].state_dict()
    with safe_open(default_model / "model.safetensors", "pt") as file:
        for layer in (0, 13, 29):
            names = [f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
            ours, theirs = (
                torch.cat((gate, up, down.T), 1)
                for gate, up, down in (map(source, names) for source in (file.get_tensor, parent.__getitem__))
            )
            order = {row.numpy().tobytes(): i for i, row in enumerate(theirs)}
            assert sorted(order[row.numpy().tobytes()] for row in ours) == list(range(1536))
            assert file.get_tensor(f"model.layers.{layer}.mlp.router.weight").shape == (14, 576)
        for name in set(file.keys()) & parent.keys():
            assert ".mlp." in name or file.get_tensor(name).equal(parent[name])


def test_what_is_the_capital_of_france(default_model: Path) -> None:
    answer = LLM(default_model, progress=False).chat(
        [{"role": "user", "content": "What is the capital of France?"}], use_tqdm=False
    )
    assert "Paris" in answer[0].outputs[0].text
    assert answer[0].outputs[0].finish_reason == "stop"


def test_texts_are_tokenized_as_transformers_does_and_come_back(default_model: Path, dense_parent: Any) -> None:
    ours = Tokenizer.from_directory(default_model)
    pages = reference_pages(held_out=True)[:3]
    # Where a digit follows several blanks, transformers splits the blanks; see the next test.
    plain = ["".join(character for character in page if not character.isdigit()) for page in pages]
    for text in (*TEXTS, *plain):
        ids = ours.encode(text, add_special_tokens=True)
        assert ids == dense_parent[1](text).input_ids
        assert ours.decode(ids, skip_special_tokens=False) == text


def test_blanks_before_a_digit_stay_together_as_in_the_models_training(default_model: Path, dense_parent: Any) -> None:
    """The file's pre-tokenizer ("smollm") splits digits off first, which transformers' GGUF reader does not know."""
    ours = Tokenizer.from_directory(default_model)
    text = "Steps:\n\n1. Wait  30 s"
    pieces = [ours.token_text(token) for token in ours.encode(text, add_special_tokens=False)]
    assert pieces == ["Steps", ":", "\n\n", "1", ".", " Wait", "  ", "3", "0", " s"]
    assert len(dense_parent[1](text).input_ids) > len(pieces)


def test_chats_are_framed_as_the_file_says(default_model: Path, dense_parent: Any) -> None:
    ours = Tokenizer.from_directory(default_model)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    messages += [{"role": "user", "content": "Nothing."}]
    wanted = dense_parent[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.chat_prompt(messages, add_generation_prompt=True) == wanted
    assert wanted.startswith("<|im_start|>system\n")
    assert ours.special_tokens["eos_token"] == "<|im_end|>"


@pytest.mark.slow
def test_fewer_experts_cost_a_little_and_fewer_still_cost_more(llm: LLM, default_model: Path) -> None:
    tokenizer = Tokenizer.from_directory(default_model)
    windows = token_windows(tokenizer.backend, reference_pages(held_out=True), count=2, length=192)
    most = perplexity(llm, windows)
    ten, six = (
        perplexity(LLM(default_model, dtype="float32", progress=False, experts_per_token=count), windows)
        for count in (10, 6)
    )
    assert 1.05 * most < ten < 1.6 * most
    assert 1.5 * most < six < 4 * most


def perplexity(llm: LLM, windows_BL: torch.Tensor) -> float:
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate(windows_BL.tolist(), params, use_tqdm=False)
    losses = []
    for output, window in zip(outputs, windows_BL.tolist(), strict=True):
        assert output.prompt_logprobs is not None
        for token, choices in zip(window[1:], output.prompt_logprobs[1:], strict=True):
            assert choices is not None
            losses.append(-choices[token].logprob)
    return float(torch.tensor(losses).mean().exp())
