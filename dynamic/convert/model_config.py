"""Which model a command runs, and how it is loaded: the keys that commands have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...kernels.api.ranges import check_ranges
from ..model.load_config import LoadConfig
from ..parallel.config import ParallelConfig


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Experts.

    Arguments:
        experts_per_token: experts that every token uses, at most the checkpoint's own number; null takes that.
    """

    experts_per_token: int | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "experts_per_token", where="moe.", least=1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(LoadConfig):
    """Which model, and how it is loaded.

    Arguments:
        model: a local directory, a Hub id, or the name of a shipped model: ``default``, ``tiny``.
    """

    model: str = "default"
    moe: MoEConfig = field(default_factory=MoEConfig)

    def load_arguments(self) -> dict[str, Any]:
        """Keyword arguments for :func:`.load_model`, without the model's name."""
        return {"config": self, "experts_per_token": self.moe.experts_per_token}


@dataclass(frozen=True, kw_only=True)
class SharedModelConfig(ModelConfig):
    """A model that several processes may share."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def load_arguments(self) -> dict[str, Any]:
        return super().load_arguments() | {"parallel": self.parallel}
