"""What a layer is made of: the one description that the decoder and a backend's stack both run.

A row has a residual stream, its normed copy, and what the last block adds to the stream. Blocks name their weights by
fields of :class:`.LayerWeights`, so that one description serves all layers that are alike.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Norm:
    """Adds what the last block left to the residual stream, and norms the sum for the blocks behind.

    Arguments:
        weight: field of the norm's weight.
    """

    weight: str


@dataclass(frozen=True)
class Attention:
    """The layer's attention, of whichever kind, over the normed rows."""


@dataclass(frozen=True)
class FeedForward:
    """The layer's mixture of experts or dense FFN over the normed rows."""


Block = Norm | Attention | FeedForward

PRE_NORM: tuple[Block, ...] = (Norm("attention_norm_D"), Attention(), Norm("ffn_norm_D"), FeedForward())
