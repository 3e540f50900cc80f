"""Provenance of results: revision of the code, versions, machine, hashes of the deployment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..contract.deployment import deployment
from ..model.machine import run_facts

if TYPE_CHECKING:
    from ..contract.certificate import Scalar
    from ..llm import LLM


def provenance(llm: LLM) -> dict[str, Scalar]:
    """Flat names and values; those of the deployment are what a certificate is bound to."""
    engine = llm.engine
    facts = deployment(llm.model, engine.runner.exits, engine.logits_plugins, engine.cache_plugins)
    return run_facts() | {f"deployment.{name}": value for name, value in facts.items()}
