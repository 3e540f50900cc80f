"""Settings of the engine: how many requests run together, how much memory their keys and values may take."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...kernels.api.ranges import check_flags, check_ranges, parse_bytes
from .structured_limits import StructuredLimits


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits of one engine.

    Arguments:
        max_num_seqs: sequences that run in one step.
        max_num_batched_tokens: rows that one step may compute; longer prompts are prefilled in chunks.
        max_model_len: longest prompt plus output, in tokens; None takes the model's own maximum.
        kv_memory: bytes for keys and values, as a number or with a unit (``2GiB``, ``512MiB``); None takes what
            ``max_num_seqs`` requests of a typical length need, within a quarter of the free memory. Several processes
            share it.
        block_size: tokens per page of the cache.
        enable_prefix_caching: share the pages of equal prompt beginnings between requests.
        max_waiting: queued requests beyond this many are refused (``EngineFull``).
        park_rows: has no effect: rows are no longer parked. It is still read, for configurations that name it.
        prefill_slowdown: how many times as long a step with running streams may take for chunks of prompts beside them
            as without, above 1; None: as long as ``max_num_batched_tokens`` rows take. ``fair`` is twice for one
            prompt, and once more for each further one that waits; ``auto`` is that in the server, and no bound
            elsewhere. Where there is a bound, steps are timed when the engine starts.
        measure_step_times: time steps of 1, 2, 4 … rows when the engine starts (:attr:`.Engine.step_times`).
        seed: seeds the draws of requests that bring no seed of their own.
        cache_policy: plug-in that decides which pages of running sequences are kept, ``FILE.py:Class`` or the name of
            an entry point; None keeps all. It runs code: only the command line and Python may name it.
        logits_processors: plug-ins that edit logits, in this order, each ``FILE.py:Class`` or the name of an entry
            point. They run code: only the command line and Python may name them.
        structured: limits of structured outputs, see :class:`StructuredLimits`.
    """

    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    kv_memory: int | str | None = None
    block_size: int = 16
    enable_prefix_caching: bool = True
    max_waiting: int = 1024
    park_rows: bool = True
    prefill_slowdown: float | str | None = "auto"
    measure_step_times: bool = False
    seed: int = 0
    cache_policy: str | None = None
    logits_processors: tuple[str, ...] = ()
    structured: StructuredLimits = field(default_factory=StructuredLimits)

    def __post_init__(self) -> None:
        if isinstance(self.logits_processors, str):
            raise ValueError(f"engine.logits_processors must be a list, not {self.logits_processors!r}")
        object.__setattr__(self, "logits_processors", tuple(self.logits_processors))
        check_flags(self, "engine.")
        counts = ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "max_waiting")
        check_ranges(self, *counts, where="engine.", least=1)
        check_ranges(self, "seed", where="engine.", least=-(2**63), below=2**63)
        if self.prefill_slowdown not in ("auto", "fair"):
            if isinstance(self.prefill_slowdown, str):
                wanted = "auto, fair or a number above 1"
                raise ValueError(f"engine.prefill_slowdown must be {wanted}, not {self.prefill_slowdown!r}")
            check_ranges(self, "prefill_slowdown", where="engine.", above=1)
        if self.kv_memory is not None:
            parse_bytes(self.kv_memory, "engine.kv_memory")
