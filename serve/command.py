"""``dynamoe serve`` and its configuration."""

from __future__ import annotations

import faulthandler
from dataclasses import dataclass, field

from ..dynamic.contract.quality_config import QualityConfig
from ..dynamic.convert.model_config import SharedModelConfig
from ..dynamic.engine.config import EngineConfig
from ..dynamic.parallel.config import launched_rank
from .contracts import MonitorSettings
from .settings import ServerSettings


@dataclass(frozen=True, kw_only=True)
class ServeQualityConfig(QualityConfig):
    """The contract catalog and its monitor."""

    monitor: MonitorSettings = field(default_factory=MonitorSettings)


@dataclass(frozen=True, kw_only=True)
class ServeConfig(SharedModelConfig):
    """``dynamoe serve``."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerSettings = field(default_factory=ServerSettings)
    quality: ServeQualityConfig = field(default_factory=ServeQualityConfig)


def serve(config: ServeConfig) -> None:
    """Serve a model until SIGTERM or SIGINT.

    Raises:
        ValueError: the address is in use, or the model cannot be served.
        SystemExit: with the exit code, when the server did not end well.
    """
    if launched_rank():  # workers do not listen
        from ..dynamic.convert.load_model import load_model

        load_model(config.model, **config.load_arguments())
    from .server import END_SECONDS, run

    code = run(
        config.model,
        settings=config.server,
        engine_config=config.engine,
        load_arguments=config.load_arguments(),
        certificates=config.quality.certificates,
        monitor=config.quality.monitor,
    )
    faulthandler.dump_traceback_later(END_SECONDS, exit=True)  # should a thread keep the interpreter from ending
    if code:
        raise SystemExit(code)
