"""Records of a sweep's jobs: one JSON file per distinct configuration, and the list of this run's jobs; and the
provenance of results: revision of the code, versions, machine, hashes of the deployment."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...exits.sidecar import JSON_FILE, TENSOR_FILE, backbone_hash
from ...kernels.api.sources import sources_hash
from ...moe.sidecar import JSON_FILE as CONTRIBUTIONS
from ..contract.catalog import CERTIFICATES
from ..convert.model_store import resolve_model
from ..model.machine import processor, run_facts
from ..train.held_out import PROMPTS_FILE

if TYPE_CHECKING:
    from ..contract.certificate import Scalar
    from ..llm import LLM

_CONFIGURATION = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
# Where results go and how a job runs, not what is measured.
NO_PART_OF_A_RESULT = frozenset({"output", "compare", "json", "threads", "quality_metric", "objective", "weight_cache"})


def job_key(config: dict[str, Any]) -> str:
    """What a job measures, as text that names its file: its configuration, the content of all that it reads, the code
    and the processor that run it.

    Raises:
        ValueError: for a model that cannot be found.
    """
    measured = {name: value for name, value in config.items() if name not in NO_PART_OF_A_RESULT}
    reference = config["reference"]["model"]
    models = [_model_hash(name) for name in (config["model"], reference) if name is not None]
    certificates = config["quality"]["certificates"]
    files = [] if certificates is None else [_folder_hash(Path(certificates).expanduser())]
    inputs = [_file_hash(Path(config[name]).expanduser()) for name in ("prompts", "text") if config[name] is not None]
    engine = config["engine"]
    plugins = [name for name in (*engine["logits_processors"], engine["cache_policy"]) if name is not None]
    inputs += [_file_hash(Path(name.rpartition(":")[0]).expanduser()) for name in plugins]
    # Python brings the pages that are read where no file is named.
    made_by = [sources_hash("kernels", "moe", "exits", "dynamic"), processor(), sys.version]
    text = json.dumps([measured, models, files, inputs, made_by], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Records:
    """The directory of a sweep.

    Arguments:
        output: it; made when it is not there.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self._jobs, self._run = output / "jobs", output / "run"

    def begin(self) -> None:
        """Clear the list of the previous run's jobs; records are kept."""
        shutil.rmtree(self._run, ignore_errors=True)
        self._run.mkdir(parents=True)
        self._jobs.mkdir(exist_ok=True)

    def finished(self, key: str) -> bool:
        """Whether a job of this key has measured what it should."""
        file = self._jobs / f"{key}.json"
        return file.exists() and "error" not in self.read(key)

    def read(self, key: str) -> dict[str, Any]:
        """A job's record."""
        return json.loads((self._jobs / f"{key}.json").read_text())

    def write(self, key: str, record: dict[str, Any]) -> None:
        """Store a job's result, atomically."""
        partial = self._jobs / f".{key}.{os.getpid()}"
        partial.write_text(json.dumps(record, indent=1, default=str))
        partial.replace(self._jobs / f"{key}.json")

    def done(self, number: int, key: str) -> None:
        """Record that a job of this run has ended, whether it measured, failed or had been finished before."""
        partial = self._run / f".{number}.partial"
        partial.write_text(key)
        partial.replace(self._run / str(number))

    def count(self) -> int:
        """Jobs of this run that have ended."""
        return sum(not file.name.startswith(".") for file in self._run.iterdir()) if self._run.is_dir() else 0

    def of_run(self) -> list[dict[str, Any]]:
        """The records of this run's jobs, by their number; each once."""
        files = sorted((f for f in self._run.iterdir() if not f.name.startswith(".")), key=lambda f: int(f.name))
        keys = dict.fromkeys(file.read_text() for file in files)
        return [self.read(key) for key in keys]


def _model_hash(name: str) -> str:
    path = resolve_model(name, progress=False)
    digest = hashlib.sha256(backbone_hash(path).encode())
    for file in (JSON_FILE, TENSOR_FILE, CONTRIBUTIONS, PROMPTS_FILE, *_CONFIGURATION):
        digest.update(_file_hash(path / file).encode())
    digest.update(_folder_hash(path / CERTIFICATES).encode())
    return digest.hexdigest()


def _folder_hash(folder: Path) -> str:
    return hashlib.sha256("".join(_file_hash(file) for file in sorted(folder.glob("*.json"))).encode()).hexdigest()


def _file_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "none"


def provenance(llm: LLM) -> dict[str, Scalar]:
    """Flat names and values; those of the deployment are what a certificate is bound to."""
    return run_facts() | {f"deployment.{name}": value for name, value in llm.certificates.running.items()}
