"""dynamoe: mixture-of-experts and early-exit inference with a quality contract per request."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["LLM", "Quality", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from .dynamic.llm import LLM
    from .dynamic.quality import Quality
    from .dynamic.sampling_params import SamplingParams


def __getattr__(name: str) -> object:
    # Importing torch takes seconds; `dynamoe --help` and `dynamoe.__version__` should not wait for it.
    if name == "LLM":
        from .dynamic.llm import LLM

        return LLM
    if name == "SamplingParams":
        from .dynamic.sampling_params import SamplingParams

        return SamplingParams
    if name == "Quality":
        from .dynamic.quality import Quality

        return Quality
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
