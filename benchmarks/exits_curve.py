"""What exits give up and what they save, through the real engine: ``python benchmarks/exits_curve.py MODEL_DIRECTORY``.

Held-out prompts are continued greedily at several thresholds, the same at every exit. One full pass over what was
served then tells which token the full model would have chosen after each *served* prefix. Per threshold: the share of
served tokens that are not that token, with a 95 % interval by resampling requests; the share of layers that were
launched for decoded tokens, counted from ``RequestOutput.compute``; what keys and values of skipped layers took is
reported as rows times layers; tokens per second, each setting beside a run of the full model.

Prompts are held-out text: by default the fifth of Python's language reference that exits are never trained on; with
``--text corpus`` the blocks that the recipe of ``tiny`` left unused, with figures per genre too; packages that training
never saw count apart. With ``--choose 0.02`` one half of the prompts chooses the threshold that saves most at
2 % disagreement, and the figures of the other half are reported for it. Written to ``results/exits_curve_NAME.json``
and, with matplotlib, an SVG beside it.
"""

import argparse
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from benchmark import command_line, name_of, surroundings, write
from dynamoe.dynamic.contract.calibration_runs import decoded_work
from dynamoe.dynamic.contract.intervals import mean
from dynamoe.dynamic.contract.served_loss import disagreements
from dynamoe.dynamic.convert.model_store import cache_home, resolve_model
from dynamoe.dynamic.engine.outputs import RequestOutput
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.llm import LLM
from dynamoe.dynamic.text.calibration_text import reference_pages
from dynamoe.dynamic.text.corpus import build_corpus, load_corpus
from dynamoe.dynamic.train.held_out import held_out_prompts
from dynamoe.dynamic.train.recipe_config import RecipeConfig
from dynamoe.dynamic.train.served import blocks_from


def greedy(tokens: int, **spent: Any) -> SamplingParams:
    """Greedy, to a fixed length: with thresholds or a budget, or all layers and experts."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    return replace(params, quality=None, **spent) if spent else params


def spent(llm: LLM, setting: dict[str, Any]) -> dict[str, Any]:
    """What a request spends at a setting: a ``threshold`` is the same at every exit, and None runs all layers."""
    if "threshold" not in setting:
        return setting
    threshold = setting["threshold"]
    return {} if threshold is None else {"exit_thresholds": dict.fromkeys(llm.model.decoder.exits, threshold)}


def executed(outputs: list[RequestOutput], num_layers: int) -> dict[str, Any]:
    """Launched rows of decoded tokens, of layers and of their experts: prompts, which run in full, are taken off."""
    works = [decoded_work(output, num_layers) for output in outputs]
    _, rows, full, experts, skipped = (sum(counts) for counts in zip(*works, strict=True))
    depths = Counter(depth for output in outputs for depth in output.outputs[0].layers[1:])
    return {
        "executed_layer_share": rows / full,
        "projected_layer_share": sum(o.compute.projected_rows for o in outputs if o.compute is not None) / full,
        "tokens_by_layers": {str(depth): count / depths.total() for depth, count in sorted(depths.items())},
        "executed_expert_share": 1 - skipped / experts if experts else 1.0,
    }


class Prompt(NamedTuple):
    """The beginning of a held-out text."""

    genre: str
    tokens: list[int]


def halves(prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Every other prompt of each genre."""
    ordered = sorted(prompts, key=lambda prompt: prompt.genre)  # stable: in order inside a genre
    return ordered[::2], ordered[1::2]


def chosen_prompts(llm: LLM, text: str, count: int, length: int) -> list[Prompt]:
    """Held-out prompts of the kind that ``--text`` names, all of one length."""
    if text == "corpus":
        return corpus_prompts(count, length)
    pages = llm.model.tokenizer.encode_batch(reference_pages(held_out=True), add_special_tokens=False)
    stream = torch.tensor([token for page in pages for token in page])
    return [Prompt("reference", tokens) for tokens in blocks_from({"held out": stream}, count, length, 0)]


def corpus_prompts(count: int, length: int) -> list[Prompt]:
    """About ``count`` prompts of all genres."""
    recipe = RecipeConfig()
    corpus = load_corpus(build_corpus(recipe.corpus, cache_home() / "corpora"))
    return [Prompt(found.label, found.tokens) for found in held_out_prompts(corpus, recipe, count, length)]


def curve_command_line(description: str | None) -> argparse.ArgumentParser:
    """What every curve over settings asks for."""
    parser = command_line(description, name=True, output=True)
    parser.add_argument("model", help="a name, or a directory, of a model that is calibrated for what is measured")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--text", choices=("reference", "corpus"), default="reference")
    return parser


def load(options: argparse.Namespace) -> tuple[LLM, list[Prompt]]:
    """The engine and the prompts of a curve."""
    path = resolve_model(options.model)
    llm = LLM(path, dtype=options.dtype, max_num_seqs=options.at_once, enable_prefix_caching=False)
    return llm, chosen_prompts(llm, options.text, options.requests, options.prompt_tokens)


def facts(options: argparse.Namespace, prompts: list[Prompt]) -> dict[str, Any]:
    """The settings of a curve for its results file."""
    return {
        "model": name_of(options),
        "dtype": options.dtype,
        "text": options.text,
        "requests": len(prompts),
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.tokens,
        "at_once": options.at_once,
        **surroundings(),
    }


def timed(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> tuple[list[RequestOutput], float]:
    started = time.perf_counter()
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    return outputs, sum(len(o.outputs[0].token_ids) for o in outputs) / (time.perf_counter() - started)


def measure(llm: LLM, prompts: list[Prompt], settings: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """One record per setting. A run of the full model precedes every timed run."""
    num_layers, starts = llm.model.spec.num_layers, [prompt.tokens for prompt in prompts]
    for setting in (settings[-1], {}):  # compiled kernels, measured segments
        timed(llm, starts[:1], greedy(4, **spent(llm, setting)))
    points = []
    for setting in settings:
        _, full_rate = timed(llm, starts, greedy(tokens))
        outputs, rate = timed(llm, starts, greedy(tokens, **spent(llm, setting)))
        losses_N = disagreements(llm.model.decoder, outputs)
        around = mean(losses_N)
        points.append(
            {
                **setting,
                "disagreement": around.value,
                "interval_95": [around.low, around.high],
                "tokens_per_second": rate,
                "full_tokens_per_second": full_rate,
                **executed(outputs, num_layers),
                "by_genre": by_genre(outputs, losses_N, [prompt.genre for prompt in prompts], num_layers),
            }
        )
        print(row(setting, points[-1]), flush=True)
    return points


def by_genre(
    outputs: list[RequestOutput], losses_N: np.ndarray, genres: list[str], num_layers: int
) -> dict[str, dict[str, float]]:
    found = {}
    for genre in sorted(set(genres)):
        members = [n for n, other in enumerate(genres) if other == genre]
        share = executed([outputs[n] for n in members], num_layers)["executed_layer_share"]
        found[genre] = {"disagreement": float(losses_N[members].mean()), "executed_layer_share": share}
    return found


def choose(points: list[dict[str, Any]], limit: float) -> float | None:
    """The threshold with the fewest layers among those whose disagreement is within a limit; None for full depth."""
    allowed = [p for p in points if p["disagreement"] <= limit]
    return min(allowed, key=lambda p: p["executed_layer_share"])["threshold"]


HEADER = "| setting | disagreement (95 %) | layers | experts | tokens/s | of full |\n|---|---|---|---|---|---|"


def row(setting: dict[str, Any], point: dict[str, Any]) -> str:
    """One line of the table."""
    low, high = point["interval_95"]
    name = ", ".join(f"{key}={value}" for key, value in setting.items() if value is not None) or "full"
    shares = f"{point['executed_layer_share']:.1%} | {point['executed_expert_share']:.1%}"
    rate, full = point["tokens_per_second"], point["full_tokens_per_second"]
    return (
        f"| {name} | {point['disagreement']:.2%} ({low:.2%} … {high:.2%}) | {shares} | {rate:.1f} | {rate / full:.2f} |"
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
    parser = curve_command_line(__doc__)
    thresholds = [0.99, 0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6]
    parser.add_argument("--thresholds", type=float, nargs="*", default=thresholds)
    parser.add_argument("--choose", type=float, help="disagreement at which a threshold is chosen on half the prompts")
    options = parser.parse_args()
    llm, prompts = load(options)
    if not llm.model.decoder.exits:
        parser.error(f"{options.model} has no exits")
    print(HEADER)
    settings: list[dict[str, Any]] = [{"threshold": threshold} for threshold in (None, *options.thresholds)]
    threshold = chosen = None
    if options.choose is not None:
        first, prompts = halves(prompts)
        threshold = choose(measure(llm, first, settings, options.tokens), options.choose)
        print(f"chosen on these {len(first)} prompts: {threshold}; on the others:")
    points = measure(llm, prompts, settings, options.tokens)
    if options.choose is not None:
        chosen = {"limit": options.choose, **next(p for p in points if p["threshold"] == threshold)}
    result = facts(options, prompts) | {
        "layers": llm.model.spec.num_layers,
        "exits": list(llm.model.decoder.exits),
        "chosen": chosen,
        "points": points,
    }
    file = options.output / f"exits_curve_{result['model']}.json"
    write(file, result)
    try:
        title = f"{result['model']}, exits after {', '.join(map(str, result['exits']))} layers"
        plot(points, title, file.with_suffix(".svg"))
    except ImportError:
        print("no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()
