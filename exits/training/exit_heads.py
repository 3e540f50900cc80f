"""Exits of a frozen model: states from text, probes of every kind, calibration, and the table that compares them.

Three disjoint parts of the text: probes learn on the first, calibrators on the second, the third is reported.

Shape suffixes: R rows, D hidden size.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from ..calibrators import ISOTONIC_MINIMUM, Isotonic, Temperature, fit_isotonic, fit_temperature
from ..exit_head import ExitHeadAdapter
from ..metrics import ProbeReport, operating_point, plot_risk_coverage, report, table
from ..probes import MAX_LAYER_SHARE, Probe, ProbeSpec, check_probe_cost, frequent_tokens, saturation, top_margin
from ..sidecar import ExitHeads, backbone_hash, save_heads
from .heads import (
    ExitStates,
    HeadTraining,
    Logits,
    choices,
    exit_labels,
    fit_adapter,
    fit_probe,
    probe_logits,
)

COMPARED = ("linear", "linear + previous", "linear + previous + entropy", "mlp", "mlp + entropy", "mlp + previous")
_WIDEST = 16
_REDUCED_VOCABULARY = 256
_ROWS = 1024  # whose logits are in memory at once


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


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """What training exits needs of a frozen model, however it is run.

    Arguments:
        num_layers, hidden_size: depth and width.
        layer_flops: floating-point operations of its cheapest layer for one token.
        routes: whether routers choose experts, so that their entropy carries information.
        logits: final norm and LM head.
        adapters: exit-head adapter of every exit, to start from.
    """

    num_layers: int
    hidden_size: int
    layer_flops: int
    routes: bool
    logits: Logits
    adapters: dict[int, ExitHeadAdapter]


def compared_probes(hidden_size: int, layer_flops: int, *, routes: bool = True) -> dict[str, ProbeSpec]:
    """Every applicable kind in ``COMPARED``; an ``mlp`` has the greatest width within 1 % of a layer's cost.

    Arguments:
        layer_flops: floating-point operations of a layer for one token.
        routes: whether the model has routers whose entropy can be looked at.

    Raises:
        ValueError: when not even the smallest probe of a kind is that cheap.
    """
    specs = {}
    for name in COMPARED:
        parts = name.split(" + ")
        if "entropy" in parts and not routes:
            continue
        spec = ProbeSpec(kind=parts[0], width=1, previous="previous" in parts, router_entropy="entropy" in parts)
        check_probe_cost(spec, hidden_size, layer_flops)
        if spec.kind == "mlp":
            wider = [replace(spec, width=width) for width in range(1, _WIDEST + 1)]
            limit = MAX_LAYER_SHARE * layer_flops
            spec = max((s for s in wider if s.flops_per_row(hidden_size) <= limit), key=lambda s: s.width)
        specs[name] = spec
    return specs


def frozen_logits(
    norm_D: torch.Tensor,
    head_VD: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
    divisor: float = 1.0,
    cap: float | None = None,
    *,
    centred: bool = False,
    norm_bias_D: torch.Tensor | None = None,
    head_bias_V: torch.Tensor | None = None,
) -> Logits:
    """Final norm and LM head as a function whose only gradient is that of its argument.

    Arguments:
        norm_D, head_VD, eps: weights of the norm and of the head, epsilon of the norm.
        dtype: that the head multiplies in.
        divisor: of the logits.
        cap: logits z become ``cap · tanh(z / cap)``.
        centred: the norm is a layer norm instead of a root-mean-square norm; norm_bias_D: its bias.
        head_bias_V: of the head.
    """
    norm_D, head_VD = norm_D.detach(), head_VD.detach().to(dtype)

    def logits(x_RD: torch.Tensor) -> torch.Tensor:
        x32 = x_RD.float()
        if centred:
            normed_RD = F.layer_norm(x32, norm_D.shape, norm_D, norm_bias_D, eps)
        else:
            normed_RD = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * norm_D
        logits_RV = F.linear(normed_RD.to(dtype), head_VD, head_bias_V).float() / divisor
        return logits_RV if cap is None else cap * (logits_RV / cap).tanh()

    return logits


def exit_splits(states: ExitStates, config: ExitHeadsConfig) -> list[ExitStates]:
    """What adapters and probes learn on, what calibrators learn on, and what is reported."""
    return states.split((0.6, 0.2, 0.2), config.training.seed)


def make_exits(
    model: Backbone,
    states: ExitStates,
    checkpoint: Path,
    config: ExitHeadsConfig,
    *,
    stream: torch.Tensor,
    plot: Path | None = None,
    progress: bool = False,
) -> tuple[ExitHeads, str]:
    """Train, compare and calibrate the exits of a checkpoint, and write them beside it.

    Arguments:
        states: of the frozen model, on text that it was not trained on or wrote itself.
        checkpoint: its directory.
        stream: training tokens; their most frequent ones are the reduced vocabulary of a baseline.
        plot: draw the risk-coverage curves of the shipped probes and the margin baseline here.
        progress: show a bar.

    Returns: the heads, and a Markdown table of all probes at all exits.

    Raises:
        ValueError: when a probe costs more than 1 % of a layer, or there is too little text to calibrate.
    """
    from tqdm import tqdm

    specs = compared_probes(model.hidden_size, model.layer_flops, routes=model.routes)
    if config.probe != "best" and config.probe not in specs:
        raise ValueError(f"probe {config.probe!r} looks at the entropy of routers, which this model does not use")
    fit, calibrate, test = exit_splits(states, config)
    logits, adapters = model.logits, model.adapters
    for layer, adapter in adapters.items():
        if config.refit_adapters:
            fit_adapter(adapter, layer, fit, logits, config.training)
        adapter.requires_grad_(False)
    common = frequent_tokens(stream, _REDUCED_VOCABULARY)
    bar = tqdm(total=1 + len(adapters) * (1 + len(specs)), desc="probes", unit="fit", disable=not progress or None)
    parts = [(part, choices(part.final_RD, logits)) for part in (fit, calibrate, test)]
    bar.update()
    labels: dict[int, list[torch.Tensor]] = {}
    for layer, adapter in adapters.items():
        labels[layer] = [exit_labels(adapter, layer, part, logits, full_R) for part, full_R in parts]
        bar.update()
    probes: dict[str, dict[int, Probe]] = {}
    calibrators: dict[str, dict[int, Temperature | Isotonic]] = {}
    scores: dict[str, dict[int, torch.Tensor]] = {"margin, reduced vocabulary": {}, "hidden-state saturation": {}}
    reports: dict[str, ProbeReport] = {}
    for name, spec in specs.items():
        probes[name] = {}
        for layer in adapters:
            probes[name][layer] = fit_probe(spec, layer, fit, labels[layer][0], config.training)
            bar.update()
        fitted = {e: _calibrator(probes[name][e], e, calibrate, labels[e][1], config) for e in adapters}
        calibrators[name] = fitted
        with torch.no_grad():
            scores[name] = {e: fitted[e](probe_logits(probes[name][e], e, test)) for e in adapters}
    with torch.no_grad():
        for layer, adapter in adapters.items():
            chunks = test.hidden_RD[layer].split(_ROWS)  # all logits at once would not fit
            margins = [top_margin(logits(adapter(x_RD))[:, common]) for x_RD in chunks]
            scores["margin, reduced vocabulary"][layer] = torch.cat(margins)
            scores["hidden-state saturation"][layer] = saturation(test.hidden_RD[layer], test.previous(layer))
    bar.close()
    for name, by_exit in scores.items():
        for layer, score in by_exit.items():
            reports[f"{name}, after {layer}"] = report(score, labels[layer][2], probability=name in specs)
    aurcs = {name: [reports[f"{name}, after {e}"].aurc for e in adapters] for name in specs}
    chosen = config.probe if config.probe != "best" else min(specs, key=lambda n: sum(aurcs[n]) / len(adapters))
    point = operating_point(scores[chosen], {e: labels[e][2] for e in adapters}, model.num_layers, 0.02)
    if plot:
        names = (chosen, "margin, reduced vocabulary")
        plot_risk_coverage(
            {f"{name}, after {e}": (scores[name][e], labels[e][2]) for name in names for e in adapters}, plot
        )
    heads = ExitHeads(
        hidden_size=model.hidden_size,
        adapters=adapters,
        probes=probes[chosen],
        calibrators=calibrators[chosen],
        backbone_sha256=backbone_hash(checkpoint),
        metrics={
            "probe": chosen,
            "reports": {name: asdict(r) for name, r in reports.items()},
            "at_2_percent_disagreement": asdict(point),
        },
    )
    save_heads(heads, checkpoint)
    return heads, table(reports)


def _calibrator(
    probe: Probe, layer: int, states: ExitStates, correct_R: torch.Tensor, config: ExitHeadsConfig
) -> Temperature | Isotonic:
    with torch.no_grad():
        raw_R = probe_logits(probe, layer, states)
    if config.calibrator == "isotonic" and int(correct_R.sum()) >= ISOTONIC_MINIMUM:
        return fit_isotonic(raw_R, correct_R)
    return fit_temperature(raw_R, correct_R)
