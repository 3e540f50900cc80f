"""Text to token ids and back, straight from ``tokenizer.json``; transformers is imported only where there is none."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tokenizers
from tokenizers import AddedToken, decoders

from ...kernels.api.disk import read_regular
from .tokenizer_file import check_settings, read_json, read_tokenizer, run_rust

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .chat_template import ChatTemplate

Result = TypeVar("Result")
LONG = 1000  # characters or tokens; the library lets other threads run only while it works on a batch
NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer and chat template. Safe to use from several threads.

    Like transformers, it takes the tokens that frame a text from ``tokenizer.json`` alone: ``add_bos_token`` and
    ``add_eos_token`` in ``tokenizer_config.json`` are leftovers of slow tokenizers.

    Arguments:
        backend: the tokenizer proper.
        settings: contents of ``tokenizer_config.json``.
        chat_templates: Jinja sources by name (``default``, ``tool_use``).
        path: the checkpoint's directory.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Mapping[str, Any],
        chat_templates: Mapping[str, str],
        path: Path,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = settings.get("split_special_tokens") is True
        self.backend = backend
        self.path = path
        self.special_tokens = {n: t for n in NAMED_SPECIAL_TOKENS if (t := _content(settings.get(n), n)) is not None}
        self._add_missing_tokens(settings)
        self._chat_sources = dict(chat_templates)
        self._chat_templates: dict[str, ChatTemplate] = {}
        self._token_texts: dict[int, str] = {}
        self._token_bytes: dict[int, bytes] = {}
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Read a checkpoint's tokenizer files.

        Raises:
            ValueError: when there is no tokenizer, or one that transformers cannot turn into a fast one.
        """
        path = Path(path)
        settings = read_json(path / "tokenizer_config.json")
        for name, token in read_json(path / "special_tokens_map.json").items():
            settings.setdefault(name, token)
        file = path / "tokenizer.json"
        if file.exists():
            backend = read_tokenizer(file)
            check_settings(path / "tokenizer_config.json", settings, backend)
        else:
            backend, settings = _convert_slow(path, settings)
        try:
            tokenizer = cls(backend, settings, _chat_sources(path, settings), path)
            tokenizer._check_added(read_json(path / "added_tokens.json"), settings.get("added_tokens_decoder") or {})
        except (TypeError, LookupError, AttributeError, OverflowError, UnicodeError) as error:
            raise ValueError(f"{path / 'tokenizer_config.json'} holds something of a wrong type: {error}") from error
        run_rust(lambda: tokenizer.decode(tokenizer.encode("a b")), f"{file} does not work")
        return tokenizer

    def _add_missing_tokens(self, settings: Mapping[str, Any]) -> None:
        listed = settings.get("added_tokens_decoder") or {}
        if not all(isinstance(key, str) and key.isdecimal() for key in listed):
            raise ValueError(
                f"tokenizer_config.json: added_tokens_decoder must be tokens by id, not {list(listed)[:9]}"
            )
        wanted = [_added_token(listed[key]) for key in sorted(listed, key=int)]
        extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
        extra = list(extra.values()) if isinstance(extra, dict) else extra
        if not isinstance(extra, list):
            raise ValueError(f"tokenizer_config.json: extra_special_tokens must be tokens, not {str(extra)[:100]!r}")
        for token in [*(settings.get(n) for n in self.special_tokens), *extra]:
            text = _content(token, "extra_special_tokens")
            wanted.append(AddedToken(text or "", special=True, normalized=False))
        known = {t.content: t.special for t in self.backend.get_added_tokens_decoder().values()}
        for token in wanted:
            if token.content and known.get(token.content) is not True and (token.special or token.content not in known):
                self.backend.add_special_tokens([token]) if token.special else self.backend.add_tokens([token])
                known[token.content] = token.special

    def _check_added(self, by_text: Mapping[str, int], by_id: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises ValueError where a file says that an added token has another id than it has."""
        wanted = [*by_text.items(), *((entry["content"], int(number)) for number, entry in by_id.items())]
        for text, number in wanted:
            if (found := self.backend.token_to_id(text)) != number:
                raise ValueError(f"the token {text!r} has id {number} in {self.path}, but {found} in tokenizer.json")

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def bos_token_id(self) -> int | None:
        """The beginning-of-sequence token, where the tokenizer names one."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The end-of-sequence token, where the tokenizer names one."""
        return self._special_id("eos_token")

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether decoding only concatenates the tokens' bytes."""
        return isinstance(self.backend.decoder, decoders.ByteLevel)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written out in the text become their ids.

        Raises:
            ValueError: for a text that UTF-8 cannot hold, or on which a rule of the tokenizer never ends.
        """
        if len(text) > LONG:
            return self.encode_batch([text], add_special_tokens)[0]
        _check_text(text)
        return _call(lambda: self.backend.encode(text, add_special_tokens=add_special_tokens)).ids

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of several texts, in parallel."""
        return [e.ids for e in self._encodings(texts, add_special_tokens)]

    def _encodings(self, texts: Sequence[str], add_special_tokens: bool) -> list[tokenizers.Encoding]:
        for text in texts:
            _check_text(text)
        return _call(lambda: self.backend.encode_batch(list(texts), add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD."""
        if len(token_ids) > LONG:
            batch = [list(token_ids)]
            return _call(lambda: self.backend.decode_batch(batch, skip_special_tokens=skip_special_tokens))[0]
        return _call(lambda: self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """What one token adds to a running text: its leading space is kept. Empty for ids outside the vocabulary."""
        text = self._token_texts.get(token_id)
        if text is None:
            # Some decoders strip the first space of a text, so the token is read behind another one.
            anchor = self._anchor_ids
            text = self.decode([*anchor, token_id], False).removeprefix(self.decode(anchor, False))
            self._token_texts[token_id] = text
        return text

    def token_bytes(self, token_id: int) -> bytes | None:
        """What one token adds to a running text in UTF-8, also where it is a part of a character; None outside the
        vocabulary."""
        data = self._token_bytes.get(token_id)
        if data is None and (name := self.token_name(token_id)) is not None:
            byte, alphabet = byte_of_name(name), _byte_of_character()
            if byte is not None and not self.is_byte_level:
                data = bytes([byte])
            elif (self.is_byte_level or "\ufffd" in self.token_text(token_id)) and alphabet.keys() >= set(name):
                data = bytes([alphabet[character] for character in name])
            else:  # an added token, which is plain text, or another kind of vocabulary
                data = (name if self.is_byte_level else self.token_text(token_id)).encode()
            self._token_bytes[token_id] = data
        return data

    def encode_with_starts(self, text: str, add_special_tokens: bool = True) -> tuple[list[int], list[int]]:
        """Token ids as of :meth:`encode`, and where each begins in the text, in characters. Tokens cover the text
        without gaps; those that are not in it, as BOS, begin where the one before them ends."""
        (encoding,) = self._encodings([text], add_special_tokens)
        starts, end = [], 0
        for first, last in encoding.offsets:
            starts.append(end if first == last else min(first, end))
            end = max(end, last)
        return encoding.ids, starts

    def token_name(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None outside the vocabulary."""
        return self.backend.id_to_token(token_id)

    @cached_property
    def special_names(self) -> tuple[str, ...]:
        """The texts of special tokens."""
        return tuple(sorted(name for token in self.special_ids if (name := self.token_name(token))))

    @property
    def added_tokens(self) -> list[str]:
        """The texts of tokens that are not the vocabulary's own, special ones among them."""
        return [token.content for token in self.backend.get_added_tokens_decoder().values()]

    @cached_property
    def _anchor_ids(self) -> list[int]:
        return self.encode("a", add_special_tokens=False)

    @property
    def has_chat_template(self) -> bool:
        """Whether the checkpoint has a chat template."""
        return bool(self._chat_sources)

    @property
    def chat_source(self) -> str | None:
        """The text of the template for plain conversations; None where the checkpoint has none."""
        return self._chat_sources.get("default")

    @property
    def reads_tools(self) -> bool:
        """Whether the template for tools reads which there are."""
        return "tools" in (self._chat_sources.get("tool_use") or self.chat_source or "")

    def chat_template(self, tools: bool = False) -> ChatTemplate:
        """The template for plain conversations, or the one for tools where the checkpoint has a separate one.

        Raises:
            ValueError: when the checkpoint has none, or it does not compile.
        """
        name = "tool_use" if tools and "tool_use" in self._chat_sources else "default"
        if name not in self._chat_sources:
            raise ValueError(f"the model in {self.path} has no chat template; send a plain prompt instead")
        if name not in self._chat_templates:
            from .chat_template import ChatTemplate

            self._chat_templates[name] = ChatTemplate(self._chat_sources[name], self.special_tokens)
        return self._chat_templates[name]

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], /, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text of a conversation; encode it with ``add_special_tokens=False``.

        Arguments and errors: see :meth:`ChatTemplate.render`.
        """
        template = self.chat_template(tools=variables.get("tools") is not None)
        return template.render(messages, add_generation_prompt=add_generation_prompt, **variables)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """What the tokenizer of transformers returns for the same call."""
        return self.hf()(*arguments, **options)

    def apply_chat_template(self, *arguments: Any, **options: Any) -> Any:
        """What the tokenizer of transformers returns for the same call."""
        return self.hf().apply_chat_template(*arguments, **options)

    def close(self) -> None:
        """End the processes of the chat templates, whatever they are rendering."""
        for template in list(self._chat_templates.values()):
            template.close()

    def hf(self) -> PreTrainedTokenizerBase:
        """The same tokenizer as transformers loads it; the first call imports transformers, which is slow."""
        return self._hf

    @cached_property
    def _hf(self) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)


def _call(call: Callable[[], Result]) -> Result:
    return run_rust(call, "the tokenizer cannot work on this text")


def _check_text(text: str) -> None:
    """The library's own error says that it is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])
        raise ValueError(f"a text holds {found} at character {error.start}, half of a surrogate pair") from None


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet (Radford et al. 2019): printable Latin-1 is itself, the rest sits at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def byte_of_name(name: str) -> int | None:
    """The byte that a token such as ``<0x0A>`` stands for; None for other tokens."""
    if len(name) != 6 or not name.startswith("<0x"):  # cheaper, and true of nearly all tokens
        return None
    return int(name[3:5], 16) if re.fullmatch(r"<0x[0-9A-F]{2}>", name) else None


def _content(token: Any, name: str) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise ValueError(f"tokenizer_config.json: {name} must be a token, not {str(token)[:100]!r}")
    return text


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    flags = {name: bool(entry.get(name)) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return AddedToken(entry["content"], **flags)


def _chat_sources(path: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    listed = settings.get("chat_template") or None
    if listed is not None and not isinstance(listed, str | list):
        raise ValueError(f"tokenizer_config.json: chat_template must be a text, not {str(listed)[:100]!r}")
    if isinstance(listed, list):
        sources = {entry["name"]: entry["template"] for entry in listed}
        if not all(isinstance(text, str) for entry in sources.items() for text in entry):
            raise ValueError("tokenizer_config.json: chat_template must hold names and texts")
    else:
        sources = {"default": listed} if listed else {}
    if (file := path / "chat_template.jinja").exists():
        sources["default"] = _template(file)
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        sources[file.stem] = _template(file)
    return sources


def _template(file: Path) -> str:
    try:
        return read_regular(file).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _convert_slow(path: Path, settings: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(f"no usable tokenizer in {path}: {error}") from error
    backend = getattr(slow, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ValueError(f"the tokenizer in {path} ({type(slow).__name__}) has no fast form; add a tokenizer.json")
    # transformers has applied the other settings to the backend already.
    kept = {name: settings[name] for name in ("chat_template",) if name in settings}
    return backend, {**slow.special_tokens_map, **kept}
