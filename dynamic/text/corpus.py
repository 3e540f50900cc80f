"""A corpus on disk: a small vocabulary, token streams to train on, held-out streams per package, and their origin.

Shape suffixes: N sequences, L positions.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from .documentation_packages import SOURCES, Collected, Source, collect, collect_folder
from .sealed_directory import is_intact, seal

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
_FORMAT = 2
_VALIDATION_SHARE = 0.03


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What a corpus is made of.

    Arguments:
        vocab_size: of the byte-level BPE that is trained on the training text; at most 4096.
        text_folder: a folder of text files instead of Debian's packages.

    Raises:
        ValueError: for a vocabulary out of range.
    """

    vocab_size: int = 2048
    text_folder: str | None = None

    def __post_init__(self) -> None:
        if not 257 <= self.vocab_size <= 4096:
            raise ValueError(f"vocab_size must be between 257 and 4096, not {self.vocab_size}")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Token streams (int16). ``held_out`` maps ``genre/package`` to a stream that training never sees; ``known`` tells
    which of them come from packages whose other pages were trained on."""

    tokenizer_file: Path
    train: torch.Tensor
    held_out: dict[str, torch.Tensor]
    known: dict[str, bool]


def build_corpus(
    config: CorpusConfig,
    cache: Path,
    *,
    sources: tuple[Source, ...] = SOURCES,
    say: Callable[[str], None] = print,
) -> Path:
    """Collect, train the vocabulary, encode. Done once: the directory's name is a hash of the settings.

    Arguments:
        cache: for downloaded packages and finished corpora.
        say: called with progress messages.

    Returns: a directory that :func:`load_corpus` reads.

    Raises:
        ValueError: when the text is not available; the message names the alternative.
    """
    used = () if config.text_folder else sources
    recipe = {"format": _FORMAT, "config": asdict(config), "sources": [asdict(source) for source in used]}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    target = cache / f"corpus-{digest}"
    if is_intact(target):
        return target
    collected = _collect(config, cache / "packages", sources, say)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write(config, collected, partial, say)
        seal(partial)
        shutil.rmtree(target, ignore_errors=True)  # damaged, or of a version that sealed nothing
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def load_corpus(directory: Path) -> Corpus:
    """Read what :func:`build_corpus` wrote."""
    streams = load_file(directory / "tokens.safetensors")
    record = json.loads((directory / "corpus.json").read_text())
    return Corpus(
        tokenizer_file=directory / "tokenizer.json",
        train=streams.pop("train"),
        held_out=streams,
        known={f"{s['genre']}/{s['name']}": not s["held_out"] for s in record["sources"]},
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE; id 0 is ``<|endoftext|>``. Every digit is a token.

    Arguments:
        texts: consumed once.
        vocab_size: including the 256 bytes and the special token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Windows:
    """Training batches out of one stream, in an order that depends only on a seed and the step's number.

    The stream is cut into long windows, shuffled anew in every epoch. A batch may cut its windows into shorter
    sequences, so that the length can change during a run without changing the order.

    Arguments:
        stream: int16 tokens.
        batch_tokens: targets per step.
        window: tokens per window; divides ``batch_tokens``.
        seed: of the shuffles.

    Raises:
        ValueError: when the sizes do not divide, or the stream is shorter than one batch.
    """

    def __init__(self, stream: torch.Tensor, *, batch_tokens: int, window: int, seed: int) -> None:
        if batch_tokens % window:
            raise ValueError(f"batch_tokens={batch_tokens} is not a multiple of the window {window}")
        self.stream, self.window, self.seed = stream, window, seed
        self.per_step = batch_tokens // window
        self.count = (stream.numel() - 1) // window
        if self.count < self.per_step:
            raise ValueError(f"{stream.numel()} tokens of text are fewer than one batch of {batch_tokens}")
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def batch(self, step: int, length: int, windows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and next-token targets of a step, int64 (N, L).

        Arguments:
            length: L; divides the window.
            windows: take only the first few of the step's windows.
        """
        if self.window % length:
            raise ValueError(f"sequence length {length} does not divide the window {self.window}")
        rows = []
        for number in range(step * self.per_step, step * self.per_step + (windows or self.per_step)):
            epoch, index = divmod(number, self.count)
            start = int(self._shuffled(epoch)[index]) * self.window
            rows.append(self.stream[start : start + self.window + 1])
        both = torch.stack(rows).long()
        return both[:, :-1].reshape(-1, length), both[:, 1:].reshape(-1, length)

    def _shuffled(self, epoch: int) -> torch.Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.count, generator=generator)
        return self._order


def _collect(
    config: CorpusConfig, cache: Path, sources: tuple[Source, ...], say: Callable[[str], None]
) -> list[Collected]:
    if config.text_folder:
        return collect_folder(Path(config.text_folder).expanduser())
    found = []
    for source in sources:
        part = collect(source, cache)
        characters = sum(map(len, part.documents))
        say(f"{part.name} {part.version}: {len(part.documents)} documents, {characters / 1e6:.1f} MB ({part.licence})")
        found.append(part)
    return found


def _split(part: Collected) -> tuple[list[str], list[str]]:
    """Training and validation documents of a source."""
    if part.held_out:
        return [], list(part.documents)
    ordered = sorted(part.documents, key=lambda d: hashlib.sha256(d.encode()).digest())
    cut = max(1, round(len(ordered) * _VALIDATION_SHARE)) if len(ordered) > 1 else 0
    return ordered[cut:], ordered[:cut]


def _write(config: CorpusConfig, collected: list[Collected], target: Path, say: Callable[[str], None]) -> None:
    splits = [_split(part) for part in collected]
    tokenizer = train_tokenizer(itertools.chain.from_iterable(train for train, _ in splits), config.vocab_size)
    tokenizer.save(str(target / "tokenizer.json"))
    streams: dict[str, torch.Tensor] = {}
    training = []
    record = []
    for part, (train, held_out) in zip(collected, splits, strict=True):
        tokens = _encode(tokenizer, train)
        training.append(tokens)
        if held_out:
            streams[f"{part.genre}/{part.name}"] = _encode(tokenizer, held_out)
        facts = {k: v for k, v in asdict(part).items() if k != "documents"}
        characters = sum(map(len, part.documents))
        record.append({**facts, "documents": len(part.documents), "characters": characters, "tokens": tokens.numel()})
    streams["train"] = torch.cat(training)
    save_file(streams, target / "tokens.safetensors")
    size = tokenizer.get_vocab_size()
    summary = {"vocab_size": size, "train_tokens": streams["train"].numel(), "sources": record}
    (target / "corpus.json").write_text(json.dumps(summary, indent=1))
    say(f"{streams['train'].numel() / 1e6:.1f} M training tokens, vocabulary of {size}")


def _encode(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(documents):
        ids.extend(encoding.ids)
        ids.append(end)
    return torch.tensor(ids, dtype=torch.int16)
