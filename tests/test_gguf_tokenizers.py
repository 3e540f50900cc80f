"""Tokenizers of GGUF files: token ids are those of the tokenizer that the file was made from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TRAINING_TEXT
from dynamoe.dynamic.convert.gguf_import import import_gguf
from dynamoe.dynamic.convert.gguf_pre_tokenizers import PRE_TOKENIZERS
from dynamoe.dynamic.model.generation_defaults import read_generation_defaults
from dynamoe.dynamic.text.tokenizer import Tokenizer
from gguf_files import tokenizer_metadata, write_gguf
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

# Digits, contractions in both cases, runs of spaces and lines, scripts, emoji, letters that compose, controls.
TEXTS = [
    "It's 12345 o'clock; THEY'LL pay $1,234.50 for x86_64!! isn't it?",
    "def f(x):\n\n    return x+1  # ok\t\t\n\r\n  \n end   ",
    " leading, trailing ",
    "ÜBER straße naïve e\u0301tude \u212b \uac00\u1100\u1161 汉字かな 한국어 ۱۲۳ ½ Ⅻ",
    "🦙👩‍👩‍👧 — “quoted”… #tag @you http://a.b/c?d=e&f",
    "HelloWorld fooBAR ABCdef 'Sam's 'REs",
    "<|im_start|>user\nHi<|im_end|>\n",
    "",
    "\n",
    "1",
    "    ",
]


@pytest.fixture
def imported(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Tokenizer]:
    """``imported(values, pre=…) -> Tokenizer`` of a file with other tokenizer metadata, of as many tokens."""

    def make(values: dict[str, Any], **writing: Any) -> Tokenizer:
        def edit(meta: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
            meta.update(values)
            for key in [key for key, value in values.items() if value is None]:
                del meta[key]
            rows = len(meta["tokenizer.ggml.tokens"])
            if rows > tensors["token_embd.weight"].shape[0]:
                meta["llama.vocab_size"] = rows
                for name in ("token_embd.weight", "output.weight"):
                    tensors[name] = torch.zeros(rows, tensors[name].shape[1])

        target = tmp_path / "imported"
        target.mkdir()
        file = write_gguf(make_checkpoint("llama", num_hidden_layers=1), tmp_path / "t.gguf", edit=edit, **writing)
        import_gguf(file, target, progress=False)
        return Tokenizer.from_directory(target)

    return make


def trained(splitter: Any, normalizer: Any = None, **model: Any) -> Backend:
    """A byte-level tokenizer of the texts, trained with the pre-tokenizer that it has."""
    from tokenizers import trainers

    backend = Backend(models.BPE(**model))
    backend.pre_tokenizer = splitter
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TRAINING_TEXT, *(text for text in TEXTS * 3 if "<|" not in text)], trainer)
    return backend


def in_gguf(backend: Backend) -> dict[str, Any]:
    """The vocabulary and merges of a byte-level tokenizer as metadata."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if index < 3 else 1 for index in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
    }


def of_transformers(module: str, name: str) -> Callable[[], tuple[Any, Any]]:
    """Pre-tokenizer and normaliser of one of transformers' own tokenizers."""

    def make() -> tuple[Any, Any]:
        import importlib

        backend = getattr(importlib.import_module(f"transformers.models.{module}"), name)().backend_tokenizer
        return backend.pre_tokenizer, backend.normalizer

    return make


def tiktoken(pattern: str) -> Callable[[], tuple[Any, Any]]:
    """As transformers converts tiktoken's tokenizers."""

    def make() -> tuple[Any, Any]:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]), None

    return make


def digits_first() -> tuple[Any, Any]:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), None


# Llama 3's and GPT-4o's patterns as tiktoken has them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Kimi K2's, as its own code has them: GPT-4o's, with Chinese characters apart.
KIMI = r"\p{Han}+|" + GPT4O.replace(r"[\p{Lu}", r"(?:(?!\p{Han})[\p{Lu}").replace(r"[\p{Ll}", r"(?:(?!\p{Han})[\p{Ll}")
for case in (r"\p{M}]*", r"\p{M}]+"):
    KIMI = KIMI.replace(case, case[:-1] + ")" + case[-1])
KIMI = KIMI.replace(r"[\r\n/]*", r"[\r\n]*")
SOURCES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "gpt-2": of_transformers("gpt2", "GPT2Tokenizer"),
    "qwen2": of_transformers("qwen2", "Qwen2Tokenizer"),
    "qwen35": of_transformers("qwen3_5", "Qwen3_5Tokenizer"),
    "olmo": of_transformers("gpt_neox", "GPTNeoXTokenizer"),
    "command-r": of_transformers("cohere", "CohereTokenizer"),
    "smollm": digits_first,
    "starcoder": digits_first,
    "refact": digits_first,
    "llama-bpe": tiktoken(LLAMA3),
    "dbrx": tiktoken(LLAMA3),
    "glm4": tiktoken(LLAMA3),
    "gpt-4o": tiktoken(GPT4O),
    "llama4": tiktoken(GPT4O),
    "kimi-k2": tiktoken(KIMI),
}


@pytest.mark.parametrize("pre", SOURCES)
def test_token_ids_are_those_of_the_source(imported: Callable[..., Tokenizer], pre: str) -> None:
    source = trained(*SOURCES[pre]())
    model = json.loads(source.to_str())["model"]
    # Half of the merges are missing, so that some tokens are words that only a look-up finds.
    merges, whole = [tuple(merge) for merge in model["merges"][::2]], pre in ("llama-bpe", "glm4")
    merged, looked_up = (Backend.from_str(source.to_str()) for _ in range(2))
    merged.model = models.BPE(vocab=model["vocab"], merges=merges)  # type: ignore[assignment]
    looked_up.model = models.BPE(vocab=model["vocab"], merges=merges, ignore_merges=True)  # type: ignore[assignment]
    assert any(merged.encode(text).ids != looked_up.encode(text).ids for text in TEXTS)
    source = looked_up if whole else merged
    values = {**in_gguf(source), "tokenizer.ggml.add_bos_token": False}
    tokenizer = imported(values, pre=pre)
    for text in TEXTS:
        found = tokenizer.encode(text, add_special_tokens=False)
        assert found == source.encode(text, add_special_tokens=False).ids, text
        if "\u0301" not in text:  # a letter that the normaliser composes
            assert tokenizer.decode(found, skip_special_tokens=False) == text


# What the published rules cut a text into.
# ruff: noqa: E501
SENTENCE = "He'LL pay 12345 HelloWorld's <é漢字>\n\n  ok"
PIECES = {
    "default": ["He", "'", "LL", " pay", " ", "123", "45", " HelloWorld", "'", "s", " ", "<", "é漢字", ">", "\n\n ", " ok"],
    "llama-bpe": ["He", "'LL", " pay", " ", "123", "45", " HelloWorld", "'s", " <", "é漢字", ">\n\n", " ", " ok"],
    "qwen2": ["He", "'LL", " pay", " ", *"12345", " HelloWorld", "'s", " <", "é漢字", ">\n\n", " ", " ok"],
    "tekken": ["He", "'LL", " pay", " ", *"12345", " Hello", "World", "'s", " <", "é漢字", ">\n\n", " ", " ok"],
    "gpt-4o": ["He'LL", " pay", " ", "123", "45", " Hello", "World's", " <", "é漢字", ">\n\n", " ", " ok"],
    "deepseek-v3": ["He", "'LL", " pay", " ", "123", "45", " HelloWorld", "'s", " <", "é", "漢字", ">\n\n", " ", " ok"],
    "deepseek-llm": ["He", "'", "LL", " pay", " ", "12345", " HelloWorld", "'", "s", " <", "é", "漢字", ">", "\n", "\n", " ", " ok"],
    "deepseek-coder": ["He", "'", "LL", " pay", " ", *"12345", " HelloWorld", "'", "s", " <", "é", "漢字", ">", "\n", "\n", " ", " ok"],
    "seed-coder": ["He", "'LL", " pay", " ", *"12345", " HelloWorld", "'s", " <", "é漢字", ">", "\n\n", " ", " ok"],
    "kimi-k2": ["He'LL", " pay", " ", "123", "45", " Hello", "World's", " <", "é", "漢字", ">\n\n", " ", " ok"],
    "tiny_aya": ["He'LL", " pay", " ", "12", "345", " Hello", "World's", " <", "é漢字", ">\n\n", " ", " ok"],
    "afmoe": ["He", "'LL", " pay", " ", "12", "345", " HelloWorld", "'s", " <", "é", "漢字", ">\n\n", " ", " ok"],
    "exaone-moe": ["He", "'LL", " pay", " ", *"12345", " HelloWorld", "'s", " <", "é漢字", ">\n", "\n", " ", " ok"],
    "falcon": ["He", "'", "LL", " pay", " ", "123", "45", " HelloWorld", "'", "s", " ", "<", "é漢字", ">", "\n\n ", " ok"],
    "bloom": ["He'LL", " pay", " 12345", " HelloWorld's", " <é漢字>", "\n\n ", " ok"],
    "viking": ["He'LL", " pay", " ", *"12345", " HelloWorld's", " <é漢字>", "\n\n ", " ok"],
}  # fmt: skip


@pytest.mark.parametrize("pre", PIECES)
def test_texts_are_cut_by_the_published_rules(imported: Callable[..., Tokenizer], pre: str) -> None:
    tokenizer = imported({}, pre=pre)
    byte_level = Backend(models.BPE())
    byte_level.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    splitter = tokenizer.backend.pre_tokenizer
    assert splitter is not None
    pieces = [SENTENCE[begin:end] for _, (begin, end) in splitter.pre_tokenize_str(SENTENCE)]
    assert pieces == PIECES[pre]


def test_every_rule_compiles_and_loses_no_text(imported: Callable[..., Tokenizer]) -> None:
    from dynamoe.dynamic.convert.gguf_tokenizer import splitter_of

    for name, rule in PRE_TOKENIZERS.items():
        splitter = splitter_of(rule)
        for text in TEXTS:
            pieces = [text[begin:end] for _, (begin, end) in splitter.pre_tokenize_str(text)]
            assert "".join(pieces) == text, name


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"tokenizer.ggml.pre": "my-own"}, "tokenizer.ggml.pre must be a pre-tokenizer that is known.*'my-own'"),
        ({"tokenizer.ggml.pre": "superbpe"}, "tokenizer.ggml.pre must be .*'superbpe'"),
        ({"tokenizer.ggml.pre": None}, "lacks the metadata entry 'tokenizer.ggml.pre'"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model must be one of gpt2, llama.*'t5'"),
        ({"tokenizer.ggml.merges": ["ab"]}, "tokenizer.ggml.merges must be pairs"),
        ({"tokenizer.ggml.merges": ["no such"]}, "its tokenizer makes no sense"),
        ({"tokenizer.ggml.merges": None}, "lacks the metadata entry 'tokenizer.ggml.merges'"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "token_type must be an array of 320 numbers"),
        ({"tokenizer.ggml.token_type": None}, "lacks the metadata entry 'tokenizer.ggml.token_type'"),
        ({"tokenizer.ggml.token_type": [9] * 320}, "token_type must be 1 to 6"),
        ({"tokenizer.ggml.eos_token_id": 320}, "eos_token_id must be a token's number, less than 320"),
        ({"tokenizer.ggml.eot_token_id": 2**31}, "eot_token_id must be"),
        ({"tokenizer.ggml.tokens": ["a"] * 320}, "tokens must be there once"),
        ({"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True}, "bos_token_id must be there"),
        ({"tokenizer.ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces must be false"),
        ({"tokenizer.ggml.add_sep_token": True}, "add_sep_token must be false"),
        ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, "'tokenizer.ggml.precompiled_charsmap' = an array of 2"),
        ({"tokenizer.chat_templates": ["../../x"]}, "chat_templates must be names"),
    ],
)
def test_tokenizers_that_are_not_understood_are_refused(
    imported: Callable[..., Tokenizer], values: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        imported(values)


def sentence_piece(*, prefix: bool = True, templated: bool = True) -> Backend:
    """A tokenizer as published for Llama 2 and Mistral: byte fallback, spaces as ▁, merges by score."""
    from tokenizers import trainers

    plain = Backend(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=260, show_progress=False)
    plain.train_from_iterator([TRAINING_TEXT, *TEXTS[:2]], trainer)
    model = json.loads(plain.to_str())["model"]
    letters = [token for token in sorted(model["vocab"], key=model["vocab"].get) if len(token) == 1]
    merges = [tuple(merge) for merge in model["merges"]]
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *("".join(m) for m in merges),
        *letters,
    ]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    ends = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
    )
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    if templated:
        backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
        )
    return backend


def scores_in_gguf(backend: Backend) -> dict[str, Any]:
    """As a converter writes a SentencePiece model: a score per token, no merges."""
    vocab = json.loads(backend.to_str())["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get)
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0 if index < 259 else float(258 - index) for index in range(len(tokens))],
        "tokenizer.ggml.token_type": [kinds.get(t, 6 if t.startswith("<0x") else 1) for t in tokens],
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.padding_token_id": None,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("how", ["scores", "merges"])
def test_sentence_piece_tokenizers_give_the_same_ids_and_texts(
    imported: Callable[..., Tokenizer], prefix: bool, how: str
) -> None:
    source = sentence_piece(prefix=prefix)
    values = scores_in_gguf(source)
    if not prefix:
        values["tokenizer.ggml.add_space_prefix"] = False
    if how == "merges":
        merges = json.loads(source.to_str())["model"]["merges"]
        values["tokenizer.ggml.merges"] = [" ".join(merge) for merge in merges]
    tokenizer = imported(values)
    for text in [*TEXTS, "a</s>b", "</s> b", "<s>", "▁x", "<0x41>"]:
        wanted = source.encode(text)
        assert tokenizer.encode(text) == wanted.ids, text
        assert tokenizer.decode(wanted.ids) == source.decode(wanted.ids)
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_id == 2


def in_gemma4(source: Backend) -> dict[str, Any]:
    """As a converter writes Gemma 4's tokenizer: merges on texts whose spaces are replaced, and no space in front."""
    merges = json.loads(source.to_str())["model"]["merges"]
    return {
        **scores_in_gguf(source),
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.pre": "gemma4",
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
    }


def test_gemma4_tokenizers_give_the_same_ids_and_texts(imported: Callable[..., Tokenizer]) -> None:
    source = sentence_piece(prefix=False)
    tokenizer = imported(in_gemma4(source))
    for text in TEXTS:
        wanted = source.encode(text)
        assert tokenizer.encode(text) == wanted.ids, text
        assert tokenizer.decode(wanted.ids) == source.decode(wanted.ids)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"tokenizer.ggml.merges": None}, "lacks the metadata entry 'tokenizer.ggml.merges'"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre must be default with the tokenizer gemma4"),
    ],
)
def test_gemma4_tokenizers_without_their_rule_are_refused(
    imported: Callable[..., Tokenizer], values: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        imported({**in_gemma4(sentence_piece(prefix=False)), **values})


def test_scores_merge_as_sentence_piece_does(imported: Callable[..., Tokenizer]) -> None:
    """The neighbours whose union has the best score, again and again: not the order in which pairs were learnt."""
    source = sentence_piece()
    values = scores_in_gguf(source)
    generator = torch.Generator().manual_seed(5)
    shuffled = torch.randperm(len(values["tokenizer.ggml.tokens"]), generator=generator).float().tolist()
    values["tokenizer.ggml.scores"] = shuffled
    scores = dict(zip(values["tokenizer.ggml.tokens"], shuffled, strict=True))
    normal = {t for t, kind in zip(scores, values["tokenizer.ggml.token_type"], strict=True) if kind == 1}
    tokenizer = imported(values)
    for text in (TEXTS[0], TRAINING_TEXT):
        symbols = list("▁" + text.replace(" ", "▁"))
        while True:
            pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in normal]
            if not pairs:
                break
            at = -max(pairs)[1]
            symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
        names = [tokenizer.token_name(index) for index in tokenizer.encode(text, add_special_tokens=False)]
        assert [name for name in names if name and not name.startswith("<0x")] == [s for s in symbols if s in scores]


def test_scores_that_say_nothing_are_refused(imported: Callable[..., Tokenizer]) -> None:
    values = scores_in_gguf(sentence_piece())
    values["tokenizer.ggml.scores"] = [-1000.0] * len(values["tokenizer.ggml.tokens"])
    with pytest.raises(ValueError, match=r"scores must be different, or merges must be there"):
        imported(values)


def test_roles_of_tokens_and_templates_are_kept(
    make_checkpoint: Callable[..., Path], imported: Callable[..., Tokenizer], caplog: pytest.LogCaptureFixture
) -> None:
    tokens = tokenizer_metadata(make_checkpoint("llama", num_hidden_layers=1), "")["tokenizer.ggml.tokens"]
    tokenizer = imported(
        {
            "tokenizer.ggml.tokens": [*tokens, *(f"[PAD{index}]" for index in range(320, 326))],
            "tokenizer.ggml.eot_token_id": 5,
            "tokenizer.ggml.eom_token_id": 2,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_eos_token": True,
            "tokenizer.ggml.token_type": [3, 3, 3, 4, *[1] * 316, *[5] * 6],
            "tokenizer.ggml.fim_pre_token_id": 7,
            "tokenizer.chat_templates": ["tool_use"],
            "tokenizer.chat_template.tool_use": "tools",
            "general.sampling.temp": 0.6,
            "general.sampling.top_k": 20,
            "general.sampling.top_p": float("nan"),
            "general.sampling.mirostat": 2,
        }
    )
    settings = json.loads((tokenizer.path / "generation_config.json").read_text())
    assert math.isnan(settings.pop("top_p"))
    assert settings == {
        **{"bos_token_id": 1, "eos_token_id": [2, 5], "pad_token_id": 0, "temperature": 0.6, "top_k": 20},
        "general.sampling.mirostat": 2,
    }
    assert read_generation_defaults(tokenizer.path) == {"temperature": 0.6, "top_k": 20}
    assert "not applied to requests: top_p=nan, general.sampling.mirostat=2" in caplog.text
    ids = tokenizer.encode("The!")
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.token_name(3) in tokenizer.backend.get_added_tokens_decoder()[3].content
    assert tokenizer.token_name(319) == tokens[319]
    assert tokenizer.token_name(320) is None, "what has no token at the end is no token"
    assert tokenizer.chat_template(tools=True).render([{"role": "user", "content": ""}]) == "tools"
