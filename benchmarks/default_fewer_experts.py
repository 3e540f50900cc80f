"""What fewer experts cost the default model: perplexity on English text that its preparation never saw.

``python benchmarks/default_fewer_experts.py`` writes ``benchmarks/results/default_fewer_experts.json``.
"""

import math
from pathlib import Path

import torch
from benchmark import RESULTS, command_line, surroundings, write
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.loader import load_decoder
from quantization_quality import held_out_windows, log_probabilities


@torch.inference_mode()
def perplexity(decoder: Decoder, windows_NL: torch.Tensor) -> float:
    """Over all tokens of the windows but the first of each."""
    pairs = zip(windows_NL, log_probabilities(decoder, windows_NL), strict=True)
    total = sum(float(found_LV.gather(1, ids_L[1:, None]).double().sum()) for ids_L, found_LV in pairs)
    return math.exp(-total / (windows_NL.numel() - len(windows_NL)))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--experts-per-token", nargs="+", type=int, default=[14, 12, 10, 8, 6], help="routed experts")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--json", type=Path, default=RESULTS / "default_fewer_experts.json")
    options = parser.parse_args()

    path, rows = resolve_model(options.model), []
    windows_NL = held_out_windows(path, options.windows, options.length)
    for count in options.experts_per_token:
        decoder = load_decoder(path, dtype=options.dtype, experts_per_token=count)
        moe = decoder.spec.layers[0].moe
        assert moe is not None
        share = (count + moe.num_always_on) / moe.num_experts
        found = perplexity(decoder, windows_NL)
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
