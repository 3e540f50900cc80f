"""What makes a model able to exit: layer dropout that grows with depth and with time, and a loss at the exits.

Source of both: LayerSkip (Elhoushi et al. 2024), with two changes. Layers are dropped for whole sequences, so that a
dropped layer costs nothing; and an exit learns from the full model's distribution beside the true next token, since
agreeing with the full model is what an exit is for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.api.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class ExitTraining:
    """How strongly exits shape the training.

    Arguments:
        loss_weight: weight of the exit's loss beside the full model's, once ramped up. 0 trains without exits.
        distillation: share of an exit's loss that follows the full model's distribution; the rest, the true token.
        start: share of all steps before which there is neither exit loss nor layer dropout.
        ramp: share of all steps over which loss weight and layer dropout rise from zero after that.
        layer_dropout: probability that a sequence skips the last layer; earlier layers less, the first never.

    Raises:
        ValueError: naming the field and the value that is out of range.
    """

    loss_weight: float = 0.3
    distillation: float = 0.5
    start: float = 0.0
    ramp: float = 0.3
    layer_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_ranges(self, "loss_weight", least=0)
        check_ranges(self, "distillation", least=0, most=1)
        check_ranges(self, "start", "layer_dropout", least=0, below=1)
        check_ranges(self, "ramp", above=0, most=1)

    def strength(self, step: int, total_steps: int) -> float:
        """How far the curriculum has come at a step, 0 … 1."""
        return min(1.0, max(0.0, step - self.start * total_steps) / max(1.0, self.ramp * total_steps))

    def exit_of_step(self, step: int, exit_layers: tuple[int, ...]) -> int | None:
        """The one exit that a step trains (rotation keeps a step's cost at one extra LM head)."""
        return exit_layers[step % len(exit_layers)] if exit_layers and self.loss_weight > 0 else None


def layer_dropout_rates(num_layers: int, last: float) -> list[float]:
    """Dropout rate per layer, from 0 at the first to ``last`` at the last, exponentially (LayerSkip, eq. 1)."""
    if num_layers == 1:
        return [0.0]
    return [last * (2 ** (layer / (num_layers - 1)) - 1) for layer in range(num_layers)]


def sequences_kept(
    rates: list[float],
    num_sequences: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    mine: slice = slice(None),
) -> list[torch.Tensor | None]:
    """For every layer the sequences that run it, int64 indices; None where all of them do.

    Arguments:
        rates: dropout rate per layer.
        generator: on the CPU, whatever the model's device, so that a seed means the same everywhere.
        mine: the sequences of this rank; indices count from its first.
    """
    draws = torch.rand(len(rates), num_sequences, generator=generator)
    kept: list[torch.Tensor | None] = []
    for rate, row in zip(rates, draws, strict=True):
        runs = row[mine] >= rate
        kept.append(None if bool(runs.all()) else runs.nonzero()[:, 0].to(device))
    return kept
