"""Quality against compute and against measured throughput, with 95 % intervals: a picture, and a page to explore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Frame = Any  # a table of pandas
NAMES = {
    "agreement": "served tokens that the full model would choose, %",
    "forced_agreement": "positions of the text with the full model's choice, %",
    "kl": "divergence from the full model, nats per token",
    "perplexity": "perplexity of the text",
    "perplexity_ratio": "perplexity in relation to the full model's",
    "true_risk": "true risk of the chosen setting, %",
    "flops_share": "operations per decoded token, LM head included, % of full compute",
    "layers_share": "layers executed per decoded token, % of all",
    "tokens_per_second": "output tokens per second, measured",
}
PERCENT = frozenset({"agreement", "forced_agreement", "true_risk", "flops_share", "layers_share"})


def draw_png(good: Frame, cost: str, quality: str, file: Path) -> None:
    """One panel for compute, and one for throughput where it was measured; what nothing beats is named beside them.

    Arguments:
        good: rows with the columns ``label``, ``pareto`` (not beaten in compute), ``fastest`` (nor in throughput).
        cost, quality: columns.

    Raises:
        ValueError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a sweep's plot needs matplotlib: pip install 'dynamoe[sweep]'") from error
    panels = _panels(good, cost)
    figure = Figure(figsize=(6.5 * len(panels) + 3.5, 5.5), layout="constrained")
    *plots, key = figure.subplots(1, len(panels) + 1, width_ratios=[1.0] * len(panels) + [0.5])
    named = good[good["pareto"] | good["fastest"]].sort_values(cost)
    names = {row: str(number) for number, row in enumerate(named.index, 1)}
    for axes, x in zip(plots, panels, strict=True):
        for group, rows in _groups(good):
            values = [_scaled(rows, name) for name in (x, quality)]
            axes.errorbar(
                values[0][0], values[1][0], xerr=values[0][1], yerr=values[1][1],
                fmt="o", markersize=5, capsize=3, elinewidth=0.8, alpha=0.85, label=group,
            )  # fmt: skip
        front = good[good["pareto" if x == cost else "fastest"]].sort_values(x)
        axes.plot(_scaled(front, x)[0], _scaled(front, quality)[0], "-", color="0.6", zorder=0, label="not beaten")
        for index, row in front.iterrows():
            place = [row[name] * (100 if name in PERCENT else 1) for name in (x, quality)]
            above = int(names[index]) % 2 == 1  # neighbours on the front hardly differ
            axes.annotate(names[index], place, fontsize=8, textcoords="offset points", xytext=(5, 5 if above else -11))
        axes.set(xlabel=NAMES.get(x, x), ylabel=NAMES.get(quality, quality))
        axes.grid(alpha=0.3)
    plots[0].legend(fontsize=8)
    key.axis("off")
    lines = [f"{names[index]}  {row['label']}" for index, row in named.iterrows()]
    key.text(0, 1, "\n".join(lines), fontsize=8, va="top", linespacing=1.6, transform=key.transAxes)
    figure.suptitle(f"{_title(good)}; bars: 95 % intervals over requests")
    figure.savefig(file, dpi=130)


def draw_html(good: Frame, cost: str, quality: str, file: Path) -> None:
    """The same as a page that needs no network: hovering shows a point's setting.

    Raises:
        ValueError: without plotly.
    """
    try:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise ValueError("a sweep's page needs plotly: pip install 'dynamoe[sweep]'") from error
    panels = _panels(good, cost)
    figure: Any = make_subplots(rows=1, cols=len(panels), shared_yaxes=True)
    for column, x in enumerate(panels, 1):
        for number, (group, rows) in enumerate(_groups(good)):
            bars = {}
            for axis, name in (("x", x), ("y", quality)):
                values, (below, above) = _scaled(rows, name)
                bars |= {axis: values, f"error_{axis}": {"array": above, "arrayminus": below, "thickness": 1}}
            trace = go.Scatter(
                **bars, mode="markers", name=group, legendgroup=group, showlegend=column == 1, text=rows["label"],
                marker={"color": f"hsl({(number * 67) % 360}, 65%, 45%)", "size": 8},
                hovertemplate="%{text}<br>%{x:.3g}, %{y:.4g}<extra></extra>",
            )  # fmt: skip
            figure.add_trace(trace, row=1, col=column)
        figure.update_xaxes(title_text=NAMES.get(x, x), row=1, col=column)
    figure.update_yaxes(title_text=NAMES.get(quality, quality), row=1, col=1)
    figure.update_layout(title=f"{_title(good)}; bars: 95 % intervals over requests", template="plotly_white")
    figure.write_html(file, include_plotlyjs=True, full_html=True)


def _panels(good: Frame, cost: str) -> list[str]:
    return [cost, "tokens_per_second"] if "tokens_per_second" in good else [cost]


def _groups(good: Frame) -> list[tuple[str, Frame]]:
    """Points by the last of their settings that has few values, so that colours mean something."""
    columns = [str(name) for name in good if str(name).startswith("config.")]
    few = [name for name in columns if 1 < good[name].map(str).nunique() <= 6]
    if not few:
        return [("settings", good)]
    key = min(few, key=lambda name: good[name].map(str).nunique())
    values = good[key].map(lambda value: "none" if value is None or value != value else str(value))
    return [(f"{key.split('.')[-1]}={value}", rows) for value, rows in good.groupby(values)]


def _scaled(rows: Frame, name: str) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Values, and how far the interval reaches below and above them."""
    factor = 100 if name in PERCENT else 1
    value, low, high = (factor * rows[column].to_numpy() for column in (name, f"{name}_low", f"{name}_high"))
    return value.tolist(), ((value - low).clip(min=0).tolist(), (high - value).clip(min=0).tolist())


def _title(good: Frame) -> str:
    models = sorted({Path(str(name)).name for name in good["config.model"]})
    return f"{', '.join(models)}, {len(good)} settings"
