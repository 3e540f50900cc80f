"""``dynamoe prepare quantization=…``: from a model's name to a quantised checkpoint beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..convert.model_store import resolve_model
from ..model.loader import choose_device
from ..quantize.driver import REPORT, quantize_checkpoint
from ..quantize.methods import NEAREST, POOLED, CalibratedMethod
from ..text.calibration_text import reference_pages, token_windows
from ..text.documentation_packages import collect_folder
from ..text.tokenizer import Tokenizer
from .config import PrepareConfig


def quantize_model(config: PrepareConfig, *, progress: bool = True, log: Callable[[str], None] = print) -> Path:
    """Quantise a model with calibration text; returns where the result is.

    Arguments:
        progress: show progress bars.

    Raises:
        ValueError: for settings that are out of range, text that is too short, or what :func:`quantize_checkpoint`
            refuses.
    """
    method = CalibratedMethod(name=config.quantization, group=config.group, symmetric=config.symmetric)
    if config.output is None:
        raise ValueError("output=DIRECTORY is needed: the quantised checkpoint is written there")
    for name in ("windows", "window_tokens"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(config, name)}")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    source, target = resolve_model(config.model, progress=progress), Path(config.output).expanduser()
    pages = reference_pages(held_out=False)
    if config.text_folder is not None:
        parts = collect_folder(Path(config.text_folder).expanduser())
        pages = [document for part in parts if not part.held_out for document in part.documents]
    tokenizer = Tokenizer.from_directory(source)
    windows_NL = token_windows(tokenizer.backend, pages, count=config.windows, length=config.window_tokens)
    device = choose_device(config.device)
    report = quantize_checkpoint(source, target, windows_NL, method, device=device, progress=progress, say=log)
    for source_of, meaning in ((POOLED, "saw few tokens and used all tokens of their layer"), (NEAREST, "saw none")):
        count = sum(layer["experts"].get(source_of, 0) for layer in report["layers"])
        if count:
            log(f"{count} experts {meaning}, see {target / REPORT}")
    worst = max(report["layers"], key=lambda layer: layer["relative_error"])
    error = f"{worst['relative_error']:.1%} (layer {worst['layer']})"
    log(f"{target}: {config.quantization}; largest error of a layer {error}")
    return target
