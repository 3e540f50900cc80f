"""Report over all jobs of a sweep: one tidy table, paired comparisons, plots, and configurations to serve."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from ..contract.intervals import paired_difference
from .plots import draw_html, draw_png

Frame = Any  # a table or a column of pandas, whose own types say of most results that they may be either
TABLE, COMPARISON = "table", "comparison"
LOWER_IS_BETTER = frozenset({"kl", "perplexity", "perplexity_ratio", "true_risk", "violations"})
_POINT = "point"  # the folder, and Hydra's group, of the configurations to serve
_ENGINE = ("max_num_seqs", "max_num_batched_tokens", "block_size")
COSTS = ("flops_share", "layers_share")  # the first that was measured is the plots' measure of compute


def write_report(
    output: Path, records: list[dict[str, Any]], compare: str | None, quality_metric: str
) -> tuple[list[str], int]:
    """Write a sweep's results into its directory, and print a summary.

    Arguments:
        records: of its jobs.
        compare: a key that pairs of jobs are to differ in.
        quality_metric: column that plots show against compute.

    Returns: the errors of jobs that failed, and how many jobs there were.

    Raises:
        ValueError: for a ``compare`` or a ``quality_metric`` that no job has, or missing libraries.
    """
    frame = tidy(records)
    frame.to_csv(output / f"{TABLE}.csv", index=False)
    frame.to_parquet(output / f"{TABLE}.parquet", index=False)
    good = frame[frame["error"].isna()].copy()
    label = frame.apply(lambda row: _setting(frame, row), axis=1)
    failures = [f"{label[number]}: {row['error']}" for number, row in frame[frame["error"].notna()].iterrows()]
    for failure in failures:
        print(f"failed: {failure}")
    if not len(good):
        return failures, len(frame)
    if quality_metric not in good:
        known = ", ".join(name[: -len("_low")] for name in good if str(name).endswith("_low"))
        raise ValueError(f"quality_metric={quality_metric} was not measured; there are: {known}")
    cost = next(name for name in COSTS if name in good)
    value = good[quality_metric] * (-1 if quality_metric in LOWER_IS_BETTER else 1)
    fastest = pareto(-good["tokens_per_second"], value) if "tokens_per_second" in good else False
    good = good.assign(pareto=pareto(good[cost], value), fastest=fastest, label=label[good.index])
    frame["pareto"] = good["pareto"].reindex(frame.index)
    frame.to_csv(output / f"{TABLE}.csv", index=False)
    frame.to_parquet(output / f"{TABLE}.parquet", index=False)
    draw_png(good, cost, quality_metric, output / "pareto.png")
    draw_html(good, cost, quality_metric, output / "pareto.html")
    written = write_serve_configs(good[good["pareto"]], output / "serve")
    print(_summary(good, cost, quality_metric))
    if compare is not None:
        pairs = comparisons(records, frame, compare)
        pairs.to_csv(output / f"{COMPARISON}.csv", index=False)
        print(f"\npaired by request, {compare}:\n{pairs.to_string(index=False)}")
    print(f"\n{len(frame)} jobs, {len(failures)} failed; table, plots, {written} configurations to serve: {output}")
    return failures, len(frame)


def tidy(records: list[dict[str, Any]]) -> Frame:
    """One row per job: its configuration, its seed among it, what it ran, its metrics with intervals, its error.

    Raises:
        ValueError: without pandas and pyarrow.
    """
    try:
        import pandas as pd
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ValueError("a sweep's table needs pandas and pyarrow: pip install 'dynamoe[sweep]'") from error
    rows = []
    for record in records:
        row: dict[str, Any] = {f"config.{name}": value for name, value in flat(record["config"])}
        row |= {f"setting.{name}": value for name, value in flat(record.get("setting", {}))}
        row |= {f"source.{name}": value for name, value in flat(record.get("source", {}))}
        row |= record.get("provenance", {})
        for name, found in record.get("metrics", {}).items():
            row |= {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
        rows.append({**row, "error": record.get("error")})
    frame = pd.DataFrame(rows)
    for name in frame.columns[[pd.api.types.is_object_dtype(kind) for kind in frame.dtypes]]:
        # Parquet wants one type per column; a job that failed may have held something else.
        if len({type(value) for value in frame[name].dropna()}) > 1:
            frame[name] = frame[name].map(str, na_action="ignore")
    return frame


def flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested dictionaries as pairs of dotted name and value; thresholds by exit stay one value."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict) and name != "exit_thresholds":
            found += flat(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, str(value) if isinstance(value, dict | list | tuple) else value))
    return found


def swept(frame: Frame) -> list[str]:
    """Configuration columns that differ between jobs."""
    columns = [str(name) for name in frame if str(name).startswith("config.")]
    return [name for name in columns if frame[name].map(str).nunique() > 1]


def pareto(costs: Frame, qualities: Frame) -> np.ndarray:
    """Which points no other beats: lower cost at no less quality, or more quality at no more cost."""
    cost, quality = costs.to_numpy(), qualities.to_numpy()
    no_worse = (cost[None] <= cost[:, None]) & (quality[None] >= quality[:, None])
    better = (cost[None] < cost[:, None]) | (quality[None] > quality[:, None])
    return ~(no_worse & better).any(1)


def comparisons(records: list[dict[str, Any]], frame: Frame, key: str) -> Frame:
    """Pairs of jobs that differ in one key alone: by how much the second exceeds the first, request by request.

    Raises:
        ValueError: when the jobs do not differ in that key.
    """
    import pandas as pd

    column, known = f"config.{key}", swept(frame)
    if column not in known:
        names = ", ".join(name.removeprefix("config.") for name in known) or "none"
        raise ValueError(f"compare={key}: no jobs differ in that key; they do in {names}")
    others = [name for name in known if name != column]
    rows, first = [], {}
    for record, (_, row) in zip(records, frame.iterrows(), strict=True):
        if row["error"] is not None and row["error"] == row["error"]:
            continue
        rest = tuple(str(row[name]) for name in others)
        if rest not in first:
            first[rest] = (record, row)
            continue
        before, before_row = first[rest]
        settings = dict(zip((name.removeprefix("config.") for name in others), rest, strict=True))
        for metric, values in record["by_request"].items():
            found = paired_difference(np.array(before["by_request"][metric]), np.array(values))
            rows.append({**settings, "first": before_row[column], "second": row[column], "metric": metric,
                         "difference": found.value, "low": found.low, "high": found.high})  # fmt: skip
    return pd.DataFrame(rows)


def _setting(frame: Frame, row: Any) -> str:
    found = [f"{name.split('.')[-1]}={_short(row[name])}" for name in swept(frame)]
    return ", ".join(found) or "the only job"


def _short(value: Any) -> str:
    if _given(value) is None:
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _summary(good: Frame, cost: str, quality: str) -> str:
    wanted = (quality, cost, "kl", "perplexity", "true_risk", "violations", "speed")
    columns = [name for name in dict.fromkeys(wanted) if name in good]
    lines = [f"{'':60}" + "".join(f"{name:>22}" for name in columns)]
    for _, row in good.sort_values(cost).iterrows():
        cells = "".join(f"{row[n]:9.4f} ±{(row[n + '_high'] - row[n + '_low']) / 2:6.4f}    " for n in columns)
        lines.append(f"{'* ' if row['pareto'] else '  '}{row['label'][:58]:58}{cells}")
    return "\n".join((*lines, "* not beaten in both; ±: half of the 95 % interval over requests"))


def write_serve_configs(points: Frame, folder: Path) -> int:
    """One file per point that a server can run: full compute, or a contract with a valid certificate.

    Raw thresholds and uncertified settings are for studies: no server runs them, so they get no file.

    Arguments:
        points: rows of the table.
        folder: emptied first; ``dynamoe serve --config-dir FOLDER +point=NAME`` takes them.

    Returns: how many were written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / _POINT).mkdir(parents=True)
    servable = [row for _, row in points.iterrows() if _servable(row)]
    for number, row in enumerate(servable, 1):
        (folder / _POINT / f"{number:02}.yaml").write_text(_text(row, f"{number:02}"))
    return len(servable)


def _servable(row: Any) -> bool:
    if "setting.promised" not in row:
        return False
    raw = ("setting.expert_keep", "setting.experts_per_token")
    exact = row["setting.exit_thresholds"] == "{}" and all(_given(row.get(name)) is None for name in raw)
    return bool(exact or row["setting.promised"])


def _text(row: Any, name: str) -> str:
    config: dict[str, Any] = {key: row[f"config.{key}"] for key in ("model", "dtype", "device", "backend")}
    if Path(str(config["model"])).is_dir():
        config["model"] = str(Path(config["model"]).resolve())
    if (experts := _given(row["config.moe.experts_per_token"])) is not None:
        config["moe"] = {"experts_per_token": int(experts)}
    config["engine"] = {key: _plain(row[f"config.engine.{key}"]) for key in _ENGINE}
    if (certificates := _given(row["config.quality.certificates"])) is not None:
        config["quality"] = {"certificates": str(Path(certificates).expanduser().resolve())}
    if (alpha := _given(row["config.quality.alpha"])) is not None and row["setting.promised"]:
        config["server"] = {"default_alpha": float(alpha), "default_delta": float(row["config.quality.delta"])}
    measured = [f"{name} {row[name]:.4f}" for name in ("agreement", "flops_share", "tokens_per_second") if name in row]
    return (
        "# @package _global_\n"
        f"# dynamoe serve --config-dir THIS_FILES_PARENT_FOLDER +{_POINT}={name}\n"
        f"# Measured: {', '.join(measured)} ({row['label']}).\n{OmegaConf.to_yaml(config)}"
    )


def _given(value: Any) -> Any:
    """None for what the table leaves empty."""
    return None if value is None or value != value else value


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
