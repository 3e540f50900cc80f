"""The whole engine against llama.cpp and vLLM on a CPU, in one run.

``python benchmarks/peers.py --model DIR --gguf FILE --llama-bin DIR --vllm-python PYTHON``; either peer may be left
out. ``--quantization none int8 int4`` measures us with each, ``--gguf`` takes several files, ``--vllm-quantization``
several of vLLM's methods; engines with weights of about as many bits are compared. ``--make DIR`` writes the checkpoint
first: random weights in the shape of Granite-3.1-1B-A400M. How to get the peers is in ``docs/benchmarks.md``.

Cells: prefill of one prompt of 512 tokens; decode of 1, 4 and 16 prompts of 128 tokens, 64 tokens each, counted from
the first token on: c * (64 - 1) / (time for 64 - time for 1). Every engine is a process; all but the one that is
measured are stopped. Engines take turns cell by cell, and the machine's limits are probed in between, because machines
drift: only ratios within a run mean anything. A repetition in which other programs took more than 15 % of the machine
is done again, twice at most; the results state how many remained disturbed.

The limits: bytes that a decode step must read (the weights of the experts that are hit, counted in our engine, and of
everything else once, and the cache) at the read bandwidth; operations of the prefill at the rate of torch's better
matrix product, bf16 or fp32.
"""

import argparse
import json
import os
import signal
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from benchmark import RESULTS, command_line, surroundings, write
from limits import Limits
from peers_engines import CELLS, CONCURRENCY, OUTPUT, PREFILL, PROMPT, Foreign, LlamaCpp, Worker, prompts, weight_bits

MOST_FOREIGN = 0.15
WORKER = Path(__file__).with_name("peers_worker.py")


def engines_of(options: argparse.Namespace) -> list[Any]:
    """Start what was asked for, one after the other."""
    threads = str(options.threads)
    common = os.environ | {"OMP_NUM_THREADS": threads}
    arguments = [str(options.model), "--dtype", options.dtype, "--threads", threads]
    engines: list[Any] = []
    for method in options.quantization:
        command = [sys.executable, str(WORKER), "dynamoe", *arguments, "--quantization", method]
        engines.append(Worker("dynamoe" if method == "none" else f"dynamoe {method}", command, common))
    if options.llama_bin:
        for gguf in options.gguf:
            engines.append(LlamaCpp(f"llama.cpp {gguf.stem}", options.llama_bin, gguf, options.threads))
    if options.vllm_python:
        environment = dict(common)
        for entry in options.vllm_env:
            key, _, value = entry.partition("=")
            environment[key] = value
        for method in options.vllm_quantization:
            command = [str(options.vllm_python), str(WORKER), "vllm", *arguments, "--quantization", method]
            engines.append(Worker("vLLM" if method == "none" else f"vLLM {method}", command, environment))
    return engines


def bytes_per_step(facts: dict[str, Any], cell: str, hit: float) -> float:
    """What a decode step must read: everything but the experts once, the experts that are hit, and the cache."""
    cache = int(cell.split()[1]) * (PROMPT + OUTPUT / 2) * facts["cache_bytes_per_token"]
    return float(facts["other_bytes"] + hit * facts["expert_bytes"] + cache)


def prefill_flops(options: argparse.Namespace) -> float:
    """Operations per token of a prefill: matrices and attention."""
    config = json.loads((options.model / "config.json").read_text())
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    channels = hidden // heads
    attention = hidden * channels * (2 * heads + 2 * kv_heads) + PREFILL / 2 * 2 * heads * channels
    experts = config["num_experts_per_tok"] * 3 * hidden * config["intermediate_size"]
    return 2.0 * config["num_hidden_layers"] * (attention + experts)


def experts_hit(options: argparse.Namespace) -> dict[str, float]:
    """Share of the experts that a decode step touches, per cell, in a separate slow run of our engine."""
    arguments = ["dynamoe", str(options.model), "--dtype", options.dtype, "--count"]
    worker = Worker("dynamoe (counting)", [sys.executable, str(WORKER), *arguments], dict(os.environ))
    worker.signal(signal.SIGCONT)
    shares = {}
    for count in CONCURRENCY:
        question = {"tokens": prompts(count, PROMPT, 2000), "output_len": 24}
        shares[f"decode {count}"] = worker.ask(question)["experts_hit"]
    worker.close()
    return shares


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All repetitions of all cells of all engines."""
    from tqdm import tqdm

    hit = experts_hit(options)
    engines = engines_of(options)
    limits = Limits()
    speeds: dict[str, dict[str, list[float]]] = {e.name: {cell: [] for cell in CELLS} for e in engines}
    disturbed = 0
    probes: dict[str, list[float]] = {"read": [], "gemm": []}
    try:
        bar = tqdm(total=options.repetitions * len(CELLS) * len(engines), unit="run", desc="Measuring")
        for repetition in range(options.repetitions):
            for cell in CELLS:
                for engine in engines[:: 1 if repetition % 2 == 0 else -1]:
                    for _ in range(3):
                        probes["read"].append(limits.read_bandwidth())
                        probes["gemm"].append(limits.gemm_rate())
                    tries = []
                    while len(tries) < 3 and (not tries or tries[-1][0] > MOST_FOREIGN):
                        foreign = Foreign()
                        speed = engine.turn(cell, 10 * repetition + 1)
                        tries.append((foreign.share(), speed))
                    share, speed = min(tries)
                    speeds[engine.name][cell].append(speed)
                    disturbed += share > MOST_FOREIGN
                    bar.update()
        bar.close()
    finally:
        for engine in engines:
            engine.close()
    return {
        "speeds": speeds,
        "limits": {key: _spread(values) for key, values in probes.items()},
        "experts_hit": hit,
        "disturbed_repetitions": disturbed,
        "engines": {e.name: e.facts | {"peak_resident_gib": round(e.peak_bytes / 2**30, 2)} for e in engines},
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def report(options: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """Per cell: every engine's spread; per engine of ours the ratio to the best peer of as many bits, to our first
    engine, and the fraction of the limit."""
    cells = {}
    read, gemm = result["limits"]["read"]["median"], result["limits"]["gemm"]["median"]
    ours = [name for name in result["speeds"] if name.startswith("dynamoe")]
    for cell in CELLS:
        spreads = {name: _spread(by_cell[cell]) for name, by_cell in result["speeds"].items() if by_cell[cell]}
        rows = {}
        for name in ours:
            speed, bits = spreads[name]["median"], weight_bits(name)
            peers = {n: s["median"] for n, s in spreads.items() if n not in ours and weight_bits(n) == bits}
            best = max(peers, key=lambda peer: peers[peer]) if peers else None
            row: dict[str, Any] = {
                "best_peer": best,
                "ratio_to_best_peer": speed / peers[best] if best else None,
                "ratio_to_our_first": speed / spreads[ours[0]]["median"],
            }
            if cell != "prefill":
                step = bytes_per_step(result["engines"][name], cell, result["experts_hit"][cell])
                row["limit_tokens_per_second"] = int(cell.split()[1]) * read / step
            elif bits == 16:
                row["limit_tokens_per_second"] = gemm / prefill_flops(options)
            if limit := row.get("limit_tokens_per_second"):
                row["fraction_of_limit"] = speed / limit
            rows[name] = row
        cells[cell] = {"tokens_per_second": spreads, "ours": rows}
    return cells


def print_table(cells: dict[str, Any]) -> None:
    for cell, found in cells.items():
        print(f"{cell:10}  tokens/s [spread]")
        for name, spread in found["tokens_per_second"].items():
            text = f"  {name:24}{spread['median']:9.1f} [{spread['min']:.1f}-{spread['max']:.1f}]"
            if row := found["ours"].get(name):
                text += f"  {row['ratio_to_our_first']:.2f} x our first"
                if row["best_peer"]:
                    text += f"  {row['ratio_to_best_peer']:.2f} x {row['best_peer']}"
                if "fraction_of_limit" in row:
                    text += f"  {row['fraction_of_limit']:.0%} of the limit"
            print(text)


def make_checkpoint(directory: Path) -> None:
    """Random weights in the shape of Granite-3.1-1B-A400M, with the default model's tokenizer.

    The tokenizer has 49152 tokens, three fewer than the original's.
    """
    import shutil

    from dynamoe.dynamic.convert.model_store import resolve_model
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    config = GraniteMoeConfig(
        vocab_size=49152, hidden_size=1024, intermediate_size=512, num_hidden_layers=24, num_attention_heads=16,
        num_key_value_heads=8, num_local_experts=32, num_experts_per_tok=8, max_position_embeddings=8192,
        rms_norm_eps=1e-6, tie_word_embeddings=True, embedding_multiplier=12.0, logits_scaling=6.0,
        residual_multiplier=0.22, attention_multiplier=0.015625, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(20261123)
    GraniteMoeForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    source = resolve_model("default", progress=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source / name).is_file():
            shutil.copy(source / name, directory / name)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--make", type=Path, metavar="DIR", help="write the checkpoint there and use it")
    parser.add_argument("--model", type=Path, help="the checkpoint, in Hugging Face layout")
    parser.add_argument("--quantization", nargs="+", default=["none"], metavar="METHOD", help="of our engines")
    parser.add_argument("--gguf", type=Path, nargs="*", default=[], help="the same checkpoint for llama.cpp")
    parser.add_argument("--llama-bin", type=Path, help="folder with llama-bench and llama-batched-bench")
    parser.add_argument("--vllm-python", type=Path, help="Python of an environment that has vLLM for CPUs")
    parser.add_argument("--vllm-quantization", nargs="+", default=["none"], metavar="METHOD", help="experts_int8 …")
    parser.add_argument("--vllm-env", nargs="*", default=[], metavar="KEY=VALUE", help="LD_PRELOAD, PYTHONPATH …")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=5)
    result_file = RESULTS / f"peers-{surroundings()['date']}.json"
    parser.add_argument("--json", type=Path, default=result_file, help="where the numbers go")
    options = parser.parse_args()
    if options.make:
        options.model = options.make
        if not (options.make / "config.json").exists():
            make_checkpoint(options.make)
    if options.model is None or not (options.model / "config.json").is_file():
        parser.error(f"--model must name a checkpoint, not {options.model}; --make DIR writes one")
    if options.llama_bin and not options.gguf:
        parser.error("--llama-bin needs --gguf")
    torch.set_num_threads(options.threads)
    result = measure(options)
    cells = report(options, result)
    print_table(cells)
    if result["disturbed_repetitions"]:
        print(f"{result['disturbed_repetitions']} repetitions were disturbed by other programs")
    summary = {
        **surroundings(),
        "dtype": options.dtype,
        "repetitions": options.repetitions,
        "cells": cells,
        **{key: result[key] for key in ("limits", "experts_hit", "disturbed_repetitions", "engines", "speeds")},
    }
    write(options.json, summary)
    print(f"written to {options.json}")


if __name__ == "__main__":
    main()
