"""``dynamoe prepare``: the work of a first start, done ahead of time; or a checkpoint quantised with calibration."""

from __future__ import annotations

import sys
from pathlib import Path

from ...kernels.cpu.build import BuildError, build
from ..convert.model_store import resolve_model
from ..model.dtype import choose_device
from ..model.load_config import LoadConfig
from ..model.loader import load_decoder
from ..model.machine import use_threads
from ..model.quantization import NONE, Quantization, methods
from ..model.weight_cache import open_cache
from ..quantize.driver import REPORT, quantize_checkpoint
from ..quantize.methods import NEAREST, POOLED, CalibratedMethod
from ..text.calibration_text import reference_pages, token_windows
from ..text.documentation_packages import collect_folder
from ..text.tokenizer import Tokenizer
from .config import PrepareConfig

__all__ = ["PrepareConfig", "prepare"]


def prepare(config: PrepareConfig) -> None:
    """Fetch or convert the model, compile the kernels, quantise as other commands do it at their start, and print the
    model's path; or quantise it with calibration.

    Raises:
        ValueError: for a model that does not exist or cannot be had here, settings that are out of range, text that is
            too short, or what :func:`quantize_checkpoint` refuses.
    """
    if config.quantization != NONE and config.quantization not in methods():
        _quantize(config)
        return
    if config.output is not None:
        raise ValueError("output=… goes with quantization=gptq, awq or smoothquant")
    path = resolve_model(config.model)
    try:
        build(progress=True)
    except BuildError as error:
        print(f"the CPU kernels are not available, torch's own operations take their place: {error}", file=sys.stderr)
    print(f"{config.model}: {path}")
    if config.quantization != NONE:
        _keep_weights(config, path)


def _keep_weights(config: PrepareConfig, path: Path) -> None:
    use_threads(config.threads)
    wanted = Quantization(method=config.quantization, lm_head=config.quantize_lm_head)
    names = ("dtype", "device", "backend", "quantization", "quantize_lm_head", "weight_cache")
    decoder = load_decoder(path, LoadConfig(**{name: getattr(config, name) for name in names}), progress=True)
    cache = open_cache(config.weight_cache, path, decoder.backend, wanted)
    kept = cache.file if cache is not None and cache.file.exists() else None
    print(f"{config.quantization}: {kept or 'made at every start'}")


def _quantize(config: PrepareConfig) -> None:
    method = CalibratedMethod(name=config.quantization, group=config.group, symmetric=config.symmetric)
    if config.output is None:
        raise ValueError("output=DIRECTORY is needed: the quantised checkpoint is written there")
    use_threads(config.threads)
    source, target = resolve_model(config.model), Path(config.output).expanduser()
    pages = reference_pages(held_out=False)
    if config.text_folder is not None:
        parts = collect_folder(Path(config.text_folder).expanduser())
        pages = [document for part in parts if not part.held_out for document in part.documents]
    tokenizer = Tokenizer.from_directory(source)
    windows_NL = token_windows(tokenizer.backend, pages, count=config.windows, length=config.window_tokens)
    device = choose_device(config.device)
    report = quantize_checkpoint(source, target, windows_NL, method, device=device)
    for source_of, meaning in ((POOLED, "saw few tokens and used all tokens of their layer"), (NEAREST, "saw none")):
        count = sum(layer["experts"].get(source_of, 0) for layer in report["layers"])
        if count:
            print(f"{count} experts {meaning}, see {target / REPORT}")
    worst = max(report["layers"], key=lambda layer: layer["relative_error"])
    error = f"{worst['relative_error']:.1%} (layer {worst['layer']})"
    print(f"{target}: {config.quantization}; largest error of a layer {error}")
