"""How a process takes its place in a model that several share: join the others, make the decoder, become a worker."""

from __future__ import annotations

import atexit
import hashlib
import os
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...kernels.torch.backend import TorchBackend
from ...version import __version__
from ..checkpoint.weights import Checkpoint
from ..model.decoder import Decoder
from ..model.placement import Join
from ..model.quantization import Quantization
from ..model.spec import ModelSpec
from .config import ParallelConfig, launched_size
from .context import ParallelContext
from .decoder import ParallelDecoder
from .pipeline import PipelineDecoder
from .shards import Shard


class PlacedShard(Shard):
    """A shard as the loader follows it: :class:`..model.placement.Placement`."""

    def make_decoder(self, spec: ModelSpec, backend: TorchBackend, **parts: Any) -> Decoder:
        """This rank's decoder; takes what :class:`Decoder` takes."""
        make = ParallelDecoder if len(self.stages) == 1 else PipelineDecoder
        return make(spec, backend, shard=self, **parts)


def joining(config: ParallelConfig | None) -> Join | None:
    """How the loader meets the other processes; None where there are none."""
    if config is None or max(config.size, launched_size()) <= 1:
        return None
    return partial(join, config)


def join(
    config: ParallelConfig,
    spec: ModelSpec,
    path: Path,
    backend: TorchBackend,
    quantization: Quantization,
    stored: object,
    exit_layers: Collection[int],
) -> PlacedShard:
    """Meet the other ranks and learn which part is ours.

    Arguments:
        spec, path: of the model.
        backend: of this rank.
        quantization: what the weights become.
        stored: how the checkpoint is quantised, if it is.
        exit_layers: after how many layers rows may leave.

    Raises:
        ValueError: when ranks were started differently, or the model cannot be split like this.
    """
    if config.record_load is not None and not Path(config.record_load).expanduser().parent.is_dir():
        raise ValueError(f"parallel.record_load={config.record_load} lies in no directory that exists")
    context = ParallelContext(config, backend.device)
    context.check_alike(
        {
            "version": __version__,
            "torch": torch.__version__,
            "parallel": config,
            "dtype": backend.dtype,
            "backend": backend.name,
            "instruction set": getattr(backend, "isa", ""),
            "quantization": quantization,
            "stored quantization": hashlib.sha256(repr(stored).encode()).hexdigest(),
            "checkpoint": _fingerprint(path),
            "exits": tuple(exit_layers),
            "placement": hashlib.sha256(_content(config.placement).encode()).hexdigest(),
            "model": hashlib.sha256(repr(spec).encode()).hexdigest(),
        }
    )
    if config.shared_memory:
        context.share_memory(backend)
    return PlacedShard(spec, context, exit_layers)


def follow_if_worker(decoder: Decoder) -> None:
    """A worker works until rank 0 ends, and then exits; rank 0 sees to it that the workers hear of its end.

    Raises:
        SystemExit: on every worker, with 0 after an orderly end.
        RuntimeError: on a worker whose rank 0 has died.
    """
    if not isinstance(decoder, ParallelDecoder):
        return
    if decoder.context.leads:
        atexit.register(decoder.close)
        return
    decoder.follow()
    raise SystemExit(0)


def _content(file: str | None) -> str:
    try:
        return "" if file is None else Path(file).expanduser().read_text()
    except OSError as error:
        raise ValueError(f"parallel.placement={file} cannot be read: {error}") from error


def _fingerprint(path: Path) -> str:
    """A hash of names, shapes and places of all tensors and of the files' sizes: reading the weights takes too long."""
    checkpoint: Any = Checkpoint(path)
    sizes = {info.file: os.path.getsize(path / info.file) for info in checkpoint.values()}
    described = sorted((name, repr(info)) for name, info in checkpoint.items())
    return hashlib.sha256(repr((described, sorted(sizes.items()))).encode()).hexdigest()
