"""Exits of a trained decoder: states from text, probes of every kind, calibration, and the table that compares them.

Three disjoint parts of the text: probes learn on the first, calibrators on the second, the third is reported.

Shape suffixes: N sequences, L positions, R rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from ...exits.calibrators import ISOTONIC_MINIMUM, fit_isotonic, fit_temperature
from ...exits.metrics import ProbeReport, operating_point, plot_risk_coverage, report, table
from ...exits.probes import MAX_LAYER_SHARE, Probe, ProbeSpec, check_probe_cost, frequent_tokens, saturation, top_margin
from ...exits.readout import ReadoutAdapter
from ...exits.sidecar import ExitHeads, backbone_hash, save_heads
from ...exits.training.heads import (
    ExitStates,
    HeadTraining,
    Logits,
    exit_labels,
    fit_adapter,
    fit_probe,
    probe_logits,
)
from .model import DecoderConfig, TrainableDecoder

COMPARED = ("linear", "linear + previous", "linear + previous + entropy", "mlp", "mlp + entropy", "mlp + previous")
_WIDEST = 16
_REDUCED_VOCABULARY = 256


@dataclass(frozen=True, kw_only=True)
class ExitHeadsConfig:
    """How a decoder's exits are made.

    Arguments:
        probe: which of the compared probes is shipped: a key of ``COMPARED``, or ``best`` (lowest AURC, mean of exits).
        calibrator: ``temperature`` or ``isotonic``.
        refit_adapters: train the adapters once more on the frozen backbone, to follow the full model.
        training: of probes and adapters.

    Raises:
        ValueError: for a name that is not known.
    """

    probe: str = "best"
    calibrator: str = "isotonic"
    refit_adapters: bool = True
    training: HeadTraining = field(default_factory=HeadTraining)

    def __post_init__(self) -> None:
        if self.probe != "best" and self.probe not in COMPARED:
            raise ValueError(f"probe must be best or one of {', '.join(COMPARED)}, not {self.probe!r}")
        if self.calibrator not in ("temperature", "isotonic"):
            raise ValueError(f"calibrator must be temperature or isotonic, not {self.calibrator!r}")


def compared_probes(config: DecoderConfig) -> dict[str, ProbeSpec]:
    """Every kind in ``COMPARED``; an ``mlp`` gets the greatest width that 1 % of a layer pays for.

    Raises:
        ValueError: when not even the smallest probe of a kind is that cheap.
    """
    specs = {}
    for name in COMPARED:
        parts = name.split(" + ")
        spec = ProbeSpec(kind=parts[0], width=1, previous="previous" in parts, router_entropy="entropy" in parts)
        check_probe_cost(spec, config.hidden_size, config.layer_flops)
        if spec.kind == "mlp":
            wider = [replace(spec, width=width) for width in range(1, _WIDEST + 1)]
            limit = MAX_LAYER_SHARE * config.layer_flops
            spec = max((s for s in wider if s.flops_per_row(config.hidden_size) <= limit), key=lambda s: s.width)
        specs[name] = spec
    return specs


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


def frozen_logits(model: TrainableDecoder) -> Logits:
    """Final norm and LM head as a function whose only gradient is that of its argument."""
    norm_D, embedding_VD = model.norm.weight.detach(), model.embedding.detach().to(model.dtype)

    def logits(x_RD: torch.Tensor) -> torch.Tensor:
        x32 = x_RD.float()
        normed_RD = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + model.norm.eps) * norm_D
        return F.linear(normed_RD.to(model.dtype), embedding_VD).float()

    return logits


def make_exits(
    model: TrainableDecoder,
    states: ExitStates,
    checkpoint: Path,
    config: ExitHeadsConfig,
    *,
    stream: torch.Tensor,
    plot: Path | None = None,
) -> tuple[ExitHeads, str]:
    """Train, compare and calibrate the exits of an exported model, and write them beside it.

    Arguments:
        states: of the frozen model, on text that it was not trained on or wrote itself.
        checkpoint: the directory of the export.
        stream: training tokens; their most frequent ones are the reduced vocabulary of a baseline.
        plot: draw the risk-coverage curves of the shipped probes and the margin baseline here.

    Returns: the heads, and a Markdown table of all probes at all exits.

    Raises:
        ValueError: when a probe costs more than 1 % of a layer, or there is too little text to calibrate.
    """
    specs = compared_probes(model.config)
    fit, calibrate, test = states.split((0.6, 0.2, 0.2), config.training.seed)
    logits = frozen_logits(model)
    adapters = _adapters(model, fit, logits, config)
    common = frequent_tokens(stream, _REDUCED_VOCABULARY)
    labels = {layer: [exit_labels(adapters[layer], layer, part, logits) for part in (fit, calibrate, test)]
              for layer in adapters}  # fmt: skip
    probes: dict[str, dict[int, Probe]] = {}
    scores: dict[str, dict[int, torch.Tensor]] = {"margin, reduced vocabulary": {}, "hidden-state saturation": {}}
    reports: dict[str, ProbeReport] = {}
    for name, spec in specs.items():
        probes[name] = {e: fit_probe(spec, e, fit, labels[e][0], config.training) for e in adapters}
        scores[name] = {e: _calibrated(probes[name][e], e, calibrate, labels[e][1], test, config) for e in adapters}
    with torch.no_grad():
        for layer, adapter in adapters.items():
            early = logits(adapter(test.hidden_RD[layer]))
            scores["margin, reduced vocabulary"][layer] = top_margin(early[:, common])
            scores["hidden-state saturation"][layer] = saturation(test.hidden_RD[layer], test.previous(layer))
    for name, by_exit in scores.items():
        for layer, score in by_exit.items():
            reports[f"{name}, after {layer}"] = report(score, labels[layer][2], probability=name in COMPARED)
    chosen = config.probe if config.probe != "best" else min(COMPARED, key=lambda n: _mean_aurc(reports, n, adapters))
    point = operating_point(scores[chosen], {e: labels[e][2] for e in adapters}, model.config.num_layers, 0.02)
    if plot:
        names = (chosen, "margin, reduced vocabulary")
        plot_risk_coverage(
            {f"{name}, after {e}": (scores[name][e], labels[e][2]) for name in names for e in adapters}, plot
        )
    heads = ExitHeads(
        hidden_size=model.config.hidden_size,
        adapters=adapters,
        probes=probes[chosen],
        calibrators={e: _calibrator(probes[chosen][e], e, calibrate, labels[e][1], config) for e in adapters},
        backbone_sha256=backbone_hash(checkpoint),
        metrics={
            "probe": chosen,
            "reports": {name: asdict(r) for name, r in reports.items()},
            "at_2_percent_disagreement": asdict(point),
        },
    )
    save_heads(heads, checkpoint)
    return heads, table(reports)


def _adapters(
    model: TrainableDecoder, fit: ExitStates, logits: Logits, config: ExitHeadsConfig
) -> dict[int, ReadoutAdapter]:
    adapters = {}
    for layer in model.config.exit_layers:
        adapter = ReadoutAdapter(model.config.hidden_size, model.config.adapter_rank)
        adapter.load_state_dict(model.adapters[str(layer)].state_dict())
        if config.refit_adapters:
            fit_adapter(adapter, layer, fit, logits, config.training)
        adapters[layer] = adapter.requires_grad_(False)
    return adapters


def _calibrator(probe: Probe, layer: int, states: ExitStates, correct_R: torch.Tensor, config: ExitHeadsConfig):
    with torch.no_grad():
        raw_R = probe_logits(probe, layer, states)
    if config.calibrator == "isotonic" and int(correct_R.sum()) >= ISOTONIC_MINIMUM:
        return fit_isotonic(raw_R, correct_R)
    return fit_temperature(raw_R, correct_R)


def _calibrated(
    probe: Probe, layer: int, known: ExitStates, correct_R: torch.Tensor, test: ExitStates, config: ExitHeadsConfig
) -> torch.Tensor:
    calibrator = _calibrator(probe, layer, known, correct_R, config)
    with torch.no_grad():
        return calibrator(probe_logits(probe, layer, test))


def _mean_aurc(reports: dict[str, ProbeReport], name: str, exits: Iterable[int]) -> float:
    values = [reports[f"{name}, after {e}"].aurc for e in exits]
    return sum(values) / len(values)
