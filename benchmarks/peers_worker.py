"""One engine in a process of its own, for ``peers.py``: loads a model, then answers one measurement per line of input.

It runs in that engine's Python environment, so it imports nothing but the standard library and the engine. A line of
input is ``{"tokens": [prompt ids, ...], "output_len": N}``; the answer is ``{"seconds": …}``. The first answer states
how long the start took. End of input ends the process.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Run = Callable[[list[list[int]], int], None]


def start_dynamoe(options: argparse.Namespace) -> tuple[Run, dict[str, Any], Callable[[], float]]:
    """Our engine, and a function that returns the share of a layer's experts a decode step hits."""
    import benchmark  # noqa: F401
    from dynamoe import LLM, SamplingParams

    llm = LLM(
        options.model,
        dtype=options.dtype,
        quantization=options.quantization,
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        progress=False,
    )
    decoder = llm.model.decoder
    backend = decoder.backend
    hits: list[float] = []
    at_once = 0

    def run(prompts: list[list[int]], output_len: int) -> None:
        nonlocal at_once
        at_once = len(prompts)
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        assert all(len(o.outputs[0].token_ids) == output_len for o in outputs)

    def experts_hit() -> float:
        share = sum(hits) / len(hits) if hits else 0.0
        hits.clear()
        return share

    def counted(x: Any, weights: Any, routing: Any) -> Any:
        if x.shape[0] == at_once:  # a step that only decodes
            hits.append(len(routing.expert_ids_TK.unique()) / weights.num_experts)
        return type(backend).experts(backend, x, weights, routing)

    if options.count:
        backend.experts = counted  # type: ignore[method-assign]
        decoder.stack = None  # operation by operation, so that the experts' one is seen

    import torch

    experts = sum(layer.ffn.nbytes for layer in decoder.layers)
    keys_BGPC = [layer.keys_BGPC for layer in llm.engine.runner.kv]
    embedding = 0 if decoder.embedding_VD is None else decoder.embedding_VD.nbytes  # of which a step reads few rows
    facts = {
        "version": "this checkout",
        "torch": torch.__version__,
        "backend": backend.name,
        "isa": getattr(backend, "isa", None),
        "expert_bytes": experts,
        "other_bytes": decoder.weight_bytes - experts - embedding,
        "cache_bytes_per_token": sum(2 * k.element_size() * k[0, :, 0].numel() for k in keys_BGPC),
    }
    return run, facts, experts_hit


def start_vllm(options: argparse.Namespace) -> tuple[Run, dict[str, Any], None]:
    """vLLM's offline engine; what makes it fast on CPUs (preloads, zentorch) is up to the environment."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{options.threads - 1}")
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    llm = LLM(
        options.model,
        dtype=options.dtype,
        quantization=None if options.quantization == "none" else options.quantization,
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=16,
        max_num_batched_tokens=4096,
        enable_prefix_caching=False,
        seed=0,
        disable_log_stats=True,
    )

    def run(prompts: list[list[int]], output_len: int) -> None:
        params = SamplingParams(
            temperature=0.0, max_tokens=output_len, min_tokens=output_len, ignore_eos=True, detokenize=False
        )
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        assert all(len(o.outputs[0].token_ids) == output_len for o in outputs)

    return run, {"version": vllm.__version__, "torch": torch.__version__}, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["dynamoe", "vllm"])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="none", help="in the engine's own words")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--count", action="store_true", help="count the experts that are hit; slows the run down")
    options = parser.parse_args()
    # Answers go to a copy of standard output; whatever the engine prints goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    begin = time.perf_counter()
    run, facts, experts_hit = {"dynamoe": start_dynamoe, "vllm": start_vllm}[options.engine](options)
    print(json.dumps({"start_seconds": time.perf_counter() - begin} | facts), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        begin = time.perf_counter()
        run(task["tokens"], task["output_len"])
        result: dict[str, float] = {"seconds": time.perf_counter() - begin}
        if experts_hit is not None:
            result["experts_hit"] = experts_hit()
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
