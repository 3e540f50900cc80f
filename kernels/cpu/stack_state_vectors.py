"""Test vectors of recurrent states, and of gates beside queries, in a small stack (:mod:`.vectors`).

Shape suffixes as in ``kernels/reference/states.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..api.stack import StackAttention, StackBlock, StackExperts, StackMixer, StackNorm, StackShape
from ..api.stack_states import StackGatedDelta, StackMamba2, StackShortConv
from ..api.types import KVLayer, KVLayers, LinearWeights, StateLayer
from ..reference.states import L2_EPS
from ..torch.backend import TorchBackend
from .vector_inputs import EPS, Numbers, cache, places, rotations

HIDDEN, HEADS, GROUPS, TAPS, PAGE = 64, 4, 2, 4, 16
_CONTEXTS, _SLOTS, _KEPT = (17, 1, 70), torch.tensor([4, 0, 2]), torch.tensor([-1, 5, 3])


def stack_state_vectors(backend: TorchBackend) -> Iterator[torch.Tensor]:
    """Layers of every kind: prompts, then their last rows again."""
    numbers = Numbers()
    for kept in (backend.dtype, torch.int8):
        mixers = [
            _delta(backend, numbers, by_group=True),
            _attention(backend, numbers),
            _delta(backend, numbers, by_group=False),
            _mamba(backend, numbers),
            _convolution(backend, numbers),
        ]
        layers = [_layer(backend, numbers, mixer) for mixer in mixers]
        stack = backend.make_stack(StackShape(hidden_size=HIDDEN, norm_eps=EPS, residual_scale=0.7), layers, ())
        kv, table_LC = KVLayers(_cache(mixer, kept) for mixer in mixers), rotations(32, max(_CONTEXTS))
        for rows, kept_slots_S in ((_CONTEXTS, None), ((1, 1, 1), _KEPT)):
            batch = replace(places(_CONTEXTS, rows, PAGE), state_slots_S=_SLOTS, kept_slots_S=kept_slots_S)
            yield stack.run(range(len(layers)), numbers.floats(sum(rows), HIDDEN, scale=2), kv, [table_LC], batch)
            for layer in kv:
                yield from layer.states if isinstance(layer, StateLayer) else layer.tensors


def _layer(backend: TorchBackend, numbers: Numbers, mixer: StackMixer) -> list[StackBlock]:
    norms = [StackNorm(weight_D=(1 + numbers.floats(HIDDEN, scale=0.5)).to(backend.dtype)) for _ in range(2)]
    gate, up = (numbers.floats(1, 48, HIDDEN, scale=0.4) for _ in range(2))
    ffn = backend.pack_experts(gate, up, numbers.floats(1, HIDDEN, 48, scale=0.4), "silu")
    return [norms[0], mixer, norms[1], StackExperts(ffn=ffn, router=None, rule=None)]


def _cache(mixer: StackMixer, kept: torch.dtype) -> KVLayer:
    if isinstance(mixer, StackAttention):
        return cache(_CONTEXTS, PAGE, mixer.num_kv_heads, mixer.head_dim, kept)
    assert isinstance(mixer, StackGatedDelta | StackMamba2 | StackShortConv)
    shapes: list[tuple[int, ...]] = [(TAPS - 1, mixer.conv_WX.shape[1])]
    if isinstance(mixer, StackGatedDelta):
        shapes.insert(0, (mixer.num_heads, mixer.key_channels, mixer.value_channels))
    elif isinstance(mixer, StackMamba2):
        shapes.insert(0, (mixer.num_heads, mixer.state_size, mixer.head_channels))
    none, states = torch.empty(0, dtype=kept), tuple(torch.zeros(6, *shape) for shape in shapes)
    return StateLayer(keys_BGPC=none, values_BGPC=none, states=states)


def _linear(backend: TorchBackend, numbers: Numbers, outputs: int, inputs: int = HIDDEN) -> LinearWeights:
    return backend.pack_linear(numbers.floats(outputs, inputs, scale=3 * inputs**-0.5), numbers.floats(outputs))


def _delta(backend: TorchBackend, numbers: Numbers, *, by_group: bool) -> StackGatedDelta:
    keys, values = 16, 24
    mixed, size = 2 * GROUPS * keys + HEADS * values, HEADS * values
    return StackGatedDelta(
        **{"num_groups": GROUPS, "num_heads": HEADS, "key_channels": keys, "value_channels": values},
        by_group=by_group,
        qkvz=_linear(backend, numbers, mixed + size),
        ba=_linear(backend, numbers, 2 * HEADS),
        out=_linear(backend, numbers, HIDDEN, size),
        conv_WX=numbers.floats(TAPS, mixed),
        decay_rate_H=-numbers.floats(HEADS).abs(),
        decay_bias_H=numbers.floats(HEADS),
        norm_V=(1 + numbers.floats(values, scale=0.5)).to(backend.dtype),
        length_eps=L2_EPS,
    )


def _mamba(backend: TorchBackend, numbers: Numbers) -> StackMamba2:
    channels, state = 300, 24  # more channels than are convolved together
    size, mixed = HEADS * channels, HEADS * channels + 2 * GROUPS * state
    return StackMamba2(
        **{"num_groups": GROUPS, "num_heads": HEADS, "head_channels": channels, "state_size": state},
        into=_linear(backend, numbers, size + mixed + HEADS),
        out=_linear(backend, numbers, HIDDEN, size),
        conv_WX=numbers.floats(TAPS, mixed),
        conv_bias_X=numbers.floats(mixed),
        decay_rate_H=-numbers.floats(HEADS).abs(),
        step_bias_H=numbers.floats(HEADS),
        skip_H=numbers.floats(HEADS),
        norm_X=1 + numbers.floats(size, scale=0.5),
    )


def _convolution(backend: TorchBackend, numbers: Numbers) -> StackShortConv:
    channels = 40
    return StackShortConv(
        channels=channels,
        gates=_linear(backend, numbers, 3 * channels),
        out=_linear(backend, numbers, HIDDEN, channels),
        conv_WX=numbers.floats(TAPS, channels),
        conv_bias_X=numbers.floats(channels),
    )


def _attention(backend: TorchBackend, numbers: Numbers) -> StackAttention:
    kv_heads, channels = 2, 32
    norms = [(1 + numbers.floats(channels, scale=0.5)).to(backend.dtype) for _ in range(2)]
    return StackAttention(
        num_heads=HEADS,
        num_kv_heads=kv_heads,
        head_dim=channels,
        qkv=_linear(backend, numbers, (2 * HEADS + 2 * kv_heads) * channels),
        q_norm=norms[0],
        k_norm=norms[1],
        norm_per_head=True,
        o=_linear(backend, numbers, HIDDEN, HEADS * channels),
        scale=channels**-0.5,
        window=None,
        gated_queries=True,
    )
