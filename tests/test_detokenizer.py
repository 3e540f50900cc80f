"""Text that grows with the tokens: adds up to the decoder's own text, and stops exactly at stop strings."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.engine.text import OutputText, StopStrings
from dynamoe.dynamic.text.detokenizer import ByteDetokenizer, TokenStarts, WindowDetokenizer, make_detokenizer
from dynamoe.dynamic.text.tokenizer import Tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend


@pytest.fixture(scope="module")
def byte_level(make_checkpoint: Callable[..., Path]) -> Tokenizer:
    tokenizer = Tokenizer.from_directory(make_checkpoint("llama"))
    tokenizer.backend.add_tokens(["héllo wörld", "☃", AddedToken(" spaced ", lstrip=True)])
    return tokenizer


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Spaces as ▁, unknown characters as byte tokens, the first space stripped: how Llama 2's decoder works."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces += ["▁", "▁the", "▁cat", "s", "▁é", "ü", "▁▁", "a", "b", "▁a"]
    backend = Backend(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    backend.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    directory = tmp_path_factory.mktemp("sentencepiece")
    backend.save(str(directory / "tokenizer.json"))
    return Tokenizer.from_directory(directory)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_like"])
@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_pieces_add_up_to_the_decoded_text(
    kind: str, skip_special_tokens: bool, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    rng = random.Random(0)
    text_ids = tokenizer.encode("naïve café 日本語 🙂🙃 — the cat, a house", add_special_tokens=False)
    for _ in range(1500):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 25))]
        ids += text_ids[rng.randrange(len(text_ids)) :]
        rng.shuffle(ids) if rng.random() < 0.3 else None
        for detokenizer in (
            make_detokenizer(tokenizer, skip_special_tokens),
            WindowDetokenizer(tokenizer, skip_special_tokens),
        ):
            pieces = [detokenizer.add(i) for i in ids] + [detokenizer.flush()]
            assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens)
            assert detokenizer.flush() == ""


def test_the_byte_level_path_is_taken_where_it_fits(byte_level: Tokenizer, sentencepiece_like: Tokenizer) -> None:
    assert isinstance(make_detokenizer(byte_level, True), ByteDetokenizer)
    assert isinstance(make_detokenizer(sentencepiece_like, True), WindowDetokenizer)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_like"])
def test_parts_of_a_character_are_held_back(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode("a🙂a", add_special_tokens=False)
    detokenizer = make_detokenizer(tokenizer, True)
    pieces = [detokenizer.add(i) for i in ids]
    assert "".join(pieces) == "a🙂a"
    assert all("\ufffd" not in piece for piece in pieces)
    cut = make_detokenizer(tokenizer, True)
    shown = "".join(cut.add(i) for i in ids[:-2])  # one byte of the character is missing
    assert shown == "a"
    assert "\ufffd" in cut.flush()


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_like"])
def test_starts_and_bytes_of_tokens_that_are_parts_of_characters(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    text = "the cat naïve 日本語 🙂🙃 — the house"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert any("\ufffd" in tokenizer.token_text(token) for token in ids)
    data = [tokenizer.token_bytes(token) or b"" for token in ids]
    assert b"".join(data).decode().lstrip() == text
    expected = [len(b"".join(data[:count]).decode(errors="ignore").lstrip()) for count in range(len(ids))]
    assert TokenStarts(tokenizer, True).add_all(ids) == expected
    assert tokenizer.encode_with_starts(text, add_special_tokens=False) == (ids, expected)
    special = min(tokenizer.special_ids)
    assert TokenStarts(tokenizer, True).add_all([special, ids[0]]) == [0, 0]  # it is left out of the text
    assert TokenStarts(tokenizer, False).add_all([special, ids[0]])[1] > 0


def test_added_tokens_have_no_width_in_the_text(make_checkpoint: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_directory(make_checkpoint("llama"))
    bos, eos = ("<|im_start|>", 1), ("<|im_end|>", 2)
    tokenizer.backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{bos[0]} $A {eos[0]}", special_tokens=[bos, eos]
    )
    ids, starts = tokenizer.encode_with_starts("the ☃")
    assert ids == tokenizer.encode("the ☃")
    assert (starts[0], starts[1], starts[-1]) == (0, 0, len("the ☃"))
    assert starts == sorted(starts)


def test_token_texts_keep_their_spaces(sentencepiece_like: Tokenizer, byte_level: Tokenizer) -> None:
    the = sentencepiece_like.backend.token_to_id("▁the")
    assert sentencepiece_like.token_text(the) == " the"
    assert byte_level.token_text(byte_level.encode(" ")[0]) == " "
    assert byte_level.token_text(10**6) == ""


def feed(stops: StopStrings, pieces: list[str]) -> tuple[list[str], str | None]:
    shown = []
    for piece in pieces:
        text, stop = stops.add(piece)
        shown.append(text)
        if stop is not None:
            return shown, stop
    return [*shown, stops.flush()], None


@pytest.mark.parametrize(
    ("pieces", "keep", "shown", "stop"),
    [
        (["one ST", "OP two"], False, ["one ", ""], "STOP"),
        (["one ST", "OP two"], True, ["one ", "STOP"], "STOP"),
        (["S", "T", "O", "x"], False, ["", "", "", "STOx", ""], None),
        (["S", "S", "T", "OP"], False, ["", "S", "", ""], "STOP"),
        (["the END STOP"], False, ["the "], "END"),  # the first in the text wins
        (["ST"], False, ["", "ST"], None),  # the end releases what was held back
    ],
)
def test_stop_strings_across_pieces(pieces: list[str], keep: bool, shown: list[str], stop: str | None) -> None:
    assert feed(StopStrings(("STOP", "END"), keep), pieces) == (shown, stop)


def test_stop_strings_equal_a_search_in_the_whole_text() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(30)))
        strings = tuple({"".join(rng.choice("ab") for _ in range(rng.randrange(2, 6))) for _ in range(2)})
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(5))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ends = [(text.find(s) + len(s), text.find(s), s) for s in strings if s in text]
        shown, stop = feed(StopStrings(strings, keep=False), pieces)
        if not ends:
            assert ("".join(shown), stop) == (text, None)
            continue
        assert stop is not None
        assert "".join(shown) == text[: text.find(stop)]
        assert text.find(stop) + len(stop) <= max(ends)[0]


def test_disabled_stops_pass_through(byte_level: Tokenizer) -> None:
    text = OutputText(byte_level, SamplingParams(stop="aa"))
    a = byte_level.encode("a")[0]
    assert text.add(a, stop_enabled=False) == ("a", None)
    assert text.add(a, stop_enabled=False) == ("a", None)
    assert text.add(a, stop_enabled=True) == ("", None)
    assert text.add(a, stop_enabled=True) == ("", "aa")


def test_a_stop_string_in_text_held_back_until_the_end_is_found(byte_level: Tokenizer) -> None:
    text = OutputText(byte_level, SamplingParams(stop="\ufffd"))
    first_byte = byte_level.encode("🙂")[0]
    assert text.add(first_byte, stop_enabled=True) == ("", None)
    assert text.finish() == ("", "\ufffd")
