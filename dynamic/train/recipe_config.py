"""Everything that a trained model depends on, in one configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...exits.training.exit_heads import ExitHeadsConfig
from ...exits.training.objectives import ExitTraining
from ...exits.training.trainer import TrainerConfig
from ...kernels.api.ranges import check_ranges
from ..text.corpus import CorpusConfig
from .language_model import LanguageModelConfig
from .model import DecoderConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class RecipeConfig:
    """Everything that a trained model depends on.

    Arguments:
        dtype: of activations while training: ``float32`` or ``bfloat16``. Weights and optimiser are float32. It is not
            chosen by the machine, so that a recipe means the same everywhere; many CPUs are slower in bfloat16.
        device: torch device.
        served_prompts: held-out prompts that the model continues, for the exits to learn from.
        prompt_tokens, new_tokens: length of these prompts and continuations.
        exit_rows: positions of held-out text that the exits learn from, beside the served ones.
        shipped_prompts: held-out prompts that are put beside the model, for ``dynamoe calibrate``.
        seed: of weights, text order and dropout.

    Raises:
        ValueError: for an unknown dtype, or parts that do not fit each other.
    """

    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    text: LanguageModelConfig = field(default_factory=lambda: LanguageModelConfig(grow_from=8, grow_at=0.8))
    exits: ExitTraining = field(default_factory=lambda: ExitTraining(start=0.5, ramp=0.1, layer_dropout=0.05))
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(steps=2500, warmup_steps=200))
    heads: ExitHeadsConfig = field(default_factory=ExitHeadsConfig)
    dtype: str = "float32"
    device: str = "cpu"
    served_prompts: int = 256
    prompt_tokens: int = 64
    new_tokens: int = 128
    exit_rows: int = 65_536
    shipped_prompts: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        counts = ("served_prompts", "prompt_tokens", "new_tokens", "exit_rows", "shipped_prompts")
        check_ranges(self, *counts, least=1)
        check_ranges(self, "seed", least=0, below=2**63)
        if self.decoder.vocab_size != self.corpus.vocab_size:
            raise ValueError(
                f"decoder.vocab_size={self.decoder.vocab_size} and corpus.vocab_size={self.corpus.vocab_size} differ"
            )
        if self.text.window > self.decoder.max_position:
            raise ValueError(f"text.window={self.text.window} exceeds decoder.max_position={self.decoder.max_position}")
