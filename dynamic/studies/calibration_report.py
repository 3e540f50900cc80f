"""What a calibration tells its reader: a table, ``report.json``, a plot.

Shape suffixes: M settings, from the safest on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..contract.bounds import betting_bound
from ..contract.calibration_runs import Measured, Setting
from ..contract.certificate import Certificate

REPORT = "report.json"


def write_report(output: Path, settings: Sequence[Setting], measured: Sequence[Measured], certified: Path) -> None:
    """``report.json``: the path with its means, and what was certified."""
    path = [
        {
            **asdict(setting),
            "requests": len(found.losses_N),
            "mean_loss": float(found.losses_N.mean()),
            "worst_length_loss": float(found.cut_losses_KN.mean(1).max()),
            "token_loss": found.token_loss,
            "worst_cut_loss": float(found.worst_cut_N.mean()),
            "layers_share": found.layers_share,
            "experts_share": found.experts_share,
        }
        for setting, found in zip(settings, measured, strict=False)
    ]
    certificates = [json.loads(file.read_text()) for file in sorted(certified.glob("*.json"))]
    (output / REPORT).write_text(json.dumps({"path": path, "certificates": certificates}, indent=1) + "\n")


def setting_name(setting: Setting) -> str:
    values = set(setting.exit_thresholds.values())
    keep = "" if setting.expert_keep is None else f", experts {setting.expert_keep:g}"
    return (f"{values.pop():g}" if len(values) == 1 else str(setting.exit_thresholds)) + keep


def differ(temperature: float, loss: float) -> str:
    return f"distributions differ by {loss:.2%}" if temperature else f"{loss:.2%} of the tokens differ"


def summary(certificate: Certificate, setting: str, held_out: Measured) -> str:
    """A certificate and what it does on other requests, in words."""
    found = certificate.held_out
    return (
        f"alpha={certificate.alpha:g}, delta={certificate.delta:g}: exits at {setting}; on {found.requests} other"
        f" requests {differ(certificate.scope.highest_temperature, found.mean_loss)}"
        f" ({found.low:.2%} … {found.high:.2%}), {found.worst_length_loss:.2%} where all outputs are cut at"
        f" {found.worst_length} tokens, the worst length; {found.token_loss:.2%} of all tokens;"
        f" {found.layers_executed:.1%} of the layers, {held_out.experts_share:.1%} of their experts"
    )


def table(settings: Sequence[Setting], measured: Sequence[Measured], temperature: float) -> str:
    what = "distance of the distributions" if temperature else "tokens that differ"
    lines = [
        f"| setting | {what} | at the worst length | layers executed | of their experts |",
        "|---|---|---|---|---|",
    ]
    for setting, found in zip(settings, measured, strict=False):
        shares = f"{found.layers_share:.1%} | {found.experts_share:.1%}"
        worst = found.cut_losses_KN.mean(1).max()
        lines.append(f"| {setting_name(setting)} | {found.losses_N.mean():.2%} | {worst:.2%} | {shares} |")
    return "\n".join(lines)


def plot(
    measured: Sequence[Measured], certificates: Sequence[Certificate], delta: float, temperature: float, file: Path
) -> None:
    """Risk against compute along the path, with the upper bounds, and the certified points on other requests."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    layers = [100 * m.layers_share for m in measured]
    axes.plot(layers, [100 * m.losses_N.mean() for m in measured], "o-", label="mean of the requests that choose")
    bounds = [100 * betting_bound(m.losses_N, delta) for m in measured]
    axes.plot(layers, bounds, "--", color="0.5", label=f"upper bound (betting, delta = {delta:g})")
    for certificate in certificates:
        found = certificate.held_out
        reach = [[100 * (found.mean_loss - found.low)], [100 * (found.high - found.mean_loss)]]
        axes.errorbar(
            100 * found.layers_executed, 100 * found.mean_loss, reach, fmt="s", capsize=4,
            label=f"alpha = {certificate.alpha:g}, on other requests",
        )  # fmt: skip
    axes.set(
        xlabel="layers executed for decoded tokens, % of all",
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
