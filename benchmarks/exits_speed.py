"""What exits save in time: ``python benchmarks/exits_speed.py MODEL --threshold 0.9``.

Engines decode the same held-out prompts of the recipe of ``tiny`` with and without thresholds and take turns, a few
steps each, because machines drift; prompts are not timed. The model without thresholds is loaded without exits.
One full pass over what was served tells which tokens the full model would not have chosen.

Written to ``results/exits_speed_NAME.json``: per number of sequences, seconds per token of both, the share of layers
that was launched for decoded tokens, the disagreement, and what part of a full step the layers and the LM head take by
themselves (timed alone, with a short context).
"""

from functools import partial
from typing import Any

from benchmark import RESULTS, command_line, name_of, surroundings, write
from dynamoe.dynamic.contract.served_loss import disagreements
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.engine.step_times import measure_step_times
from dynamoe.dynamic.llm import LLM
from dynamoe.dynamic.model.loaded import LoadedModel
from exits_curve import corpus_prompts, executed, greedy, spent
from exits_overhead import seconds_per_token, timed_steps, without_exits

CHUNK = 8  # steps of one turn


def decoding(model: LoadedModel, prompts: list[list[int]], params: SamplingParams) -> Engine:
    """An engine whose sequences are all past their prompts."""
    engine = Engine(model, EngineConfig(max_num_seqs=len(prompts), enable_prefix_caching=False))
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params)
    while engine.stats().generation_tokens < len(prompts):
        engine.step()
    return engine


def relative(model: LoadedModel, prompts: list[list[int]], at_once: int, params: SamplingParams) -> dict:
    """Seconds per token with and without thresholds; every group of prompts is decoded by both, in turns."""
    tokens = params.max_tokens or 1
    plain, turns = without_exits(model), (tokens - 1) // CHUNK
    totals = {"full": 0.0, "exits": 0.0}
    groups = [prompts[n : n + at_once] for n in range(0, len(prompts) - at_once + 1, at_once)]
    for group in groups:
        engines = {"full": decoding(plain, group, greedy(tokens)), "exits": decoding(model, group, params)}
        steps = {name: partial(timed_steps, engine, CHUNK) for name, engine in engines.items()}
        for name, seconds in seconds_per_token(steps, turns).items():
            totals[name] += seconds / len(groups)
    cache = plain.decoder.allocate_cache(at_once, EngineConfig().block_size)
    alone, step = measure_step_times(plain.decoder, cache, at_once), totals["full"] * at_once
    return {
        "sequences": at_once,
        "seconds_per_token": totals,
        "speedup": totals["full"] / totals["exits"],
        "layers_share_of_time": alone.layers(at_once) / step,
        "head_share_of_time": alone.head(at_once) / step,
    }


def main() -> None:
    parser = command_line(__doc__, name=True)
    parser.add_argument("model", help="with exits, made by a recipe on the corpus: tiny, or a directory")
    parser.add_argument("--threshold", type=float, required=True, help="calibrated probability, the same at every exit")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=97)
    options = parser.parse_args()
    llm = LLM(resolve_model(options.model), dtype=options.dtype, enable_prefix_caching=False)
    # The curve takes its prompts from the beginning of the same order; these are others.
    every = corpus_prompts(3 * options.prompts, options.prompt_tokens)
    prompts = [prompt.tokens for prompt in every[2::3]]
    params = greedy(options.tokens, **spent(llm, {"threshold": options.threshold}))
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    work = executed(outputs, llm.model.spec.num_layers)
    facts: dict[str, Any] = {
        "model": name_of(options),
        **surroundings(),
        "dtype": str(llm.model.decoder.dtype),
        "threshold": options.threshold,
        "prompts": len(prompts),
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.tokens,
        "disagreement": float(disagreements(llm.model.decoder, outputs).mean()),
        **work,
        "rows": [],
    }
    print(f"disagreement {facts['disagreement']:.2%}, layers executed {work['executed_layer_share']:.1%}")
    for at_once in options.sequences:
        facts["rows"].append(relative(llm.model, prompts, at_once, params))
        print(f"{at_once:3} sequences: {facts['rows'][-1]['speedup']:.3f} x full depth", flush=True)
    write(RESULTS / f"exits_speed_{facts['model']}.json", facts)


if __name__ == "__main__":
    main()
