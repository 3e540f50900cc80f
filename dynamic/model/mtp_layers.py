"""Layers that predict further tokens (multi-token prediction), which checkpoints store beside the model.

They do not change what the model computes, and are left out unless they are asked for. What they are made of is called
alike here, however a checkpoint calls it: ``mtp.N.`` with norms of the embedding and of the hidden state, what joins
both, a layer like those of the model, and maybe a norm behind it and copies of the model's embedding and head.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..checkpoint.config_reader import ConfigReader
from .text_part import Rename

logger = logging.getLogger(__name__)

PREFIX = "mtp."  # of names that are made here
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.(.*)")
_MODULE = re.compile(r"(model\.)?mtp\w*\.")
# What joins the last hidden state and the next token's embedding: no other layer has it.
_JOIN = "eh_proj."
_LAYERS = {
    r"^(?:model\.)?mtp\.layers\.(\d+)\.": r"mtp.\1.",
    r"^(?:model\.)?mtp_(?:layers|block)\.(\d+)\.": r"mtp.\1.",
    r"^(?:model\.)?mtp_(emb_norm|hidden_norm|linear_proj)\.(\d+)\.": r"mtp.\2.\1.",
    r"^(?:model\.)?mtp\.(fc|pre_fc_norm_embedding|pre_fc_norm_hidden|norm)\.": r"mtp.0.\1.",
}
_PARTS = {
    r"^(mtp\.\d+\.)(?:enorm|emb_norm|pre_fc_norm_embedding|token_layernorm)\.": r"\1embedding_norm.",
    r"^(mtp\.\d+\.)(?:hnorm|pre_fc_norm_hidden|hidden_layernorm)\.": r"\1hidden_norm.",
    r"^(mtp\.\d+\.)(?:eh_proj|fc|linear_proj|input_proj)\.": r"\1join.",
    r"^(mtp\.\d+\.)(?:shared_head\.norm|final_layernorm)\.": r"\1norm.",
    r"^(mtp\.\d+\.)shared_head\.head\.": r"\1head.",
    r"^(mtp\.\d+\.)pre_mlp_layernorm\.": r"\1post_attention_layernorm.",
}


def mtp_names(rename: Rename, config: Mapping[str, Any], keep: bool = False) -> Rename:
    """A table of names without those of such layers, or with the names that they have here.

    Arguments:
        rename: makes the table, see :func:`.text_names`.
        config: of the text model. Beyond its ``num_hidden_layers`` it has ``num_nextn_predict_layers`` more, where
            they are numbered like the others.
        keep: they stay in the table.

    Returns: a function from all names to a table. Layers that lack what such layers have stay in it as they are.
    """
    reader = ConfigReader(config)
    first = reader.integer("num_hidden_layers")
    count = reader.integer("num_nextn_predict_layers", reader.integer("num_mtp_layers", 0))

    def renamed(names: Iterable[str]) -> dict[str, str]:
        table = rename(names)
        numbered = {name: _LAYER.match(name) for name in table.values()}
        layers = {int(m[1]) for m in numbered.values() if m and m[2].startswith(_JOIN)}
        layers &= set(range(first, first + count))
        found = {
            theirs: f"mtp.{int(m[1]) - first}.{m[2]}" if (m := numbered[name]) and int(m[1]) in layers else name
            for theirs, name in table.items()
        }
        of_mtp = {theirs for theirs, name in found.items() if _MODULE.match(name)}
        if keep:
            return {theirs: _canonical(name) if theirs in of_mtp else name for theirs, name in found.items()}
        if of_mtp:
            logger.info("%d tensors of layers that predict further tokens are left out", len(of_mtp))
        return {theirs: name for theirs, name in found.items() if theirs not in of_mtp}

    return renamed


def layers_found(names: Iterable[str]) -> int:
    """How many such layers there are tensors of, from the highest number."""
    numbers = [int(match[1]) for name in names if (match := re.match(r"mtp\.(\d{1,3})\.", name))]
    return max(numbers, default=-1) + 1


def _canonical(name: str) -> str:
    for pattern, known in (*_LAYERS.items(), *_PARTS.items()):
        name = re.sub(pattern, known, name)
    return name
