"""Decoding where not all experts are in memory: ``python benchmarks/resident_experts.py MODEL``.

For each share of the experts' bytes a process of its own loads the model with so much ``expert_memory``, generates some
tokens so that the memory fills with what is used, then measures: tokens per second with one request and with several,
which experts were there, what was read ahead, and the bytes that were read for each token. The first row has all
experts in memory without ``expert_memory``. All rows must generate the same tokens. These are drawn: models with random
weights repeat themselves otherwise, and use few experts. ``read_gb_s`` is how fast experts come from the disk, past the
system's cache of files, when four readers ask for nothing else.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark import RESULTS, command_line, surroundings, write
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.expert_pool import READERS, ExpertPool, page_aligned
from quantized_memory import peak


def read_rate(pool: ExpertPool, count: int = 128) -> float:
    """Bytes per second of reading experts here and there."""
    file, random = pool.file, np.random.default_rng(0)
    layers, buffers = list(file.layers), page_aligned(READERS * pool.slot_bytes)
    slots = buffers.numpy().view(np.uint8).reshape(READERS, -1)

    def read(number: int) -> None:
        for _ in range(count // READERS):
            layer = int(choices[number].choice(layers))
            records = file.layers[layer]
            file.read(layer, int(choices[number].integers(records.num_experts)), slots[number, : records.stride])

    choices = random.spawn(READERS)
    start = time.perf_counter()
    with ThreadPoolExecutor(READERS) as readers:
        list(readers.map(read, range(READERS)))
    return count * pool.slot_bytes / (time.perf_counter() - start)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Of one share; negative: all experts are in memory."""
    settings = {"dtype": "bfloat16", "device": "cpu", "quantization": options.quantization, "progress": False}
    memory = None if options.share < 0 else int(options.share * options.bytes)
    start = time.perf_counter()
    model = load_model(options.model, expert_memory=memory, skip_tokenizer_init=True, **settings)
    row: dict[str, Any] = {
        "load_seconds": time.perf_counter() - start,
        "weight_gib": model.decoder.weight_bytes / 2**30,
    }
    longest = options.prompt + options.warm + options.tokens
    config = EngineConfig(max_model_len=longest, max_num_seqs=max(options.requests), enable_prefix_caching=False)
    engine, pool = Engine(model, config), model.decoder.expert_pool
    if pool is not None:
        row |= {"resident": pool.num_slots / pool.num_experts, "expert_bytes": pool.num_experts * pool.slot_bytes}
        row["read_gb_s"] = read_rate(pool) / 1e9
    digest = hashlib.sha256()
    for count in options.requests:
        generator = torch.Generator().manual_seed(count)
        ids = torch.randint(3, model.spec.vocab_size, (count, options.prompt), generator=generator).tolist()
        for number, prompt in enumerate(ids):
            params = SamplingParams(
                temperature=1.0, seed=number, max_tokens=longest - options.prompt, ignore_eos=True, detokenize=False
            )
            engine.add_request(str(number), prompt, params)
        made, warm, start, before = 0, 0, 0.0, None
        while engine.has_unfinished():
            for delta in engine.step():
                made += sum(len(completion.token_ids) for completion in delta.completions)
                digest.update(f"{delta.request_id} {[c.token_ids for c in delta.completions]}".encode())
            if not warm and made >= count * options.warm:
                before, start, warm = engine.stats().expert_traffic, time.perf_counter(), made
        cell: dict[str, Any] = {"tokens_per_second": (made - warm) / (time.perf_counter() - start)}
        after = engine.stats().expert_traffic
        if before is not None and after is not None:
            earlier = asdict(before)
            moved = {name: value - earlier[name] for name, value in asdict(after).items()}
            cell |= {"hit_rate": moved["hits"] / moved["uses"], "read_ahead_rate": moved["early"] / moved["uses"]}
            cell |= {"foreseen": moved["foreseen"] / max(moved["foreseeable"], 1)}
            cell |= {"mb_read_per_token": moved["read_bytes"] / (made - warm) / 1e6}
        row[f"requests_{count}"] = cell
    return {**row, "peak_gib": peak() / 2**30, "tokens": digest.hexdigest()[:16]}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("model", help="a directory or a shipped model")
    parser.add_argument("--quantization", default="none", help="of a checkpoint that is not quantised")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25], help="below all")
    parser.add_argument("--larger", action="store_true", help="leave out the first row, for a model that does not fit")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--warm", type=int, default=48, help="tokens before those that are measured")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, default=1 << 50, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS / "resident_experts.json")
    options = parser.parse_args()
    if options.share is not None:
        print(json.dumps(measure(options)))
        return
    rows: list[dict[str, Any]] = []
    for share in (*([] if options.larger else [-1.0]), 1.0, *options.shares):
        command = [sys.executable, __file__, *sys.argv[1:], "--share", str(share), "--bytes", str(options.bytes)]
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        rows.append({"share": "without expert_memory" if share < 0 else share, **json.loads(answer)})
        if share == 1:
            options.bytes = rows[-1]["expert_bytes"]
        rows[-1]["same_tokens"] = rows[-1]["tokens"] == rows[0]["tokens"]
        print(json.dumps(rows[-1]), flush=True)
        write(options.output, {**surroundings(), "model": Path(options.model).name, "rows": rows})


if __name__ == "__main__":
    main()
