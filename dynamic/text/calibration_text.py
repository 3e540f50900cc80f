"""English text that is on every machine: the language reference that comes with Python (``help("topics")``).

It calibrates how a dense model is split into experts, and measures what fewer experts cost. Both take different pages.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_HELD_OUT_SHARE = 0.2


def reference_pages(*, held_out: bool) -> list[str]:
    """Pages of the Python language reference, in an order that is the same everywhere.

    Arguments:
        held_out: the fifth of the pages that calibration never sees, else the others.

    Raises:
        ValueError: when this Python was installed without its documentation.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            "calibration needs the text of Python's own documentation (the module pydoc_data), which this Python"
            " lacks; install the complete standard library"
        ) from error
    names = sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest())
    cut = round(len(names) * _HELD_OUT_SHARE)
    return [topics[name] for name in (names[:cut] if held_out else names[cut:])]


def token_windows(tokenizer: Tokenizer, pages: list[str], *, count: int, length: int) -> torch.Tensor:
    """Windows of consecutive tokens spread evenly over all pages, (count, length), int64.

    Raises:
        ValueError: when the pages are too short for that many windows.
    """
    ids = torch.tensor([i for page in pages for i in tokenizer.encode(page, add_special_tokens=False).ids])
    windows = ids[: ids.numel() // length * length].view(-1, length)
    if windows.shape[0] < count:
        raise ValueError(f"{count} windows of {length} tokens wanted, the text has {windows.shape[0]}")
    return windows[torch.linspace(0, windows.shape[0] - 1, count).round().long()]
