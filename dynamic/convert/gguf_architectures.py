"""From a GGUF file to a ``config.json`` and to tensors under Hugging Face's names, by the tables of architectures.

A new architecture is a new entry in one of the tables. Rules and defaults are those of llama.cpp, which the files are
made for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..checkpoint.gguf_file import GgufTensor
from ..checkpoint.weights import CheckpointError
from ..model.families import FAMILIES
from ..model.family import Family, one_each
from .gguf_latent import LATENT
from .gguf_layer_types import LAYER_TYPES
from .gguf_llama_like import LLAMA_LIKE
from .gguf_metadata import Metadata
from .gguf_norms import NORMS
from .gguf_parts import FUSED_QKV, Config, Part, Rule, less, shape_error
from .gguf_rope import SKIPPED, rope_scaling
from .gguf_settings import FULL, MOST_EXPERTS, SLIDING, Architecture, Tensors
from .gguf_shared_experts import SHARED_EXPERTS
from .gguf_state_spaces import STATE_SPACES
from .gguf_states import STATES

_MOST_LAYERS = 1 << 12
_SMALLEST_EXPERT = 1024  # bytes of a projection: no file may name far more tensors than it has bytes for
_BLOCK_TENSOR = re.compile(
    r"blk\.(?P<block>0|[1-9]\d{0,4})\.(?P<part>\w+(\.[a-z]\w*)?)(\.(?P<expert>0|[1-9]\d{0,4}))?\.(?P<kind>weight|bias|scale)"
)
# Parts of blocks behind the layers, and what :mod:`..model.mtp_layers` calls them.
_FURTHER = {
    **{"nextn.eh_proj": "join", "nextn.enorm": "embedding_norm", "nextn.hnorm": "hidden_norm"},
    **{"nextn.shared_head_norm": "norm", "nextn.shared_head_head": "head", "nextn.embed_tokens": "embed_tokens"},
}
_BARE_TENSOR = re.compile(r"blk\.(?P<block>0|[1-9]\d{0,4})\.(?P<part>ssm_[ad]|exp_probs_b)(?P<kind>)(?P<expert>)")
_OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ATTENTION = {
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_NORMS = {
    "attention": "attn_norm",
    "attention_out": "post_attention_norm",
    "ffn": "ffn_norm",
    "ffn_out": "post_ffw_norm",
}
_PROJECTIONS = ("gate", "up", "down")
_EXPERTS = {f"ffn_{part}": part for part in _PROJECTIONS}
_GATES_AND_UPS = "ffn_gate_up_exps"

ARCHITECTURES: dict[str, Architecture] = {
    **LLAMA_LIKE,
    **SHARED_EXPERTS,
    **LATENT,
    **LAYER_TYPES,
    **NORMS,
    **STATES,
    **STATE_SPACES,
}


def model_config(
    meta: Metadata, tensors: Tensors, read: Callable[[GgufTensor], torch.Tensor]
) -> tuple[dict[str, Any], Architecture]:
    """The ``config.json`` of a file, without what belongs to its tokenizer, and its entry in the table.

    Arguments:
        read: the numbers of a small tensor, float32.

    Raises:
        CheckpointError: naming an architecture, a key or a tensor that is missing or not understood.
    """
    if meta.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise meta.error("general.architecture", meta.architecture, f"one of {known}; nothing else is supported")
    architecture = ARCHITECTURES[meta.architecture]
    if (embedding := tensors.get("token_embd.weight")) is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{meta.file} lacks the tensor 'token_embd.weight' of two dimensions")
    layers = meta.num_layers
    if not 0 <= layers <= (most := min(len(tensors), _MOST_LAYERS)):
        raise meta.error(".block_count", meta.get(".block_count"), f"at most {most}, for {len(tensors)} tensors")
    vocabulary = meta.integer(".vocab_size", embedding.shape[0])
    if vocabulary != embedding.shape[0]:
        raise meta.error(".vocab_size", vocabulary, f"the rows of 'token_embd.weight', {embedding.shape[0]}")
    heads, own = architecture.heads(meta), architecture.settings(meta, tensors)
    epsilons = architecture.epsilons
    epsilon = next(filter(meta.has, epsilons), next(iter(epsilons)))
    return {
        "vocab_size": vocabulary,
        "hidden_size": meta.integer(".embedding_length"),
        "intermediate_size": meta.of_all_layers(".feed_forward_length", 0, zeros=True),
        "num_hidden_layers": layers,
        **heads,
        "hidden_act": "silu",
        "max_position_embeddings": meta.integer(".context_length"),
        epsilons[epsilon]: meta.number(epsilon),
        **_rotations(meta, rope_scaling(meta, tensors, read, architecture.latent), architecture, {**heads, **own}),
        "tie_word_embeddings": "output.weight" not in tensors,
        **own,
    }, architecture


def _rotations(
    meta: Metadata, scaling: dict[str, Any] | None, architecture: Architecture, config: Config
) -> dict[str, Any]:
    base = meta.number(".rope.freq_base", 10000.0)
    if scaling is not None:
        scaling |= architecture.scaling(meta)
    family = FAMILIES[config["model_type"]]
    if FULL not in family.thetas:
        if scaling is None and family.default_rope:  # which a configuration without any would get
            return {"rope_parameters": {"rope_type": "default", "rope_theta": base}}
        # A null would be a statement in some families.
        return {"rope_theta": base, **({} if scaling is None else {"rope_scaling": scaling})}
    # Layers with a window rotate by a base of their own, and unscaled.
    own = meta.number(".rope.freq_base_swa", architecture.window_theta or base)
    part = {name: config[name] for name in ("partial_rotary_factor",) if name in config}
    plain = {"rope_type": "default", **part}
    full = {**(plain if scaling is None else {**part, **scaling}), "rope_theta": base}
    return {"rope_parameters": {FULL: full, SLIDING: {**plain, "rope_theta": own}}}


def parts_of(tensor: GgufTensor, architecture: Architecture, config: Config, num_blocks: int) -> list[Part]:
    """What a tensor holds, under Hugging Face's names; nothing for one that is skipped.

    Arguments:
        num_blocks: those behind the model's layers predict further tokens.

    Raises:
        CheckpointError: for a name that is not known, or a shape that cannot be.
    """
    name, family = tensor.name, FAMILIES[config["model_type"]]
    if (whole := {**_OTHER_NAMES, **architecture.others}.get(name)) is not None:
        return [_norm_part(Part(name=whole, shape=tensor.shape), name, architecture)]
    if SKIPPED.fullmatch(name):
        return []
    match = _BLOCK_TENSOR.fullmatch(name) or _BARE_TENSOR.fullmatch(name)
    if match is None:
        raise _unknown(tensor)
    theirs, further = f"{match['part']}.{match['kind']}", int(match["block"]) - config["num_hidden_layers"]
    is_further = 0 <= further < num_blocks - config["num_hidden_layers"]
    if is_further and match["kind"] == "weight" and not match["expert"] and match["part"] in _FURTHER:
        parts = [Part(name=f"{_FURTHER[match['part']]}.weight", shape=tensor.shape)]
    else:
        parts = _block_parts(match, tensor, architecture, family, config)
    prefix = f"mtp.{further}." if is_further else f"model.layers.{match['block']}."
    return [_norm_part(replace(part, name=prefix + part.name), theirs, architecture) for part in parts]


def _block_parts(
    match: re.Match[str],
    tensor: GgufTensor,
    architecture: Architecture,
    family: Family,
    config: Config,
) -> list[Part]:
    part, kind, expert = match["part"], match["kind"], match["expert"]
    if expert:
        if part in _EXPERTS and kind == "weight":
            name = getattr(one_each(family), _EXPERTS[part]).replace("{e}", expert)
            return [Part(name=name, shape=tensor.shape)]
        raise _unknown(tensor)
    theirs = f"{part}.{kind}" if kind else part
    own = architecture.names.get(theirs) or FUSED_QKV.get(theirs)
    if isinstance(own, Rule):
        return [_paired(made, tensor, architecture, config) for made in own.make(tensor, config)]
    if own is None and kind in ("weight", "bias"):
        own = _own_names(family, kind).get(part)
    if own is not None:
        shape = (1, *tensor.shape) if part == "ffn_gate_inp_shexp" and len(tensor.shape) == 1 else tensor.shape
        return [_paired(Part(name=own, shape=shape), tensor, architecture, config)]
    stem = part.removesuffix("_exps")
    if kind == "scale" or (part != _GATES_AND_UPS and (stem not in _EXPERTS or stem == part)):
        raise _unknown(tensor)
    dimensions, smallest = (3, _SMALLEST_EXPERT) if kind == "weight" else (2, 0)
    if len(tensor.shape) != dimensions or tensor.end - tensor.begin < tensor.shape[0] * smallest:
        raise shape_error(tensor, f"{dimensions} dimensions, and {_SMALLEST_EXPERT} bytes for each expert")
    if tensor.shape[0] > MOST_EXPERTS:
        raise shape_error(tensor, f"at most {MOST_EXPERTS} experts")
    return _expert_parts(tensor, family, kind, ("gate", "up") if part == _GATES_AND_UPS else (_EXPERTS[stem],))


def _expert_parts(tensor: GgufTensor, family: Family, kind: str, projections: tuple[str, ...]) -> list[Part]:
    """One expert after the other, of each first its gate and then its up where both are in one tensor."""
    count, outputs = tensor.shape[:2]
    size = outputs // len(projections)
    if (kind != "weight" and len(projections) > 1) or size * len(projections) != outputs:
        raise shape_error(tensor, "as many gates as ups, and no biases")
    shape, parts = (size, *tensor.shape[2:]), []
    # Of a bias the last dimension is that of a row.
    step = size if kind == "weight" else 1
    for expert in range(count):
        for number, projection in enumerate(projections):
            name = of_kind(getattr(one_each(family), projection), kind).replace("{e}", str(expert))
            first = (expert * len(projections) + number) * step
            parts.append(Part(name=name, shape=shape, rows=slice(first, first + step)))
    return parts


def _paired(part: Part, tensor: GgufTensor, architecture: Architecture, config: Config) -> Part:
    """Rows of queries and keys in Hugging Face's order."""
    module = part.name.rpartition(".")[0]
    keys = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
    if module not in keys or not architecture.rotary_pairs:
        return part
    heads, rows = config[keys[module]], part.shape[0]
    if heads < 1 or rows % (2 * heads):
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}, which {heads} heads do not share"
        )
    order = torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).flatten()
    return replace(part, rows=order + (part.rows.start if isinstance(part.rows, slice) else 0))


def _norm_part(part: Part, theirs: str, architecture: Architecture) -> Part:
    """Without the offset that the family adds."""
    is_norm = theirs.endswith(("_norm.weight", "nextn.enorm.weight", "nextn.hnorm.weight"))
    if not architecture.norm_offset or not is_norm or theirs.startswith("ssm_"):
        return part
    return replace(part, change=less(architecture.norm_offset))


def _own_names(family: Family, kind: str) -> dict[str, str]:
    """What a family calls parts of a block, by what all files call them."""
    dense, shared = family.dense[0], family.shared[0]
    names = {theirs: f"{ours}.{kind}" for theirs, ours in _ATTENTION.items()}
    names |= {_NORMS[ours]: f"{module}.{kind}" for ours, module in family.norm_modules.items() if ours in _NORMS}
    for part in _PROJECTIONS:
        names[f"ffn_{part}"] = of_kind(getattr(dense, part), kind)
        names[f"ffn_{part}_shexp"] = of_kind(getattr(shared, part), kind)
    names |= {"ffn_gate_inp": of_kind(family.router[0], kind), "ffn_gate_inp_shexp": of_kind(family.shared_gate, kind)}
    if kind == "bias" and "selection_bias_E" in family.router_tensors:
        names["exp_probs_b"] = family.router_tensors["selection_bias_E"][0]
    return names


def _unknown(tensor: GgufTensor) -> CheckpointError:
    return CheckpointError(f"{tensor.file}: tensor {tensor.name[:100]!r} is not one of the model's")


def of_kind(weight: str, kind: str) -> str:
    """The name of a weight, or of its bias."""
    return weight.removesuffix("weight") + kind


def gguf_names(architecture: Architecture, config: Config, message: str) -> str:
    """A message in which tensors are called what the file calls them."""
    family = FAMILIES[config["model_type"]]
    names = {theirs: ours for ours, theirs in {**_OTHER_NAMES, **architecture.others}.items()}
    parts = {
        theirs: f"{ours}.{kind}" for kind in ("bias", "weight") for ours, theirs in _own_names(family, kind).items()
    }
    for ours, own in architecture.names.items():
        parts |= dict.fromkeys(own.names if isinstance(own, Rule) else (own,), ours)
    further = {f"{theirs}.weight": f"{ours}.weight" for ours, theirs in _FURTHER.items()}

    def renamed(match: re.Match[str]) -> str:
        name = match[1]
        is_further = name.startswith("mtp.")
        number, _, part = name.removeprefix("mtp.").removeprefix("model.layers.").partition(".")
        block = int(number) + config["num_hidden_layers"] if is_further else number
        if (theirs := (parts | further if is_further else parts).get(part)) is not None:
            name = f"blk.{block}.{theirs}"
        elif (expert := re.search(r"experts\.(\d+)\.(\w+)", part)) is not None:
            kind = {"w1": "gate", "w2": "down", "w3": "up"}.get(expert[2], expert[2].removesuffix("_proj"))
            name = f"blk.{block}.ffn_{kind}_exps.{part.rpartition('.')[2]}"
        return repr(names.get(name, name))

    return re.sub(r"'((?:model\.|lm_head\.|mtp\.\d)[\w.]+)'", renamed, message)
