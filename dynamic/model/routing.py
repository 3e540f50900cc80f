"""What surrounds a routing rule: the logits in front of it, and experts that rows use whatever it says.

Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

import torch

from ...kernels.api.router_spec import RouterSpec
from ...kernels.api.types import Routing
from ...kernels.reference.elementwise import sigmoid
from ...kernels.torch.backend import TorchBackend
from .layer_weights import LayerWeights
from .moe_spec import MoESpec


def router_logits(backend: TorchBackend, weights: LayerWeights, rule: RouterSpec, x_TD: torch.Tensor) -> torch.Tensor:
    """What a rule makes experts and weights of, (T, E), in the dtype that it asks for."""
    assert weights.router is not None
    if rule.input_norm_eps is not None:
        assert weights.router_norm_D is not None
        x_TD = backend.rms_norm(x_TD, weights.router_norm_D, rule.input_norm_eps)
    return backend.linear(x_TD.to(weights.router.dtype), weights.router)


def with_always_on(routing: Routing, count: int) -> Routing:
    """Put ``count`` experts that every row uses with weight 1 in front; the routed ones come after them in storage."""
    num_rows = routing.expert_ids_TK.shape[0]
    always_TK = torch.arange(count, dtype=torch.int32, device=routing.expert_ids_TK.device).expand(num_rows, -1)
    return Routing(
        expert_ids_TK=torch.cat((always_TK, routing.expert_ids_TK + count), -1),
        weights_TK=torch.cat((torch.ones_like(always_TK, dtype=torch.float32), routing.weights_TK), -1),
        counts_T=None if routing.counts_T is None else routing.counts_T + count,
    )


def read_by_experts(backend: TorchBackend, weights: LayerWeights, x_TD: torch.Tensor) -> torch.Tensor:
    """What a mixture's experts read: the rows, or latents of them."""
    return x_TD if weights.latent_in is None else backend.linear(x_TD, weights.latent_in)


def shared_experts(
    backend: TorchBackend, weights: LayerWeights, moe: MoESpec | None, x_TD: torch.Tensor
) -> torch.Tensor | None:
    """What the expert leaves that every row uses beside those that are chosen, with its factor and gate."""
    if weights.shared is None or moe is None:
        return None
    shared_TD = backend.all_experts(x_TD, weights.shared)
    shared_TD = shared_TD if moe.shared_scale == 1.0 else shared_TD * moe.shared_scale
    if weights.shared_gate is None:
        return shared_TD
    return shared_TD * sigmoid(backend.linear(x_TD, weights.shared_gate))
