"""Qwen3-30B-A3B's shape on a machine with 24 GiB: ``python benchmarks/qwen3_30b_shape.py FOLDER``.

Writes a checkpoint of random numbers in int4, groups of 32, as compressed-tensors lays it out, layer by layer, unless
the folder holds one of these sizes (17.7 GB). ``--write`` ends there. Else it loads it and serves four requests, whose
cache holds 8,192 tokens each; then it compares decodes, with short contexts and at the end of that cache, with the time
of reading what they read at the bandwidth that is probed beside them. ``peak_gib`` is the most that the process and
the system's cache of files took together until the whole cache had been in use, beyond what that of files held before.
"""

import argparse
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmark import surroundings
from dynamoe.dynamic.checkpoint.compressed_writer import compressed_config
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.offline import OfflineEngine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from limits import Limits
from shapes import PAGE, Reads, Tensors, ends, last_rows, options_of, plain, timed, write

HIDDEN, WIDTH, CHOSEN = 2048, 768, 8
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128
GROUP, SCALE = 32, 0.0043  # of codes -8 to 7: weights are then about as large as trained ones


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    return {
        **{"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "vocab_size": options.vocabulary},
        **{"hidden_size": HIDDEN, "intermediate_size": 6144, "moe_intermediate_size": WIDTH},
        **{"num_hidden_layers": options.layers, "decoder_sparse_step": 1, "mlp_only_layers": []},
        **{"num_experts": options.experts, "num_experts_per_tok": CHOSEN, "norm_topk_prob": True},
        **{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM},
        **{"rope_theta": 1000000, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "eos_token_id": 1},
        **{"tie_word_embeddings": False, "torch_dtype": "bfloat16"},
        "quantization_config": compressed_config(["lm_head", "re:.*mlp.gate$"], group=GROUP),
    }


def coded(name: str, outputs: int, inputs: int) -> Tensors:
    """The tensors of a linear layer's weight, as the library names them."""
    words = torch.randint(-(2**31), 2**31, (outputs, inputs // 8), dtype=torch.int64).to(torch.int32)
    # The code -8 becomes 0: weights whose mean is not zero would make all rows alike, and their experts.
    some = words | words >> 1 | words >> 2 | words >> 3
    words |= (~some & 0x11111111) << 3
    scales = (torch.rand(outputs, inputs // GROUP) + 0.5).mul_(SCALE).bfloat16()
    shape = torch.tensor([outputs, inputs])
    return {f"{name}.weight_packed": words, f"{name}.weight_scale": scales, f"{name}.weight_shape": shape}


def random_files(config: dict[str, Any]) -> Iterator[tuple[str, Tensors]]:
    """One file for each layer and one for the rest."""
    for layer in range(config["num_hidden_layers"]):
        prefix, tensors = f"model.layers.{layer}.", Tensors()
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors |= coded(f"{prefix}self_attn.{part}_proj", heads * HEAD_DIM, HIDDEN)
        tensors |= coded(f"{prefix}self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM)
        norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
        norms |= {f"self_attn.{name}_norm": HEAD_DIM for name in ("q", "k")}
        tensors |= {f"{prefix}{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in norms.items()}
        tensors[f"{prefix}mlp.gate.weight"] = plain(config["num_experts"], HIDDEN)
        for expert in range(config["num_experts"]):
            own = f"{prefix}mlp.experts.{expert}."
            for part, *sizes in (("gate", WIDTH, HIDDEN), ("up", WIDTH, HIDDEN), ("down", HIDDEN, WIDTH)):
                tensors |= coded(f"{own}{part}_proj", *sizes)
        yield f"model-{layer:05}.safetensors", tensors
    yield ends(config, embedding=1.0)  # routers then choose other experts for other tokens


class Memory(threading.Thread):
    """Watches what this process has in memory and by how much the system's cache of files grows; ``peak`` in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._cached, self.peak = self._line("/proc/meminfo", "Cached:"), 0
        self.start()

    def run(self) -> None:
        while True:
            grown = max(self._line("/proc/meminfo", "Cached:") - self._cached, 0)
            self.peak = max(self.peak, self._line("/proc/self/status", "RssAnon:") + grown)
            time.sleep(0.05)

    @staticmethod
    def _line(file: str, name: str) -> int:
        return next(
            1024 * int(line.split()[1]) for line in Path(file).read_text().splitlines() if line.startswith(name)
        )


def fill(kv: list[Any]) -> None:
    """Put something into all of a cache, so that it is memory in use, and rows differ."""
    for layer in kv:
        layer.keys_BGPC.uniform_(-1, 1)
        layer.values_BGPC.uniform_(-1, 1)


def prompts(count: int, length: int, vocabulary: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"prompt_token_ids": row} for row in torch.randint(vocabulary, (count, length), generator=generator).tolist()
    ]


@torch.inference_mode()
def main() -> None:
    options = options_of(__doc__, "write", requests=(1, 4), layers=48, experts=128, vocabulary=151936, cached=8192)
    config = config_of(options)
    write(options.folder, config, random_files(config))
    if options.write:
        return
    memory, start = Memory(), time.perf_counter()
    model = load_model(options.folder, dtype="bfloat16", device="cpu", backend="cpu", skip_tokenizer_init=True)
    decoder, requests = model.decoder, max(options.requests)
    report: dict[str, Any] = {**surroundings(), "layers": options.layers, "experts": options.experts}
    report |= {"load_seconds": time.perf_counter() - start, "weight_gib": decoder.weight_bytes / 2**30}
    report["peak_gib_of_load"] = memory.peak / 2**30
    pages = -(-options.cached // PAGE) * requests
    limits = EngineConfig(
        **{
            "max_num_seqs": requests,
            "max_model_len": options.cached,
            "block_size": PAGE,
            "max_num_batched_tokens": 512,
        },
        kv_memory=pages * PAGE * int(Reads(decoder, options.experts).per_token),
    )
    engine = OfflineEngine(model, limits)
    start = time.perf_counter()
    sampling = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, detokenize=False)
    outputs = engine.generate(prompts(requests, options.prompt, options.vocabulary), sampling, use_tqdm=False)
    report["served"] = {
        **{"requests": requests, "prompt_tokens": options.prompt, "seconds": time.perf_counter() - start},
        **{"output_tokens": sum(len(o.outputs[0].token_ids) for o in outputs), "longest": engine.engine.max_model_len},
    }
    fill(engine.engine.runner.kv)
    report["peak_gib"] = memory.peak / 2**30
    del engine
    limit, reads = Limits(), Reads(decoder, options.experts)
    steps = {f"decode_{count}": [options.context] * count for count in options.requests}
    steps[f"decode_{requests}_at_{options.cached}"] = [options.cached] * requests
    for name, contexts in steps.items():
        kv, whole = fresh_cache(decoder, contexts)
        fill(kv)
        batch = last_rows(whole)
        weights, keys = reads.of(kv, batch)
        seconds, bandwidth = timed(decoder, kv, batch, options.rounds, limit.read_bandwidth)
        report[name] = {
            **{"tokens_per_second": len(contexts) / seconds, "milliseconds": 1000 * seconds},
            **{"weight_gb": weights / 1e9, "kv_gb": keys / 1e9, "read_gb_s": bandwidth / 1e9},
            "share_of_read_limit": (weights + keys) / bandwidth / seconds,
        }
        del kv
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
