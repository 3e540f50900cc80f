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

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark import command_line, name_of, surroundings, write
from dynamoe.dynamic.contract.calibration_runs import decoded_layers
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


def executed(outputs: list[RequestOutput], num_layers: int) -> dict[str, Any]:
    """Launched rows of decoded tokens: prompts, which run all layers, are taken off."""
    rows, full, projected, depths = 0, 0, 0, dict[int, int]()
    for output in outputs:
        assert output.compute is not None
        ran, all_layers = decoded_layers(output, num_layers)
        rows, full = rows + ran, full + all_layers
        projected += output.compute.projected_rows
        for depth in output.outputs[0].layers[1:]:
            depths[depth] = depths.get(depth, 0) + 1
    total = sum(depths.values())
    return {
        "executed_layer_share": rows / full,
        "projected_layer_share": projected / full,
        "tokens_by_layers": {str(depth): count / total for depth, count in sorted(depths.items())},
    }


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Beginnings of held-out text, all of one length, with the genre of each."""

    tokens: list[list[int]]
    genres: list[str]

    def halves(self) -> tuple[Prompts, Prompts]:
        """Every other prompt of each genre."""
        by_genre = sorted(range(len(self.genres)), key=lambda n: self.genres[n])  # stable: in order inside a genre
        first, second = (by_genre[half::2] for half in (0, 1))
        return self._of(first), self._of(second)

    def _of(self, numbers: list[int]) -> Prompts:
        return Prompts(tokens=[self.tokens[n] for n in numbers], genres=[self.genres[n] for n in numbers])


def reference_prompts(llm: LLM, count: int, length: int) -> Prompts:
    pages = llm.model.tokenizer.encode_batch(reference_pages(held_out=True), add_special_tokens=False)
    stream = torch.tensor([token for page in pages for token in page])
    tokens = blocks_from({"held out": stream}, count, length, 0)
    return Prompts(tokens=tokens, genres=["reference"] * len(tokens))


def corpus_prompts(count: int, length: int, skip: int = 0) -> Prompts:
    """About ``count`` prompts of all genres after the first ``skip``."""
    recipe = RecipeConfig()
    corpus = load_corpus(build_corpus(recipe.corpus, cache_home() / "corpora"))
    found = held_out_prompts(corpus, recipe, count, length, skip=skip)
    return Prompts(tokens=[p.tokens for p in found], genres=[p.label for p in found])


def chosen_prompts(llm: LLM, text: str, count: int, length: int) -> Prompts:
    """Held-out prompts of the kind that ``--text`` names."""
    return corpus_prompts(count, length) if text == "corpus" else reference_prompts(llm, count, length)


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


def load(options: argparse.Namespace) -> tuple[LLM, Prompts]:
    """The engine and the prompts of a curve."""
    path = resolve_model(options.model)
    llm = LLM(path, dtype=options.dtype, max_num_seqs=options.at_once, enable_prefix_caching=False)
    return llm, chosen_prompts(llm, options.text, options.requests, options.prompt_tokens)


def facts(options: argparse.Namespace, prompts: Prompts) -> dict[str, Any]:
    """The settings of a curve for its results file."""
    return {
        "model": name_of(options),
        "dtype": options.dtype,
        "text": options.text,
        "requests": len(prompts.tokens),
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.tokens,
        "at_once": options.at_once,
        **surroundings(),
    }


def compared(
    llm: LLM, prompts: Prompts, full: SamplingParams, params: SamplingParams
) -> tuple[list[RequestOutput], np.ndarray, dict[str, Any]]:
    """Serve prompts beside a run of the full model: outputs, the loss of each, and the figures of both runs."""
    _, full_rate = timed(llm, prompts.tokens, full)
    outputs, rate = timed(llm, prompts.tokens, params)
    losses_N = disagreements(llm.model.decoder, outputs)
    around = mean(losses_N)
    figures = {"disagreement": around.value, "interval_95": [around.low, around.high]}
    return outputs, losses_N, figures | {"tokens_per_second": rate, "full_tokens_per_second": full_rate}


def timed(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> tuple[list[RequestOutput], float]:
    started = time.perf_counter()
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    return outputs, sum(len(o.outputs[0].token_ids) for o in outputs) / (time.perf_counter() - started)


def measure(llm: LLM, prompts: Prompts, thresholds: list[float], tokens: int) -> list[dict[str, Any]]:
    """One record per threshold, full depth first. Every timed run stands beside one of the full model."""
    exits, num_layers = tuple(llm.model.decoder.exits), llm.model.spec.num_layers
    timed(llm, prompts.tokens[:1], settings(1.0, exits, 4))  # compiled kernels, measured segments
    timed(llm, prompts.tokens[:1], settings(None, exits, 4))
    points = []
    for threshold in (None, *thresholds):
        full, params = settings(None, exits, tokens), settings(threshold, exits, tokens)
        outputs, losses_N, figures = compared(llm, prompts, full, params)
        genres = by_genre(outputs, losses_N, prompts.genres, num_layers)
        points.append({"threshold": threshold, **figures, **executed(outputs, num_layers), "by_genre": genres})
        print(row(points[-1]), flush=True)
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
    parser = curve_command_line(__doc__)
    thresholds = [0.99, 0.97, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6]
    parser.add_argument("--thresholds", type=float, nargs="*", default=thresholds)
    parser.add_argument("--choose", type=float, help="disagreement at which a threshold is chosen on half the prompts")
    options = parser.parse_args()
    llm, prompts = load(options)
    if not llm.model.decoder.exits:
        parser.error(f"{options.model} has no exits")
    print("| threshold | disagreement (95 %) | layers executed | tokens/s | of full |\n|---|---|---|---|---|")
    chosen = None
    if options.choose is None:
        points = measure(llm, prompts, options.thresholds, options.tokens)
    else:
        first, prompts = prompts.halves()
        threshold = choose(measure(llm, first, options.thresholds, options.tokens), options.choose)
        print(f"chosen on these {len(first.tokens)} prompts: {threshold}; on the others:")
        points = measure(llm, prompts, options.thresholds, options.tokens)
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
