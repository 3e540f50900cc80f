"""Layers that keep recurrent states, as a backend's stack runs them in the place of attention.

Their fields are named as the weights of ``dynamic/model/attention``; shape suffixes as in ``reference/states.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from .types import LinearWeights


@dataclass(frozen=True, kw_only=True)
class StackState:
    """Over the rows that are read; the states are those of the layer's cache."""

    @property
    def linears(self) -> Iterator[LinearWeights]:
        """Projections of the layer."""
        values = (getattr(self, f.name) for f in fields(self))
        return (value for value in values if isinstance(value, LinearWeights))


@dataclass(frozen=True, kw_only=True)
class StackGatedDelta(StackState):
    """Linear attention with the delta rule, whose output is normed per head and gated.

    Arguments:
        by_group: whether the outputs of both projections are ordered by groups of heads; else by parts.
        qkvz, ba: queries, keys, values and gates of the output; what becomes steps and decays.
        length_eps: of the lengths of queries and keys.
    """

    num_groups: int
    num_heads: int
    key_channels: int
    value_channels: int
    by_group: bool
    qkvz: LinearWeights
    ba: LinearWeights
    out: LinearWeights
    conv_WX: torch.Tensor
    decay_rate_H: torch.Tensor
    decay_bias_H: torch.Tensor
    norm_V: torch.Tensor
    length_eps: float


@dataclass(frozen=True, kw_only=True)
class StackMamba2(StackState):
    """A state space with time steps of its own for each row, whose output is gated and normed by group.

    Arguments:
        into: gates of the output, values, keys, queries and time steps.
    """

    num_groups: int
    num_heads: int
    head_channels: int
    state_size: int
    into: LinearWeights
    out: LinearWeights
    conv_WX: torch.Tensor
    conv_bias_X: torch.Tensor | None
    decay_rate_H: torch.Tensor
    step_bias_H: torch.Tensor
    skip_H: torch.Tensor
    norm_X: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class StackShortConv(StackState):
    """A convolution whose input and output are gated.

    Arguments:
        gates: of the input, of the output, and the input.
    """

    channels: int
    gates: LinearWeights
    out: LinearWeights
    conv_WX: torch.Tensor
    conv_bias_X: torch.Tensor | None
