"""Generates under a launcher, for ``test_parallel.py``. Arguments: a JSON file of one job, a file for rank 0's answer.

A job names a model, keyword arguments of :class:`LLM`, exit thresholds and an expert budget for every second request.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from dynamoe import LLM, SamplingParams
from dynamoe.dynamic.deployment import deployment
from dynamoe.dynamic.parallel.config import ParallelConfig
from dynamoe.dynamic.parallel.decoder import ParallelDecoder
from dynamoe.dynamic.parallel.pipeline import PipelineDecoder

PROMPTS = [[5, 9, 200, 31], [7] * 40, list(range(3, 90)), [11, 12], [250, 3, 77, 8, 120, 4]]


def tokens(
    model: str, arguments: dict[str, Any], thresholds: dict[str, float], budget: dict[str, Any]
) -> dict[str, object]:
    if "parallel" in arguments:
        arguments = {**arguments, "parallel": ParallelConfig(**arguments["parallel"])}
    llm = LLM(model, dtype="float32", progress=False, max_num_seqs=3, max_num_batched_tokens=48, **arguments)
    exits = {int(layer): value for layer, value in thresholds.items()}
    params = [SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)] * len(PROMPTS)
    if exits or budget:
        params[::2] = [
            SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, quality=None, exit_thresholds=exits, **budget)
        ] * 3
        params[-1] = replace(params[-1], n=2)  # its choices share pages and copy them, while others' rows are owed
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    found: dict[str, object] = {
        "tokens": [list(choice.token_ids) for output in outputs for choice in output.outputs],
        "rows": list(llm.engine.stats().segment_rows),
        "deployment": deployment(llm.model, llm.engine.runner.exits),
    }
    decoder = llm.model.decoder
    if isinstance(decoder, ParallelDecoder):
        context = decoder.context
        found |= {"sums": context.sums, "broadcasts": context.broadcasts, "received": dict(context.received)}
        found["expert_rows"] = decoder.exchange().expert_rows
    if isinstance(decoder, PipelineDecoder):
        links = decoder.links
        found |= {
            "stages": [[layers.start, layers.stop] for layers in decoder.stages.layers],
            "read": decoder.read_bytes,
            "cached_layers": [number for number, layer in enumerate(llm.engine.runner.kv) if layer.keys_BGPC.numel()],
            "ahead": links.bytes_ahead,
            "owed": links.bytes_owed,
            "back": links.bytes_back,
            "decisions": links.bytes_decided,
            "still_owed": decoder.rows_owed * 4 * decoder.spec.hidden_size,
            "row": 4 * decoder.spec.hidden_size,
        }
    return found


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(tokens(**job)))
