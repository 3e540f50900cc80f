"""The default model's throughput against transformers' ``generate`` on its dense parent, in the same type and process:
``python benchmarks/default_vs_transformers.py``.

Both get the same prompts of equal length (so that transformers needs no padding), all at once, and generate the same
number of tokens greedily. The two take turns, who goes first alternates, and medians are compared, because machines
drift. Prefill is part of the time; the prefix cache is off, or every repetition but the first would skip it.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark import RESULTS, command_line, surroundings, write
from dynamoe import LLM, SamplingParams
from dynamoe.dynamic.convert.default_model import dense_default_file
from dynamoe.dynamic.convert.gguf_import import import_gguf
from quantization_quality import held_out_windows


def transformers_parent(dtype: str, output_len: int) -> Callable[[torch.Tensor], list[list[int]]]:
    """transformers on the dense parent, its weights dequantised as ours are."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        import_gguf(dense_default_file(), Path(folder), progress=False)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def generate(prompts_BL: torch.Tensor) -> list[list[int]]:
        mask_BL = torch.ones_like(prompts_BL)
        out = model.generate(prompts_BL, attention_mask=mask_BL, max_new_tokens=output_len, do_sample=False)
        return out[:, prompts_BL.shape[1] :].tolist()

    return generate


def seconds(run: Callable[[torch.Tensor], list[list[int]]], prompts_BL: torch.Tensor, output_len: int) -> float:
    """How long a batch takes; every prompt must have got all its tokens."""
    begin = time.perf_counter()
    outputs = run(prompts_BL)
    elapsed = time.perf_counter() - begin
    assert [len(tokens) for tokens in outputs] == [output_len] * prompts_BL.shape[0]
    return elapsed


def measure(dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per concurrency: tokens per second of both, and the ratio of the medians."""
    most = max(options.concurrency)
    llm = LLM("default", dtype=dtype, max_num_seqs=most, enable_prefix_caching=False, progress=False)
    params = SamplingParams(temperature=0.0, max_tokens=options.output_len, ignore_eos=True)

    def ours(prompts_BL: torch.Tensor) -> list[list[int]]:
        outputs = llm.generate(prompts_BL.tolist(), params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    runs = {"dynamoe": ours, "transformers": transformers_parent(dtype, options.output_len)}
    prompts_BL = held_out_windows(llm.model.path, most, options.input_len)
    times: dict[tuple[str, int], list[float]] = {(name, c): [] for name in runs for c in options.concurrency}
    for concurrency in options.concurrency:
        for run in runs.values():
            run(prompts_BL[:concurrency])
    for repetition in range(options.repetitions):
        for concurrency in options.concurrency:
            for name in list(runs)[:: 1 if repetition % 2 == 0 else -1]:
                batch_BL = prompts_BL[:concurrency]
                times[name, concurrency].append(seconds(runs[name], batch_BL, options.output_len))
    rows = []
    for concurrency in options.concurrency:
        tokens = concurrency * options.output_len
        rates = {name: tokens / statistics.median(times[name, concurrency]) for name in runs}
        best = {name: tokens / min(times[name, concurrency]) for name in runs}
        rows.append(
            {
                "dtype": dtype,
                "concurrency": concurrency,
                "backend": llm.model.decoder.backend.name,
                "output_tokens_per_second": rates,
                "best_output_tokens_per_second": best,
                "ratio": rates["dynamoe"] / rates["transformers"],
                "ratio_of_best": best["dynamoe"] / best["transformers"],
                "seconds": {name: times[name, concurrency] for name in runs},
            }
        )
        print(
            f"{dtype:9} {concurrency:3} at once: dynamoe {rates['dynamoe']:7.1f} tokens/s, transformers"
            f" {rates['transformers']:7.1f} tokens/s, ratio {rows[-1]['ratio']:.2f}"
            f" (of the best runs {rows[-1]['ratio_of_best']:.2f})",
            flush=True,
        )
    return rows


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--input-len", type=int, default=64, help="tokens per prompt")
    parser.add_argument("--output-len", type=int, default=64, help="tokens per answer")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument(
        "--json", type=Path, default=RESULTS / "default_vs_transformers.json", help="where the numbers go"
    )
    options = parser.parse_args()

    import transformers

    load_before = os.getloadavg()[0]
    rows = [row for dtype in options.dtype for row in measure(dtype, options)]
    report = {
        **surroundings(),
        "load_average": [load_before, os.getloadavg()[0]],
        "transformers": transformers.__version__,
        "input_len": options.input_len,
        "output_len": options.output_len,
        "repetitions": options.repetitions,
        "points": rows,
    }
    write(options.json, report)
    print(f"written to {options.json}")


if __name__ == "__main__":
    main()
