"""The plain-torch oracle of routing: one function for every rule that a :class:`RouterSpec` can state.

Shape suffixes are explained in ``types.py``. Everything runs in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..api.router_spec import RouterSpec
from ..api.types import Routing
from .elementwise import sigmoid, softplus


def router_logits(
    x_TD: torch.Tensor,
    weight_ED: torch.Tensor,
    spec: RouterSpec,
    bias_E: torch.Tensor | None = None,
    input_scale_D: torch.Tensor | None = None,
) -> torch.Tensor:
    """The router's matrix product, (T, E), in the dtype that the rule asks for.

    Arguments:
        bias_E: part of the logits, unlike a selection bias (GPT-OSS).
        input_scale_D: with ``spec.input_norm_eps``, the learned scale of the normed input.
    """
    if spec.input_norm_eps is not None:
        x32 = x_TD.float()
        normed = x32 * torch.pow(x32.square().mean(-1, keepdim=True) + spec.input_norm_eps, -0.5)
        x_TD = normed.to(x_TD.dtype)
        if input_scale_D is not None:
            x_TD = x_TD * input_scale_D
        x_TD = x_TD * x_TD.shape[-1] ** -0.5
    if spec.float32_logits:
        x_TD, weight_ED = x_TD.float(), weight_ED.float()
        bias_E = None if bias_E is None else bias_E.float()
    return F.linear(x_TD, weight_ED, bias_E)


def top_k_lowest_first(scores_TE: torch.Tensor, k: int) -> torch.Tensor:
    """Numbers of the k best of each row, best first; ties go to the lower number, which ``torch.topk`` leaves open."""
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def _scores(logits_TE: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    if spec.score == "softmax" and not spec.softmax_after_topk:
        return logits_TE.softmax(-1)
    if spec.score == "sigmoid":
        return sigmoid(logits_TE)
    if spec.score == "sqrt_softplus":
        return softplus(logits_TE).sqrt()
    return logits_TE


def _sparsemixer(logits_TE: torch.Tensor, spec: RouterSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights of Phimoe's rule (Liu et al. 2024, inference)."""
    left_TE = logits_TE.clone()
    ids, weights = [], []
    for _ in range(spec.top_k):
        chosen_T1 = top_k_lowest_first(left_TE, 1)
        best_T1 = left_TE.gather(-1, chosen_T1)
        distance_TE = (best_T1 - logits_TE) / logits_TE.abs().clamp(min=best_T1)
        probs_TE = left_TE.masked_fill(distance_TE > 2 * spec.jitter, float("-inf")).softmax(-1)
        ids.append(chosen_T1)
        weights.append(probs_TE.gather(-1, chosen_T1))
        left_TE = left_TE.scatter(-1, chosen_T1, float("-inf"))
    return torch.cat(ids, -1), torch.cat(weights, -1)


def _choose(scores_TE: torch.Tensor, spec: RouterSpec, selection_bias_E: torch.Tensor | None) -> torch.Tensor:
    choice_TE = scores_TE if selection_bias_E is None else scores_TE + selection_bias_E.float()
    if spec.grouped:
        grouped = choice_TE.unflatten(-1, (spec.num_groups, spec.group_size))
        best = grouped.sort(-1, descending=True).values
        worth = best[..., 0] if spec.group_score == "max" else best[..., 0] + best[..., 1]
        allowed = torch.zeros_like(worth, dtype=torch.bool).scatter(
            -1, top_k_lowest_first(worth, spec.top_groups), True
        )
        choice_TE = grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)
    return top_k_lowest_first(choice_TE, spec.top_k)


def _normalize(weights_TK: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    norm_T1 = torch.linalg.vector_norm(weights_TK, spec.norm_p, dim=-1, keepdim=True)
    return weights_TK / (norm_T1.clamp(min=spec.norm_floor) + spec.norm_epsilon)


def _kept_by_capacity(ids_TK: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """Which choices find room: rows queue in order, and all first choices queue before all second ones."""
    by_choice = F.one_hot(ids_TK.t().flatten().long(), spec.num_experts)
    place = (by_choice.cumsum(0) * by_choice).sum(-1) - 1
    return (place < spec.capacity_for(ids_TK.shape[0])).view(spec.top_k, -1).t()


def pack_kept(values_TK: torch.Tensor, kept_TK: torch.Tensor) -> torch.Tensor:
    """Move the kept entries of each row to the front, in order, and zero the rest."""
    order_TK = (~kept_TK).int().sort(dim=-1, stable=True).indices
    return values_TK.masked_fill(~kept_TK, 0).gather(-1, order_TK)


def route(
    logits_TE: torch.Tensor,
    spec: RouterSpec,
    *,
    selection_bias_E: torch.Tensor | None = None,
    expert_scale_E: torch.Tensor | None = None,
    forced_ids_TK: torch.Tensor | None = None,
    scores_TE: torch.Tensor | None = None,
) -> Routing:
    """Scores, groups, top-k, weights. Ties go to the lower expert number. Sorted by falling choice score within a row.

    Arguments:
        logits_TE: any float dtype.
        selection_bias_E: required by ``spec.selection_bias``.
        expert_scale_E: required by ``spec.expert_scale``.
        forced_ids_TK: required by ``spec.forced_experts``; integer, distinct within a row.
        scores_TE: what the rule makes of the logits, float32, where the caller has it.

    Returns: a :class:`Routing`. Choices of zero experts and choices that found no room are not among its slots: the
        former add up in ``identity_weights_T``.

    Raises:
        ValueError: when the spec needs a tensor that is missing, or the other way round.
    """
    check_route_arguments(logits_TE, spec, selection_bias_E, expert_scale_E, forced_ids_TK)
    logits_TE = logits_TE.float()
    scores_TE = _scores(logits_TE, spec) if scores_TE is None else scores_TE
    if spec.score == "sparsemixer":
        ids_TK, weights_TK = _sparsemixer(logits_TE, spec)
    else:
        ids_TK = _choose(scores_TE, spec, selection_bias_E) if forced_ids_TK is None else forced_ids_TK.long()
        weights_TK = scores_TE.gather(-1, ids_TK)
    if spec.softmax_after_topk:
        weights_TK = weights_TK.softmax(-1)
    if spec.score == "constant":
        weights_TK = torch.ones_like(weights_TK)

    kept_TK = _kept_by_capacity(ids_TK, spec) if spec.drops else torch.ones_like(ids_TK, dtype=torch.bool)
    if spec.renormalize_after_drop:
        weights_TK = weights_TK.masked_fill(~kept_TK, 0.0)
    if spec.renormalize:
        weights_TK = _normalize(weights_TK, spec)
    weights_TK = weights_TK * spec.scale
    if expert_scale_E is not None:
        weights_TK = weights_TK * expert_scale_E.float()[ids_TK]

    counts_T = identity_T = None
    if spec.zero_experts:
        zero_TK = ids_TK >= spec.num_real_experts
        identity_T = weights_TK.masked_fill(~(zero_TK & kept_TK), 0.0).sum(-1)
        kept_TK = kept_TK & ~zero_TK
    if spec.zero_experts or spec.drops:
        counts_T = kept_TK.sum(-1, dtype=torch.int32)
        ids_TK, weights_TK = pack_kept(ids_TK, kept_TK), pack_kept(weights_TK, kept_TK)
    return Routing(
        expert_ids_TK=ids_TK.int().contiguous(),
        weights_TK=weights_TK.contiguous(),
        counts_T=counts_T,
        identity_weights_T=identity_T,
        weight_on_input=spec.weight_on_input,
    )


def check_route_arguments(
    logits_TE: torch.Tensor,
    spec: RouterSpec,
    selection_bias_E: torch.Tensor | None = None,
    expert_scale_E: torch.Tensor | None = None,
    forced_ids_TK: torch.Tensor | None = None,
) -> None:
    """Raise ValueError when the tensors given are not the ones that the rule needs. Shared by every backend."""
    if logits_TE.dim() != 2 or logits_TE.shape[1] != spec.num_experts:
        raise ValueError(f"logits must be (T, {spec.num_experts}), not {tuple(logits_TE.shape)}")
    for name, tensor, needed, shape in (
        ("selection_bias_E", selection_bias_E, spec.selection_bias, (spec.num_experts,)),
        ("expert_scale_E", expert_scale_E, spec.expert_scale, (spec.num_experts,)),
        ("forced_ids_TK", forced_ids_TK, spec.forced_experts, (logits_TE.shape[0], spec.top_k)),
    ):
        if (tensor is not None) != needed:
            raise ValueError(f"this router {'needs' if needed else 'does not take'} {name}")
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
