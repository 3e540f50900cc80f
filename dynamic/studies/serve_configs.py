"""The Pareto-optimal points of a sweep as configurations of a server."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

if TYPE_CHECKING:
    import pandas as pd

GROUP = "point"
_ENGINE = ("max_num_seqs", "max_num_batched_tokens", "block_size")


def write_serve_configs(points: pd.DataFrame, folder: Path) -> int:
    """One file per point that a server can run: full compute, or a contract with a valid certificate.

    Raw thresholds and uncertified settings are for studies: no server runs them, so they get no file.

    Arguments:
        points: rows of the table.
        folder: emptied first; ``dynamoe serve --config-dir FOLDER +point=NAME`` takes them.

    Returns: how many were written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / GROUP).mkdir(parents=True)
    names = []
    for _, row in points.iterrows():
        if not _servable(row):
            continue
        names.append(f"{len(names) + 1:02}")
        (folder / GROUP / f"{names[-1]}.yaml").write_text(_text(row, names[-1]))
    return len(names)


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
        f"# dynamoe serve --config-dir THIS_FILES_PARENT_FOLDER +{GROUP}={name}\n"
        f"# Measured: {', '.join(measured)} ({row['label']}).\n{OmegaConf.to_yaml(config)}"
    )


def _given(value: Any) -> Any:
    """None for what the table leaves empty."""
    return None if value is None or value != value else value


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
