"""What the benchmarks of large models' shapes have in common: random checkpoints, steps, bytes that are read."""

import argparse
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from benchmark import command_line
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.kv_cache import bytes_per_page
from dynamoe.exits.segments import Segment
from dynamoe.kernels.api.disk import forget
from dynamoe.kernels.api.types import AttentionBatch, Routing
from safetensors.torch import save_file

PAGE = 16
Tensors = dict[str, torch.Tensor]


def write(folder: Path, config: dict[str, Any], files: Iterable[tuple[str, Tensors]]) -> None:
    """A checkpoint of some files, which are made one after the other, unless the folder holds it."""
    if (folder / "config.json").is_file():
        if json.loads((folder / "config.json").read_text()) != config:
            raise SystemExit(f"{folder} holds a model of other sizes; name another folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, str] = {}
    for file, tensors in files:
        save_file(tensors, folder / file)
        with (folder / file).open("rb") as written:
            forget(written.fileno(), written=True)
        index.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))


def plain(*shape: int, size: float = 0.02) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, size)


def ends(config: dict[str, Any], embedding: float = 0.02) -> tuple[str, Tensors]:
    """The file of what is in front of the layers and behind them.

    Arguments:
        embedding: size of its numbers. Large ones keep tokens apart from each other through all layers.
    """
    hidden, sizes = config["hidden_size"], {"model.embed_tokens.weight": embedding, "lm_head.weight": 0.02}
    tables = {name: plain(config["vocab_size"], hidden, size=size) for name, size in sizes.items()}
    return "model-ends.safetensors", {**tables, "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}


def options_of(
    documentation: str | None, *flags: str, requests: Sequence[int] = (1, 4, 16), **sizes: int
) -> argparse.Namespace:
    """What the command line says.

    Arguments:
        flags: further ones, false by default.
        requests: how many run together, one after the other.
        sizes: of the model, with their defaults.
    """
    parser = command_line(documentation)
    parser.add_argument("folder", type=Path)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name in flags:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--requests", type=int, nargs="+", default=list(requests))
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--long", type=int, nargs="*", default=[4096, 16384, 32768], help="contexts of one request")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    return parser.parse_args()


def run(decoder: Decoder, kv: Any, batch: AttentionBatch) -> None:
    """Some tokens from embedding to logits, those of each sequence's last row."""
    rows = len(batch.positions_T)
    x_TD = decoder.embed(torch.randint(decoder.spec.vocab_size, (rows,)))
    x_TD = decoder.run_segment(Segment(index=0, layers=range(decoder.spec.num_layers)), x_TD, kv, batch)
    decoder.logits(x_TD[batch.query_start_S1[1:].long() - 1])


def last_rows(batch: AttentionBatch) -> AttentionBatch:
    """A decode: of each sequence the last row alone."""
    last_S = batch.query_start_S1[1:].long() - 1
    starts_S1 = torch.arange(len(last_S) + 1, dtype=torch.int32)
    places = {"positions_T": batch.positions_T[last_S], "slots_T": batch.slots_T[last_S]}
    return replace(batch, **places, query_start_S1=starts_S1, max_query_len=1)


def experts_read(decoder: Decoder, kv: Any, batch: AttentionBatch) -> float:
    """How many experts the rows of a step use together, in all layers."""
    stack, route, found = decoder.stack, decoder.backend.route, list[int]()

    def watched(*arguments: Any, **more: Any) -> Routing:
        routing = route(*arguments, **more)
        found.append(len(routing.expert_ids_TK.unique()))
        return routing

    decoder.stack, decoder.backend.route = None, watched  # type: ignore[method-assign]
    for _ in range(3):
        run(decoder, kv, batch)
    decoder.stack, decoder.backend.route = stack, route  # type: ignore[method-assign]
    return sum(found) / 3


def timed(decoder: Decoder, kv: Any, batch: AttentionBatch, rounds: int, probe: Any) -> tuple[float, float]:
    """Median seconds of a step, and the median of a limit that is probed beside each."""
    seconds, limits = [], []
    for _ in range(rounds + 1):
        limits.append(probe())
        start = time.perf_counter()
        run(decoder, kv, batch)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), statistics.median(limits[1:])


def torch_seconds(sizes: list[tuple[int, int, int, int]]) -> float:
    """What torch takes for them in bf16 or fp32, whichever is faster; each of many products has weights of its own."""
    total = 0.0
    for count, rows, outputs, inputs in sizes:
        best = float("inf")
        for dtype in (torch.bfloat16, torch.float32):
            taken = min(count, 8)
            weights, x = torch.randn(taken, outputs, inputs).to(dtype), torch.randn(rows, inputs).to(dtype)
            F.linear(x, weights[0])
            start = time.perf_counter()
            for weight in weights:
                F.linear(x, weight)
            best = min(best, (time.perf_counter() - start) / taken)
        total += count * best
    return total


class Reads:
    """Bytes that a decode reads: weights, and entries of the cache."""

    def __init__(self, decoder: Decoder, experts: int) -> None:
        self._decoder = decoder
        routed = [layer.ffn.nbytes for layer in decoder.layers if layer.router is not None]
        self._in_experts, self._per_expert = sum(routed), routed[0] / experts
        self.per_token = bytes_per_page(decoder.spec, decoder.kv_dtype, PAGE) / PAGE  # of the cache, in all layers

    def of(self, kv: Any, batch: Any) -> tuple[float, float]:
        decoder = self._decoder
        embedding = 0 if decoder.embedding_VD is None else decoder.embedding_VD.nbytes
        experts = experts_read(decoder, kv, batch)
        weights = decoder.weight_bytes - embedding - self._in_experts + experts * self._per_expert
        return weights, int(batch.context_len_S.sum()) * self.per_token
