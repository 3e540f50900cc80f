"""What making exits needs of a decoder that a recipe trained: its backbone, and its hidden states on text.

Shape suffixes: N sequences, L positions, R rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ...exits.exit_head import ExitHeadAdapter
from ...exits.training.exit_heads import Backbone, frozen_logits
from ...exits.training.heads import ExitStates
from .model import TrainableDecoder


def trained_backbone(model: TrainableDecoder) -> Backbone:
    """A decoder that a recipe trained, with copies of its adapters."""
    config, adapters = model.config, {}
    for layer in config.exit_layers:
        adapters[layer] = ExitHeadAdapter(config.hidden_size, config.adapter_rank)
        adapters[layer].load_state_dict(model.adapters[str(layer)].state_dict())
    return Backbone(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        layer_flops=config.layer_flops,
        routes=True,
        logits=frozen_logits(model.norm.weight, model.embedding, model.norm.eps, model.dtype),
        adapters=adapters,
    )


@torch.no_grad()
def collect_states(model: TrainableDecoder, sequences: Iterable[tuple[int, torch.Tensor, int]]) -> ExitStates:
    """Hidden states of some text.

    Arguments:
        sequences: (group, tokens, first): int64 (N, L) of one document or request, and the first position whose row is
            taken.
    """
    model.eval()
    hidden: dict[int, list[torch.Tensor]] = {layer: [] for layer in (0, *model.config.exit_layers)}
    entropy: dict[int, list[torch.Tensor]] = {layer: [] for layer in model.config.exit_layers}
    final, groups = [], []
    for group, tokens_NL, first in sequences:
        output = model(tokens_NL.to(model.embedding.device), entropy=True)
        for layer, parts in hidden.items():
            parts.append(output.exits[layer][:, first:].flatten(0, 1))
        for layer, parts in entropy.items():
            parts.append(output.entropy_T[layer].view_as(tokens_NL)[:, first:].flatten())
        final.append(output.final_NLD[:, first:].flatten(0, 1))
        groups.append(torch.full((final[-1].shape[0],), group))
    return ExitStates(
        hidden_RD={layer: torch.cat(parts) for layer, parts in hidden.items()},
        router_entropy_R={layer: torch.cat(parts) for layer, parts in entropy.items()},
        final_RD=torch.cat(final),
        group_R=torch.cat(groups),
    )
