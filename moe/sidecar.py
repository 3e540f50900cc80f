"""The calibrated contribution scales of a checkpoint, kept beside it in ``experts.json``.

The checkpoint itself stays an ordinary one. The file is JSON alone: a float32 survives being written as a decimal, and
another safetensors file would change the hash that ties the checkpoint's exits to its weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .contribution import ExpertScales, LayerScales

JSON_FILE = "experts.json"
_FORMAT = 1


def save_scales(scales: ExpertScales, directory: Path) -> None:
    """Write the sidecar into a checkpoint's directory, atomically."""
    summary = {
        "format": _FORMAT,
        "backbone_sha256": scales.backbone_sha256,
        "tokens": scales.tokens,
        "layers": [
            None if layer is None else {"impact": layer.impact, "scales": layer.scale_E.tolist()}
            for layer in scales.layers
        ],
    }
    partial = directory / f"{JSON_FILE}.partial"
    partial.write_text(json.dumps(summary, indent=1))
    partial.rename(directory / JSON_FILE)


def load_scales(directory: Path) -> ExpertScales | None:
    """The sidecar of a checkpoint, on the CPU; None where there is none.

    Raises:
        ValueError: for another format or a damaged file.
    """
    file = directory / JSON_FILE
    if not file.is_file():
        return None
    try:
        summary = json.loads(file.read_text())
        if summary["format"] != _FORMAT:
            raise ValueError(f"{file} has format {summary['format']}; this version reads {_FORMAT}")
        return ExpertScales(
            layers=tuple(None if record is None else _layer(record) for record in summary["layers"]),
            tokens=summary["tokens"],
            backbone_sha256=summary["backbone_sha256"],
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error


def _layer(record: dict[str, Any]) -> LayerScales:
    scales: list[float] = record["scales"]
    return LayerScales(scale_E=torch.tensor([float(s) for s in scales]), impact=float(record["impact"]))
