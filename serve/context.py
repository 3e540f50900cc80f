"""State that the routes share, in one explicit object instead of module globals."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..dynamic.model.loaded import LoadedModel
from .bridge import EngineBridge
from .contracts import ContractManager
from .gate import BodyBudget, Gate
from .json_body import BodyReader
from .metrics import ServerMetrics
from .request_checks import RequestChecks
from .response_store import ResponseStore
from .settings import ServerSettings
from .text import TextPool


@dataclass(frozen=True, kw_only=True)
class ServerContext:
    """The parts of one running server."""

    settings: ServerSettings
    model: LoadedModel
    model_name: str
    max_model_len: int
    bridge: EngineBridge
    contracts: ContractManager
    gate: Gate
    bodies: BodyBudget
    metrics: ServerMetrics
    text: TextPool
    reader: BodyReader
    checks: RequestChecks
    responses: ResponseStore
    started_at: int = field(default_factory=lambda: int(time.time()))
