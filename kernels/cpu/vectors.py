"""Fixed inputs for every operator of the C++ kernels: what comes out is the kernels' fingerprint.

The numbers are made of integers alone, so that they are the same under any version of any library. Shapes lie where
kernels have edges: few rows and a row more than a tile, outputs and inputs that end inside a block, contexts at the
ends of pages, of key blocks, of windows and of the stretches that threads share out.

Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from ..api import formats, uncommon
from ..api.formats import ROW_GROUP, UNQUANTIZED, ActivationScheme, Format
from ..api.quantized_weight import QuantizedWeight
from ..api.router_spec import RouterSpec
from ..api.types import ExpertWeights, KVLayer, KVProjection, LinearWeights, Routing
from ..api.uncommon import (
    CAPS,
    CHANNEL_DECAYS,
    FLOAT32_NORMS,
    LATENT_PAGES,
    LATENTS,
    LAYER_NORMS,
    ROUTING,
    SHARED_EXPERTS,
    STATES,
    UNGATED,
)
from ..reference.operations import CLAMPED_SWIGLU, SQUARED_RELU, rope
from ..torch.backend import TorchBackend
from .latent_vectors import latent_vectors
from .layout import PLAIN_ACTIVATIONS
from .stack_part_vectors import Change, other_attention, other_mixtures, other_norms
from .stack_state_vectors import stack_state_vectors
from .stack_vectors import stack_vectors
from .state_vectors import channel_decay_vectors, state_vectors
from .vector_inputs import EPS, Numbers, cache, places, probe, rotations, thresholds

Outputs = Iterator[torch.Tensor]
PLAIN, CODED_CACHE, SINKS = "plain", "int8 cache", "sinks and biases of routers"
ROWS = (1, 2, 7, 16, 17, 33)
_LINEARS = ((33, 45), (96, 64), (70, 130))  # outputs, inputs
_EXPERTS = ((5, 45, 40), (3, 64, 32))  # experts, hidden size, width
_RULES = (
    RouterSpec(num_experts=8, top_k=2),
    RouterSpec(num_experts=8, top_k=3, renormalize=True, scale=2.5),
    RouterSpec(num_experts=67, top_k=6, softmax_after_topk=True),
    RouterSpec(num_experts=67, top_k=1, score="sigmoid", renormalize=True),
    RouterSpec(num_experts=8, top_k=2, score="sqrt_softplus"),
    RouterSpec(num_experts=8, top_k=8, score="constant"),
)
_RULES_BEYOND = (
    RouterSpec(
        **{"num_experts": 8, "top_k": 3, "score": "sigmoid", "renormalize": True, "norm_epsilon": 1e-20, "scale": 2.5},
        **{"selection_bias": True, "num_groups": 4, "top_groups": 2, "group_score": "top2_sum"},
        float32_logits=True,
    ),
    RouterSpec(num_experts=8, top_k=2, num_groups=2, top_groups=1, expert_scale=True),
    RouterSpec(num_experts=67, top_k=6, renormalize=True, norm_floor=0.3, selection_bias=True),
)
_CONTEXTS = (1, 2, 15, 16, 17, 63, 64, 65, 130, 300)
_NEW_ROWS = (1, 2, 7, 16, 17, 1, 2, 7, 16, 17)  # of each context's end
_WINDOWS = (None, 1, 5, 16, 64, 65)


def vectors() -> dict[str, Callable[[TorchBackend], Outputs]]:
    """What is computed, by what a model must use for it to matter: everybody :data:`PLAIN`, codes in the cache, sinks,
    or a format, an activation or something else uncommon by its name. The backend is the CPU's."""
    found: dict[str, Callable[[TorchBackend], Outputs]] = {PLAIN: _plain, CODED_CACHE: _coded_cache}
    found |= {SINKS: _sinks, CLAMPED_SWIGLU: lambda backend: _mixtures(backend, Numbers(), (CLAMPED_SWIGLU,), 12.0)}
    found |= {ROUTING: _routing_beyond, SHARED_EXPERTS: _shared_experts, UNGATED: _ungated}
    found |= {CAPS: _caps, FLOAT32_NORMS: _float32_norms, LAYER_NORMS: _layer_norms, LATENTS: _latents}
    found |= {STATES: state_vectors, CHANNEL_DECAYS: channel_decay_vectors}
    found |= {LATENT_PAGES: latent_vectors, uncommon.STACK_STATES: stack_state_vectors}
    changes = {
        uncommon.STACK_ATTENTION: other_attention,
        uncommon.STACK_MIXTURES: other_mixtures,
        uncommon.STACK_NORMS: other_norms,
    }
    for part, change in changes.items():
        found[part] = lambda backend, change=change: _changed_stack(backend, change)
    for format in cpu_formats():
        found[format.name] = lambda backend, format=format: _quantised(backend, format)
    return found


def cpu_formats() -> list[Format]:
    """The formats for which there are C++ kernels."""
    known = [value for value in vars(formats).values() if isinstance(value, Format) and value.cpu is not None]
    return sorted(known, key=lambda format: format.name)


def _plain(backend: TorchBackend) -> Outputs:
    numbers = Numbers()
    for outputs, inputs in _LINEARS:
        weight_OI = numbers.floats(outputs, inputs, scale=3 * inputs**-0.5)
        for bias_O in (None, numbers.floats(outputs)):
            yield from _linear(backend, numbers, backend.pack_linear(weight_OI, bias_O))
    yield from _mixtures(backend, numbers, PLAIN_ACTIVATIONS)
    yield from _routing(backend, numbers)
    yield from _norms(backend, numbers)
    yield from _attention(backend, numbers, backend.dtype)
    yield from _exits(backend, numbers)
    yield from stack_vectors(backend, numbers, backend.dtype)


def _mixtures(backend: TorchBackend, numbers: Numbers, activations: Sequence[str], size: float = 1.0) -> Outputs:
    """Plain experts; ``size`` is that of what their activation reads."""
    for num_experts, hidden, width in _EXPERTS:
        gate_EFD, up_EFD = (numbers.floats(num_experts, width, hidden, scale=0.4 * size) for _ in range(2))
        down_EDF = numbers.floats(num_experts, hidden, width, scale=0.4)
        biases = (
            numbers.floats(num_experts, width),
            numbers.floats(num_experts, width),
            numbers.floats(num_experts, hidden),
        )
        side_by_side = down_EDF.permute(1, 0, 2).contiguous().permute(1, 0, 2)
        for activation in activations:
            for given, down in (((), down_EDF), (biases, down_EDF), ((), side_by_side)):
                packed = backend.pack_experts(gate_EFD, up_EFD, down, activation, *given)
                yield from _experts(backend, numbers, packed)


def _coded_cache(backend: TorchBackend) -> Outputs:
    numbers = Numbers()
    yield from _attention(backend, numbers, torch.int8)
    yield from stack_vectors(backend, numbers, torch.int8)


def _sinks(backend: TorchBackend) -> Outputs:
    for kept in (backend.dtype, torch.int8):
        yield from stack_vectors(backend, Numbers(), kept, sinks=True)


def _routing_beyond(backend: TorchBackend) -> Outputs:
    yield from _routing(backend, Numbers(), _RULES_BEYOND)
    for rule in _RULES_BEYOND[:2]:
        for kept in (backend.dtype, torch.int8):
            yield from stack_vectors(backend, Numbers(), kept, rule=rule)


def _shared_experts(backend: TorchBackend) -> Outputs:
    for kept in (backend.dtype, torch.int8):
        yield from stack_vectors(backend, Numbers(), kept, shared=True)


def _ungated(backend: TorchBackend) -> Outputs:
    numbers = Numbers()
    for num_experts, hidden, width in _EXPERTS:
        up, down = (
            [
                backend.pack_linear(numbers.floats(*shape, scale=0.4), numbers.floats(shape[0]))
                for _ in range(num_experts)
            ]
            for shape in ((width, hidden), (hidden, width))
        )
        yield from _experts(backend, numbers, backend.join_experts((), up, down, SQUARED_RELU))


def _changed_stack(backend: TorchBackend, change: Change) -> Outputs:
    for kept in (backend.dtype, torch.int8):
        yield from stack_vectors(backend, Numbers(), kept, change=change)


def _linear(backend: TorchBackend, numbers: Numbers, weights: LinearWeights) -> Outputs:
    for rows in ROWS:
        x_TI = numbers.floats(rows, weights.in_features).to(backend.dtype)
        yield backend.linear(x_TI, weights)
        yield backend.logits_linear(x_TI, weights)
        for start in (13, 32):
            yield backend.linear(x_TI, backend.linear_tail(weights, start))
        norm_I = (1 + numbers.floats(weights.in_features, scale=0.5)).to(backend.dtype)
        for divisor in (1.0, 1.7):
            stream_TI = numbers.floats(rows, weights.in_features, scale=20)
            yield backend.logits(stream_TI, norm_I, EPS, weights, divisor)
    ids_T = torch.tensor([0, weights.out_features - 1, 31, 32])
    for scale in (1.0, 0.3):
        yield backend.embed(weights, ids_T, scale)


def _experts(backend: TorchBackend, numbers: Numbers, weights: ExpertWeights) -> Outputs:
    count = weights.num_experts
    for rows in ROWS:
        x_TD = numbers.floats(rows, weights.hidden_size).to(backend.dtype)
        first_T, step_T = numbers.whole(count, rows), 1 + numbers.whole(count - 1, rows)
        routing = Routing(
            expert_ids_TK=torch.stack((first_T, (first_T + step_T) % count), 1).int(),
            weights_TK=numbers.floats(rows, 2).abs(),
        )
        yield backend.experts(x_TD, weights, routing)
        yield backend.experts(x_TD, weights, replace(routing, counts_T=1 + numbers.whole(2, rows).int()))
        yield backend.all_experts(x_TD, weights)
        if rows == ROWS[-1]:
            identity_T = numbers.floats(rows).abs()
            for unusual in (replace(routing, identity_weights_T=identity_T), replace(routing, weight_on_input=True)):
                yield backend.experts(x_TD, weights, unusual)


def _routing(backend: TorchBackend, numbers: Numbers, rules: Sequence[RouterSpec] = _RULES) -> Outputs:
    for rule in rules:
        given: dict[str, torch.Tensor] = {}
        if rule.selection_bias:
            given["selection_bias_E"] = numbers.floats(rule.num_experts, scale=0.3)
        if rule.expert_scale:
            given["expert_scale_E"] = numbers.floats(rule.num_experts)
        for rows in (1, 17):
            logits_TE = numbers.floats(rows, rule.num_experts, scale=4)
            routing = backend.route(logits_TE if rule.float32_logits else logits_TE.to(backend.dtype), rule, **given)
            yield from (routing.expert_ids_TK, routing.weights_TK)
            for scale_E in (None, numbers.floats(rule.num_experts).abs()):
                keep_T, cap_T = numbers.floats(rows).abs(), 1 + numbers.whole(rule.top_k, rows).int()
                limited = backend.limit_experts(routing, scale_E, keep_T, cap_T)
                again = backend.limit_experts(limited, scale_E, keep_T, cap_T)
                for found in (limited, again):
                    assert found.counts_T is not None
                    yield from (found.expert_ids_TK, found.weights_TK, found.counts_T)


def _norms(backend: TorchBackend, numbers: Numbers) -> Outputs:
    for hidden in (1, 45, 576):
        weight_D = (1 + numbers.floats(hidden, scale=0.5)).to(backend.dtype)
        for rows in ROWS:
            for stream in dict.fromkeys((torch.float32, backend.dtype)):
                x_TD = numbers.floats(rows, hidden, scale=3).to(stream)
                yield backend.rms_norm(x_TD, weight_D, EPS)
                for scale in (1.0, 0.22):
                    added_TD = numbers.floats(rows, hidden).to(backend.dtype)
                    yield from backend.add_rms_norm(added_TD, x_TD.clone(), weight_D, EPS, scale)


def _float32_norms(backend: TorchBackend) -> Outputs:
    numbers = Numbers()
    for hidden in (1, 45, 576):
        weight_D = 1 + numbers.floats(hidden, scale=0.5)
        for rows in ROWS:
            x_TD, added_TD = (numbers.floats(rows, hidden, scale=3) for _ in range(2))
            yield backend.rounded_rms_norm(x_TD.to(backend.dtype), weight_D, EPS)
            yield from backend.add_rms_norm(added_TD.to(backend.dtype), x_TD, weight_D, EPS, 0.22)


def _layer_norms(backend: TorchBackend) -> Outputs:
    numbers = Numbers()
    for hidden in (1, 45, 576):
        weight_D = 1 + numbers.floats(hidden, scale=0.5)
        for rows in ROWS:
            for bias_D in (None, numbers.floats(hidden)):
                yield backend.layer_norm(numbers.floats(rows, hidden, scale=3), weight_D, bias_D, EPS)


def _caps(backend: TorchBackend) -> Outputs:
    numbers = Numbers()
    for kept in (backend.dtype, torch.int8):
        yield from _attention(backend, numbers, kept, softcap=2.5)
    for rows in ROWS:
        yield backend.cap_logits(numbers.floats(rows, 45, scale=20), 3.0)


def _attention(backend: TorchBackend, numbers: Numbers, kept: torch.dtype, softcap: float | None = None) -> Outputs:
    for heads, kv_heads, channels, page in ((6, 2, 40, 16), (2, 2, 64, 4)):
        layer, table_LC = cache(_CONTEXTS, page, kv_heads, channels, kept), rotations(channels, max(_CONTEXTS))
        written, asked = places(_CONTEXTS, _CONTEXTS, page), places(_CONTEXTS, _NEW_ROWS, page)
        count = sum(_CONTEXTS)
        q_THC = numbers.floats(count, heads, channels).to(backend.dtype)
        k_TGC, v_TGC = (numbers.floats(count, kv_heads, channels).to(backend.dtype) for _ in range(2))
        yield backend.rope_and_write(q_THC, k_TGC, v_TGC, table_LC, written, layer)
        yield from (layer.keys_BGPC, layer.values_BGPC)
        q_THC = numbers.floats(sum(_NEW_ROWS), heads, channels, scale=2).to(backend.dtype)
        for window in _WINDOWS:
            for sinks_H in (None, numbers.floats(heads)):
                lse_TH = torch.zeros(sum(_NEW_ROWS), heads)
                options = {"window": window, "sinks_H": sinks_H, "lse_TH": lse_TH, "softcap": softcap}
                yield backend.attention(q_THC, layer, asked, scale=channels**-0.5, **options)
                yield lse_TH


def _latents(backend: TorchBackend) -> Outputs:
    """Many heads over one key that is the value too, and what every head multiplies with."""
    numbers = Numbers()
    for heads, latent, rotated, plain in ((20, 40, 8, 24), (4, 64, 32, 33)):
        channels = latent + rotated
        keys = cache(_CONTEXTS, 16, 1, channels, backend.dtype).keys_BGPC
        keys.copy_(numbers.floats(*keys.shape))
        layer, asked = KVLayer(keys_BGPC=keys, values_BGPC=keys), places(_CONTEXTS, _NEW_ROWS, 16)
        up = backend.pack_head_linear(numbers.floats(heads, latent, plain))
        q_THN, q_THR = (numbers.floats(sum(_NEW_ROWS), heads, size).to(backend.dtype) for size in (plain, rotated))
        for interleaved in (False, True):
            q_THR = rope(q_THR, rotations(rotated, max(_CONTEXTS)), asked.positions_T, interleaved)
            q_THC = torch.cat((backend.head_linear(q_THN, up), q_THR), -1)
            yield backend.attention(q_THC, layer, asked, scale=channels**-0.5)


def _exits(backend: TorchBackend, numbers: Numbers) -> Outputs:
    for hidden, inner in ((64, 0), (45, 3)):
        for previous, entropy in ((False, False), (True, False), (False, True), (True, True)):
            weights = probe(numbers, hidden, inner, previous, entropy)
            for rows in ROWS:
                x_TD, before_TD = (numbers.floats(rows, hidden, scale=3) for _ in range(2))
                entropy_T, thresholds_T = numbers.floats(rows).abs(), thresholds(numbers, rows)
                found = backend.exit_decide(x_TD, weights, thresholds_T, before_TD, entropy_T)
                yield from (found.logits_T, found.order_T, torch.tensor(found.num_staying))
    for rows in (1, 17):
        yield backend.router_entropy([numbers.floats(rows, 8, scale=4).to(backend.dtype) for _ in range(3)])
    hidden, kv_heads, channels, page = 45, 2, 40, 16
    lengths, table_LC = (17, 3), rotations(channels, 32)
    for k_norm, biased, clip in ((0, False, None), (channels, True, None), (kv_heads * channels, False, 0.5)):
        projections, layers = [], []
        for _ in range(2):
            bias = numbers.floats(2 * kv_heads * channels) if biased else None
            kv = backend.pack_linear(numbers.floats(2 * kv_heads * channels, hidden, scale=0.3), bias)
            norm_D, norm = (1 + numbers.floats(n, scale=0.5) for n in (hidden, max(k_norm, 1)))
            key_norm = norm.to(backend.dtype) if k_norm else None
            projections.append(KVProjection(norm_D=norm_D.to(backend.dtype), kv=kv, k_norm=key_norm))
            layers.append(cache(lengths, page, kv_heads, channels, backend.dtype))
        x_TD, batch = numbers.floats(sum(lengths), hidden, scale=3), places(lengths, lengths, page)
        backend.project_kv(x_TD, projections, layers, table_LC, batch, norm_eps=EPS, clip=clip)
        for layer in layers:
            yield from (layer.keys_BGPC, layer.values_BGPC)


def _quantised(backend: TorchBackend, format: Format) -> Outputs:
    numbers, inputs = Numbers(), 288 if format.two_level else 160  # more than share an outer scale
    kinds = ["", *(["zero"] if format.zero_points else []), *(["offset"] if format.offsets else [])]
    for group in format.groups:
        schemes = [UNQUANTIZED]
        if format.rows and (group is None or format.grouped_rows):
            schemes.append(ActivationScheme(format.rows, group or ROW_GROUP))
        for block_out in (n for n in format.block_outs if n == 1 or group is not None):
            for kind in kinds[-1:] if format.two_level else kinds:
                for scales in format.scales:
                    weight_OI = _weight(numbers, format, (70, inputs), group, block_out, kind, scales)
                    shapes = ((3, 40, inputs), (3, 40, inputs), (3, inputs, 40))
                    gate, up, down = (
                        _weight(numbers, format, shape, group, block_out, kind, scales) for shape in shapes
                    )
                    for scheme in schemes:
                        bias_O = numbers.floats(70)
                        yield from _linear(backend, numbers, backend.pack_quantized_linear(weight_OI, bias_O, scheme))
                        experts = backend.pack_quantized_experts(gate, up, down, "silu", scheme=scheme)
                        yield from _experts(backend, numbers, experts)


def _weight(
    numbers: Numbers,
    format: Format,
    shape: tuple[int, ...],
    group: int | None,
    block_out: int,
    kind: str,
    dtype: torch.dtype,
) -> QuantizedWeight:
    codes = numbers.whole(1 << format.codes.bits, *shape).to(torch.uint8)
    if format.codes.dtype == torch.float8_e4m3fn:  # no NaN
        codes = torch.where(codes & 127 == 127, codes - 1, codes)
    inputs = shape[-1]
    groups = -(-inputs // group) if group else 1
    form = (*shape[:-2], -(-shape[-2] // block_out), groups)
    scale = (0.2 + numbers.floats(*form).abs()) * (0.004 if format.codes.bits == 8 else 0.05)
    parts: dict[str, torch.Tensor] = {"data": format.codes.pack(codes), "scale": scale.to(dtype)}
    if kind == "zero":
        parts["zero"] = numbers.whole(1 << format.codes.bits, *form).to(torch.uint8)
    if kind == "offset":
        parts["offset"] = numbers.floats(*form, scale=0.3).to(dtype)
    if format.two_level:
        assert format.outer_group is not None
        outer = (*form[:-1], -(-inputs // format.outer_group))
        parts["scale"] = (numbers.whole(64, *form) - (32 if dtype.is_signed else 0)).to(dtype)
        parts["outer_scale"] = ((0.2 + numbers.floats(*outer).abs()) * 0.001).half()
        if kind == "offset":
            parts["offset"] = numbers.whole(64, *form).to(dtype)
            parts["outer_offset"] = numbers.floats(*outer, scale=0.005).half()
    whole = None if format.codes.bits == 8 else inputs
    return QuantizedWeight(format=format, inputs=whole, group=group, block_out=block_out, **parts)
