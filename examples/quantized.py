"""Load the same model in bfloat16, int8 and int4: what it takes in memory, and what becomes of the text.

    python examples/quantized.py

Weights are rounded while they are loaded. A token reads each weight that it needs once, so that decoding alone gets
faster by about what is saved here. int8 is all but free for the default model, int4 without calibration is not:
docs/quantization.md has the numbers, and ``dynamoe prepare quantization=gptq`` is the better int4.
"""

import argparse
import resource
from pathlib import Path

from dynamoe import LLM, SamplingParams

QUESTION = [{"role": "user", "content": "Explain what a library is in one sentence."}]


def resident() -> float:
    """Memory of this process, in MB: Python, torch, the weights and the cache."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="a directory, a .gguf file, default or tiny")
    model = parser.parse_args().model
    for method in ("none", "int8", "int4"):
        print(describe(model, method), flush=True)


def describe(model: str, method: str) -> str:
    """Load the model, answer, and release it."""
    llm = LLM(model, dtype="bfloat16", quantization=method, kv_memory="64MiB")
    (result,) = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)
    tokens = result.compute.tokens
    weights = tokens.full_weight_bytes / tokens.count / 1e6
    name = "bfloat16" if method == "none" else method
    return f"{name}: {weights:.1f} MB of weights per token, process {resident():.0f} MB: {result.outputs[0].text!r}"


if __name__ == "__main__":
    main()
