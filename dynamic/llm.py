"""The Python API: load a model by name, generate for many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .contract.catalog import CertificateSource
from .convert.load_model import load_model
from .engine.config import EngineConfig
from .engine.offline import OfflineEngine
from .engine.vllm_keywords import check_vllm_keywords
from .model.load_config import LoadConfig, WeightCacheConfig
from .model.machine import release_threads
from .parallel.config import ParallelConfig


class LLM(OfflineEngine):
    """A model and an engine for offline use, with the names that users of vLLM know.

    Arguments:
        model: a local directory, a Hub id, or a shipped model (``default``, ``tiny``).
        dtype, device, backend, quantization, quantize_lm_head, dequantize, kv_cache_dtype, expert_memory,
            weight_cache: see :class:`LoadConfig`.
        progress: show a bar while loading.
        experts_per_token: use fewer routed experts per token than the model was made for.
        certificates: directory that ``dynamoe calibrate`` filled, for requests with a :class:`Quality`; None takes the
            certificates that lie beside the model.
        tensor_parallel_size, expert_parallel_size, pipeline_parallel_size, data_parallel_size: see
            :class:`ParallelConfig`; for scripts under ``torchrun``.
        parallel: instead of these four, with time-out and micro-batches.
        max_model_len, max_num_seqs, max_num_batched_tokens, enable_prefix_caching, kv_memory, block_size, seed,
            cache_policy, logits_processors: see :class:`EngineConfig`.
        skip_tokenizer_init: leave the tokenizer alone, or do without one; the model takes and gives token ids.
        vllm_keywords: further keywords of vLLM's ``LLM``, where they change nothing (:mod:`.engine.vllm_keywords`);
            ``kv_cache_memory_bytes`` stands for ``kv_memory``.

    Raises:
        TypeError: for a keyword that neither this class nor vLLM's knows.
        ValueError: for a model that cannot be found or is not supported, settings out of range, or a plug-in that
            cannot be loaded.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        backend: str = "auto",
        progress: bool = True,
        max_model_len: int | None = None,
        max_num_seqs: int = EngineConfig.max_num_seqs,
        max_num_batched_tokens: int = EngineConfig.max_num_batched_tokens,
        enable_prefix_caching: bool = True,
        kv_memory: int | str | None = None,
        block_size: int = EngineConfig.block_size,
        seed: int = 0,
        cache_policy: str | None = None,
        logits_processors: Sequence[str] = (),
        experts_per_token: int | None = None,
        quantization: str | None = None,
        quantize_lm_head: bool = True,
        dequantize: bool = False,
        kv_cache_dtype: str = "auto",
        expert_memory: int | str | None = None,
        weight_cache: WeightCacheConfig | None = None,
        certificates: str | Path | None = None,
        tensor_parallel_size: int = 1,
        expert_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        data_parallel_size: int = 1,
        parallel: ParallelConfig | None = None,
        skip_tokenizer_init: bool = False,
        **vllm_keywords: Any,
    ) -> None:
        kv_bytes = vllm_keywords.pop("kv_cache_memory_bytes", None)
        if None not in (kv_bytes, kv_memory):
            raise ValueError(f"give either kv_memory={kv_memory!r} or kv_cache_memory_bytes={kv_bytes!r}")
        check_vllm_keywords(vllm_keywords)
        config = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            kv_memory=kv_bytes if kv_memory is None else kv_memory,
            block_size=block_size,
            enable_prefix_caching=enable_prefix_caching,
            seed=seed,
            cache_policy=cache_policy,
            logits_processors=tuple(logits_processors),
        )
        sizes = (tensor_parallel_size, expert_parallel_size, pipeline_parallel_size, data_parallel_size)
        if parallel is None:
            tensor, expert, pipeline, data = sizes
            parallel = ParallelConfig(tensor=tensor, expert=expert, pipeline=pipeline, data=data)
        elif sizes != (1, 1, 1, 1):
            raise ValueError(f"give either parallel= or the sizes of its axes, not both: {parallel} and {sizes}")
        load = LoadConfig(
            dtype=dtype,
            device=device,
            backend=backend,
            quantization=quantization or "none",
            quantize_lm_head=quantize_lm_head,
            dequantize=dequantize,
            kv_cache_dtype=kv_cache_dtype,
            expert_memory=expert_memory,
            weight_cache=weight_cache or WeightCacheConfig(),
        )
        self._start(model, load, config, progress, experts_per_token, certificates, parallel, skip_tokenizer_init)

    @classmethod
    def from_config(
        cls,
        model: str | Path,
        load: LoadConfig,
        engine: EngineConfig,
        *,
        progress: bool = True,
        experts_per_token: int | None = None,
        certificates: str | Path | None = None,
        parallel: ParallelConfig | None = None,
    ) -> LLM:
        """The same out of whole configurations."""
        llm = cls.__new__(cls)
        llm._start(model, load, engine, progress, experts_per_token, certificates, parallel)
        return llm

    def _start(
        self,
        model: str | Path,
        load: LoadConfig,
        engine: EngineConfig,
        progress: bool,
        experts_per_token: int | None,
        certificates: str | Path | None,
        parallel: ParallelConfig | None,
        skip_tokenizer_init: bool = False,
    ) -> None:
        loaded = load_model(
            model,
            load,
            progress=progress,
            experts_per_token=experts_per_token,
            parallel=parallel,
            skip_tokenizer_init=skip_tokenizer_init,
        )
        OfflineEngine.__init__(self, loaded, engine)
        self.certificates = CertificateSource(self.engine, None if certificates is None else Path(certificates))
        self.catalog = self.certificates.read()
        release_threads()  # whoever generates may be another thread
        self.engine.contracts = self.catalog
