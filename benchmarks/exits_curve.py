"""What exits give up and what they save, through the real engine: ``python benchmarks/exits_curve.py MODEL_DIRECTORY``.

Held-out prompts are continued greedily at several thresholds, the same at every exit. One full pass over what was
served then says which token the full model would have chosen after each *served* prefix. Per threshold: the share of
served tokens that are not that token, with a 95 % interval by resampling requests; the share of layers that were
launched for decoded tokens, counted from ``RequestOutput.compute``; what keys and values of skipped layers took is
reported as rows times layers; tokens per second, each setting beside a run of the full model.

Prompts are the fifth of Python's language reference that exits are never trained on. Written to
``results/exits_curve_NAME.json`` and, with matplotlib, an SVG beside it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from checkout import RESULTS
from dynamoe.dynamic.calibration_text import reference_pages
from dynamoe.dynamic.llm import LLM
from dynamoe.dynamic.outputs import RequestOutput
from dynamoe.dynamic.sampling_params import SamplingParams
from dynamoe.dynamic.train.frozen_states import collect_served_states
from dynamoe.dynamic.train.served import blocks_from
from machine import processor

RESAMPLES = 2000
ROWS = 1024  # whose logits are in memory at once


def settings(threshold: float | None, exits: tuple[int, ...], tokens: int) -> SamplingParams:
    """Greedy, to a fixed length; None runs all layers."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        quality="exact" if threshold is None else None,
        exit_thresholds={} if threshold is None else dict.fromkeys(exits, threshold),
    )


def disagreements(llm: LLM, outputs: list[RequestOutput]) -> torch.Tensor:
    """Share of each request's served tokens that are not the full model's choice after the served prefix, (requests,).

    The first token comes from the prompt, which runs all layers; it counts as served like the others.
    """
    decoder = llm.model.decoder
    prompt = len(outputs[0].prompt_token_ids)
    served_NL = torch.tensor([[*o.prompt_token_ids, *o.outputs[0].token_ids] for o in outputs])
    length = served_NL.shape[1] - prompt
    batches = [([n], row_L[None, :-1], prompt - 1) for n, row_L in enumerate(served_NL)]
    states = collect_served_states(decoder, batches, (), len(outputs) * length)
    choices = [decoder.logits(x.to(decoder.device)).argmax(-1).cpu() for x in states.final_RD.split(ROWS)]
    wrong_NL = torch.cat(choices).view(-1, length) != served_NL[:, prompt:]
    return wrong_NL.double().mean(1)


def interval(losses_N: torch.Tensor) -> list[float]:
    """95 % interval of the mean by resampling requests with replacement."""
    count = losses_N.numel()
    picks = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    return losses_N[picks].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def executed(outputs: list[RequestOutput], num_layers: int) -> dict[str, Any]:
    """Launched rows of decoded tokens: prompts, which run all layers, are taken off."""
    rows, full, projected, leaves = 0, 0, 0, dict[int, int]()
    for output in outputs:
        assert output.compute is not None
        computed = len(output.prompt_token_ids) - output.num_cached_tokens
        rows += output.compute.layer_rows - num_layers * computed
        full += num_layers * (len(output.outputs[0].token_ids) - 1)
        projected += output.compute.projected_rows
        for depth in output.outputs[0].layers[1:]:
            leaves[depth] = leaves.get(depth, 0) + 1
    total = sum(leaves.values())
    return {
        "executed_layer_share": rows / full,
        "projected_layer_share": projected / full,
        "tokens_by_layers": {str(depth): count / total for depth, count in sorted(leaves.items())},
    }


def timed(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> tuple[list[RequestOutput], float]:
    started = time.perf_counter()
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    return outputs, sum(len(o.outputs[0].token_ids) for o in outputs) / (time.perf_counter() - started)


def measure(llm: LLM, prompts: list[list[int]], thresholds: list[float], tokens: int) -> list[dict[str, Any]]:
    """One record per threshold, full depth first. Every timed run stands beside one of the full model."""
    exits, num_layers = tuple(llm.model.decoder.exits), llm.model.spec.num_layers
    timed(llm, prompts[:1], settings(1.0, exits, 4))  # compiled kernels, measured segments
    timed(llm, prompts[:1], settings(None, exits, 4))
    points = []
    for threshold in (None, *thresholds):
        _, full_rate = timed(llm, prompts, settings(None, exits, tokens))
        outputs, rate = timed(llm, prompts, settings(threshold, exits, tokens))
        losses_N = disagreements(llm, outputs)
        points.append(
            {
                "threshold": threshold,
                "disagreement": float(losses_N.mean()),
                "interval_95": interval(losses_N),
                **executed(outputs, num_layers),
                "tokens_per_second": rate,
                "full_tokens_per_second": full_rate,
            }
        )
        print(row(points[-1]), flush=True)
    return points


def row(point: dict[str, Any]) -> str:
    """One line of the table."""
    low, high = point["interval_95"]
    name = "full" if point["threshold"] is None else f"{point['threshold']:.3f}"
    rate, full = point["tokens_per_second"], point["full_tokens_per_second"]
    return (
        f"| {name} | {point['disagreement']:.2%} ({low:.2%} … {high:.2%}) | {point['executed_layer_share']:.1%}"
        f" | {rate:.1f} | {rate / full:.2f} |"
    )


def plot(points: list[dict[str, Any]], title: str, file: Path) -> None:
    """Disagreement over the share of layers executed, with the intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(points, key=lambda p: p["executed_layer_share"])
    x, y = [[100 * p[key] for p in ordered] for key in ("executed_layer_share", "disagreement")]
    reach = [[abs(100 * (p["interval_95"][side] - p["disagreement"])) for p in ordered] for side in (0, 1)]
    axes.errorbar(x, y, reach, marker="o", capsize=3)
    axes.set(
        xlabel="layers executed for decoded tokens, %",
        ylabel="served tokens that differ from the full model's, %",
        title=title,
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of a model with exits")
    parser.add_argument("--name", help="of the result file; the directory's name otherwise")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--at-once", type=int, default=8)
    thresholds = [0.99, 0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6]
    parser.add_argument("--thresholds", type=float, nargs="*", default=thresholds)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    llm = LLM(options.model, dtype=options.dtype, max_num_seqs=options.at_once, enable_prefix_caching=False)
    if not llm.model.decoder.exits:
        parser.error(f"{options.model} has no exits")
    pages = llm.model.tokenizer.encode_batch(reference_pages(held_out=True), add_special_tokens=False)
    stream = torch.tensor([token for page in pages for token in page])
    prompts = blocks_from({"held out": stream}, options.requests, options.prompt_tokens, 0)
    print("| threshold | disagreement (95 %) | layers executed | tokens/s | of full |\n|---|---|---|---|---|")
    points = measure(llm, prompts, options.thresholds, options.tokens)
    name = options.name or options.model.name
    result = {
        "model": name,
        "dtype": options.dtype,
        "layers": llm.model.spec.num_layers,
        "exits": list(llm.model.decoder.exits),
        "requests": len(prompts),
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
    file = options.output / f"exits_curve_{name}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    try:
        plot(points, f"{name}, exits after {', '.join(map(str, result['exits']))} layers", file.with_suffix(".svg"))
    except ImportError:
        print("no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()
