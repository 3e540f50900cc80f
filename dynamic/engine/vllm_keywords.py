"""Keyword arguments of vLLM's ``LLM`` that mean nothing here, or mean the same under another name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

# They tune how vLLM uses a GPU or what it logs. Results do not depend on them.
HARMLESS = frozenset(
    {
        "gpu_memory_utilization",
        "enforce_eager",
        "swap_space",
        "max_seq_len_to_capture",
        "disable_custom_all_reduce",
        "disable_async_output_proc",
        "disable_log_stats",
        "disable_log_requests",
        "enable_chunked_prefill",
        "compilation_config",
        "num_gpu_blocks_override",
        "max_logprobs",
        "max_num_partial_prefills",
        "async_scheduling",
        "distributed_executor_backend",
        "max_parallel_loading_workers",
        "use_tqdm_on_load",
    }
)
# Values that ask for what happens anyway; any other asks for what this engine cannot do.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "trust_remote_code": (False,),
    "hf_token": (None,),  # HF_TOKEN and HF_HOME of huggingface_hub count
    "download_dir": (None,),
    "cpu_offload_gb": (0,),
    "tokenizer": (None,),
    "tokenizer_mode": ("auto",),
    "load_format": ("auto", "safetensors"),
    "generation_config": ("auto",),
    "runner": ("auto", "generate"),
    "task": ("auto", "generate"),
    "revision": (None, "main"),
    "tokenizer_revision": (None, "main"),
    "code_revision": (None, "main"),
    "hf_overrides": (None, {}),
    "override_generation_config": (None, {}),
    "rope_scaling": (None, {}),
    "rope_theta": (None,),
    "enable_lora": (False,),
    "enable_expert_parallel": (False,),
    "enable_prompt_embeds": (False,),
    "speculative_config": (None,),
    "limit_mm_per_prompt": (None, {}),
    "guided_decoding_backend": ("auto", "guidance"),
    "structured_outputs_config": (None, {}, {"backend": "auto"}, {"backend": "guidance"}),
}


def check_vllm_keywords(options: Mapping[str, Any]) -> None:
    """Accept what changes nothing, with one warning for all of it.

    Raises:
        TypeError: for a keyword that neither knows.
        ValueError: for one whose value asks for what this engine does not do.
    """
    for name, value in options.items():
        if name not in HARMLESS and name not in NEUTRAL:
            raise TypeError(f"LLM got an unexpected keyword argument {name!r}")
        if name in NEUTRAL and value not in NEUTRAL[name]:
            accepted = " or ".join(repr(known) for known in NEUTRAL[name])
            raise ValueError(f"{name}={value!r} is not supported here, only {accepted}")
    if ignored := sorted(HARMLESS & set(options)):
        logger.warning("keywords of vLLM that have no effect here: %s", ", ".join(ignored))
