"""Provenance of results: revision of the code, versions, machine, hashes of the deployment."""

from __future__ import annotations

import datetime
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...version import __version__
from ..contract.deployment import deployment
from ..model.machine import processor

if TYPE_CHECKING:
    from ..contract.certificate import Scalar
    from ..llm import LLM


def provenance(llm: LLM) -> dict[str, Scalar]:
    """Flat names and values; those of the deployment are what a certificate is bound to."""
    return {
        "git_revision": git_revision(),
        "version": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "processor": processor(),
        "cpus": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        **{f"deployment.{name}": value for name, value in deployment_of(llm).items()},
    }


def deployment_of(llm: LLM) -> dict[str, Scalar]:
    """What certificates of a running model are bound to."""
    engine = llm.engine
    return deployment(llm.model, engine.runner.exits, engine.logits_plugins, engine.cache_plugins)


@cache
def git_revision() -> str:
    """The commit of the checkout that the package runs from, with ``-dirty`` where files differ; ``none`` elsewhere."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed: a repository around it would be somebody else's
        return "none"
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("-dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
