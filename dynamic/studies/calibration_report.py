"""What a calibration tells its reader: a table, ``report.json``, a plot.

Shape suffixes: M settings, from the safest on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..contract.bounds import betting_bound
from ..contract.calibration_runs import Measured
from ..contract.certificate import Certificate
from ..contract.setting_path import Setting

if TYPE_CHECKING:
    from .calibrate_config import CalibrateConfig

REPORT = "report.json"


def costs_of(works: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """What a calibration took, interrupted runs included: sums of :attr:`Measured.work`, and ``words`` about them."""
    total = {name: sum(work.get(name, 0) for work in works) for name in works[0]} if works else {}
    if not total:
        return {"words": "nothing was measured"}
    rows = total["rows"] + total["cached_rows"] + total["judged_rows"] + total["known_rows"]
    reused = total["cached_rows"] + total["known_rows"]
    words = (
        f"measured: {total['requests']:.0f} requests, {total['rows']:.0f} rows through the serving model and"
        f" {total['judged_rows']:.0f} through the judging one, in {total['seconds'] + total['judge_seconds']:.0f} s;"
        f" {reused / rows:.1%} of all rows were known before: {total['cached_rows']:.0f} of prompts,"
        f" {total['known_rows']:.0f} of outputs that several settings serve"
    )
    return {**total, "reused_share": reused / rows, "words": words}


def write_report(
    output: Path, settings: Sequence[Setting], measured: Sequence[Measured], certified: Path, costs: Mapping[str, Any]
) -> None:
    """``report.json``: the path with its means, what was certified, what the calibration took."""
    path = [
        {
            **setting.as_json(),
            "requests": len(found.losses_N),
            "mean_loss": float(found.losses_N.mean()),
            "worst_length_loss": float(found.cut_losses_KN.mean(1).max()),
            "token_loss": found.token_loss,
            "worst_cut_loss": float(found.worst_cut_N.mean()),
            "layers_share": found.layers_share,
            "experts_share": found.experts_share,
            "weight_bytes": found.weight_bytes,
            "cache_bytes": found.cache_bytes,
            "seconds_per_token": found.seconds_per_token,
        }
        for setting, found in zip(settings, measured, strict=False)
    ]
    certificates = [json.loads(file.read_text()) for file in sorted(certified.glob("*.json"))]
    report = {"path": path, "certificates": certificates, "cost": costs}
    (output / REPORT).write_text(json.dumps(report, indent=1) + "\n")


def differ(temperature: float, loss: float) -> str:
    return f"distributions differ by {loss:.2%}" if temperature else f"{loss:.2%} of the tokens differ"


def summary(certificate: Certificate, setting: str, held_out: Measured) -> str:
    """A certificate and what it does on other requests, in words."""
    found = certificate.held_out
    against = f", against {certificate.original}" if certificate.reference else ""
    assert found.tokens_per_second is not None and found.full_tokens_per_second is not None
    return (
        f"alpha={certificate.alpha:g}, delta={certificate.delta:g}{against}: {setting}; on {found.requests} other"
        f" requests {differ(certificate.scope.highest_temperature, found.mean_loss)}"
        f" ({found.low:.2%} … {found.high:.2%}), {found.worst_length_loss:.2%} where all outputs are cut at"
        f" {found.worst_length} tokens, the worst length; {found.token_loss:.2%} of all tokens;"
        f" {found.layers_executed:.1%} of the layers, {held_out.experts_share:.1%} of their experts,"
        f" {found.weight_bytes_read:.1%} of the weights' bytes,"
        f" {found.tokens_per_second / found.full_tokens_per_second:.2f} times as fast"
    )


def table(settings: Sequence[Setting], measured: Sequence[Measured], temperature: float, full_bytes: float) -> str:
    """One row for each setting that was measured.

    Arguments:
        full_bytes: of the weights that an output token of the full model reads.
    """
    what = "distance of the distributions" if temperature else "tokens that differ"
    lines = [
        f"| setting | {what} | at the worst length | layers executed | of their experts | bytes of weights |",
        "|---|---|---|---|---|---|",
    ]
    for setting, found in zip(settings, measured, strict=False):
        shares = f"{found.layers_share:.1%} | {found.experts_share:.1%} | {found.weight_bytes / full_bytes:.1%}"
        worst = found.cut_losses_KN.mean(1).max()
        lines.append(f"| {setting} | {found.losses_N.mean():.2%} | {worst:.2%} | {shares} |")
    return "\n".join(lines)


def plot(
    measured: Sequence[Measured],
    certificates: Sequence[Certificate],
    config: CalibrateConfig,
    full_bytes: float,
    file: Path,
) -> None:
    """Risk along the path against the weights that a token reads, with the upper bounds, and the certified points on
    other requests."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    delta, temperature = config.delta, config.temperature
    weights = [100 * m.weight_bytes / full_bytes for m in measured]
    axes.plot(weights, [100 * m.losses_N.mean() for m in measured], "o-", label="mean of the requests that choose")
    bounds = [100 * betting_bound(m.losses_N, delta) for m in measured]
    axes.plot(weights, bounds, "--", color="0.5", label=f"upper bound (betting, delta = {delta:g})")
    for certificate in certificates:
        found = certificate.held_out
        reach = [[100 * (found.mean_loss - found.low)], [100 * (found.high - found.mean_loss)]]
        assert found.weight_bytes_read is not None
        axes.errorbar(
            100 * found.weight_bytes_read, 100 * found.mean_loss, reach, fmt="s", capsize=4,
            label=f"alpha = {certificate.alpha:g}, on other requests",
        )  # fmt: skip
    axes.set(
        xlabel="bytes of weights that an output token reads, % of all",
        ylabel=(
            f"distance of the distributions at temperature {temperature:g}, %"
            if temperature
            else "served tokens that differ from the full model's, %"
        ),
        title=f"risk against compute, {len(measured[0].losses_N)} requests",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file)
