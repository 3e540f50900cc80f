"""Models whose experts do not fit into memory: packed once into a file, of which a bounded part is in memory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from ...kernels.api.disk import cache_home
from ...kernels.api.ranges import parse_bytes
from ...kernels.api.sources import sources_hash
from ...kernels.api.types import ExpertWeights, Routing
from ...kernels.cpu.backend import CpuBackend
from ...kernels.cpu.placed import ExpertParts, placed_experts
from ...kernels.torch.backend import TorchBackend
from ..checkpoint.expert_file import ExpertFile, ExpertFileWriter
from ..checkpoint.weights import CheckpointError
from .expert_pool import ExpertPool, Numbers
from .layer_weights import LayerWeights
from .load_config import LoadConfig
from .routing import router_logits
from .spec import ModelSpec

GuessOfRows = Callable[[torch.Tensor], Numbers | None]
log = logging.getLogger(__name__)
_MANY = 4  # times as many choices as there are experts: all of them are expected


class ExpertMemory:
    """Has the experts of a model's mixtures on the disk, and as many as it may in memory.

    Arguments:
        path: the checkpoint.
        backend: packs and runs them.
        described: what is done to the weights.
        memory: bytes for experts, as a number or with a unit.
    """

    def __init__(self, path: Path, spec: ModelSpec, backend: CpuBackend, described: str, memory: int | str) -> None:
        self._spec, self._backend, self._memory = spec, backend, parse_bytes(memory, "expert_memory")
        name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
        self._folder, self._made_of = cache_home() / "experts" / name, _made_of(path, backend, described)
        self._writer: ExpertFileWriter | None = None
        self._file = self._open()
        if self._file is None:
            self._writer = ExpertFileWriter(self._folder, self._made_of)
            self._file = self._open()  # another process may have packed them meanwhile
            if self._file is not None:
                self._writer.discard()
                self._writer = None

    def _open(self) -> ExpertFile | None:
        try:
            return ExpertFile(self._folder, self._made_of)
        except CheckpointError as reason:
            log.info("experts are to be packed: %s", reason)
            return None

    @classmethod
    def of(
        cls, config: LoadConfig, path: Path, spec: ModelSpec, backend: TorchBackend, described: str, *, shared: bool
    ) -> ExpertMemory | None:
        """What a configuration asks for; None: all experts are in memory.

        Arguments:
            shared: whether several processes share the model.

        Raises:
            ValueError: the model cannot run like that.
        """
        if config.expert_memory is None:
            return None
        if shared:
            raise ValueError("expert_memory goes with one process, not with parallel axes")
        if not isinstance(backend, CpuBackend):
            raise ValueError(f"expert_memory needs backend=cpu, not {backend.name}")
        if not any(layer.moe is not None and not layer.moe.is_dense for layer in spec.layers):
            raise ValueError(f"expert_memory: this {spec.family} model has no mixtures of experts")
        return cls(path, spec, backend, described, config.expert_memory)

    def pack(self, number: int, load: Callable[[], ExpertWeights]) -> ExpertWeights:
        """The experts of a layer; of a mixture none yet: :meth:`finish` gives them.

        Arguments:
            load: packs them.

        Raises:
            ValueError: they are not quantised, or in several formats.
            CheckpointError: the disk is full, or another error of it.
        """
        moe = self._spec.layers[number].moe
        if moe is None or moe.is_dense:
            return load()
        if self._writer is not None:
            try:
                parts = ExpertParts.of(load())
            except BaseException:
                self._writer.discard()
                raise
            if parts is None:
                self._writer.discard()
                raise ValueError(
                    f"expert_memory: the experts of layer {number} are not quantised, or in several formats; it takes "
                    "those that are in one, as with quantization=int4"
                )
            self._writer.add(number, parts.gate_up, parts.down, parts.shared, parts.facts)
        return ExpertWeights.none(self._spec.hidden_size, self._spec.activation)

    def finish(self, layers: Sequence[LayerWeights]) -> tuple[list[LayerWeights], ExpertPool]:
        """The layers with their experts, and what has these in memory.

        Raises:
            ValueError: the memory does not hold the experts of one layer.
        """
        if self._writer is not None:
            self._writer.finish()
            self._file = ExpertFile(self._folder, self._made_of)
        assert self._file is not None
        pool, found = ExpertPool(self._file, self._memory), list(layers)
        log.info("%d of %d experts fit into memory", pool.num_slots, pool.num_experts)
        for number, records in self._file.layers.items():
            source = _Source(pool, number, records.num_experts, self._guess(number + 1, layers))
            shared, backend = self._file.shared(number), self._backend
            ffn = placed_experts(backend.isa_number, backend.dtype, records.facts, shared, source)
            found[number] = replace(layers[number], ffn=ffn)
        return found, pool

    def _guess(self, number: int, layers: Sequence[LayerWeights]) -> GuessOfRows | None:
        """What a layer will probably use, by its router, of the rows that the experts of the layer before read."""
        assert self._file is not None
        if number not in self._file.layers:
            return None
        weights, moe, count = layers[number], self._spec.layers[number].moe, self._file.layers[number].num_experts
        assert moe is not None
        assert weights.router is not None
        router, every = weights.router, np.arange(count)

        def guess(x_TD: torch.Tensor) -> Numbers | None:
            if x_TD.shape[0] * moe.router.top_k > _MANY * count:
                return every
            if x_TD.shape[1] != router.in_features:
                return None
            logits_TE = router_logits(self._backend, weights, moe.router, x_TD)
            routing = self._backend.route(logits_TE, moe.router, **weights.routing)
            chosen = np.unique(routing.expert_ids_TK.numpy()).astype(np.int64) + moe.num_always_on
            return np.concatenate((every[: moe.num_always_on], chosen[chosen < count]))

        return guess


@dataclass(frozen=True)
class _Source:
    """The experts of one layer, see :class:`.ExpertSource`."""

    pool: ExpertPool
    number: int
    num_experts: int
    guess: GuessOfRows | None

    def bring(self, x_TD: torch.Tensor, routing: Routing | None) -> tuple[torch.Tensor, torch.Tensor]:
        used = np.arange(self.num_experts)
        if routing is not None:
            ids = routing.expert_ids_TK
            used = np.unique((ids if routing.counts_T is None else ids[routing.used_TK]).numpy()).astype(np.int64)
        guess = None if self.guess is None else partial(self.guess, x_TD)
        return self.pool.words, self.pool.bring(self.number, used, self.number + 1, guess)


def _made_of(path: Path, backend: CpuBackend, described: str) -> str:
    """What packed experts depend on: the checkpoint's files by size and time, the settings, the code that packs."""
    files = sorted(file for file in path.iterdir() if file.is_file())
    stats = [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    code = sources_hash("kernels/api", "kernels/cpu", "kernels/torch", "dynamic/checkpoint", "dynamic/model")
    facts = [stats, backend.isa, str(backend.dtype), described, code]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
