"""How a model is loaded, said once for the loader, the Python API and the commands."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...kernels.api.ranges import check_flags, parse_bytes


@dataclass(frozen=True, kw_only=True)
class WeightCacheConfig:
    """Weights that ``quantization`` made, kept on the disk for the next start. They change nothing but its time.

    Arguments:
        enabled: whether they are kept, and read where they are.
        folder: where; None: ``weights`` in the folder of prepared models.
        size: bytes that all of them may take together, as a number or with a unit; those that were used least recently
            make room.
        least: bytes of a checkpoint that is worth it; smaller ones are quantised at every start.

    Raises:
        ValueError: naming what is no number of bytes, or no flag.
    """

    enabled: bool = True
    folder: str | None = None
    size: int | str = "20GiB"
    least: int | str = "512MiB"

    def __post_init__(self) -> None:
        check_flags(self, "weight_cache.")
        parse_bytes(self.size, "weight_cache.size")
        parse_bytes(self.least, "weight_cache.least")


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """How a model is loaded.

    Arguments:
        dtype: ``auto`` (the checkpoint's own; instead of float16, CPUs take float32, or bfloat16 with quantised
            weights), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto`` (a GPU where there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        backend: which kernels compute; ``auto`` takes the fastest that run here, ``cpu:avx512vnni`` (or another
            instruction set) what a processor would choose that has no better one.
        quantization: ``none``, or what the weights become while they are loaded: ``int8``, ``w8a8``, ``int4`` (also
            ``int4-g32``, ``int4-g128``, each also with ``-asym``), ``fp8`` or ``fp8-block``.
        quantize_lm_head: whether LM head and embedding become int8 then.
        dequantize: also load weights whose stored type has no format here, such as GGUF's IQ types, in 16 bits.
        kv_cache_dtype: ``auto`` (as ``dtype``), ``int8`` or ``fp8``, half the memory: what keys and values are kept in.
        expert_memory: bytes for the experts of mixtures, as a number or with a unit (``8GiB``), where not all fit: the
            others are read from the disk when they are needed; None keeps all. CPU, quantised experts.
        weight_cache: see :class:`WeightCacheConfig`.
    """

    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    quantization: str = "none"
    quantize_lm_head: bool = True
    dequantize: bool = False
    kv_cache_dtype: str = "auto"
    expert_memory: int | str | None = None
    weight_cache: WeightCacheConfig = field(default_factory=WeightCacheConfig)

    def __post_init__(self) -> None:
        if self.expert_memory is not None:
            parse_bytes(self.expert_memory, "expert_memory")
