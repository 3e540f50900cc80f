"""GGUF files turned into checkpoints in Hugging Face layout, their quantised tensors kept or dequantised without loss.

Files of the architectures below are read directly, in one pass. Others go through transformers, which takes longer and
reads less of the tokenizer.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.compressed_writer import compressed, kept_codes_config
from ..checkpoint.directory import write_json, write_tensors
from ..checkpoint.gguf_codes import codes_of, tensors_to_keep
from ..model.families import FAMILIES
from ..model.family import one_each

# What a file's architecture is in Hugging Face's terms, without and with experts.
_DENSE = {"llama": ("llama", "LlamaForCausalLM")}
_SPARSE = {
    "llama": ("mixtral", "MixtralForCausalLM"),
    "granitemoe": ("granitemoe", "GraniteMoeForCausalLM"),
}
# Tensor names of such files, without the block's prefix, and what Hugging Face calls them.
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EXPERT_NAMES = {"ffn_gate_exps": "gate", "ffn_up_exps": "up", "ffn_down_exps": "down"}
_OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_SCALES = {  # Granite's
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_CONTROL, _USER_DEFINED = 3, 4  # values of ``tokenizer.ggml.token_type``
# Pre-tokenizers (``tokenizer.ggml.pre``) that split digits off one by one before the byte-level rule of GPT-2.
_SINGLE_DIGITS = ("smollm", "starcoder", "refact", "command-r")


def import_gguf(file: Path, target: Path, *, keep_codes: bool = False, progress: bool = True) -> None:
    """Write config, tokenizer and weights of a GGUF file to a directory.

    Weights that are not kept as codes are stored in float32: a 4-bit value is ``scale * code + minimum`` with both in
    float16, which neither float16 nor bfloat16 holds exactly. The config names bfloat16 as the type to serve in.

    Arguments:
        file: the GGUF file.
        target: a directory that exists and is empty.
        keep_codes: keep the codes of Q4_0, Q4_1 and Q8_0 tensors, where the file is read directly.

    Raises:
        ValueError: when the file is not GGUF, or holds a model that cannot be read.
    """
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"{file} is not a GGUF file")
    reader = _open(file)
    fields = dict(reader.fields)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    kind = _kind(fields)
    names = {} if kind is None else {name: _hugging_face_names(name, kind[0], tensors[name]) for name in tensors}
    if kind is not None and fields["tokenizer.ggml.model"].contents() == "gpt2" and all(names.values()):
        _write_direct(fields, tensors, names, kind, target, keep_codes, progress)
    else:
        _write_through_transformers(file, target)


def _open(file: Path) -> Any:
    """The ``gguf`` package's reader of a file that is complete.

    Raises:
        ValueError: naming the file, and the tensor that it ends in the middle of.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

    class CutShort(ValueError):
        pass

    class Reader(GGUFReader):
        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            for field in fields:
                _, name, _, dims, kind, offset = field.parts
                block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind[0])]
                end = int(start_offs) + int(offset[0]) + math.prod(dims.tolist()) // block * size
                if end > len(self.data):
                    raise CutShort(
                        f"{file} is cut short: it has {len(self.data)} bytes, and {bytes(name).decode()!r} reaches to"
                        f" byte {end}"
                    )
            super()._build_tensors(start_offs, fields)

    try:
        return Reader(file)
    except CutShort:
        raise
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{file} is damaged or cut short in its header: {error}") from error


def _kind(fields: dict[str, Any]) -> tuple[str, str] | None:
    """Model type and class in Hugging Face's terms, None where the file is not read directly."""
    architecture = fields["general.architecture"].contents()
    experts = fields.get(f"{architecture}.expert_count")
    return (_SPARSE if experts is not None and experts.contents() else _DENSE).get(architecture)


def _hugging_face_names(name: str, model_type: str, tensor: Any) -> list[str]:
    """What Hugging Face calls a tensor: one name, or one for each expert that it holds; none if it is not known."""
    stem, _, kind = name.rpartition(".")
    if stem in _OTHER_NAMES:
        return [f"{_OTHER_NAMES[stem]}.{kind}"]
    block, number, part = (*stem.split(".", 2), "", "")[:3]
    prefix, family = f"model.layers.{number}.", FAMILIES[model_type]
    if block != "blk":
        return []
    if part in _BLOCK_NAMES:
        return [f"{prefix}{_BLOCK_NAMES[part]}.{kind}"]
    if part == "ffn_gate_inp" and kind == "weight":
        return [prefix + family.router[0]]
    if part in _EXPERT_NAMES and kind == "weight":
        pattern = getattr(one_each(family), _EXPERT_NAMES[part])
        return [prefix + pattern.replace("{e}", str(expert)) for expert in range(int(tensor.shape[2]))]
    return []


def _write_direct(
    fields: dict[str, Any],
    tensors: dict[str, Any],
    names: dict[str, list[str]],
    kind: tuple[str, str],
    target: Path,
    keep_codes: bool,
    progress: bool,
) -> None:
    from gguf import dequantize
    from tqdm import tqdm

    config = _model_config(fields, kind, tied="output.weight" not in tensors)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    kept = tensors_to_keep(tensors) if keep_codes else set[str]()
    if kept:
        config["quantization_config"] = kept_codes_config()
    weights = {}
    for name, tensor in tqdm(tensors.items(), desc="Converting", unit="tensor", disable=not progress or None):
        num_heads = next((heads[part] for part in name.split(".") if part in heads), None)
        if name in kept:
            codes = codes_of(tensor)
            rows_O = torch.arange(codes.out_features)
            codes = codes if num_heads is None else codes.take(_half_split_rope(rows_O[:, None], num_heads)[:, 0])
            size = codes.out_features // len(names[name])
            for number, part in enumerate(names[name]):
                weights |= compressed(part, codes.rows(number * size, (number + 1) * size))
            continue
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).float()
        if num_heads is not None:
            weight = _half_split_rope(weight, num_heads)
        parts = weight[None] if len(names[name]) == 1 else weight
        weights |= {part: parts[number].contiguous() for number, part in enumerate(names[name])}
    write_tensors(target / "model.safetensors", weights)
    write_json(target / "config.json", config)
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    write_json(target / "generation_config.json", tokens)
    _write_tokenizer(fields, config["max_position_embeddings"], target)


def _half_split_rope(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """GGUF stores the rotary pairs of queries and keys next to each other, Hugging Face half a head apart."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _model_config(fields: dict[str, Any], kind: tuple[str, str], tied: bool) -> dict[str, Any]:
    architecture = fields["general.architecture"].contents()

    def value(name: str, default: Any = None) -> Any:
        field = fields.get(f"{architecture}.{name}")
        return default if field is None else field.contents()

    hidden, heads = value("embedding_length"), value("attention.head_count")
    config = {
        "architectures": [kind[1]],
        "model_type": kind[0],
        "dtype": "bfloat16",
        "vocab_size": value("vocab_size", len(fields["tokenizer.ggml.tokens"].data)),
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("rope.dimension_count", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_theta": value("rope.freq_base", 10000.0),
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
    }
    if experts := value("expert_count"):
        config |= {"num_local_experts": experts, "num_experts_per_tok": value("expert_used_count")}
    for ours, theirs in _SCALES.items() if kind[0] == "granitemoe" else ():
        config[ours] = value(theirs, 1.0)
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := fields.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            config[f"{ours}_token_id"] = token.contents()
    return config


def _write_tokenizer(fields: dict[str, Any], context: int, target: Path) -> None:
    """A byte-level BPE tokenizer with the file's own pre-tokenizer, special tokens and chat template.

    transformers would take GPT-2's pre-tokenizer for every such file, which tokenizes "\\n\\n1" and runs of spaces
    before a digit unlike what the model was trained on.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pre = fields["tokenizer.ggml.pre"].contents() if "tokenizer.ggml.pre" in fields else "default"
    if pre in _SINGLE_DIGITS:
        byte_level = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    kinds = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in kinds if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in kinds if k == _USER_DEFINED])

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (field := fields.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            config[f"{ours}_token"] = tokens[field.contents()]
    if (field := fields.get("tokenizer.ggml.add_bos_token")) is not None and field.contents():
        bos = config["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    if (field := fields.get("tokenizer.chat_template")) is not None:
        (target / "chat_template.jinja").write_text(field.contents(), encoding="utf-8")
    tokenizer.save(str(target / "tokenizer.json"))
    write_json(target / "tokenizer_config.json", config)


def _write_through_transformers(file: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # A separate directory, because transformers takes a directory and reads its other files too.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / file.name).symlink_to(file.resolve())
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
        # Else the weights stay packed where Hugging Face's package "kernels" is installed.
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file.name, dtype=torch.float32, quantization_config=unpacked
        )
    # transformers does not save a model marked as quantised, and its configuration would be wrong.
    vars(model).pop("hf_quantizer", None)
    vars(model.config).pop("quantization_config", None)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
