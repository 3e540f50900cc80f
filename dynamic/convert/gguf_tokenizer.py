"""Tokenizers of GGUF files as ``tokenizer.json``: byte-level BPE (``gpt2``) and SentencePiece's BPE (``llama``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.directory import write_json
from ..checkpoint.weights import CheckpointError
from .gguf_metadata import Metadata
from .gguf_pre_tokenizers import DIGIT, GPT2, PRE_TOKENIZERS, PreTokenizer

# Values of ``tokenizer.ggml.token_type``.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_MERGES_PER_TOKEN = 16  # SentencePiece's have up to 3
_MOST_TEMPLATES = 64
_LONGEST_PIECE = 256  # characters of a SentencePiece token; their splits are tried one by one
_SPECIAL = {  # what Hugging Face calls tokens with a role, and the file
    **{f"{name}_token": f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "cls", "mask")},
    "pad_token": "tokenizer.ggml.padding_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",
}
_ENDS = ("eos", "eot", "eom")  # tokens that end an answer, the first one first
_DEFAULT_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}  # SentencePiece's, where the file does not say
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9][\w-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens of a file.

    Arguments:
        tokens: by id.
        types: one for each, see ``_NORMAL`` and its neighbours.
        special: ids of tokens with a role, by Hugging Face's names.
        end_ids: tokens that end an answer.
    """

    tokens: Sequence[str]
    types: np.ndarray
    special: dict[str, int]
    end_ids: list[int]

    def of_type(self, *types: int) -> list[str]:
        """Tokens of some types, in the order of their ids."""
        return [self.tokens[index] for index in np.flatnonzero(np.isin(self.types, types)).tolist()]


def read_vocabulary(meta: Metadata, rows: int) -> Vocabulary:
    """The tokens of a file.

    Arguments:
        rows: of the embedding table; tokens may be fewer.

    Raises:
        CheckpointError: for tokens that make no sense, naming the key.
    """
    tokens = meta.strings("tokenizer.ggml.tokens", rows)
    seen: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if seen.setdefault(token, index) != index:
            raise meta.error("tokenizer.ggml.tokens", token[:80], f"there once, not as {seen[token]} and {index}")
    types = meta.numbers("tokenizer.ggml.token_type", len(tokens))
    if not bool(np.isin(types, range(_NORMAL, _BYTE + 1)).all()):
        raise meta.error("tokenizer.ggml.token_type", types.tolist()[:20], f"{_NORMAL} to {_BYTE}")

    def token_id(key: str, default: int | None = None) -> int | None:
        value = meta.get(key, default)
        if value is not None and (type(value) is not int or not 0 <= value < len(tokens)):
            raise meta.error(key, value, f"a token's number, less than {len(tokens)}")
        return value

    sentence_piece = meta.text("tokenizer.ggml.model") == "llama"
    ids = {ours: token_id(key) for ours, key in _SPECIAL.items()}
    if sentence_piece:
        ids |= {name: default for name, default in _DEFAULT_IDS.items() if ids[name] is None and default < len(tokens)}
    ends = [ids["eos_token"], *(token_id(f"tokenizer.ggml.{name}_token_id") for name in _ENDS[1:])]
    return Vocabulary(
        tokens=tokens,
        types=types,
        special={name: index for name, index in ids.items() if index is not None},
        end_ids=list(dict.fromkeys(index for index in ends if index is not None)),
    )


def write_tokenizer(meta: Metadata, vocabulary: Vocabulary, context: int, target: Path) -> None:
    """Write ``tokenizer.json``, its settings and the chat templates to a directory.

    Arguments:
        context: the model's longest context, in tokens.

    Raises:
        CheckpointError: for a kind of tokenizer or a pre-tokenizer that is not known, or one that makes no sense.
    """
    kinds = {"gpt2": _byte_level, "llama": _sentence_piece, "gemma4": _gemma4}
    kind, tokens, special = meta.text("tokenizer.ggml.model"), vocabulary.tokens, vocabulary.special
    if kind not in kinds:
        raise meta.error("tokenizer.ggml.model", kind, f"one of {', '.join(kinds)}; nothing else is supported")
    if meta.flag("tokenizer.ggml.add_sep_token", False):
        raise meta.error("tokenizer.ggml.add_sep_token", True, "false")
    try:
        tokenizer, add_bos = kinds[kind](meta, vocabulary)
        _add_tokens(tokenizer, vocabulary)
        _frame(meta, tokenizer, vocabulary, meta.flag("tokenizer.ggml.add_bos_token", add_bos))
    except CheckpointError:
        raise
    except Exception as error:  # the Rust library raises bare Exception
        raise CheckpointError(f"{meta.file}: its tokenizer makes no sense: {str(error)[:200]!r}") from error
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **{name: tokens[index] for name, index in special.items()},
    }
    _write_templates(meta, target)
    tokenizer.save(str(target / "tokenizer.json"))
    write_json(target / "tokenizer_config.json", settings)


def _byte_level(meta: Metadata, vocabulary: Vocabulary) -> tuple[Any, bool]:
    from tokenizers import Tokenizer, decoders, models, normalizers

    pre = meta.text("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise meta.error("tokenizer.ggml.pre", pre, "a pre-tokenizer that is known; guessing would change token ids")
    rule: PreTokenizer = PRE_TOKENIZERS[pre]
    # Behind the last token there are names for rows without one, which converters add.
    used = np.flatnonzero(vocabulary.types != _UNUSED).tolist()
    last = max([*used[-1:], *vocabulary.special.values(), *vocabulary.end_ids], default=-1)
    known = {token: index for index, token in enumerate(vocabulary.tokens[: last + 1])}
    merges = _merges(meta, vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=known, merges=merges, ignore_merges=rule.whole_words))
    tokenizer.pre_tokenizer = splitter_of(rule)
    if rule.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    for key in ("tokenizer.ggml.add_space_prefix", "tokenizer.ggml.remove_extra_whitespaces"):
        if meta.flag(key, False):
            raise meta.error(key, True, "false for a byte-level tokenizer")
    return tokenizer, rule.add_bos


def splitter_of(rule: PreTokenizer) -> Any:
    """The pre-tokenizer of a rule, of Hugging Face's library."""
    from tokenizers import Regex, pre_tokenizers

    # The rule of GPT-2 is the library's own.
    own = rule.patterns[-1] == GPT2
    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == DIGIT
        else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        for pattern in (rule.patterns[:-1] if own else rule.patterns)
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own))
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)


def _sentence_piece(meta: Metadata, vocabulary: Vocabulary, prefix: bool = True) -> tuple[Any, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers

    kind, pre = meta.text("tokenizer.ggml.model"), meta.text("tokenizer.ggml.pre", "default")
    if pre != "default" and (kind, pre) != ("gemma4", "gemma4"):
        raise meta.error("tokenizer.ggml.pre", pre, f"default with the tokenizer {kind}")
    tokens, unknown = vocabulary.tokens, vocabulary.special.get("unk_token")
    merges = _merges(meta, vocabulary) if meta.has("tokenizer.ggml.merges") else _merges_of_scores(meta, vocabulary)
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    steps: list[Any] = []
    if meta.flag("tokenizer.ggml.remove_extra_whitespaces", False):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    prefix = meta.flag("tokenizer.ggml.add_space_prefix", prefix)
    if prefix:
        steps.append(normalizers.Prepend("▁"))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    ends = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return tokenizer, True


def _gemma4(meta: Metadata, vocabulary: Vocabulary) -> tuple[Any, bool]:
    """Gemma 4's merges on texts whose spaces are ``▁``: SentencePiece's tokenizer without a space in front."""
    if not meta.has("tokenizer.ggml.merges"):
        raise meta.lacks("tokenizer.ggml.merges")
    return _sentence_piece(meta, vocabulary, prefix=False)


def _merges(meta: Metadata, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Pairs in the order in which they are merged; scores say nothing more then."""
    meta.get("tokenizer.ggml.scores")
    pairs = []
    for merge in meta.strings("tokenizer.ggml.merges", _MERGES_PER_TOKEN * len(vocabulary.tokens)):
        cut = merge.find(" ", 1)
        if cut < 0:
            raise meta.error("tokenizer.ggml.merges", merge[:80], "pairs of tokens with a space between them")
        pairs.append((merge[:cut], merge[cut + 1 :]))
    return pairs


def _merges_of_scores(meta: Metadata, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece merges two neighbours into the token with the best score.

    Every split of a token into two tokens is a merge, in the order of the tokens' scores.
    """
    tokens = vocabulary.tokens
    scores = meta.numbers("tokenizer.ggml.scores", len(tokens)).astype(np.float64)
    if not bool(np.isfinite(scores).all()):
        raise meta.error("tokenizer.ggml.scores", "some that are not", "finite numbers")
    normal = vocabulary.types == _NORMAL
    if len(np.unique(scores[normal])) < 2 <= int(normal.sum()):
        raise meta.error("tokenizer.ggml.scores", "one for all tokens", "different, or merges must be there")
    pieces = {tokens[index]: index for index in np.flatnonzero(normal).tolist()}
    found: list[tuple[float, int, int, str, str]] = []
    for token, index in pieces.items():
        if len(token) > _LONGEST_PIECE:
            raise meta.error("tokenizer.ggml.tokens", token[:40], f"at most {_LONGEST_PIECE} characters each")
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        splits = [pair for pair in splits if pair[0] in pieces and pair[1] in pieces]
        splits.sort(key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
        found += [(-scores[index], -len(left), -len(right), left, right) for left, right in splits]
    found.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in found]


def _add_tokens(tokenizer: Any, vocabulary: Vocabulary) -> None:
    """Tokens that are found in a text before it is cut."""
    from tokenizers import AddedToken

    special = vocabulary.of_type(_CONTROL, _UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in vocabulary.of_type(_USER_DEFINED)])


def _frame(meta: Metadata, tokenizer: Any, vocabulary: Vocabulary, add_bos: bool) -> None:
    """Begin and end texts with the tokens for it."""
    from tokenizers import processors

    add_eos = meta.flag("tokenizer.ggml.add_eos_token", False)
    ids, tokens = vocabulary.special, vocabulary.tokens
    for wanted, name in ((add_bos, "bos_token"), (add_eos, "eos_token")):
        if wanted and name not in ids:
            raise meta.error(_SPECIAL[name], None, f"there, because tokenizer.ggml.add_{name} is true")
    if not (add_bos or add_eos):
        return
    before = [(tokens[ids["bos_token"]], ids["bos_token"])] if add_bos else []
    after = [(tokens[ids["eos_token"]], ids["eos_token"])] if add_eos else []

    def around(number: int, text: str) -> list[str]:
        return [f"{name}:{number}" for name, _ in before] + [f"${text}:{number}"] + [f"{n}:{number}" for n, _ in after]

    tokenizer.post_processor = processors.TemplateProcessing(
        single=around(0, "A"), pair=[*around(0, "A"), *around(1, "B")], special_tokens=list({*before, *after})
    )


def _write_templates(meta: Metadata, target: Path) -> None:
    names = meta.strings("tokenizer.chat_templates", _MOST_TEMPLATES) if meta.has("tokenizer.chat_templates") else []
    if meta.has("tokenizer.chat_template"):
        text = meta.text("tokenizer.chat_template")
        (target / "chat_template.jinja").write_text(text, encoding="utf-8")
    for name in names:
        if not _TEMPLATE_NAME.fullmatch(name):
            raise meta.error("tokenizer.chat_templates", name, "names of letters, digits, _ and -")
        text = meta.text(f"tokenizer.chat_template.{name}")
        folder = target / "additional_chat_templates"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jinja").write_text(text, encoding="utf-8")
