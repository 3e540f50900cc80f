"""``dynamoe prepare``: the work of a first start, done ahead of time."""

from __future__ import annotations

import sys

from .config import PrepareConfig

__all__ = ["PrepareConfig", "prepare"]


def prepare(config: PrepareConfig) -> None:
    """Fetch or convert the model, compile the kernels, and print the model's path; or quantise it.

    Raises:
        ValueError: for a model that does not exist or cannot be had here, or settings that are out of range.
    """
    if config.quantization != "none":
        from .quantize import quantize_model

        quantize_model(config)
        return
    if config.output is not None:
        raise ValueError("output=… goes with quantization=gptq, awq or smoothquant")
    from ...kernels.cpu.build import BuildError, build
    from ..convert.model_store import resolve_model

    path = resolve_model(config.model)
    try:
        build(progress=True)
    except BuildError as error:
        print(f"the CPU kernels are not available, torch's own operations take their place: {error}", file=sys.stderr)
    print(f"{config.model}: {path}")
