"""Models whose tokenizers differ on the same held-out text, in bits per byte.

    python benchmarks/tiny_per_byte.py tiny runs/tiny_no_exits/model

The recipe's corpus is made of packages of the Debian release at hand. Two runs on machines with different releases see
different text and train different tokenizers, so that their perplexities do not compare; bits per byte of one text do.
The text is what the recipe held out, in windows that begin afresh; genres of which a package's version differed between
the runs should be left out (``--without kernel``). Full depth, float32.
"""

from __future__ import annotations

import argparse
import json
import math
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from checkout import RESULTS
from dynamoe.dynamic.loader import LoadedModel, load_model
from dynamoe.dynamic.machine import cache_home, processor
from dynamoe.dynamic.prompt_pass import fresh_cache
from dynamoe.dynamic.train.corpus import build_corpus, load_corpus
from dynamoe.dynamic.train.recipe import RecipeConfig
from dynamoe.exits.segments import Segment
from tokenizers import Tokenizer
from tqdm import tqdm


def held_out_text(windows: int, characters: int, without: list[str]) -> dict[str, list[str]]:
    """Up to so many stretches of text of every held-out stream, spread evenly over it."""
    directory = build_corpus(RecipeConfig().corpus, cache_home() / "corpora")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    found = {}
    for stream, tokens in load_corpus(directory).held_out.items():
        if stream.split("/")[0] in without:
            continue
        text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        count = min(windows, len(text) // characters)
        step = len(text) // max(1, count)
        found[stream] = [text[n * step : n * step + characters] for n in range(count)]
    return found


@torch.inference_mode()
def bits(model: LoadedModel, text: str) -> float:
    """What the full model pays for a text behind its beginning-of-sequence token."""
    decoder, spec = model.decoder, model.spec
    ids = model.tokenizer.encode(text)
    start = [ids[0]] if spec.bos_token_id is None else [spec.bos_token_id]
    tokens_T = torch.tensor([*start, *(ids[1:] if ids[0] == start[0] else ids)])
    kv, batch = fresh_cache(decoder, [len(tokens_T) - 1])
    whole = Segment(index=0, layers=range(spec.num_layers))
    logits_TV = decoder.logits(decoder.run_segment(whole, decoder.embed(tokens_T[:-1]), kv, batch))
    return float(torch.nn.functional.cross_entropy(logits_TV, tokens_T[1:], reduction="sum")) / math.log(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--windows", type=int, default=24, help="most windows of a stream")
    parser.add_argument("--characters", type=int, default=2400, help="of a window")
    parser.add_argument("--without", nargs="*", default=[], help="genres to leave out")
    parser.add_argument("--output", type=Path, default=RESULTS / "tiny_per_byte.json")
    options = parser.parse_args()
    text = held_out_text(options.windows, options.characters, options.without)
    paid: dict[str, dict[str, Any]] = {}
    for name in options.models:
        model = load_model(name, dtype="float32", progress=False)
        streams = {}
        for stream, windows in tqdm(text.items(), desc=name, unit="stream"):
            size = sum(len(window.encode()) for window in windows)
            streams[stream] = sum(bits(model, window) for window in windows) / max(1, size)
        paid[name] = {"bits_per_byte": streams, "mean": sum(streams.values()) / len(streams)}
        print(f"{name}: {paid[name]['mean']:.4f} bits per byte, mean over {len(streams)} streams", flush=True)
    report = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor(),
        "windows": {stream: len(windows) for stream, windows in text.items()},
        "characters": options.characters,
        "models": {Path(name).parent.name if "/" in name else name: found for name, found in paid.items()},
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
