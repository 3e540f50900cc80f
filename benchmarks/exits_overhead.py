"""What exits cost when they are off, and cost or save when they are on: ``python benchmarks/exits_overhead.py``.

Variants decode the same number of sequences and take turns, a few steps each, because machines drift; times per token
are compared, those with exits in relation to the same engine's without. A model without exits gets random ones: a share
of the rows exits at each of them. The output is then meaningless, but its cost is realistic.

Variants (named as in earlier results): ``off``: the model has exits, requests run exactly; ``0 % leave``: every
probe is evaluated and no row exits; and shares of the rows that exit at each exit.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmark import command_line, in_turns, surroundings, write
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.step_times import last_slots
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.kv_cache import allocate_layers
from dynamoe.dynamic.model.loaded import LoadedModel
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.train.export import checkpoint_tensors, model_config
from dynamoe.dynamic.train.model import DecoderConfig, TrainableDecoder
from dynamoe.exits.calibrators import Temperature
from dynamoe.exits.exit_head import ExitHeadAdapter
from dynamoe.exits.probes import Probe, ProbeSpec
from dynamoe.exits.sidecar import JSON_FILE, ExitHeads, backbone_hash, save_heads
from exits_curve import greedy

PROBE = ProbeSpec(kind="mlp", width=2, previous=True, router_entropy=True)
PROMPT = 32
CHUNK = 16  # steps of one turn


def tiny_checkpoint(directory: Path) -> Path:
    """An untrained model of the shape of ``tiny``."""
    from safetensors.torch import save_file

    model = TrainableDecoder(DecoderConfig())
    save_file(checkpoint_tensors(model, torch.bfloat16), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(model_config(model.config, torch.bfloat16)))
    return directory


def with_exits(checkpoint: Path, directory: Path, exits: tuple[int, ...], hidden_size: int) -> Path:
    """Links to a checkpoint, with random exits beside it."""
    for file in checkpoint.iterdir():
        (directory / file.name).symlink_to(file)
    generator = torch.Generator().manual_seed(0)
    heads = ExitHeads(
        hidden_size=hidden_size,
        adapters={e: ExitHeadAdapter(hidden_size, 16) for e in exits},
        probes={e: Probe(PROBE, hidden_size, generator) for e in exits},
        calibrators={e: Temperature(1.0) for e in exits},
        backbone_sha256=backbone_hash(directory),
    )
    save_heads(heads, directory)
    return directory


def load(path: Path, dtype: str) -> LoadedModel:
    """A model whose exit probabilities rise with the logits: ties at a calibrator's highest step would all exit."""
    decoder = load_decoder(path, dtype=dtype)
    for exit in decoder.exits.values():
        decoder.exits[exit.after_layers] = replace(exit, calibrator=Temperature(1.0))
    tokenizer: Any = None
    return LoadedModel(
        name=path.name, path=path, spec=decoder.spec, decoder=decoder, tokenizer=tokenizer, generation_defaults={}
    )


def without_exits(model: LoadedModel) -> LoadedModel:
    """The same weights in the same memory, loaded without exits."""
    d = model.decoder
    parts = {name: getattr(d, name) for name in ("embedding_VD", "layers", "final_norm_D", "lm_head")}
    return replace(model, decoder=Decoder(d.spec, d.backend, **parts))


def thresholds(model: LoadedModel, share: float) -> dict[int, float]:
    """Calibrated probabilities that about this share of the rows exceeds at each exit."""
    decoder, rows = model.decoder, 256
    kv = allocate_layers(decoder.spec, rows, 16, decoder.dtype, decoder.device)
    x_TD = decoder.embed(torch.randint(decoder.spec.vocab_size, (rows,), generator=torch.Generator().manual_seed(1)))
    found = {}
    for segment in decoder.segments[:-1]:
        before_TD, entropy_T = x_TD.clone(), torch.zeros(rows)
        x_TD = decoder.run_segment(segment, x_TD, kv, last_slots(rows, 16, decoder.device), entropy_T)
        exit = decoder.exits[segment.layers.stop]
        assert exit.probe is not None
        everybody_T = torch.full((rows,), torch.inf)
        logits_T = decoder.backend.exit_decide(x_TD, exit.probe, everybody_T, before_TD, entropy_T).logits_T
        found[exit.after_layers] = float(logits_T.quantile(1 - share).sigmoid()) if share else 1.0
    return found


def decode(engine: Engine, batch: int, spent: dict[str, Any]) -> tuple[float, int]:
    """Seconds and tokens of some steps in which so many sequences decode, all of them past their prompts."""
    vocabulary = engine.model.spec.vocab_size
    for number in range(batch):
        prompt = torch.randint(3, vocabulary, (PROMPT,), generator=torch.Generator().manual_seed(number))
        engine.add_request(str(number), prompt.tolist(), greedy(4 * CHUNK, **spent))
    timed_steps(engine, 1 + CHUNK // 2)  # the prompts, and some steps to warm up
    measured = timed_steps(engine, CHUNK)
    engine.abort([str(number) for number in range(batch)])
    return measured


def seconds_per_token(measurements: dict[str, Callable[[], tuple[float, int]]], turns: int) -> dict[str, float]:
    """Over all turns but the slowest tenth, of measurements that take turns and give seconds and tokens."""
    names, found = list(measurements), {name: list[tuple[float, int]]() for name in measurements}
    for turn in range(turns):
        for name in in_turns(names, turn):
            found[name].append(measurements[name]())
    kept = {name: sorted(pairs)[: -max(1, turns // 10)] for name, pairs in found.items()}
    return {name: sum(s for s, _ in pairs) / sum(t for _, t in pairs) for name, pairs in kept.items()}


def timed_steps(engine: Engine, count: int) -> tuple[float, int]:
    """Seconds and tokens of some steps."""
    before, started = engine.stats().generation_tokens, time.perf_counter()
    for _ in range(count):
        engine.step()
    return time.perf_counter() - started, engine.stats().generation_tokens - before


def measure(
    model: LoadedModel, plain: LoadedModel, batches: list[int], rounds: int, turns: int, only: list[str] | None
) -> Iterator[tuple[int, list[dict[str, float]]]]:
    """Seconds per token by variant in each round, for each number of sequences: over all turns but the slowest tenth.

    Engines of one kind differ by some percent for as long as they live, by where their memory happens to lie. So
    whatever is compared runs in one engine, turn by turn, and every round has new engines; only the model without exits
    needs an engine of its own.
    """
    variants: dict[str, tuple[str, dict[str, Any]]] = {"none": ("plain", {}), "off": ("exits", {})}
    for name, share in (("0 % leave", 0.0), ("10% leave", 0.1), ("50% leave", 0.5), ("90% leave", 0.9)):
        if only is None or name in only:
            variants[name] = ("exits", {"exit_thresholds": thresholds(model, share)})
    for batch in batches:
        measured: list[dict[str, float]] = []
        for _ in range(rounds):
            engines = {
                kind: Engine(which, EngineConfig(max_num_seqs=batch, enable_prefix_caching=False))
                for kind, which in (("plain", plain), ("exits", model))
            }
            decoding = {name: partial(decode, engines[kind], batch, spent) for name, (kind, spent) in variants.items()}
            measured.append(seconds_per_token(decoding, turns))
        yield batch, measured


def ratio(measured: list[dict[str, float]], name: str, to: str) -> float:
    """Median over the rounds."""
    return median(seconds[name] / seconds[to] for seconds in measured)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--model", default="tiny", help="tiny, tiny_shape (untrained), default, or a directory")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5, help="each with new engines")
    parser.add_argument("--turns", type=int, default=6, help="of every variant in a round")
    parser.add_argument("--variants", nargs="*", help="only these; none and off always run")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        path = tiny_checkpoint(Path(first)) if options.model == "tiny_shape" else resolve_model(options.model)
        config = json.loads((path / "config.json").read_text())
        layers = config["num_hidden_layers"]
        if not (path / JSON_FILE).exists():
            quarters = tuple(layers * quarter // 4 for quarter in (1, 2, 3))
            path = with_exits(path, Path(second), quarters, config["hidden_size"])
        model = load(path, options.dtype)
        exits = tuple(model.decoder.exits)
        plain = without_exits(model)
        print(f"{options.model}, {plain.decoder.dtype}, exits after {exits} of {layers} layers, {os.cpu_count()} CPUs")
        print("time per token; off: in relation to a model without exits; others: in relation to off")
        rows = []
        for batch, measured in measure(model, plain, options.batches, options.rounds, options.turns, options.variants):
            ratios = {name: ratio(measured, name, "off") for name in measured[0] if name not in ("none", "off")}
            off = ratio(measured, "off", "none")
            step = median(seconds["none"] for seconds in measured) * batch * 1e3
            rows.append({"sequences": batch, "off": off, "to_off": ratios, "seconds_per_token": measured})
            cells = "  ".join(f"{name} {value:.3f}" for name, value in ratios.items())
            print(f"{batch:3}: {step:.2f} ms per step; off {off:.3f}; {cells}", flush=True)
        if options.json:
            facts = {"model": options.model, "dtype": str(plain.decoder.dtype), "exits": exits, "layers": layers}
            facts |= {**surroundings(), "rounds": options.rounds, "turns": options.turns, "rows": rows}
            write(options.json, facts)


if __name__ == "__main__":
    main()
