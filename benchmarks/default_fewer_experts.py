"""What fewer experts cost the default model: perplexity on English text that its preparation never saw.

``python benchmarks/default_fewer_experts.py`` writes ``benchmarks/results/default_fewer_experts.json``.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from benchmark import command_line, surroundings, write
from checkout import RESULTS
from dynamoe import LLM, SamplingParams
from dynamoe.dynamic.text.calibration_text import reference_pages, token_windows


def perplexity(llm: LLM, windows_BL: torch.Tensor) -> float:
    """Over all tokens of the windows but the first of each."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    total = 0.0
    for output in llm.generate(windows_BL.tolist(), params, use_tqdm=False):
        assert output.prompt_logprobs is not None
        for token, choices in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
            assert choices is not None
            total -= choices[token].logprob
    return math.exp(total / (windows_BL.shape[0] * (windows_BL.shape[1] - 1)))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--experts-per-token", nargs="+", type=int, default=[14, 12, 10, 8, 6], help="routed experts")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--json", type=Path, default=RESULTS / "default_fewer_experts.json")
    options = parser.parse_args()

    rows = []
    for count in options.experts_per_token:
        llm = LLM(options.model, dtype=options.dtype, experts_per_token=count, progress=False)
        tokenizer = llm.get_tokenizer().backend
        pages = reference_pages(held_out=True)
        windows_BL = token_windows(tokenizer, pages, count=options.windows, length=options.length)
        moe = llm.model.spec.layers[0].moe
        assert moe is not None
        share = (count + moe.num_always_on) / moe.num_experts
        found = perplexity(llm, windows_BL)
        rows.append({"routed_experts": count, "share_of_ffn": share, "perplexity": found})
        print(f"{count:2} routed experts, {share:6.1%} of the FFN: perplexity {found:.2f}", flush=True)
    record = {
        **surroundings(),
        "model": options.model,
        "dtype": options.dtype,
        "windows": options.windows,
        "tokens_per_window": options.length,
        "rows": rows,
    }
    write(options.json, record)


if __name__ == "__main__":
    main()
