"""What keys and values in 8 bits cost and save: ``python benchmarks/kv_cache.py default tiny``.

Perplexity, agreement and divergence on the fifth of Python's language reference that calibration never sees: the model
in float32 with its cache in float32 against the same with its cache in int8 and, on torch's operations, in fp8. Then
bytes per token against bfloat16, and how many requests of one length run in a pool of equal bytes before the first is
preempted, with int8.
"""

import json
from pathlib import Path
from typing import Any

import torch
from benchmark import RESULTS, command_line, surroundings, write
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.kv_cache import bytes_per_page
from dynamoe.dynamic.model.loader import load_decoder
from quantization_quality import compare, held_out_windows, log_probabilities

POOL_PAGES = 96  # of bfloat16; int8 gets as many bytes
NEW_TOKENS, PROMPT_TOKENS = 120, 8


def quality(model: str, kept: torch.dtype, windows: int, window_tokens: int) -> dict[str, float]:
    """8 bits against the model's own numbers, both in float32."""
    path = resolve_model(model)
    text = held_out_windows(path, windows, window_tokens)
    backend = "auto" if kept == torch.int8 else "torch"
    plain = load_decoder(path, dtype="float32", device="cpu", backend=backend)
    with torch.inference_mode():
        expected = list(log_probabilities(plain, text))
    plain.kv_dtype = kept
    return compare(expected, plain, text)


def requests_without_preemption(model: str, kv_cache_dtype: str, memory: int) -> int:
    """How many requests that begin small and grow to one length a pool holds."""
    loaded = load_model(model, dtype="bfloat16", kv_cache_dtype=kv_cache_dtype, progress=False)
    config = EngineConfig(kv_memory=memory, max_num_seqs=256, enable_prefix_caching=False)
    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    for count in range(1, 256):
        engine = Engine(loaded, config)
        for number in range(count):
            engine.add_request(str(number), list(range(3 + number, 3 + number + PROMPT_TOKENS)), params)
        while engine.has_unfinished():
            engine.step()
        if engine.stats().preemptions:
            return count - 1
    raise AssertionError("nothing was ever preempted")


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("models", nargs="+", help="tiny, default, or directories")
    parser.add_argument("--windows", type=int, default=24, help="of held-out text")
    parser.add_argument("--window-tokens", type=int, default=512)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for model in args.models:
        row: dict[str, Any] = quality(model, torch.int8, args.windows, args.window_tokens)
        row["fp8"] = quality(model, torch.float8_e4m3fn, args.windows, args.window_tokens)
        spec = load_model(model, progress=False).spec
        dtypes = {"bfloat16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
        kept = {name: bytes_per_page(spec, dtype, 1) for name, dtype in dtypes.items()}
        row |= {"bytes_per_token": kept, "memory": kept["int8"] / kept["bfloat16"]}
        memory = 16 * kept["bfloat16"] * POOL_PAGES
        row["requests_before_preemption"] = {
            name: requests_without_preemption(model, asked, memory)
            for name, asked in (("bfloat16", "auto"), ("int8", "int8"))
        }
        found[Path(model).name] = row
        print(model, json.dumps(row, indent=1), flush=True)
    result = {
        **surroundings(),
        "settings": {"windows": args.windows, "window_tokens": args.window_tokens, "pages": POOL_PAGES},
        "models": found,
    }
    write(RESULTS / "kv_cache.json", result)


if __name__ == "__main__":
    main()
