"""What making exits needs of a model: its backbone, and its hidden states on text where its exits are.

The model is one that the engine serves, or a decoder that a recipe has trained.

Shape suffixes: N sequences, L positions, T = N*L rows of a step, R rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from ...exits.exit_head import ExitHeadAdapter
from ...exits.segments import split_into_segments
from ...exits.training.exit_heads import Backbone, frozen_logits
from ...exits.training.heads import ExitStates, HeadTraining
from ..checkpoint.directory import write_tensors
from ..model.decoder import Decoder
from ..model.norms import NORM_KINDS
from ..model.prompt_pass import fresh_cache
from ..model.spec import ModelSpec
from .model import TrainableDecoder

_LOGIT_ROWS = 4096  # rows whose logits are in memory at once when choices are compared
_GIB = 2**30


def default_exit_layers(num_layers: int) -> tuple[int, ...]:
    """Exits at 1/2, 2/3, 4/5 and 14/15 of the depth: a frozen model agrees with itself only late.

    Raises:
        ValueError: for a model of one layer, which has no room for an exit.
    """
    if num_layers < 2:
        raise ValueError("a model of one layer has no room for an exit")
    shares = ((1, 2), (2, 3), (4, 5), (14, 15))
    return tuple(sorted({min(num_layers - 1, max(1, num_layers * a // b)) for a, b in shares}))


def served_backbone(decoder: Decoder, exit_layers: Sequence[int], adapter_rank: int, seed: int) -> Backbone:
    """What training exits needs of a loaded model; the adapters start as the identity.

    Raises:
        ValueError: for a rank out of range.
    """
    spec, generator, adapters = decoder.spec, torch.Generator().manual_seed(seed), {}
    for layer in exit_layers:
        adapters[layer] = ExitHeadAdapter(spec.hidden_size, adapter_rank)
        adapters[layer].reset(generator)
    ids_V = torch.arange(spec.vocab_size, device=decoder.device)
    with torch.no_grad():
        head_VD = decoder.backend.weight_rows(decoder.lm_head, ids_V).float().cpu().clone()
        norm_D, norm_bias_D = (
            None if part is None else part.float().cpu().clone()
            for part in (decoder.final_norm_D, decoder.final_norm_bias_D)
        )
        zero_1D = torch.zeros(1, spec.hidden_size, dtype=decoder.dtype, device=decoder.device)
        # Whatever a backend has made of the head: what it adds to nothing is its bias.
        bias_V = decoder.backend.logits_linear(zero_1D, decoder.lm_head)[0].cpu().clone() if spec.lm_head_bias else None
    assert norm_D is not None
    return Backbone(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        layer_flops=min(spec.layer_flops(layer) for layer in spec.layers),
        routes=any(layer.moe is not None and not layer.moe.is_dense for layer in spec.layers),
        logits=frozen_logits(
            norm_D,
            head_VD,
            spec.norm_eps,
            torch.float32,
            spec.logits_divisor,
            spec.logits_cap,
            centred=NORM_KINDS[spec.norm].centred,
            norm_bias_D=norm_bias_D,
            head_bias_V=bias_V,
        ),
        adapters=adapters,
    )


def needed_memory(spec: ModelSpec, rows: int, exits: int, training: HeadTraining) -> int:
    """Bytes that making exits takes beside the loaded model: states and their splits, LM head, logits in work."""
    states = 2 * rows * 4 * (spec.hidden_size * (exits + 2) + exits)
    logits = max(6 * training.batch_rows, 2 * min(rows, _LOGIT_ROWS)) * spec.vocab_size * 4
    return states + spec.vocab_size * spec.hidden_size * 4 + logits


def refuse_if_too_many(needed: int, available: int) -> None:
    """Raises:
    ValueError: when more memory is needed than there is, with the numbers and what to change.
    """
    if needed > available:
        raise ValueError(
            f"making these exits takes about {needed / _GIB:.2f} GiB beside the model, {available / _GIB:.2f} GiB are"
            " free; take fewer exit_rows, served_prompts or exit_layers, or a smaller heads.training.batch_rows"
        )


def collect_served_states(
    decoder: Decoder,
    batches: Iterable[tuple[Sequence[int], torch.Tensor, int]],
    exit_layers: Sequence[int],
    rows: int,
    watch: Callable[[int], None] | None = None,
) -> ExitStates:
    """Run text through a served model, segment by segment, and keep the inputs of its exits, float32, on the CPU.

    Arguments:
        batches: (groups, tokens, first): numbers of N documents or requests, int64 (N, L), and the first position whose
            row is taken.
        exit_layers: layers in front of each exit.
        rows: taken in all.
        watch: called with the number of rows done.

    Raises:
        ValueError: for an exit outside the model.
    """
    spec, device = decoder.spec, decoder.device
    segments = split_into_segments(spec.num_layers, exit_layers)
    # Made outside of inference mode: autograd refuses tensors from inside, and training reads these.
    hidden_RD = {layer: torch.empty(rows, spec.hidden_size) for layer in (0, *exit_layers, spec.num_layers)}
    entropy_R = {layer: torch.empty(rows) for layer in exit_layers}
    group_R = torch.empty(rows, dtype=torch.int64)
    done = 0
    for groups, tokens_NL, first in batches:
        count, length = tokens_NL.shape
        kv, batch = fresh_cache(decoder, [length] * count)
        here = slice(done, done + count * (length - first))

        def taken(x: torch.Tensor, shape: tuple[int, int] = (count, length), first: int = first) -> torch.Tensor:
            return x.unflatten(0, shape)[:, first:].flatten(0, 1).float().cpu()

        x_TD = decoder.embed(tokens_NL.flatten().to(device))
        hidden_RD[0][here] = taken(x_TD)
        for segment in segments:
            entropy_T = torch.zeros(count * length, device=device)
            x_TD = decoder.run_segment(segment, x_TD, kv, batch, entropy_T)
            hidden_RD[segment.layers.stop][here] = taken(x_TD)
            if segment.layers.stop in entropy_R:
                entropy_R[segment.layers.stop][here] = taken(entropy_T)
        group_R[here] = torch.tensor(groups).repeat_interleave(length - first)
        done = here.stop
        if watch is not None:
            watch(done)
    assert done == rows
    final_RD = hidden_RD.pop(spec.num_layers)
    return ExitStates(hidden_RD=hidden_RD, router_entropy_R=entropy_R, final_RD=final_RD, group_R=group_R)


def save_states(states: ExitStates, file: Path) -> None:
    """Write states, atomically."""
    tensors = {f"hidden.{layer}": x for layer, x in states.hidden_RD.items()}
    tensors |= {f"entropy.{layer}": x for layer, x in states.router_entropy_R.items()}
    write_tensors(file, {**tensors, "final": states.final_RD, "group": states.group_R})


def load_states(file: Path) -> ExitStates:
    """Read what :func:`save_states` wrote."""
    tensors = load_file(file)

    def of(kind: str) -> dict[int, torch.Tensor]:
        return {int(name.split(".")[1]): x for name, x in tensors.items() if name.startswith(kind)}

    return ExitStates(
        hidden_RD=of("hidden."),
        router_entropy_R=of("entropy."),
        final_RD=tensors["final"],
        group_R=tensors["group"],
    )


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
