"""dynamoe: mixture-of-experts and early-exit inference with a quality contract per request."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from .dynamic.llm import LLM
    from .dynamic.sampling_params import SamplingParams


def __getattr__(name: str) -> object:
    # Importing torch takes seconds; `dynamoe --help` and `dynamoe.__version__` should not wait for it.
    if name == "LLM":
        from .dynamic.llm import LLM

        return LLM
    if name == "SamplingParams":
        from .dynamic.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
