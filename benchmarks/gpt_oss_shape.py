"""gpt-oss's shape on this machine: ``python benchmarks/gpt_oss_shape.py FOLDER --layers 2``.

Writes a checkpoint of random numbers in gpt-oss's own layout (experts in MXFP4) layer by layer, unless the folder holds
one of these sizes; loads it, and reports the time and the peak of memory that took, decodes against the time of reading
what they read at this machine's bandwidth, and prompts against the rate of torch's matrix product. The limits are
probed between the measurements. Long contexts of one request lie where the engine's scheduler puts them, in pages of
both groups of layers; ``context_plot.py`` draws their decodes and bytes. The defaults are the sizes of gpt-oss-20b,
which takes 14 GB of disk and of memory.
"""

import argparse
import json
import resource
import time
from collections.abc import Iterator
from typing import Any

import torch
from benchmark import surroundings
from dynamoe.dynamic.engine.block_pool import BlockPool
from dynamoe.dynamic.engine.cache_size import make_cache
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.request import Request, StopTokens
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.engine.scheduler import Scheduler
from dynamoe.dynamic.engine.staging import HostStaging
from dynamoe.dynamic.engine.step_rows import StepRows
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.kv_cache import group_page_bytes
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from dynamoe.kernels.api.types import AttentionBatch
from limits import Limits
from shapes import Reads, Tensors, ends, last_rows, options_of, plain, timed, write

GROUP = 32
EXPONENTS = (116, 120)  # of scales: weights are then about as large as trained ones


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    return {
        **{"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "vocab_size": options.vocabulary},
        **{"hidden_size": options.hidden, "intermediate_size": options.hidden, "num_hidden_layers": options.layers},
        **{"num_local_experts": options.experts, "num_experts_per_tok": 4, "sliding_window": 128},
        **{"num_attention_heads": options.heads, "num_key_value_heads": 8, "head_dim": 64},
        **{"max_position_embeddings": 131072, "eos_token_id": 2},
        "quantization_config": {"quant_method": "mxfp4"},
    }


def random_files(config: dict[str, Any]) -> Iterator[tuple[str, Tensors]]:
    """One file for each layer and one for the rest."""
    hidden, experts, layers = config["hidden_size"], config["num_local_experts"], config["num_hidden_layers"]
    q_size, kv_size = (config[name] * config["head_dim"] for name in ("num_attention_heads", "num_key_value_heads"))
    for layer in range(layers):
        prefix, tensors = f"model.layers.{layer}.", Tensors()
        for part, outputs, inputs in (
            *(("q", q_size, hidden), ("k", kv_size, hidden), ("v", kv_size, hidden)),
            ("o", hidden, q_size),
        ):
            name = f"{prefix}self_attn.{part}_proj"
            tensors |= {f"{name}.weight": plain(outputs, inputs), f"{name}.bias": plain(outputs)}
        tensors[f"{prefix}self_attn.sinks"] = plain(config["num_attention_heads"], size=1.0)
        tensors |= {f"{prefix}mlp.router.weight": plain(experts, hidden), f"{prefix}mlp.router.bias": plain(experts)}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for part, outputs in (("gate_up_proj", 2 * hidden), ("down_proj", hidden)):
            name, shape = f"{prefix}mlp.experts.{part}", (experts, outputs, hidden // GROUP)
            tensors[f"{name}_blocks"] = torch.randint(256, (*shape, GROUP // 2), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(*EXPONENTS, shape, dtype=torch.uint8)
            tensors[f"{name}_bias"] = plain(experts, outputs)
        yield f"model-{layer:05}.safetensors", tensors
    yield ends(config)


def served(decoder: Decoder, length: int) -> tuple[Any, AttentionBatch, float]:
    """A decode at the end of a context, as the engine schedules it behind a prompt in chunks: its cache, which is not
    filled, its batch, and the bytes of the pages that the request holds."""
    config, spec = EngineConfig(max_num_seqs=1), decoder.spec
    pool = BlockPool(-(-length // config.block_size))
    cache = make_cache(config, spec, pool, 0, length)
    scheduler = Scheduler(config, pool, cache, spec.longest_window)
    request = Request(
        "long",
        list(range(length - 1)),
        SamplingParams(),
        **{"priority": 0, "cache_salt": None, "arrival": 0, "max_total_tokens": length, "base_seed": 0},
        stop_tokens=StopTokens(eos=frozenset(), listed=frozenset()),
    )
    (sequence,) = request.sequences
    scheduler.add(sequence)
    while sequence.num_uncomputed:
        for entry in scheduler.schedule().entries:
            scheduler.computed(entry)
    sequence.append(0)
    rows = StepRows(
        scheduler.schedule().entries, config.block_size, HostStaging(torch.device("cpu")), False, cache.windows
    )
    windows = [group.num_pages for group in cache.windows]
    held = scheduler.cache_groups(group_page_bytes(spec, decoder.kv_dtype, config.block_size))
    kv = decoder.allocate_cache(pool.num_pages, config.block_size, window_pages=windows)
    return kv, rows.batch(), sum(group.held for group in held)


def theory(decoder: Decoder, length: int) -> int:
    """Bytes of keys and values of a context: all of it in full layers, what a decode sees of it in the others."""
    total = 0
    for layer in decoder.spec.layers:
        attention: Any = layer.attention
        seen = length if layer.window is None else min(layer.window, length)
        total += 2 * attention.kv_size * decoder.dtype.itemsize * seen
    return total


@torch.inference_mode()
def main() -> None:
    options = options_of(__doc__, layers=24, experts=32, hidden=2880, heads=64, vocabulary=201088)
    config = config_of(options)
    write(options.folder, config, random_files(config))
    start = time.perf_counter()
    decoder = load_decoder(options.folder, dtype="bfloat16", device="cpu", backend="cpu")
    report: dict[str, Any] = {**surroundings(), "load_seconds": time.perf_counter() - start}
    report |= {"weight_gib": decoder.weight_bytes / 2**30}
    report |= {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    limits, spec = Limits(), decoder.spec
    reads = Reads(decoder, options.experts)
    for requests in options.requests:
        kv, prompts = fresh_cache(decoder, [options.context] * requests)
        batch = last_rows(prompts)
        moved, _ = reads.of(kv, batch)
        seconds, bandwidth = timed(decoder, kv, batch, options.rounds, limits.read_bandwidth)
        report[f"decode_{requests}"] = {
            **{"tokens_per_second": requests / seconds, "gigabytes_read": moved / 1e9, "read_gb_s": bandwidth / 1e9},
            "share_of_read_limit": moved / bandwidth / seconds,
        }
    for length in options.long:
        kv, batch, held = served(decoder, length)
        seconds, bandwidth = timed(decoder, kv, batch, options.rounds, limits.read_bandwidth)
        report[f"decode_1_at_{length}"] = {
            **{"milliseconds": 1000 * seconds, "cache_mib": held / 2**20, "read_gb_s": bandwidth / 1e9},
            **{"cache_bytes_per_token": held / length, "in_theory": theory(decoder, length) / length},
        }
    kv, batch = fresh_cache(decoder, [options.prompt])
    seconds, rate = timed(decoder, kv, batch, max(options.rounds // 3, 1), limits.gemm_rate)
    operations = options.prompt * sum(spec.layer_flops(layer) for layer in spec.layers)
    report["prefill"] = {
        **{"tokens_per_second": options.prompt / seconds, "product_gflop_s": rate / 1e9},
        "share_of_product_rate": operations / rate / seconds,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
