"""What structured output costs: ``python benchmarks/structured.py --model default``.

The same number of sequences decodes with and without a JSON schema, in one engine and in turns, a few steps each,
because machines drift. The schema asks for a list of records that is longer than any turn; it allows one token here and
nearly all of them in a text there. Ratios are throughput with it over throughput without, of the same way to choose
tokens.
"""

import os
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmark import command_line, surroundings, write
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from exits_overhead import seconds_per_token, timed_steps

CHUNK = 32  # steps of one turn
PROMPT = 32
RECORD = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 60},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 4},
        "active": {"type": "boolean"},
        "note": {"type": "string"},
    },
    "required": ["name", "age", "tags", "active", "note"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": RECORD, "minItems": 1000}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
}


def decode(engine: Engine, batch: int, settings: dict[str, Any]) -> tuple[float, int]:
    """Seconds and tokens of some steps in which so many sequences decode, all of them past their prompts."""
    vocabulary = engine.model.spec.vocab_size
    for number in range(batch):
        prompt = torch.randint(3, vocabulary, (PROMPT,), generator=torch.Generator().manual_seed(number))
        params = SamplingParams(**settings, seed=number, max_tokens=4 * CHUNK, ignore_eos=True)
        engine.add_request(str(number), prompt.tolist(), params)
    timed_steps(engine, 1 + CHUNK // 4)  # the prompts, and some steps to warm up
    measured = timed_steps(engine, CHUNK)
    engine.abort([str(number) for number in range(batch)])
    return measured


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3, help="each with a new engine")
    parser.add_argument("--turns", type=int, default=10, help="of every variant in a round")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    model = load_model(options.model, progress=False)
    variants: dict[str, dict[str, Any]] = {}
    for name, way in WAYS.items():
        variants |= {name: way, f"{name}, JSON": {**way, "structured_outputs": {"json": SCHEMA}}}
    print(f"{options.model}, {model.decoder.dtype}, {os.cpu_count()} CPUs; throughput with the schema over without")
    rows = []
    for batch in options.batches:
        measured = []
        for _ in range(options.rounds):
            engine = Engine(model, EngineConfig(max_num_seqs=batch, enable_prefix_caching=False))
            decoding = {name: partial(decode, engine, batch, settings) for name, settings in variants.items()}
            measured.append(seconds_per_token(decoding, options.turns))
        ratios = {way: median(seconds[way] / seconds[f"{way}, JSON"] for seconds in measured) for way in WAYS}
        step = median(seconds["greedy"] for seconds in measured) * batch * 1e3
        cells = "  ".join(f"{name} {value:.3f}" for name, value in ratios.items())
        print(f"{batch:3}: {step:.2f} ms per step without, greedy; {cells}", flush=True)
        rows.append({"sequences": batch, "ratios": ratios, "seconds_per_token": measured})
    if options.json:
        facts = {"model": options.model, "dtype": str(model.decoder.dtype), "rounds": options.rounds}
        write(options.json, {**surroundings(), **facts, "turns": options.turns, "rows": rows})


if __name__ == "__main__":
    main()
