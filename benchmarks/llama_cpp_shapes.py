"""One GGUF file here and in llama.cpp: ``python benchmarks/llama_cpp_shapes.py FILE.gguf --llama-bench PATH``.

llama-bench runs before and after, since a large model leaves no memory for both at once. Reported are tokens per second
of a prompt and of decodes of one request, and their ratio to the mean of both runs of llama.cpp. Files of the shapes of
``gpt_oss_shape.py`` and the like come out of llama.cpp's ``convert_hf_to_gguf.py``, with any tokenizer beside them.
"""

import argparse
import gc
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch
from benchmark import command_line, surroundings
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from shapes import last_rows, timed


def llama_cpp(options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second."""
    lengths = ["-p", str(options.prompt), "-n", str(options.tokens)]
    command = [options.llama_bench, "-m", options.file, "-t", str(torch.get_num_threads()), *lengths]
    run = subprocess.run([*command, "-r", "3", "-o", "json"], capture_output=True, text=True, check=True)
    results = json.loads(run.stdout)
    return {("prefill" if result["n_prompt"] else "decode"): result["avg_ts"] for result in results}


@torch.inference_mode()
def ours(options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second."""
    decoder = load_model(options.file, dtype="bfloat16", device="cpu").decoder
    kv, batch = fresh_cache(decoder, [options.prompt])
    seconds, _ = timed(decoder, kv, batch, 3, lambda: 0.0)
    found = {"prefill": options.prompt / seconds}
    kv, batch = fresh_cache(decoder, [options.tokens // 2])  # as long as contexts of llama-bench are on average
    seconds, _ = timed(decoder, kv, last_rows(batch), options.tokens, lambda: 0.0)
    return {**found, "decode": 1 / seconds}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--llama-bench", type=Path, required=True)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    first = llama_cpp(options)
    here = ours(options)
    gc.collect()
    report: dict[str, Any] = {**surroundings(), "file": options.file.name}
    last = llama_cpp(options)
    for key, rate in here.items():
        theirs = [first[key], last[key]]
        report[key] = {"dynamoe": rate, "llama.cpp": theirs, "ratio": rate / statistics.mean(theirs)}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
