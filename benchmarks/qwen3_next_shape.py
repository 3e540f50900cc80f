"""Qwen3-Next's shape on this machine, in 4 GB: ``python benchmarks/qwen3_next_shape.py FOLDER``.

Writes a checkpoint of random numbers in the model's own layout layer by layer, unless the folder holds one of these
sizes, and loads it. Decodes are compared with the time of moving what they move at this machine's bandwidth: weights
and keys and values that are read, recurrent states that are read and written. Prompts are compared with the time that
torch's product takes for products of the same sizes. The limits are probed between the measurements. Three layers of
four keep states; the model itself has 48 layers of 512 experts and a larger vocabulary.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch
from benchmark import surroundings
from dynamoe.dynamic.model.kv_cache import bytes_per_sequence
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from limits import Limits
from shapes import Reads, Tensors, ends, last_rows, options_of, plain, timed, torch_seconds, write

HIDDEN, WIDTH = 2048, 512  # of an expert, and of the shared one
KEY_HEADS, VALUE_HEADS, CHANNELS, TAPS = 16, 32, 128, 4  # of layers with states
HEADS, KV_HEADS, HEAD_DIM = 16, 2, 256  # of layers with keys and values
INTERVAL, CHOSEN = 4, 10


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    return {
        **{"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"], "vocab_size": options.vocabulary},
        **{"hidden_size": HIDDEN, "intermediate_size": 5120, "moe_intermediate_size": WIDTH},
        **{"num_hidden_layers": options.layers, "full_attention_interval": INTERVAL, "decoder_sparse_step": 1},
        **{"num_experts": options.experts, "num_experts_per_tok": CHOSEN, "norm_topk_prob": True},
        **{"shared_expert_intermediate_size": WIDTH, "mlp_only_layers": [], "tie_word_embeddings": False},
        **{"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM},
        **{"linear_num_key_heads": KEY_HEADS, "linear_num_value_heads": VALUE_HEADS, "linear_conv_kernel_dim": TAPS},
        **{"linear_key_head_dim": CHANNELS, "linear_value_head_dim": CHANNELS, "rope_theta": 10000000},
        **{"partial_rotary_factor": 0.25, "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "eos_token_id": 1},
    }


def products(layer: int) -> list[tuple[str, int, int]]:
    """Of a layer's attention or of what it has in its place: the module, outputs, inputs."""
    if (layer + 1) % INTERVAL:
        keys, values = KEY_HEADS * CHANNELS, VALUE_HEADS * CHANNELS
        return [
            ("linear_attn.in_proj_qkvz", 2 * keys + 2 * values, HIDDEN),
            ("linear_attn.in_proj_ba", 2 * VALUE_HEADS, HIDDEN),
            ("linear_attn.out_proj", HIDDEN, values),
        ]
    sizes = {"q_proj": 2 * HEADS, "k_proj": KV_HEADS, "v_proj": KV_HEADS}
    made = [(f"self_attn.{name}", heads * HEAD_DIM, HIDDEN) for name, heads in sizes.items()]
    return [*made, ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM)]


def random_files(config: dict[str, Any]) -> Iterator[tuple[str, Tensors]]:
    """One file for each layer and one for the rest."""

    def ffn(prefix: str) -> Tensors:
        sizes = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
        return {f"{prefix}{name}.weight": plain(*size) for name, size in sizes.items()}

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.weight": plain(*sizes) for name, *sizes in products(layer)}
        zeros = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}  # 1 is added to these
        if (layer + 1) % INTERVAL:
            own = f"{prefix}linear_attn."
            tensors[f"{own}conv1d.weight"] = plain((2 * KEY_HEADS + VALUE_HEADS) * CHANNELS, 1, TAPS, size=0.5)
            tensors |= {f"{own}{name}": plain(VALUE_HEADS, size=1.0) for name in ("A_log", "dt_bias")}
            tensors[f"{own}norm.weight"] = torch.ones(CHANNELS, dtype=torch.bfloat16)
        else:
            zeros |= {f"self_attn.{name}": HEAD_DIM for name in ("q_norm", "k_norm")}
        tensors |= {f"{prefix}{name}.weight": torch.zeros(size, dtype=torch.bfloat16) for name, size in zeros.items()}
        tensors[f"{prefix}mlp.gate.weight"] = plain(config["num_experts"], HIDDEN)
        tensors |= ffn(f"{prefix}mlp.shared_expert.")
        tensors[f"{prefix}mlp.shared_expert_gate.weight"] = plain(1, HIDDEN)
        for expert in range(config["num_experts"]):
            tensors |= ffn(f"{prefix}mlp.experts.{expert}.")
        yield f"model-{layer:05}.safetensors", tensors
    yield ends(config)


def torch_products(config: dict[str, Any], rows: int) -> list[tuple[int, int, int, int]]:
    """Of a prompt of so many rows in all layers: how many products, their rows, outputs and inputs."""
    layers, experts = config["num_hidden_layers"], config["num_experts"]
    full = layers // INTERVAL
    found = [(layers - full, rows, *sizes) for _, *sizes in products(0)]
    found += [(full, rows, *sizes) for _, *sizes in products(INTERVAL - 1)]
    of_expert = -(-rows * CHOSEN // experts)
    found += [(layers, rows, 2 * WIDTH, HIDDEN), (layers, rows, HIDDEN, WIDTH), (layers, rows, experts, HIDDEN)]
    ffn = (layers * experts, of_expert, 2 * WIDTH, HIDDEN), (layers * experts, of_expert, HIDDEN, WIDTH)
    return [*found, *ffn]  # type: ignore[list-item]


@torch.inference_mode()
def main() -> None:
    options = options_of(__doc__, layers=8, experts=64, vocabulary=32768)
    config = config_of(options)
    write(options.folder, config, random_files(config))
    decoder, limits = load_decoder(options.folder, dtype="bfloat16", device="cpu", backend="cpu"), Limits()
    reads, full = Reads(decoder, options.experts), options.layers // INTERVAL
    per_sequence = bytes_per_sequence(decoder.spec)  # of states
    memory, tails = VALUE_HEADS * CHANNELS**2, (TAPS - 1) * (2 * KEY_HEADS + VALUE_HEADS) * CHANNELS
    report: dict[str, Any] = {
        **{**surroundings(), "layers": options.layers, "weight_gib": decoder.weight_bytes / 2**30},
        "one_call": decoder.stack is not None,
        "cache_bytes_per_token": {"found": reads.per_token, "theory": full * 2 * KV_HEADS * HEAD_DIM * 2},
        "state_bytes_per_sequence": {
            "found": per_sequence,
            "theory": (options.layers - full) * (memory + tails) * 4,
        },
    }
    steps = {f"decode_{requests}": [options.context] * requests for requests in options.requests}
    steps |= {f"decode_1_at_{length}": [length] for length in options.long}
    for name, contexts in steps.items():
        kv, prompts = fresh_cache(decoder, contexts)
        batch = last_rows(prompts)
        weights, keys = reads.of(kv, batch)
        states = 2 * batch.num_sequences * per_sequence  # read and written
        seconds, bandwidth = timed(decoder, kv, batch, options.rounds, limits.read_bandwidth)
        report[name] = {
            **{"tokens_per_second": len(contexts) / seconds, "milliseconds": 1000 * seconds},
            **{"weight_gb": weights / 1e9, "kv_gb": keys / 1e9, "state_gb": states / 1e9},
            "cache_mib": (keys + states / 2) / 2**20,  # states are read and written
            **{"read_gb_s": bandwidth / 1e9, "share_of_read_limit": (weights + keys + states) / bandwidth / seconds},
        }
    kv, batch = fresh_cache(decoder, [options.prompt])
    sizes = torch_products(config, options.prompt)
    rounds = max(options.rounds // 3, 1)
    seconds, product = timed(decoder, kv, batch, rounds, lambda: torch_seconds(sizes))
    operations = sum(2 * count * rows * outputs * inputs for count, rows, outputs, inputs in sizes)
    report["prefill"] = {
        "tokens_per_second": options.prompt / seconds,
        **{"torch_gflop_s": operations / product / 1e9, "share_of_torch": product / seconds},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
