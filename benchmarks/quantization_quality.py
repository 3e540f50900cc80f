"""What quantisation costs in quality: ``python benchmarks/quantization_quality.py MODEL``.

Every method's next-token distributions on held-out text are compared with those of the unquantised model, both computed
in float32: perplexity; the share of positions where the most likely token stays the same; the Kullback-Leibler
divergence from the unquantised distribution, in nats per token. The text is the fifth of Python's language reference
that calibration never sees. Calibrated methods (gptq, awq, smoothquant) are run here, into a directory that is removed
afterwards, on the other pages; LM head and embedding stay as they are, unless ``--lm-head`` is given. ``--choose``
measures on windows of the other pages that calibration left out: what variants of a method are chosen by. The results
file is written anew after each method: ``results/quantization_quality_NAME.json``, with matplotlib an SVG beside it.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark import RESULTS, command_line, name_of, surroundings, write
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from dynamoe.dynamic.quantize.driver import quantize_checkpoint
from dynamoe.dynamic.quantize.methods import METHODS, CalibratedMethod
from dynamoe.dynamic.text.calibration_text import reference_pages, token_windows
from dynamoe.dynamic.text.tokenizer import Tokenizer
from dynamoe.exits.segments import Segment

INT4 = tuple(f"int4{group}{ending}" for group in ("-g32", "", "-g128") for ending in ("", "-asym"))
AT_LOAD = ("int8", "int8-g32", "w8a8", *INT4, "w4a8", "w4a8-g32", "fp8", "fp8-block")


def held_out_windows(path: Path, count: int, length: int) -> torch.Tensor:
    """Windows of the pages that calibration never sees, in a model's tokens, (count, length)."""
    backend = Tokenizer.from_directory(path).backend
    return token_windows(backend, reference_pages(held_out=True), count=count, length=length)


def log_probabilities(decoder: Decoder, windows_NL: torch.Tensor) -> Iterator[torch.Tensor]:
    """Of the token after each but the last of every window: (L - 1, V), one window at a time."""
    for ids_L in windows_NL:
        yield logits(decoder, ids_L)[:-1].log_softmax(-1)


def logits(decoder: Decoder, ids_L: torch.Tensor) -> torch.Tensor:
    """Of every position of a text, (L, V), float32."""
    whole = Segment(index=0, layers=range(decoder.spec.num_layers))
    kv, batch = fresh_cache(decoder, [len(ids_L)])
    return decoder.logits(decoder.run_segment(whole, decoder.embed(ids_L), kv, batch))


@torch.inference_mode()
def compare(plain: list[torch.Tensor], quantized: Decoder, windows_NL: torch.Tensor) -> dict[str, float]:
    """Perplexities, agreement and divergence; ``plain`` are the unquantised model's log-probabilities, by window."""
    sums = torch.zeros(4, dtype=torch.float64)
    both = zip(plain, log_probabilities(quantized, windows_NL), windows_NL, strict=True)
    for expected_LV, found_LV, ids_L in both:
        next_L1 = ids_L[1:, None]
        sums += torch.stack(
            (
                -expected_LV.gather(1, next_L1).sum(),
                -found_LV.gather(1, next_L1).sum(),
                (expected_LV.argmax(-1) == found_LV.argmax(-1)).sum(),
                (expected_LV.exp() * (expected_LV - found_LV)).sum(),
            )
        ).double()
    before, after, agreement, divergence = (sums / (windows_NL.numel() - len(windows_NL))).tolist()
    perplexity, unquantized = torch.tensor([after, before]).exp().tolist()
    return {
        "perplexity": perplexity,
        "perplexity_change": perplexity / unquantized - 1,
        "unquantized_perplexity": unquantized,
        "top1_agreement": agreement,
        "kl_nats": divergence,
    }


def measure(
    method: str, args: argparse.Namespace, path: Path, windows: dict[str, torch.Tensor], plain: list[torch.Tensor]
) -> dict[str, Any]:
    """One method's row of the table."""
    name, _, group = method.partition("-g")
    asymmetric = group.endswith("-asym") or name.endswith("-asym")
    common = {"dtype": "float32", "device": "cpu"}
    started, extra = time.perf_counter(), {}
    if name.removesuffix("-asym") not in METHODS:
        quantized = load_decoder(path, **common, quantization=method, quantize_lm_head=args.lm_head)
    else:
        settings = CalibratedMethod(
            name=name.removesuffix("-asym"), group=int(group.removesuffix("-asym") or 64), symmetric=not asymmetric
        )
        with tempfile.TemporaryDirectory() as folder:
            report = quantize_checkpoint(path, Path(folder) / "out", windows["calibration"], settings)
            quantized = load_decoder(Path(folder) / "out", **common)
        extra = {"layer_errors": [round(layer["relative_error"], 4) for layer in report["layers"]]}
    seconds = time.perf_counter() - started
    row = compare(plain, quantized, windows["held out"])
    layer_bytes = sum(layer.nbytes for layer in quantized.layers)
    return {"method": method, **row, "seconds_to_quantize": seconds, "layer_bytes": layer_bytes, **extra}


def plot(rows: list[dict[str, Any]], title: str, file: Path) -> None:
    """Perplexity's change and the divergence, a bar per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    for axes, key, factor, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("perplexity_change", "kl_nats"),
        (100, 1),
        ("change of perplexity, %", "divergence, nats per token"),
        strict=True,
    ):
        axes.barh([row["method"] for row in rows], [factor * row[key] for row in rows])
        axes.set(xlabel=label)
        axes.grid(alpha=0.3, axis="x")
        axes.invert_yaxis()
    figure.suptitle(title)
    figure.savefig(file)


def main() -> None:
    parser = command_line(__doc__, name=True)
    parser.add_argument("model", help="tiny, default, or a directory")
    parser.add_argument("--methods", nargs="+", default=[*AT_LOAD, *METHODS], help="also gptq-g32, awq-g128-asym, …")
    parser.add_argument("--windows", type=int, default=16, help="of held-out text")
    parser.add_argument("--calibration-windows", type=int, default=64)
    parser.add_argument("--window-tokens", type=int, default=256)
    parser.add_argument("--choose", action="store_true", help="measure on pages that variants are chosen by")
    parser.add_argument("--lm-head", action="store_true", help="make LM head and embedding int8 with methods at load")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = resolve_model(args.model)
    tokenizer = Tokenizer.from_directory(path).backend
    wanted = args.windows if args.choose else 0
    others = token_windows(
        tokenizer, reference_pages(held_out=False), count=args.calibration_windows + wanted, length=args.window_tokens
    )
    kept = torch.linspace(0, len(others) - 1, wanted).round().long()  # none unless --choose
    windows = {"calibration": others[[i for i in range(len(others)) if i not in set(kept.tolist())]]}
    windows["held out"] = others[kept] if args.choose else held_out_windows(path, args.windows, args.window_tokens)
    with torch.inference_mode():
        plain = list(log_probabilities(load_decoder(path, dtype="float32", device="cpu"), windows["held out"]))
    name, rows = name_of(args), []
    for method in args.methods:
        rows.append(measure(method, args, path, windows, plain))
        print({key: value for key, value in rows[-1].items() if key != "layer_errors"}, flush=True)
        result = {
            **surroundings(),
            "model": name,
            "settings": {key: value for key, value in vars(args).items() if key not in ("model", "name", "methods")},
            "rows": rows,
        }
        file = RESULTS / f"quantization_quality_{name}.json"
        write(file, result)
    plot(rows, f"{name}: against the unquantised model", file.with_suffix(".svg"))


if __name__ == "__main__":
    main()
