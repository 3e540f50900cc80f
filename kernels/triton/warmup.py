"""Every launch that a model's layers can need, planned on tensors without storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..api.kv_codes import stored_channels
from ..api.types import AttentionBatch, KVLayer, ProbeWeights, Routing
from ..torch.experts import PlainExperts
from .attention import plan_attention
from .exits import plan_exit_decide
from .experts import ExpertPlanner, plan_experts, shape_of
from .launch import Launch
from .norm import plan_rms_norm, plan_rope_and_write
from .router import plan_route
from .tuning import best_attention

if TYPE_CHECKING:
    from .backend import WarmUpShape

_META = torch.device("meta")


def planned_launches(shapes: Sequence[WarmUpShape], dtype: torch.dtype, planner: ExpertPlanner) -> list[Launch]:
    """The distinct launches of layers of these shapes, over all powers of two of tokens, sequences and contexts."""
    found: dict[tuple, Launch] = {}
    for shape in shapes:
        for launch in _layer_launches(shape, dtype, planner):
            found.setdefault(launch.variant(), launch)
    return list(found.values())


def _powers(limit: int) -> list[int]:
    return [1 << i for i in range(max(limit - 1, 0).bit_length() + 1)]


def _layer_launches(shape: WarmUpShape, dtype: torch.dtype, planner: ExpertPlanner) -> list[Launch]:
    launches: list[Launch] = []
    for tokens in _powers(shape.max_tokens):
        launches += norm_launches(shape, tokens, dtype) + exit_launches(shape, tokens, dtype)
        if shape.router is not None:
            launches += mixture_launches(shape, tokens, dtype, planner)
    for sequences in _powers(shape.max_sequences):
        for context in _powers(shape.max_context):
            launches += attention_launches(shape, sequences, 1, context, dtype, planner)
    for tokens in _powers(shape.max_tokens):
        launches += attention_launches(shape, 1, tokens, max(tokens, shape.max_context), dtype, planner)
    return launches


def norm_launches(shape: WarmUpShape, tokens: int, dtype: torch.dtype) -> list[Launch]:
    """The norm alone, with a residual, and with a scaled residual; the residual in the model's dtype and in float32."""
    x_TD = torch.empty(tokens, shape.hidden_size, dtype=dtype, device=_META)
    launches = []
    for residual_TD in (x_TD, x_TD.float()):
        launches.append(plan_rms_norm(residual_TD, x_TD[0], 1e-6, x_TD))
        for scale in (1.0, 0.5):
            launches.append(plan_rms_norm(x_TD, x_TD[0], 1e-6, x_TD, residual_TD, residual_TD, scale))
    for width in shape.norm_widths:
        rows_TC = torch.empty(tokens, width, dtype=dtype, device=_META)
        launches.append(plan_rms_norm(rows_TC, rows_TC[0], 1e-6, rows_TC))
    return launches


def mixture_launches(
    shape: WarmUpShape, tokens: int, dtype: torch.dtype, planner: ExpertPlanner, biased: bool = False
) -> list[Launch]:
    """Routing and experts of one layer for so many rows."""
    spec = shape.router
    assert spec is not None, "the layer has no mixture"
    e, f, d = spec.num_real_experts + shape.always_on, shape.expert_size, shape.hidden_size
    top_k = spec.top_k + shape.always_on

    def weights(*sizes: int) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device=_META)

    biases = (weights(e, f), weights(e, f), weights(e, d)) if biased else (None, None, None)
    plain = PlainExperts(weights(e, f, d), weights(e, f, d), weights(e, d, f), *biases)
    ticket = torch.empty(1, dtype=torch.int32, device=_META)
    path = planner.path(tokens, shape_of(plain, top_k))
    logits_dtype = torch.float32 if spec.float32_logits else dtype
    routing, launches = plan_route(
        torch.empty(tokens, spec.num_experts, dtype=logits_dtype, device=_META),
        spec,
        block_m=None if path.pairs or shape.always_on else path.block_m,
        ticket=ticket,
        selection_bias_E=torch.empty(spec.num_experts, device=_META) if spec.selection_bias else None,
        expert_scale_E=torch.empty(spec.num_experts, device=_META) if spec.expert_scale else None,
        forced_ids_TK=torch.empty(tokens, spec.top_k, dtype=torch.int64, device=_META) if spec.forced_experts else None,
    )
    x_TD = torch.empty(tokens, d, dtype=dtype, device=_META)
    if shape.always_on:
        routing = Routing(
            expert_ids_TK=torch.empty(tokens, top_k, dtype=torch.int32, device=_META),
            weights_TK=torch.empty(tokens, top_k, device=_META),
        )
    # An expert budget replaces the counts of a routing, which then needs tables of its own.
    fewer = replace(routing, counts_T=torch.empty(tokens, dtype=torch.int32, device=_META))
    for case in (routing, fewer):
        launches += plan_experts(x_TD, plain, case, shape.activation, torch.empty_like(x_TD), planner, ticket)
    return launches


def exit_launches(shape: WarmUpShape, tokens: int, dtype: torch.dtype) -> list[Launch]:
    """The decision of every probe, and the rotation of keys that rows which leave owe to the layers behind."""
    ticket = torch.empty(1, dtype=torch.int32, device=_META)
    x_TD, rows_T = torch.empty(tokens, shape.hidden_size, device=_META), torch.empty(tokens, device=_META)
    launches = []
    for inner, two_layers, previous, router_entropy in shape.probes:
        inputs = shape.hidden_size * (1 + previous) + router_entropy
        probe = ProbeWeights(
            weight_JX=torch.empty(inner, inputs, device=_META),
            bias_J=torch.empty(inner, device=_META),
            out_J=torch.empty(inner, device=_META) if two_layers else None,
            out_bias=torch.empty((), device=_META) if two_layers else None,
            previous=previous,
            router_entropy=router_entropy,
        )
        launches.append(plan_exit_decide(x_TD, probe, rows_T, x_TD, rows_T, ticket)[-1])
    if launches:
        g, c = shape.num_kv_heads, shape.head_dim
        positions_T = torch.empty(tokens, dtype=torch.int64, device=_META)
        few = torch.empty(1, dtype=torch.int32, device=_META)
        batch = AttentionBatch(
            positions_T=positions_T,
            slots_T=positions_T,
            query_start_S1=few,
            context_len_S=few,
            block_table_SM=few[:, None],
            max_query_len=1,
            max_context_len=1,
        )
        layer = cache_layer(shape, dtype)
        kv = torch.empty(tokens, 2 * g * c, dtype=dtype, device=_META)
        projected = [part.unflatten(-1, (g, c)) for part in kv.chunk(2, -1)]
        normed = torch.empty(tokens, g, c, dtype=dtype, device=_META)
        table = torch.empty(shape.max_context, c, device=_META)
        for keys in (projected[0], normed):
            launches.append(plan_rope_and_write(keys, keys, projected[1], table, batch, layer, normed))
    return launches


def attention_launches(
    shape: WarmUpShape, sequences: int, query_len: int, context: int, dtype: torch.dtype, planner: ExpertPlanner
) -> list[Launch]:
    """Rotation, cache write and attention of one layer."""
    rows, h, g, c = sequences * query_len, shape.num_heads, shape.num_kv_heads, shape.head_dim

    def ints(*sizes: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device=_META)

    batch = AttentionBatch(
        positions_T=ints(rows, dtype=torch.int64),
        slots_T=ints(rows, dtype=torch.int64),
        query_start_S1=ints(sequences + 1),
        context_len_S=ints(sequences),
        block_table_SM=ints(sequences, -(-shape.max_context // shape.page_size)),
        max_query_len=query_len,
        max_context_len=context,
    )
    layer, native_fp8 = cache_layer(shape, dtype), planner.device.has_fp8
    qkv = torch.empty(rows, (h + 2 * g) * c, dtype=dtype, device=_META)
    q_TX, k_TX, v_TX = qkv.split((h * c, g * c, g * c), -1)
    out_THC = torch.empty(rows, h, c, dtype=dtype, device=_META)
    table = torch.empty(shape.max_context, c, dtype=torch.float32, device=_META)
    narrow = layer.keys_BGPC.itemsize == 1
    config = best_attention(query_len, context, sequences * g, h // g, c, planner.device, narrow)
    return [
        plan_rope_and_write(
            q_TX.view(rows, h, c), k_TX.view(rows, g, c), v_TX.view(rows, g, c), table, batch, layer, out_THC
        ),
        *plan_attention(
            out_THC, layer, batch, out_THC, scale=c**-0.5, window=shape.window, config=config, native_fp8=native_fp8
        ),
    ]


def cache_layer(shape: WarmUpShape, dtype: torch.dtype) -> KVLayer:
    """Pages of one layer, as the engine allocates them for this backend."""
    kept = shape.kv_dtype or dtype
    width = stored_channels(shape.head_dim, kept)
    pages = torch.empty(1024, shape.num_kv_heads, shape.page_size, width, dtype=kept, device=_META)
    return KVLayer(keys_BGPC=pages, values_BGPC=pages, scales_behind_page=True)
