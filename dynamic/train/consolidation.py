"""The last part of a run: all exits follow the full model, and the states at exits learn to tell how sure they are.

A probe may cost 1 % of a layer and sees the hidden state only. Where the model was never asked to, the state hardly
says whether the token chosen here would be the full model's; so probes are trained with the model for a while, and
their gradient reaches the layers. The probes that ship are fitted anew afterwards, on the frozen model.

Shape suffixes: N sequences, L positions, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...exits.probes import Probe, ProbeSpec
from ...exits.training.objectives import ExitTraining
from .head_loss import head_losses
from .language_model import LanguageModelConfig, LanguageModelTask
from .model import TrainableDecoder


@dataclass(frozen=True, kw_only=True)
class Consolidation:
    """How the run ends.

    Arguments:
        steps: optimiser steps; 0 leaves this part out.
        learning_rate: peak of its own cosine schedule.
        exit_weight: of the exit's divergence from the full model, in turn for every exit. 0 trains without exits.
        probe_weight: of the probe's loss.
        probe_width: inner units of the probes that are trained along.

    Raises:
        ValueError: naming the field and the value that is out of range.
    """

    steps: int = 0
    learning_rate: float = 6e-4
    exit_weight: float = 0.5
    probe_weight: float = 0.3
    probe_width: int = 8

    def __post_init__(self) -> None:
        for name in ("steps", "exit_weight", "probe_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")


class WithProbes(nn.Module):
    """A decoder and one probe per exit, as one thing to train."""

    def __init__(self, decoder: TrainableDecoder, seed: int, width: int = Consolidation.probe_width) -> None:
        super().__init__()
        self.module = decoder
        spec, size = ProbeSpec(kind="mlp", width=width), decoder.config.hidden_size
        generator = torch.Generator().manual_seed(seed)
        self.probes = nn.ModuleDict({str(e): Probe(spec, size, generator) for e in decoder.config.exit_layers})
        self.to(decoder.embedding.device)

    def forward(self, tokens_NL: torch.Tensor):
        """What the decoder says."""
        return self.module(tokens_NL)


class ConsolidationTask(LanguageModelTask):
    """Next-token loss of the full model, and in turn each exit's divergence and its probe's loss.

    Arguments:
        first_step: steps that came before; the text goes on from there.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        part: Consolidation,
        train: torch.Tensor,
        held_out: dict[str, torch.Tensor],
        first_step: int,
    ) -> None:
        exits = ExitTraining(loss_weight=part.exit_weight, distillation=1.0, layer_dropout=0.0)
        super().__init__(config, exits, train, held_out, part.steps)
        self.part, self.first_step = part, first_step

    def loss(
        self, model: torch.nn.Module, step: int, *, samples: int | None = None, shard: tuple[int, int] = (0, 1)
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        """See :class:`exits.training.trainer.Task`; one process only."""
        assert isinstance(model, WithProbes)
        assert shard == (0, 1)
        decoder, device = model.module, model.module.embedding.device
        tokens_NL, targets_NL = self.windows.batch(self.first_step + step, self.length_at(step), samples)
        targets_T = targets_NL.flatten().to(device)
        output = model(tokens_NL.to(device))
        at = self.exits.exit_of_step(step, decoder.config.exit_layers)
        agreed_T = None if at is None else torch.empty(targets_T.shape[0], device=device)
        cross_entropy, divergence = head_losses(
            decoder.read_out(output.final_NLD.flatten(0, 1)),
            None if at is None else decoder.read_out(output.exits[at].flatten(0, 1), at),
            decoder.embedding.to(decoder.dtype),
            targets_T,
            1.0,
            agreed_T,
        )
        total = cross_entropy + self.config.balance_weight * output.balance_loss + self.config.z_weight * output.z_loss
        values: dict[str, torch.Tensor | float] = {"cross_entropy": cross_entropy.detach()}
        if at is not None and divergence is not None and agreed_T is not None:
            sure_T = model.probes[str(at)](output.exits[at].flatten(0, 1))
            probe = F.binary_cross_entropy_with_logits(sure_T, agreed_T)
            total = total + self.part.exit_weight * divergence + self.part.probe_weight * probe
            values |= {f"exit_{at}": divergence.detach(), f"probe_{at}": probe.detach()}
            values[f"agreement_{at}"] = agreed_T.mean()
        return total, values
