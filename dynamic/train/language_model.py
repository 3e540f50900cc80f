"""The task of training a decoder with exits on a corpus, and what is measured on held-out text.

Shape suffixes: N sequences, L positions, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...exits.training.objectives import ExitTraining, layer_dropout_rates, sequences_kept
from ...kernels.api.ranges import check_ranges
from ..text.corpus import Windows
from .head_loss import head_losses
from .model import TrainableDecoder


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """How text becomes batches and losses.

    Arguments:
        batch_tokens: target tokens per step.
        sequence_length: positions per sequence for most of the run; the end of it uses ``window`` positions.
        window: longest sequence; the model's context.
        long_from: share of the steps after which sequences are ``window`` long.
        grow_from, grow_at: the run begins with the first ``grow_from`` layers and adds the others after this share of
            its steps; 0 trains all layers from the start.
        balance_weight, z_weight: of the routers' load-balancing and z-losses.
        evaluation_tokens: held-out tokens per stream that an evaluation reads at most.
        seed: of the order of the text and of layer dropout.

    Raises:
        ValueError: naming the field and the value that is out of range.
    """

    batch_tokens: int = 4096
    sequence_length: int = 256
    window: int = 1024
    long_from: float = 0.9
    grow_from: int = 0
    grow_at: float = 0.6
    balance_weight: float = 0.01
    z_weight: float = 1e-4
    evaluation_tokens: int = 32_768
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, "batch_tokens", "sequence_length", "window", "evaluation_tokens", least=1)
        check_ranges(self, "grow_from", "balance_weight", "z_weight", least=0)
        check_ranges(self, "grow_at", least=0, below=1)
        check_ranges(self, "long_from", least=0, most=1)
        check_ranges(self, "seed", least=0, below=2**63)


class LanguageModelTask:
    """Next-token loss of the full model plus one exit's loss per step (:class:`exits.training.trainer.Task`).

    Arguments:
        train: int16 token stream.
        held_out: named streams to evaluate on.
        steps: of the whole run; schedules are shares of it.
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        exits: ExitTraining,
        train: torch.Tensor,
        held_out: dict[str, torch.Tensor],
        steps: int,
    ) -> None:
        self.config, self.exits, self.steps = config, exits, steps
        self.windows = Windows(train, batch_tokens=config.batch_tokens, window=config.window, seed=config.seed)
        self.samples_per_step = self.windows.per_step
        self.held_out = held_out

    def length_at(self, step: int) -> int:
        """Positions per sequence at a step."""
        return self.config.window if step >= self.config.long_from * self.steps else self.config.sequence_length

    def depth_at(self, step: int, num_layers: int) -> int:
        """Layers that a step trains, of ``num_layers``."""
        grown = not self.config.grow_from or step >= self.config.grow_at * self.steps
        return num_layers if grown else min(num_layers, self.config.grow_from)

    def loss(
        self, model: torch.nn.Module, step: int, *, samples: int | None = None, shard: tuple[int, int] = (0, 1)
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        """See :class:`exits.training.trainer.Task`.

        Arguments:
            shard: (rank, ranks): take only this rank's share of the step's windows; shares together are the step.
        """
        decoder = _decoder(model)
        shape = decoder.config
        device = decoder.embedding.device
        whole_NL, targets_NL = self.windows.batch(step, self.length_at(step), samples)
        rank, ranks = shard
        per_rank = whole_NL.shape[0] // ranks
        mine = slice(rank * per_rank, (rank + 1) * per_rank)
        tokens_NL, targets_T = whole_NL[mine].to(device), targets_NL[mine].flatten().to(device)
        strength = self.exits.strength(step, self.steps)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        rates = layer_dropout_rates(shape.num_layers, self.exits.layer_dropout * strength)
        kept = sequences_kept(rates, whole_NL.shape[0], generator, device, mine)
        depth = self.depth_at(step, shape.num_layers)
        no_rows = torch.empty(0, dtype=torch.long, device=device)
        output = model(tokens_NL, kept[:depth] + [no_rows] * (shape.num_layers - depth))
        at = self.exits.exit_of_step(step, shape.exit_layers)
        if at is not None and (strength == 0 or at >= depth):
            at = None  # an exit keeps its share of the steps before others exist
        cross_entropy, at_exit = head_losses(
            decoder.apply_exit_head(output.final_NLD.flatten(0, 1)),
            None if at is None else decoder.apply_exit_head(output.exits[at].flatten(0, 1), at),
            decoder.embedding.to(decoder.dtype),
            targets_T,
            self.exits.distillation,
        )
        balance, z = output.balance_loss, output.z_loss
        total = cross_entropy + self.config.balance_weight * balance + self.config.z_weight * z
        values: dict[str, torch.Tensor | float] = {"cross_entropy": cross_entropy.detach(), "balance": balance.detach()}
        if at_exit is not None:
            total = total + self.exits.loss_weight * strength * at_exit
            values[f"exit_{at}"] = at_exit.detach()
        return total, values

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        """Perplexity per stream at full depth, and over all streams at every exit with its agreement with full depth.

        Agreement is the share of positions where the exit's best token is the full model's.
        """
        decoder = _decoder(model)
        exits = decoder.config.exit_layers if self.exits.loss_weight > 0 else ()
        numbers: dict[str, float] = {}
        sums = dict.fromkeys((None, *exits), 0.0)
        agreed = dict.fromkeys(exits, 0)
        total = 0
        for name, stream in self.held_out.items():
            loss, count = 0.0, 0
            for tokens_NL, targets_NL in self._evaluation_batches(stream, decoder.embedding.device):
                output = decoder(tokens_NL)
                targets_T = targets_NL.flatten()
                logits_TV = decoder.logits(output.final_NLD.flatten(0, 1)).float()
                here = F.cross_entropy(logits_TV, targets_T, reduction="sum").item()
                loss, count = loss + here, count + targets_T.numel()
                sums[None] += here
                for at in exits:
                    exit_TV = decoder.logits(output.exits[at].flatten(0, 1), at).float()
                    sums[at] += F.cross_entropy(exit_TV, targets_T, reduction="sum").item()
                    agreed[at] += int((exit_TV.argmax(-1) == logits_TV.argmax(-1)).sum())
            if count:
                numbers[f"perplexity/{name}"] = math.exp(loss / count)
            total += count
        numbers["perplexity"] = math.exp(sums[None] / total)
        for at in exits:
            numbers[f"perplexity/exit_{at}"] = math.exp(sums[at] / total)
            numbers[f"agreement/exit_{at}"] = agreed[at] / total
        return numbers

    def _evaluation_batches(self, stream: torch.Tensor, device: torch.device):
        usable = min(stream.numel() - 1, self.config.evaluation_tokens)
        length = min(usable, self.config.window)
        per_batch = max(1, self.config.batch_tokens // max(1, length))
        starts = list(range(0, usable - length + 1, length)) if length else []
        for first in range(0, len(starts), per_batch):
            rows = torch.stack([stream[s : s + length + 1] for s in starts[first : first + per_batch]])
            rows = rows.long().to(device)
            yield rows[:, :-1], rows[:, 1:]


def _decoder(model: torch.nn.Module) -> TrainableDecoder:
    """The decoder itself, whatever wraps it (DeepSpeed's engine, DistributedDataParallel)."""
    while not isinstance(model, TrainableDecoder):
        model = model.module  # type: ignore[assignment]
    return model
