"""What expert budgets give up and save, through the engine: ``python benchmarks/expert_budget_curve.py MODEL``.

Held-out prompts are continued greedily at several settings of ``expert_keep`` and ``experts_per_token``. One full pass
over what was served says which token the full model would have chosen after each *served* prefix. Per setting: the
share of served tokens that are not that token, with a 95 % interval by resampling requests; the share of experts that
was launched for decoded tokens, counted from ``RequestOutput.compute``; tokens per second, each setting beside a run
of the full model. The model must have been through ``dynamoe experts``. Written to
``results/expert_budget_curve_NAME.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from checkout import RESULTS
from dynamoe.dynamic.contract.intervals import mean
from dynamoe.dynamic.contract.served_loss import disagreements
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.engine.outputs import RequestOutput
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.llm import LLM
from dynamoe.dynamic.model.machine import processor
from exits_curve import Prompts, corpus_prompts, reference_prompts, timed


def executed_share(outputs: list[RequestOutput], experts_per_row: int) -> float:
    """Experts launched for decoded tokens as a share of what the routers chose; prompts use all and are left out."""
    full = experts_per_row * sum(len(o.outputs[0].token_ids) - 1 for o in outputs)
    return 1 - sum(o.compute.skipped_experts for o in outputs if o.compute is not None) / full


def measure(llm: LLM, prompts: Prompts, settings: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """One record per setting, no budget first."""
    exact = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    experts = llm.model.spec.experts_in(range(llm.model.spec.num_layers))
    timed(llm, prompts.tokens[:2], exact)
    points = []
    for setting in ({}, *settings):
        _, full_rate = timed(llm, prompts.tokens, exact)
        params = replace(exact, quality=None, **setting) if setting else exact
        outputs, rate = timed(llm, prompts.tokens, params)
        losses_N = disagreements(llm.model.decoder, outputs)
        around = mean(losses_N)
        points.append(
            {
                **setting,
                "disagreement": around.value,
                "interval_95": [around.low, around.high],
                "executed_expert_share": executed_share(outputs, experts),
                "tokens_per_second": rate,
                "full_tokens_per_second": full_rate,
            }
        )
        print(row(setting, points[-1]), flush=True)
    return points


def row(setting: dict[str, Any], point: dict[str, Any]) -> str:
    """One line of the table."""
    name = ", ".join(f"{key}={value}" for key, value in setting.items()) or "all experts"
    low, high = point["interval_95"]
    speed = point["tokens_per_second"] / point["full_tokens_per_second"]
    loss = f"{point['disagreement']:.2%} | {low:.2%} … {high:.2%}"
    return f"| {name} | {loss} | {point['executed_expert_share']:.1%} | {speed:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model with calibrated experts: a name or a directory")
    parser.add_argument("--name", help="of the result file; the directory's name otherwise")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--keep", type=float, nargs="*", default=[0.95, 0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--experts", type=int, nargs="*", default=[1], help="settings of experts_per_token")
    parser.add_argument("--text", choices=("reference", "corpus"), default="reference")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    llm = LLM(
        resolve_model(options.model), dtype=options.dtype, max_num_seqs=options.at_once, enable_prefix_caching=False
    )
    corpus = options.text == "corpus"
    count, length = options.requests, options.prompt_tokens
    prompts = corpus_prompts(count, length) if corpus else reference_prompts(llm, count, length)
    print("| budget | differs | 95 % interval | experts executed | speed |\n|---|---:|---:|---:|---:|")
    settings: list[dict[str, Any]] = [{"expert_keep": keep} for keep in options.keep]
    settings += [{"experts_per_token": count} for count in options.experts]
    points = measure(llm, prompts, settings, options.tokens)
    name = options.name or Path(options.model).name
    result = {
        "model": name,
        "dtype": options.dtype,
        "text": options.text,
        "requests": len(prompts.tokens),
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.tokens,
        "at_once": options.at_once,
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "points": points,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"expert_budget_curve_{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
