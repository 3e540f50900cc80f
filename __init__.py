"""dynamoe: mixture-of-experts and early-exit inference with a quality contract per request."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

__all__ = ["LLM", "Quality", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from .dynamic.engine.quality import Quality
    from .dynamic.engine.sampling_params import SamplingParams
    from .dynamic.llm import LLM
    from .version import __version__


# Threads of libgomp, which torch's own operators use, spin after their work before they sleep, and would keep the
# kernels' threads (kernels/cpu/csrc/team) and other processes from the cores. The bound is read while torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "300")


def __getattr__(name: str) -> object:
    # Importing torch takes seconds; `dynamoe --help` and `dynamoe.__version__` should not wait for it.
    if name == "LLM":
        from .dynamic.llm import LLM

        return LLM
    if name == "SamplingParams":
        from .dynamic.engine.sampling_params import SamplingParams

        return SamplingParams
    if name == "Quality":
        from .dynamic.engine.quality import Quality

        return Quality
    if name == "__version__":
        from .version import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
