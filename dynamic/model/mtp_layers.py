"""Layers that predict further tokens (multi-token prediction), which checkpoints store beside the model.

They do not change what the model computes, and are left out.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..checkpoint.config_reader import ConfigReader
from .text_part import Rename

logger = logging.getLogger(__name__)

_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.(.*)")
_MODULE = re.compile(r"(model\.)?mtp\w*\.")
# What joins the last hidden state and the next token's embedding: no other layer has it.
_JOIN = "eh_proj."


def without_mtp(rename: Rename, config: Mapping[str, Any]) -> Rename:
    """A table of names without those of such layers.

    Arguments:
        rename: makes the table, see :func:`.text_names`.
        config: of the text model. Beyond its ``num_hidden_layers`` it has ``num_nextn_predict_layers`` more, where
            they are numbered like the others.

    Returns: a function from all names to a table. Layers that lack what such layers have stay in it.
    """
    reader = ConfigReader(config)
    first = reader.integer("num_hidden_layers")
    count = reader.integer("num_nextn_predict_layers", reader.integer("num_mtp_layers", 0))

    def shortened(names: Iterable[str]) -> dict[str, str]:
        table = rename(names)
        numbered = {name: _LAYER.match(name) for name in table.values()}
        layers = {int(m[1]) for m in numbered.values() if m and m[2].startswith(_JOIN)}
        layers &= set(range(first, first + count))
        kept = {
            theirs: name
            for theirs, name in table.items()
            if not _MODULE.match(name) and not ((m := numbered[name]) and int(m[1]) in layers)
        }
        if gone := len(table) - len(kept):
            logger.info("%d tensors of layers that predict further tokens are left out", gone)
        return kept

    return shortened
