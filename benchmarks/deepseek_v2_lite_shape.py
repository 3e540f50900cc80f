"""DeepSeek-V2-Lite's shape on this machine: ``python benchmarks/deepseek_v2_lite_shape.py FOLDER --layers 6``.

Writes a checkpoint of random numbers in the model's own layout layer by layer, unless the folder holds one of these
sizes, and loads it. Decodes are compared with the time of reading what they read at this machine's bandwidth, weights
and latents in the cache counted; prompts with the time that torch's product takes for products of the same sizes. The
limits are probed between the measurements. A layer takes 1.2 GB of disk and of memory, all 27 take 31 GB.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

import torch
from benchmark import surroundings
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from dynamoe.kernels.api.kv_codes import KV_DTYPES
from limits import Limits
from shapes import Reads, Tensors, ends, last_rows, options_of, plain, timed, torch_seconds, write

LATENT, ROTATED = 512, 64
PLAIN, VALUES = 128, 128  # channels of a head
YARN = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}


def config_of(options: argparse.Namespace) -> dict[str, Any]:
    return {
        **{"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "vocab_size": options.vocabulary},
        **{"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408},
        **{"num_hidden_layers": options.layers, "first_k_dense_replace": 1, "moe_layer_freq": 1},
        **{"n_routed_experts": options.experts, "n_shared_experts": 2, "num_experts_per_tok": 6},
        **{"topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False},
        **{"routed_scaling_factor": 1.0, "scoring_func": "softmax"},
        **{"num_attention_heads": options.heads, "num_key_value_heads": options.heads, "q_lora_rank": None},
        **{"kv_lora_rank": LATENT, "qk_nope_head_dim": PLAIN, "qk_rope_head_dim": ROTATED, "v_head_dim": VALUES},
        **{"rope_theta": 10000, "rope_scaling": {**YARN, "original_max_position_embeddings": 4096}},
        **{"max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "eos_token_id": 1, "tie_word_embeddings": False},
    }


def products(config: dict[str, Any]) -> list[tuple[str, int, int]]:
    """Of a layer's attention: the module, outputs, inputs."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return [
        ("q_proj", heads * (PLAIN + ROTATED), hidden),
        ("kv_a_proj_with_mqa", LATENT + ROTATED, hidden),
        ("kv_b_proj", heads * (PLAIN + VALUES), LATENT),
        ("o_proj", hidden, heads * VALUES),
    ]


def random_files(config: dict[str, Any]) -> Iterator[tuple[str, Tensors]]:
    """One file for each layer and one for the rest."""
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]

    def ffn(prefix: str, neurons: int) -> Tensors:
        sizes = {"gate_proj": (neurons, hidden), "up_proj": (neurons, hidden), "down_proj": (hidden, neurons)}
        return {f"{prefix}{name}.weight": plain(*size) for name, size in sizes.items()}

    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}self_attn.{name}.weight": plain(*sizes) for name, *sizes in products(config)}
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden, "self_attn.kv_a_layernorm": LATENT}
        tensors |= {f"{prefix}{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in norms.items()}
        if layer < config["first_k_dense_replace"]:
            tensors |= ffn(f"{prefix}mlp.", config["intermediate_size"])
        else:
            tensors[f"{prefix}mlp.gate.weight"] = plain(config["n_routed_experts"], hidden)
            tensors |= ffn(f"{prefix}mlp.shared_experts.", config["n_shared_experts"] * width)
            for expert in range(config["n_routed_experts"]):
                tensors |= ffn(f"{prefix}mlp.experts.{expert}.", width)
        yield f"model-{layer:05}.safetensors", tensors
    yield ends(config)


def torch_products(config: dict[str, Any], rows: int) -> list[tuple[int, int, int, int]]:
    """Of a prompt of so many rows in one layer with experts: how many products, their rows, outputs and inputs.
    Those of each head's own are counted as one product of all heads, as if keys and values were made of latents."""
    hidden, width, experts = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    shared = config["n_shared_experts"] * width
    of_expert = -(-rows * config["num_experts_per_tok"] // experts)
    found = [(1, rows, outputs, inputs) for _, outputs, inputs in products(config)]
    found += [(1, rows, 2 * shared, hidden), (1, rows, hidden, shared), (1, rows, experts, hidden)]
    return [*found, (experts, of_expert, 2 * width, hidden), (experts, of_expert, hidden, width)]


@torch.inference_mode()
def main() -> None:
    options = options_of(__doc__, layers=6, experts=64, heads=16, vocabulary=102400)
    config = config_of(options)
    write(options.folder, config, random_files(config))
    decoder, limits = load_decoder(options.folder, dtype="bfloat16", device="cpu", backend="cpu"), Limits()
    report: dict[str, Any] = {**surroundings(), "layers": options.layers, "weight_gib": decoder.weight_bytes / 2**30}
    for kept in ("auto", "int8"):
        decoder.kv_dtype = KV_DTYPES[kept] or decoder.dtype
        reads = Reads(decoder, options.experts)
        found: dict[str, Any] = {"cache_bytes_per_token": reads.per_token}
        found["cache_mib_at_32k"] = reads.per_token * 2**15 / 2**20
        steps = {f"decode_{requests}": [options.context] * requests for requests in options.requests}
        steps |= {f"decode_1_at_{length}": [length] for length in options.long}
        for name, contexts in steps.items():
            kv, prompts = fresh_cache(decoder, contexts)
            batch = last_rows(prompts)
            weights, latents = reads.of(kv, batch)
            seconds, bandwidth = timed(decoder, kv, batch, options.rounds, limits.read_bandwidth)
            found[name] = {
                **{"tokens_per_second": len(contexts) / seconds, "milliseconds": 1000 * seconds},
                **{"weight_gb": weights / 1e9, "latent_gb": latents / 1e9, "read_gb_s": bandwidth / 1e9},
                **{"share_of_read_limit": (weights + latents) / bandwidth / seconds, "cache_mib": latents / 2**20},
            }
        kv, batch = fresh_cache(decoder, [options.prompt])
        sizes = torch_products(config, options.prompt)
        rounds = max(options.rounds // 3, 1)
        seconds, product = timed(decoder, kv, batch, rounds, lambda sizes=sizes: torch_seconds(sizes))
        per_layer = sum(2 * count * rows * outputs * inputs for count, rows, outputs, inputs in sizes)
        found["prefill"] = {
            "tokens_per_second": options.prompt / seconds,
            "torch_gflop_s": per_layer / product / 1e9,
            "share_of_torch": product * options.layers / seconds,  # the dense layer counts as one with experts
        }
        report[kept] = found
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
