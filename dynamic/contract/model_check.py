"""What tells one model from another: its specification, and what it computes of fixed tokens.

Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ...exits.segments import Segment
from ..model.decoder import FIRST_TABLE_LENGTH
from ..model.prompt_pass import fresh_cache

if TYPE_CHECKING:
    from ..model.decoder import Decoder
    from ..model.spec import ModelSpec

_PROMPT = 37  # tokens: more than two pages
_DECODED = 4
CHECKED = _PROMPT + _DECODED  # tokens that every check runs


def spec_hash(spec: ModelSpec) -> str:
    """The SHA-256 of a specification. Values that are their fields' defaults are left out, so that a field that is new,
    and neutral, changes nothing."""
    return hashlib.sha256(json.dumps(_canonical(spec), sort_keys=True).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if is_dataclass(value):
        said = {f.name: getattr(value, f.name) for f in fields(value)}
        for f in fields(value):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            if default is not MISSING and said[f.name] == default:
                del said[f.name]
        return {"": type(value).__name__, **{name: _canonical(item) for name, item in said.items()}}
    if isinstance(value, Mapping):
        return {str(name): _canonical(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_canonical(item) for item in value]
    assert value is None or isinstance(value, str | int | float), f"{value!r} has no canonical form"
    return value


@torch.inference_mode()
def logits_hash(decoder: Decoder, exact: bool) -> str:
    """The SHA-256 of a model's logits for fixed tokens, a prompt and some decoded one by one, and of its rotations.

    Arguments:
        exact: whether this machine always gives the same bits; else of the best tokens alone, which says less.
    """
    spec = decoder.spec
    length = min(CHECKED, spec.max_position)
    prompt = max(1, length - _DECODED)
    tokens_T = torch.tensor([(7919 * place + 13) % spec.vocab_size for place in range(length)], device=decoder.device)
    kv, whole = fresh_cache(decoder, [length])
    whole_model = Segment(index=0, layers=range(spec.num_layers))
    digest = hashlib.sha256()
    for start, end in ((0, prompt), *((place, place + 1) for place in range(prompt, length))):
        batch = replace(
            whole,
            positions_T=whole.positions_T[start:end],
            slots_T=whole.slots_T[start:end],
            query_start_S1=torch.tensor([0, end - start], dtype=torch.int32, device=decoder.device),
            context_len_S=torch.tensor([end], dtype=torch.int32, device=decoder.device),
            max_query_len=end - start,
            max_context_len=end,
        )
        logits_TV = decoder.logits(decoder.run_segment(whole_model, decoder.embed(tokens_T[start:end]), kv, batch))
        digest.update((logits_TV if exact else logits_TV.argmax(-1)).cpu().contiguous().numpy().tobytes())
    if exact:
        for table_LC in decoder.distinct_tables:
            digest.update(table_LC[:FIRST_TABLE_LENGTH].contiguous().numpy().tobytes())
    return digest.hexdigest()
