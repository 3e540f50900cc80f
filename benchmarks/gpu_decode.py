"""A decode step in ``gpu_check.py``: as a CUDA graph it gives the eager step's bits; both are timed."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import moe_layer
import torch
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.exits.segments import Segment
from dynamoe.kernels.api.types import AttentionBatch
from dynamoe.kernels.triton.backend import TritonBackend
from gpu_attention import PAGE

SIZES = {
    "hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    "num_experts": 32, "num_experts_per_tok": 8, "moe_intermediate_size": 512, "vocab_size": 32768,
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 64,
}  # fmt: skip
ROUNDS = 3  # steps that are compared


@contextlib.contextmanager
def random_model(small: bool, device: torch.device) -> Iterator[Path]:
    """A checkpoint of Qwen3's mixtures with random weights, made with transformers."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    sizes = SMALL if small else SIZES
    config = Qwen3MoeConfig(**sizes, norm_topk_prob=True, max_position_embeddings=8192, tie_word_embeddings=False)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        yield Path(folder)


class Decode:
    """One token for each of some sequences, whose tensors stay where they are, as a graph needs it.

    Arguments:
        context: tokens in front of the first step, with random keys and values.
    """

    def __init__(self, decoder: Decoder, sequences: int, context: int) -> None:
        self.decoder, self.context, device = decoder, context, decoder.device
        longest = context + ROUNDS
        pages = -(-longest // PAGE)
        self.kv = decoder.allocate_cache(sequences * pages, PAGE)
        self.table_SM = torch.randperm(sequences * pages, device=device).int().view(sequences, pages)
        self.ids_S = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.batch = AttentionBatch(
            positions_T=torch.zeros_like(self.ids_S),
            slots_T=torch.zeros_like(self.ids_S),
            query_start_S1=torch.arange(sequences + 1, dtype=torch.int32, device=device),
            context_len_S=torch.zeros(sequences, dtype=torch.int32, device=device),
            block_table_SM=self.table_SM,
            max_query_len=1,
            max_context_len=longest,  # of all steps, so that all take the same tilings
        )
        self.logits_SV = torch.empty(sequences, decoder.spec.vocab_size, device=device)
        decoder.reserve_positions(longest)
        for tensor in self.cache:
            tensor.normal_()

    @property
    def cache(self) -> list[torch.Tensor]:
        """Keys and values of all layers."""
        return [tensor for layer in self.kv for tensor in layer.tensors]

    def move_to(self, position: int) -> None:
        """Let the next step be that of this position, with tokens that belong to it; its keys and values are zero."""
        batch = self.batch
        self.ids_S.copy_(torch.arange(len(self.ids_S)) * 7919 + position * 104729)
        self.ids_S.remainder_(self.decoder.spec.vocab_size)
        batch.positions_T.fill_(position)
        batch.slots_T.copy_(self.table_SM[:, position // PAGE].long() * PAGE + position % PAGE)
        batch.context_len_S.fill_(position + 1)
        for tensor in self.cache:
            tensor[self.table_SM[:, position // PAGE].long(), :, position % PAGE] = 0

    def step(self) -> None:
        """From token ids to logits."""
        decoder = self.decoder
        x_SD = decoder.embed(self.ids_S)
        layers = Segment(index=0, layers=range(decoder.spec.num_layers))
        self.logits_SV.copy_(decoder.logits(decoder.run_segment(layers, x_SD, self.kv, self.batch)))

    def result(self, position: int, run: Callable[[], Any]) -> list[torch.Tensor]:
        """The logits of a step and all keys and values behind it."""
        self.move_to(position)
        self.logits_SV.fill_(torch.nan)
        run()
        return [tensor.clone() for tensor in (self.logits_SV, *self.cache)]


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """An error for whatever makes the host wait for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_decode(decode: Decode) -> Callable[[], Any] | None:
    """Steps of a graph against eager ones, bit by bit. Returns the graph's replay, None where there are no graphs."""
    device = decode.batch.positions_T.device
    decode.result(decode.context, decode.step)  # compiles
    with no_waiting(device):
        decode.step()
    replay = moe_layer.captured(decode.step, device)
    assert replay is not None or device.type != "cuda", "the step could not be captured"
    for position in range(decode.context, decode.context + ROUNDS):
        found, eager = (decode.result(position, run) for run in (replay or decode.step, decode.step))
        assert eager[0].isfinite().all(), f"logits at position {position} are not finite"
        assert all(map(torch.equal, found, eager)), f"a captured step differs at position {position}"
    return replay


def launches_of(decode: Decode) -> int:
    """How many Triton kernels a step launches."""
    backend, counted = decode.decoder.backend, list[int]()
    run = backend._run
    backend._run = lambda launches: (counted.append(len(launches)), run(launches))[1]
    try:
        decode.step()
    finally:
        backend._run = run
    return sum(counted)


def measure_decode(device: torch.device, small: bool, until: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Check and time steps of a few sequences, with weights as they are and quantised.

    Arguments:
        until: of the monotonic clock; nothing new is started afterwards.

    Returns: the measurements, and what was left out.
    """
    found, left_out, context = [], [], 5 if small else 1024
    with random_model(small, device) as path, torch.inference_mode():
        for quantization in ("none", "int4", "int8"):
            decoder = None
            for sequences in (1, 3) if small else (1, 8, 64):
                if time.monotonic() > until:
                    left_out.append(f"decode of {sequences} sequences, quantization {quantization}")
                    continue
                if decoder is None:
                    options = {"dtype": "bfloat16", "device": str(device), "backend": "triton", "progress": False}
                    decoder = load_decoder(path, quantization=quantization, **options)
                    assert isinstance(decoder.backend, TritonBackend)
                decode = Decode(decoder, sequences, context)
                replay = check_decode(decode)
                eager, *_ = moe_layer.time_calls(decode.step, device, 3 if small else 20)
                captured = moe_layer.time_calls(replay, device, 20)[0] if replay is not None else None
                launches = launches_of(decode)
                found.append({
                    "quantization": quantization, "sequences": sequences, "context": context, "launches": launches,
                    "eager": eager, "captured": captured,
                })  # fmt: skip
                graph = "no graph" if captured is None else f"captured {captured * 1e6:.0f} µs"
                what = f"decode of {sequences}, quantization {quantization}: {launches} launches"
                print(f"{what}, eager {eager * 1e6:.0f} µs, {graph}", flush=True)
    return found, left_out
