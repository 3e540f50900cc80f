"""What a layer is made of: the one description that the decoder and a backend's stack both run.

A row has a residual stream, what the blocks read, and what the last block adds to the stream. Norms are named as in
:attr:`.LayerWeights.norms`, so that one description serves all layers that are alike.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Norm:
    """Adds what the last block left to the residual stream, and norms the sum for the blocks behind.

    Arguments:
        weight: name of the norm.
    """

    weight: str


@dataclass(frozen=True)
class Read:
    """Adds what the last block left to the residual stream; the blocks behind read the sum as it is."""


@dataclass(frozen=True)
class Add:
    """Adds what the last block left to the residual stream; the blocks behind read what that block read."""


@dataclass(frozen=True)
class OutNorm:
    """Norms what the last block left, before it is added to the residual stream.

    Arguments:
        weight: name of the norm.
    """

    weight: str


@dataclass(frozen=True)
class Attention:
    """The layer's attention, of whichever kind, over the rows that are read."""


@dataclass(frozen=True)
class FeedForward:
    """The layer's mixture of experts or dense FFN over the rows that are read."""


@dataclass(frozen=True)
class FeedForwards:
    """The shared expert over the rows that are read, beside the mixture over the residual stream.

    Arguments:
        shared_out: name of the norm of what the shared expert leaves.
        mixture, mixture_out: of the norms in front of the mixture, not of its router, and of what it leaves.
    """

    shared_out: str
    mixture: str
    mixture_out: str


@dataclass(frozen=True)
class Scale:
    """Adds what the last block left to the residual stream, and multiplies the sum by a number.

    Arguments:
        weight: its name among the norms.
    """

    weight: str


Block = Norm | Read | Add | OutNorm | Attention | FeedForward | FeedForwards | Scale

PRE_NORM: tuple[Block, ...] = (Norm("attention"), Attention(), Norm("ffn"), FeedForward())
POST_NORM: tuple[Block, ...] = (
    *(Read(), Attention(), OutNorm("attention_out")),
    *(Read(), FeedForward(), OutNorm("ffn_out")),
)
SANDWICH: tuple[Block, ...] = (
    *(Norm("attention"), Attention(), OutNorm("attention_out")),
    *(Norm("ffn"), FeedForward(), OutNorm("ffn_out")),
)
GEMMA4_DENSE: tuple[Block, ...] = (*SANDWICH, Scale("layer_scale"))
GEMMA4: tuple[Block, ...] = (
    *(Norm("attention"), Attention(), OutNorm("attention_out")),
    *(Norm("ffn"), FeedForwards("shared_out", "mixture", "mixture_out"), OutNorm("ffn_out")),
    Scale("layer_scale"),
)
PARALLEL: tuple[Block, ...] = (Norm("attention"), Attention(), Add(), FeedForward())


def norm_names(blocks: tuple[Block, ...]) -> tuple[str, ...]:
    """The norms of a layer, in the order in which they run."""
    names: list[str] = []
    for block in blocks:
        if isinstance(block, FeedForwards):
            names += (block.shared_out, block.mixture, block.mixture_out)
        elif isinstance(block, Norm | OutNorm):
            names.append(block.weight)
    return tuple(names)


def has_ffn(blocks: tuple[Block, ...]) -> bool:
    """Whether a layer has an FFN or a mixture."""
    return any(isinstance(block, FeedForward | FeedForwards) for block in blocks)


def norm_before_attention(blocks: tuple[Block, ...]) -> str | None:
    """The norm whose output attention reads; None: it reads the residual stream itself."""
    before = None
    for block in blocks:
        if isinstance(block, Attention):
            break
        if isinstance(block, Norm | Read):
            before = block
    return before.weight if isinstance(before, Norm) else None
