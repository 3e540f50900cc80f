"""``dynamoe prepare``: what a first start would do, done ahead of it."""

from __future__ import annotations

from .config import PrepareConfig

__all__ = ["PrepareConfig", "prepare"]


def prepare(config: PrepareConfig) -> None:
    """Fetch or convert the model and say where it is.

    Raises:
        ValueError: for a model that does not exist or cannot be had here.
    """
    from .model_store import resolve_model

    print(f"{config.model}: {resolve_model(config.model)}")
