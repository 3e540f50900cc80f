"""Generates while experts move, for ``test_rebalance.py``. Arguments: a JSON file of one job, a file for the answer.

A job names a model, keyword arguments of :class:`LLM`, prompts, how often they are run one after the other, and maybe a
rank that ends while experts move.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from dynamoe import LLM, SamplingParams
from dynamoe.dynamic.parallel.config import ParallelConfig, launched_rank
from dynamoe.dynamic.parallel.context import ParallelContext
from dynamoe.dynamic.parallel.decoder import ParallelDecoder
from dynamoe.dynamic.parallel.expert_ranks import ExpertRanks

if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    arguments = job["arguments"]
    if "parallel" in arguments:
        arguments |= {"parallel": ParallelConfig(**arguments["parallel"])}
    windows: list[tuple[int, float]] = []  # slots of rank 0's rows, and how uneven all ranks' work was
    moving: list[int] = []  # in front of each segment
    end_window, next_move = ExpertRanks._end_window, ExpertRanks.next_move

    def watched_end(experts: ExpertRanks) -> None:
        slots = int(experts._ran_NX.sum())
        end_window(experts)
        windows.append((slots, experts.imbalance or 0.0))

    def watched_move(experts: ExpertRanks) -> object:
        message = next_move(experts)
        moving.append(-1 if message is None else int(message.operation))
        return message

    ExpertRanks._end_window, ExpertRanks.next_move = watched_end, watched_move  # type: ignore[method-assign, assignment]
    if launched_rank() == job.get("dies"):
        swap = ParallelContext.swap

        def dying_swap(context: ParallelContext, *given: Any) -> Any:
            if given[-1] == "moves" and context.received["moves"]:  # in the middle of a layer
                os._exit(0)
            return swap(context, *given)

        ParallelContext.swap = dying_swap  # type: ignore[method-assign]
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "enable_prefix_caching": False, **arguments}
    llm = LLM(job["model"], **{"dtype": "float32", "progress": False, **limits})
    greedy = SamplingParams(max_tokens=job["max_tokens"], temperature=0, ignore_eos=True, logprobs=1)
    rounds = [llm.generate(job["prompts"], greedy, use_tqdm=False) for _ in range(job["rounds"])]
    texts = [
        [
            (list(output.outputs[0].token_ids), [list(map(str, p.values())) for p in output.outputs[0].logprobs or []])
            for output in outputs
        ]
        for outputs in rounds
    ]
    found = {"rounds": texts, "windows": windows, "moving": moving}
    decoder = llm.model.decoder
    if isinstance(decoder, ParallelDecoder):
        exchange = decoder.exchange()
        found |= {"moves": exchange.expert_moves, "imbalance": exchange.imbalance, "received": exchange.received}
    Path(sys.argv[2]).write_text(json.dumps(found))
