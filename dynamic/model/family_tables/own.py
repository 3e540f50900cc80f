"""The models that are made here."""

from __future__ import annotations

from ....kernels.api.router_spec import RouterSpec
from ...checkpoint.config_reader import ConfigReader
from ..family import DENSE_FFN, Family
from ..moe_spec import MoESpec
from .mixtures import ONE_EACH
from .rules import ATTENTION_BIAS

DYNAMOE_EXPERTS = (DENSE_FFN, ONE_EACH)


def _dynamoe(config: ConfigReader, layer: int) -> MoESpec:
    num_experts, always_on = config.integer("num_experts"), config.integer("num_always_on_experts", 0)
    if always_on >= num_experts:
        raise config.error("num_always_on_experts", always_on, f"less than num_experts={num_experts}")
    routed = num_experts - always_on
    top_k = config.integer("num_experts_per_tok", routed)
    if not 1 <= top_k <= routed:
        raise config.error("num_experts_per_tok", top_k, f"between 1 and {routed}, the experts that are not always on")
    router = RouterSpec(num_experts=routed, top_k=top_k, score="constant")
    return MoESpec(router=router, expert_size=config.integer("expert_size"), num_always_on=always_on)


OWN: dict[str, Family] = {
    "dynamoe": Family(
        moe=_dynamoe,
        qkv_bias=ATTENTION_BIAS,
        o_bias=ATTENTION_BIAS,
        experts=DYNAMOE_EXPERTS,
        router=("mlp.router.weight",),
    ),
}
