"""The kinds of attention by name. A kind from elsewhere registers itself; a family then names it."""

from __future__ import annotations

from .absent import NoAttentionSpec
from .extended import ExtendedGqaSpec
from .gated_delta import GatedDeltaSpec
from .gated_gqa import GatedGqaSpec
from .gqa import GqaSpec
from .kimi_delta import KimiDeltaSpec
from .kind import AttentionSpec
from .mamba1 import Mamba1Spec
from .mamba2 import Mamba2Spec
from .mla import MlaSpec
from .short_conv import ShortConvSpec

_OWN = (
    *(GqaSpec, ExtendedGqaSpec, GatedGqaSpec, MlaSpec, NoAttentionSpec),
    *(GatedDeltaSpec, KimiDeltaSpec, Mamba1Spec, Mamba2Spec, ShortConvSpec),
)
KINDS: dict[str, type[AttentionSpec]] = {kind.kind: kind for kind in _OWN}


def register(kind: type[AttentionSpec]) -> type[AttentionSpec]:
    """Make a kind known by its name; usable as a decorator.

    Raises:
        ValueError: when another kind has this name.
    """
    if KINDS.setdefault(kind.kind, kind) is not kind:
        raise ValueError(f"there is another attention kind {kind.kind!r}: {KINDS[kind.kind].__qualname__}")
    return kind


def attention_kind(name: str) -> type[AttentionSpec]:
    """A kind by its name.

    Raises:
        ValueError: for an unknown name; the message lists those that are known.
    """
    if name not in KINDS:
        raise ValueError(f"unknown attention kind {name!r}; known: {', '.join(KINDS)}")
    return KINDS[name]
