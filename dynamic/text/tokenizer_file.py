"""Reading ``tokenizer.json``: what the library would pass over in silence is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from ...kernels.api.disk import read_regular

Result = TypeVar("Result")
_PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_KEYS = frozenset({"version", "truncation", "padding", "added_tokens", "model", *_PARTS})
_MODEL_KEYS = frozenset(
    {
        *("type", "vocab", "merges", "dropout", "unk_token", "unk_id", "continuing_subword_prefix"),
        *("end_of_word_suffix", "fuse_unk", "byte_fallback", "ignore_merges", "max_input_chars_per_word"),
    }
)
# Tokenizers of transformers that leave a tokenizer.json as it is; others apply add_prefix_space to it.
_PLAIN_CLASSES = (None, "PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast")
# Tokenizers of transformers that put no space in front unless they are told to, whatever a tokenizer.json says.
_NO_PREFIX_CLASSES = frozenset(
    f"{name}Tokenizer{fast}" for name in ("GPT2", "Qwen2", "Cohere", "GPTNeoX", "CodeGen") for fast in ("", "Fast")
)
_TOKEN_KEYS = frozenset({"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"})
_OLDER_KEYS = frozenset({"add_prefix_space", "str_rep"})  # under which older files say what newer keys say


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is no file.

    Raises:
        ValueError: for anything else.
    """
    if not file.exists():
        return {}
    return _object(file, run_rust(lambda: read_regular(file), f"{file} cannot be read"))


def _object(file: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


def read_tokenizer(file: Path) -> tokenizers.Tokenizer:
    """The tokenizer in a ``tokenizer.json``.

    Raises:
        ValueError: for a file that the library cannot read, a key that it does not know, token ids that are not those
            of the file, or merges that are left out by chance.
    """
    data = run_rust(lambda: read_regular(file), f"{file} cannot be read")
    backend = run_rust(lambda: tokenizers.Tokenizer.from_buffer(data), f"{file} cannot be read")
    content = _object(file, data)
    _check_keys(file, "", content, _KEYS)
    model = content.get("model")
    if isinstance(model, Mapping):
        _check_keys(file, "model/", model, _MODEL_KEYS)
        if model.get("dropout"):
            raise ValueError(f"{file}: model/dropout={model['dropout']} leaves out merges by chance")
        vocab = model.get("vocab")
        if isinstance(vocab, Mapping) and len(set(vocab.values())) < len(vocab):
            seen: dict[int, str] = {}
            first = next((seen[n], text) for text, n in vocab.items() if seen.setdefault(n, text) != text)
            raise ValueError(f"{file}: model/vocab gives {first[0]!r} and {first[1]!r} the same id")
    for token in content.get("added_tokens") or ():
        _check_keys(file, "added_tokens/", token, _TOKEN_KEYS)
        if (found := backend.token_to_id(token["content"])) != token["id"]:
            raise ValueError(
                f"{file}: added_tokens gives {token['content']!r} the id {token['id']}, but it has {found}"
            )
    for name in _PARTS:
        if content.get(name) is not None:
            _check_part(file, f"{name}/", content[name], json.loads(getattr(backend, name).__getstate__()))
    return backend


def check_settings(file: Path, settings: Mapping[str, Any], backend: tokenizers.Tokenizer) -> None:
    """Refuse what a ``tokenizer_config.json`` says otherwise than the tokenizer beside it, or in another type.

    Raises:
        ValueError: naming the setting.
    """
    for name in ("add_prefix_space", "split_special_tokens"):
        if not isinstance(value := settings.get(name), bool | None):
            raise ValueError(f"{file}: {name} must be true or false, not {str(value)[:100]!r}")
    prefix, kind = settings.get("add_prefix_space"), settings.get("tokenizer_class")
    if not isinstance(kind, str | None):
        raise ValueError(f"{file}: tokenizer_class must be a text, not {str(kind)[:100]!r}")
    if prefix is None and kind in _NO_PREFIX_CLASSES:
        prefix = False
    if prefix is None or kind in _PLAIN_CLASSES or backend.pre_tokenizer is None:
        return
    steps = json.loads(backend.pre_tokenizer.__getstate__())
    for step in steps.get("pretokenizers", [steps]):
        if step["type"] == "ByteLevel" and step["add_prefix_space"] != prefix:
            raise ValueError(f"{file}: add_prefix_space={prefix}, but tokenizer.json says {step['add_prefix_space']}")


def run_rust(call: Callable[[], Result], failure: str) -> Result:
    """The result of a call of the Rust library, which raises bare exceptions, and panics where it has a mistake.

    Raises:
        ValueError: of one line, for any of them.
    """
    try:
        return call()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{failure}: {' '.join(str(error).split())[:300]}") from error


def _check_keys(file: Path, where: str, content: Mapping[str, Any], known: frozenset[str]) -> None:
    unknown = sorted(key for key, value in content.items() if key not in known and value is not None)
    if unknown:
        raise ValueError(f"{file}: {where}{unknown[0]!r} is unknown, and ignoring it could give other tokens")


def _check_part(file: Path, where: str, ours: Any, theirs: Any) -> None:
    """Compare a part of the file with what the library has made of it."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        _check_keys(file, where, ours, _OLDER_KEYS | theirs.keys())
        for key in ours.keys() & theirs.keys():
            _check_part(file, f"{where}{key}/", ours[key], theirs[key])
    elif isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            raise ValueError(f"{file}: of {where[:-1]!r} the library reads {len(theirs)} parts, not {len(ours)}")
        for one, other in zip(ours, theirs, strict=True):
            _check_part(file, where, one, other)
