"""Generates under a launcher, for ``test_parallel.py``. Arguments: a JSON file of one job, a file for rank 0's answer.

A job names a model, keyword arguments of :class:`LLM`, exit thresholds and an expert budget for every second request;
and prompts, where they are not the usual ones. Every rank but 0 leaves what it sent to experts beside the answer.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from dynamoe import LLM, SamplingParams
from dynamoe.dynamic.contract.deployment import deployment
from dynamoe.dynamic.parallel.config import ParallelConfig, launched_rank
from dynamoe.dynamic.parallel.decoder import ParallelDecoder
from dynamoe.dynamic.parallel.pipeline import PipelineDecoder
from dynamoe.kernels.api.types import Routing
from dynamoe.moe.dispatch import ExpertShares
from dynamoe.moe.exchange import ExpertExchange, PendingDispatch

PROMPTS = [[5, 9, 200, 31], [7] * 40, list(range(3, 90)), [11, 12], [250, 3, 77, 8, 120, 4]]


class Watched:
    """What a rank's rows need of the exchange between experts, told from their routing alone.

    Attributes:
        rows: of every KV shard, by segment.
        pairs: of rows and ranks that have one of their experts, by rank.
    """

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.pairs: list[int] = []
        begin, dispatch = ExpertExchange.begin, ExpertExchange.dispatch

        def watched_begin(exchange: ExpertExchange, shard_rows: list[int]) -> None:
            self.rows.append(list(shard_rows))
            begin(exchange, shard_rows)

        def watched_dispatch(
            exchange: ExpertExchange, x_TD: torch.Tensor, routing: Routing, shares: ExpertShares
        ) -> PendingDispatch:
            assert routing.counts_T is None
            there = [(local_E1[routing.expert_ids_TK.long()] >= 0).any(1).sum() for local_E1 in shares.local_XE1]
            self.pairs = [int(n) + before for n, before in zip(there, self.pairs or [0] * len(there), strict=True)]
            return dispatch(exchange, x_TD, routing, shares)

        ExpertExchange.begin, ExpertExchange.dispatch = watched_begin, watched_dispatch  # type: ignore[method-assign]


def tokens(
    model: str,
    arguments: dict[str, Any],
    thresholds: dict[str, float],
    budget: dict[str, Any],
    prompts: list[list[int]] = PROMPTS,
    max_tokens: int = 12,
    facts: bool = True,
) -> dict[str, object]:
    if "parallel" in arguments:
        arguments = {**arguments, "parallel": ParallelConfig(**arguments["parallel"])}
    limits = {"max_num_seqs": 3, "max_num_batched_tokens": 48, **arguments}
    llm = LLM(model, **{"dtype": "float32", "progress": False, **limits})
    exits = {int(layer): value for layer, value in thresholds.items()}
    greedy = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, logprobs=1)
    params = [greedy] * len(prompts)
    if exits or budget:
        params[::2] = [replace(greedy, quality=None, exit_thresholds=exits, **budget)] * len(params[::2])
        params[-1] = replace(params[-1], n=2)  # its choices share pages and copy them, while others' rows are owed
    outputs = llm.generate(prompts, params, use_tqdm=False)
    stats = llm.engine.stats()
    found: dict[str, object] = {
        "tokens": [list(choice.token_ids) for output in outputs for choice in output.outputs],
        "logprobs": [
            [found[token].logprob for token, found in zip(choice.token_ids, choice.logprobs or [], strict=True)]
            for output in outputs
            for choice in output.outputs
        ],
        "rows": list(stats.segment_rows),
        "preemptions": stats.preemptions,
        "cached_tokens": stats.prefix_cache_hits,
    }
    decoder = llm.model.decoder
    if isinstance(decoder, ParallelDecoder):
        context = decoder.context
        found |= {"sums": context.sums, "broadcasts": context.broadcasts, "received": dict(context.received)}
        found["shared"] = context.shares_memory
        found["expert_rows"] = decoder.exchange().expert_rows
    if isinstance(decoder, PipelineDecoder):
        links = decoder.links
        found |= {
            "stages": [[layers.start, layers.stop] for layers in decoder.stages.layers],
            "read": decoder.read_bytes,
            "cached_layers": [number for number, layer in enumerate(llm.engine.runner.kv) if layer.keys_BGPC.numel()],
            "ahead": links.bytes_ahead,
            "owed": links.bytes_deferred,
            "back": links.bytes_back,
            "decisions": links.bytes_decided,
            "unsent": [rows * 4 * decoder.spec.hidden_size for rows in decoder.unsent_rows],
            "row": 4 * decoder.spec.hidden_size,
        }
    # Behind all counts: it runs some tokens.
    return found | ({"deployment": deployment(llm.model, llm.engine.runner.exits)} if facts else {})


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    answer = Path(sys.argv[2])
    watched = Watched() if job.pop("watched", False) else None
    try:
        found = tokens(**job, facts=watched is None)  # what is watched is the requests' own work
        answer.write_text(json.dumps(found))
    finally:  # workers end within
        if watched is not None:
            record = {"rows": watched.rows, "pairs": watched.pairs}
            answer.with_name(f"rank{launched_rank()}.json").write_text(json.dumps(record))
