"""Test vectors of layers with recurrent states (:mod:`.vectors`).

Sequences begin, go on, and are two parts of one; some are kept as they are behind their rows. Shape suffixes as in
``kernels/reference/states.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..api.types import AttentionBatch
from ..reference.elementwise import sigmoid, silu, softplus
from ..torch.backend import TorchBackend
from .vector_inputs import Numbers, places

_LENGTHS, _COUNTS, _SLOTS, _KEPT = (
    (1, 2, 17, 40, 44, 70),
    (1, 2, 17, 33, 4, 1),
    (4, 0, 6, 2, 2, 9),
    (-1, 1, -1, 8, 3, -1),
)
_ROWS, _NUM_SLOTS = sum(_COUNTS), 10


def state_vectors(backend: TorchBackend) -> Iterator[torch.Tensor]:
    numbers, batch = Numbers(), _batch()
    for taps, channels, biased, activation in ((4, 40, False, "silu"), (2, 1030, True, "none"), (3, 64, True, "silu")):
        weight_WX, bias_X = numbers.floats(taps, channels), numbers.floats(channels) if biased else None
        tails_NWX, x_TX = numbers.floats(_NUM_SLOTS, taps - 1, channels), numbers.floats(_ROWS, channels, scale=3)
        yield backend.short_convolution(x_TX, weight_WX, bias_X, tails_NWX, batch, activation)
        yield tails_NWX
    for groups, heads, keys, values in ((2, 4, 16, 24), (1, 3, 128, 130), (3, 3, 33, 64)):
        yield from _recurrences(backend, numbers, groups, keys, heads, values, (heads,))
    x_TX = numbers.floats(33, 5, scale=9)
    yield from (sigmoid(x_TX), silu(x_TX), softplus(x_TX), torch.exp(-torch.exp(x_TX)))
    yield from backend.time_steps(x_TX, numbers.floats(5), -numbers.floats(5).abs())
    yield backend.silu_gated(x_TX.to(backend.dtype), numbers.floats(33, 5, scale=9))


def channel_decay_vectors(backend: TorchBackend) -> Iterator[torch.Tensor]:
    numbers = Numbers()
    for groups, heads, keys, values in ((4, 4, 16, 24), (3, 3, 128, 130), (1, 3, 33, 1)):
        yield from _recurrences(backend, numbers, groups, keys, heads, values, (heads, keys))
    for keys, channels in ((16, 1030), (8, 64), (1, 7)):
        q_TC, k_TC = (numbers.floats(_ROWS, keys) for _ in range(2))
        v_TX, step_TX = (numbers.floats(_ROWS, channels) for _ in range(2))
        rate_CX, states_NCX = -numbers.floats(keys, channels).abs(), numbers.floats(_NUM_SLOTS, keys, channels)
        yield backend.selective_scan(q_TC, k_TC, v_TX, softplus(step_TX), rate_CX, states_NCX, _batch())
        yield states_NCX


def _batch() -> AttentionBatch:
    slots, kept = torch.tensor(_SLOTS), torch.tensor(_KEPT)
    return replace(places(_LENGTHS, _COUNTS, 16), state_slots_S=slots, kept_slots_S=kept)


def _recurrences(
    backend: TorchBackend, numbers: Numbers, groups: int, keys: int, heads: int, values: int, decays: tuple[int, ...]
) -> Iterator[torch.Tensor]:
    """With the delta rule and without.

    Arguments:
        decays: shape of a row's.
    """
    for delta_rule in (True, False):
        q_TGC, k_TGC = (numbers.floats(_ROWS, groups, keys) for _ in range(2))
        decay, step_TH = (numbers.floats(_ROWS, *shape).abs() for shape in (decays, (heads,)))
        v_THV, states_NHCV = numbers.floats(_ROWS, heads, values), numbers.floats(_NUM_SLOTS, heads, keys, values)
        inputs = (q_TGC, k_TGC, v_THV, decay, step_TH)
        yield backend.recurrence(*inputs, states_NHCV, _batch(), delta_rule=delta_rule)
        yield states_NHCV
