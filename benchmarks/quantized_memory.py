"""What quantised weights take: ``python benchmarks/quantized_memory.py MODEL...``.

For each model and method a separate process loads it, serves prompts and reports what its weights and scales take,
what its cache takes, and its peak memory (``VmHWM`` of Linux, shared libraries included).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmark import RESULTS, command_line, surroundings, write

METHODS = ("none", "int8", "w8a8", "int4", "int4-g128")
MARGIN = 0.5e9  # bytes on top of weights and cache


def serve(model: str, method: str, kv_memory: str) -> dict[str, Any]:
    """Load a model, serve from it, and measure this process."""
    import torch
    from dynamoe import LLM, SamplingParams

    torch.set_num_threads(1)
    idle = peak()
    llm = LLM(
        model, dtype="bfloat16", quantization=method, kv_memory=kv_memory, max_num_batched_tokens=512, progress=False
    )
    loaded = peak()
    ids = torch.randint(3, 2000, (4, 128), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
    decoder = llm.model.decoder
    layers = sum(layer.nbytes for layer in decoder.layers)
    return {
        "layer_bytes": layers,
        "weight_bytes": decoder.weight_bytes,
        "kv_bytes": sum(
            t.nbytes for layer in llm.engine.runner.kv for t in vars(layer).values() if hasattr(t, "nbytes")
        ),
        "peak_before": idle,
        "peak_loaded": loaded,
        "peak": peak(),
    }


def peak() -> int:
    """The most memory that this process held, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("models", nargs="+", help="tiny, default, or directories")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--kv-memory", default="128MiB")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS / "quantized_memory.json")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(serve(args.models[0], args.methods[0], args.kv_memory)))
        return

    rows: list[dict[str, Any]] = []
    for model in args.models:
        for method in args.methods:
            command = [sys.executable, __file__, model, "--one", "--methods", method, "--kv-memory", args.kv_memory]
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
            row = {"model": Path(model).name, "method": method, **json.loads(answer)}
            plain = next((r for r in rows if (r["model"], r["method"]) == (row["model"], "none")), row)
            row["share_of_bf16"] = row["layer_bytes"] / plain["layer_bytes"]
            row["beyond_weights_and_cache"] = row["peak"] - row["weight_bytes"] - row["kv_bytes"]
            row["within_margin"] = row["beyond_weights_and_cache"] <= MARGIN
            rows.append(row)
            print(json.dumps(row), flush=True)
            write(args.output, {**surroundings(), "rows": rows})


if __name__ == "__main__":
    main()
