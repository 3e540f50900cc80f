"""The exits of a checkpoint, kept beside it: ``exits.json`` describes them, ``exits.safetensors`` holds the tensors.

The checkpoint itself stays an ordinary one, readable by programs without exits.

Names in ``exits.safetensors``, for an exit after 4 layers: ``exits.4.adapter.down_JD``, ``exits.4.adapter.up_DJ`` and
``exits.4.probe.*``, as :class:`ExitHeadAdapter` and :class:`Probe` name them. Shape suffixes: D hidden size, J rank.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .calibrators import Isotonic, Temperature, calibrator_from_json
from .exit_head import ExitHeadAdapter
from .probes import Probe, ProbeSpec

JSON_FILE, TENSOR_FILE = "exits.json", "exits.safetensors"
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ExitHeads:
    """Adapters, probes and calibrators by the number of layers in front of the exit.

    Arguments:
        adapters: exit-head adapter of every exit.
        probes, calibrators: present for all exits or for none.
        backbone_sha256: of the checkpoint's safetensors files that the heads were trained on.
        metrics: numbers of the training, as JSON values.
    """

    hidden_size: int
    adapters: dict[int, ExitHeadAdapter]
    probes: dict[int, Probe] = field(default_factory=dict)
    calibrators: dict[int, Temperature | Isotonic] = field(default_factory=dict)
    backbone_sha256: str
    metrics: dict = field(default_factory=dict)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """After how many layers the exits are."""
        return tuple(sorted(self.adapters))


def backbone_hash(directory: Path) -> str:
    """SHA-256 over the weights of a checkpoint: all its safetensors files but the exits', by name."""
    files = sorted(file for file in directory.glob("*.safetensors") if file.name != TENSOR_FILE)
    digest = hashlib.sha256()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for file, content in zip(files, pool.map(_hash_once, files), strict=True):
            digest.update(file.name.encode() + content)
    return digest.hexdigest()


def _hash_once(file: Path) -> bytes:
    stat = file.stat()
    return _file_hash(file.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _file_hash(file: Path, size: int, changed: int) -> bytes:
    """Exits, experts and certificates all need it at the start; the weights are read for it only once."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def save_heads(heads: ExitHeads, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the sidecar into a checkpoint's directory.

    Arguments:
        dtype: of the stored tensors.
    """
    tensors, exits = {}, []
    for layer in heads.exit_layers:
        parts: dict[str, torch.nn.Module] = {"adapter": heads.adapters[layer]}
        record: dict = {"after_layers": layer, "adapter_rank": heads.adapters[layer].down_JD.shape[0]}
        if layer in heads.probes:
            parts["probe"] = heads.probes[layer]
            record["probe"] = asdict(heads.probes[layer].spec)
        if layer in heads.calibrators:
            record["calibrator"] = heads.calibrators[layer].to_json()
        for part, module in parts.items():
            for name, tensor in module.state_dict().items():
                tensors[f"exits.{layer}.{part}.{name}"] = tensor.detach().cpu().to(dtype).contiguous()
        exits.append(record)
    save_file(tensors, directory / TENSOR_FILE)
    (directory / TENSOR_FILE).chmod(0o644)  # safetensors lets nobody else read what it writes
    summary = {
        "format": _FORMAT,
        "hidden_size": heads.hidden_size,
        "backbone_sha256": heads.backbone_sha256,
        "exits": exits,
        "metrics": heads.metrics,
    }
    (directory / JSON_FILE).write_text(json.dumps(summary, indent=1))


def load_heads(directory: Path) -> ExitHeads | None:
    """The sidecar of a checkpoint, in float32 on the CPU; None where there is none.

    Raises:
        ValueError: for another format, a damaged file, or when the weights beside it are not those that it was trained
            on.
    """
    if not (directory / JSON_FILE).is_file():
        return None
    try:
        return _read(directory)
    except (KeyError, TypeError, RuntimeError, OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{directory / JSON_FILE} or {TENSOR_FILE} beside it is damaged: {error!r}") from error


def _read(directory: Path) -> ExitHeads:
    summary = json.loads((directory / JSON_FILE).read_text())
    if summary["format"] != _FORMAT:
        raise ValueError(f"{directory / JSON_FILE} has format {summary['format']}; this version reads {_FORMAT}")
    found = backbone_hash(directory)
    if found != summary["backbone_sha256"]:
        raise ValueError(
            f"{directory / JSON_FILE} was trained on other weights: it names {summary['backbone_sha256'][:12]}, the"
            f" safetensors files beside it hash to {found[:12]}; train the exits again or remove {JSON_FILE}"
        )
    tensors = load_file(directory / TENSOR_FILE)
    hidden_size = summary["hidden_size"]
    adapters, probes, calibrators = {}, {}, {}
    for record in summary["exits"]:
        layer = record["after_layers"]
        adapters[layer] = ExitHeadAdapter(hidden_size, record["adapter_rank"])
        _fill(adapters[layer], tensors, f"exits.{layer}.adapter.")
        if "probe" in record:
            probes[layer] = Probe(ProbeSpec(**record["probe"]), hidden_size)
            _fill(probes[layer], tensors, f"exits.{layer}.probe.")
        if "calibrator" in record:
            calibrators[layer] = calibrator_from_json(record["calibrator"])
    return ExitHeads(
        hidden_size=hidden_size,
        adapters=adapters,
        probes=probes,
        calibrators=calibrators,
        backbone_sha256=found,
        metrics=summary["metrics"],
    )


def _fill(module: torch.nn.Module, tensors: dict[str, torch.Tensor], prefix: str) -> None:
    module.load_state_dict({name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)})
