"""How long starts take: ``python benchmarks/startup.py --layers 24``.

A checkpoint of random numbers in the shape of Granite-1B-A400M is written to a temporary folder. For each format other
processes start: one that quantises the weights and keeps them, then some that find them. Each reports the time until
the package is imported, until the model is loaded, and until the first token, from the start of its process, and the
most memory that it held. ``allowed`` is the imports, a second, and the weights' bytes at 1.5 GB/s.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark import RESULTS, command_line, surroundings
from benchmark import write as write_results
from shapes import Tensors, plain, write

FORMATS = ("none", "int8", "w8a8", "int8-g32", "int4", "int4-asym", "w4a8", "fp8", "fp8-block")
HIDDEN, WIDTH, EXPERTS, HEADS, KV_HEADS, CHANNELS = 1024, 512, 32, 16, 8, 64


def config_of(layers: int) -> dict[str, Any]:
    return {
        **{"model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"], "vocab_size": 49152},
        **{"hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": layers},
        **{"num_local_experts": EXPERTS, "num_experts_per_tok": 8, "tie_word_embeddings": True},
        **{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 4096},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "torch_dtype": "bfloat16"},
    }


def random_files(config: dict[str, Any]) -> Iterator[tuple[str, Tensors]]:
    """One file for each layer and one for the rest."""
    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{norm}.weight": ones.clone() for norm in ("input_layernorm", "post_attention_layernorm")}
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"{prefix}self_attn.{part}_proj.weight"] = plain(heads * CHANNELS, HIDDEN)
        tensors[f"{prefix}self_attn.o_proj.weight"] = plain(HIDDEN, HEADS * CHANNELS)
        moe = f"{prefix}block_sparse_moe."
        tensors[f"{moe}router.layer.weight"] = plain(EXPERTS, HIDDEN)
        tensors[f"{moe}input_linear.weight"] = plain(EXPERTS, 2 * WIDTH, HIDDEN)
        tensors[f"{moe}output_linear.weight"] = plain(EXPERTS, HIDDEN, WIDTH)
        yield f"model-{layer:05}.safetensors", tensors
    yield "model-ends.safetensors", {"model.embed_tokens.weight": plain(49152, HIDDEN), "model.norm.weight": ones}


def start(folder: str, method: str, cache: str, began: float) -> dict[str, Any]:
    """Load and answer in this process."""
    from dynamoe import LLM, SamplingParams
    from dynamoe.dynamic.model.load_config import WeightCacheConfig

    imported = time.time()
    kept = WeightCacheConfig(folder=cache, least=0)
    llm = LLM(
        folder, quantization=method, weight_cache=kept, skip_tokenizer_init=True, kv_memory="64MiB", progress=False
    )
    loaded = time.time()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)
    seconds = {"imported": imported - began, "loaded": loaded - began, "first_token": time.time() - began}
    peak = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return {**seconds, "weight_bytes": llm.model.decoder.weight_bytes, "peak_bytes": 1024 * int(peak)}


def one(folder: Path, method: str, cache: Path) -> dict[str, Any]:
    """A start in a process of its own."""
    command = [sys.executable, __file__, "--one", str(folder), method, str(cache), str(time.time())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--repetitions", type=int, default=3, help="of starts that find the weights; medians count")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS / "startup.json")
    options = parser.parse_args()
    if options.one:
        folder, method, cache, began = options.one
        print(json.dumps(start(folder, method, cache, float(began))))
        return
    starts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder, config = Path(temporary) / "model", config_of(options.layers)
        write(folder, config, random_files(config))
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        one(folder, "none", Path(temporary) / "none")  # brings files and libraries into memory
        for method in options.formats:
            cache = Path(temporary) / method
            first = one(folder, method, cache)
            later = [one(folder, method, cache) for _ in range(options.repetitions)]
            second = {name: statistics.median(run[name] for run in later) for name in first}
            second["allowed"] = second["imported"] + 1 + second["weight_bytes"] / 1.5e9
            starts[method] = {"first": first, "second": second}
            print(method, json.dumps(starts[method]), flush=True)
            for file in cache.glob("*.packed"):
                file.unlink()
    write_results(options.output, {**surroundings(), "checkpoint_bytes": size, "config": config, "starts": starts})


if __name__ == "__main__":
    main()
