"""Every routing rule against transformers' own router of that family, with random weights and biases."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from dynamoe.kernels.api.router_spec import RouterSpec
from dynamoe.kernels.reference import operations as reference
from dynamoe.moe.router_specs import FAMILIES, router_spec

HIDDEN, EXPERTS, TOKENS = 32, 16, 37

# family → (config class, router class, config values, names of the selection bias and the logit bias in the router)
SIMPLE = {"hidden_size": HIDDEN, "num_local_experts": EXPERTS, "num_experts_per_tok": 4}
NAMED = {"hidden_size": HIDDEN, "num_experts": EXPERTS, "num_experts_per_tok": 4}
ROUTED = {
    "hidden_size": HIDDEN, "n_routed_experts": EXPERTS, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
    "norm_topk_prob": True, "routed_scaling_factor": 1.7,
}  # fmt: skip
ONE_GROUP = {**ROUTED, "n_group": 1, "topk_group": 1}
CASES = [
    ("mixtral", "MixtralConfig", "MixtralTopKRouter", SIMPLE),
    ("minimax", "MiniMaxConfig", "MiniMaxTopKRouter", SIMPLE),
    ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeTopKRouter", {**NAMED, "norm_topk_prob": True}),
    ("qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeTopKRouter", {**NAMED, "norm_topk_prob": False}),
    ("qwen3_next", "Qwen3NextConfig", "Qwen3NextTopKRouter", NAMED),
    ("qwen3_5_moe", "Qwen3_5MoeTextConfig", "Qwen3_5MoeTopKRouter", NAMED),
    ("hunyuan_v1_moe", "HunYuanMoEV1Config", "HunYuanMoEV1Gate", {**NAMED, "moe_topk": [4, 2]}),
    ("olmoe", "OlmoeConfig", "OlmoeTopKRouter", NAMED),
    ("qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeTopKRouter", NAMED),
    ("mellum", "MellumConfig", "MellumTopKRouter", {**NAMED, "norm_topk_prob": True}),
    ("flex_olmo", "FlexOlmoConfig", "FlexOlmoTopKRouter", {**NAMED, "norm_topk_prob": True}),
    ("jamba", "JambaConfig", "JambaTopKRouter", NAMED),
    ("gpt_oss", "GptOssConfig", "GptOssTopKRouter", SIMPLE),
    ("granitemoe", "GraniteMoeConfig", "GraniteMoeTopKRouter", SIMPLE),
    ("granitemoeshared", "GraniteMoeSharedConfig", "GraniteMoeSharedTopKRouter", SIMPLE),
    ("granitemoe_swa", "GraniteMoeSWAConfig", "GraniteMoeSWATopKRouter", SIMPLE),
    ("granitemoehybrid", "GraniteMoeHybridConfig", "GraniteMoeHybridTopKRouter", {**SIMPLE, "mamba_n_heads": 4}),
    ("aria", "AriaTextConfig", "AriaTextTopKRouter",
     {"hidden_size": HIDDEN, "moe_num_experts": EXPERTS, "moe_topk": 3}),
    ("deepseek_v2", "DeepseekV2Config", "DeepseekV2TopkRouter", {**ROUTED, "topk_method": "group_limited_greedy"}),
    ("deepseek_v2", "DeepseekV2Config", "DeepseekV2TopkRouter", {**ONE_GROUP, "topk_method": "greedy"}),
    ("deepseek_v3", "DeepseekV3Config", "DeepseekV3TopkRouter", ROUTED),
    ("deepseek_v3", "DeepseekV3Config", "DeepseekV3TopkRouter", {**ONE_GROUP, "norm_topk_prob": False}),
    ("deepseek_v32", "DeepseekV32Config", "DeepseekV32TopkRouter", ROUTED),
    ("glm_moe_dsa", "GlmMoeDsaConfig", "GlmMoeDsaTopkRouter", ONE_GROUP),
    ("glm4_moe_lite", "Glm4MoeLiteConfig", "Glm4MoeLiteTopkRouter", ROUTED),
    ("glm4_moe", "Glm4MoeConfig", "Glm4MoeTopkRouter", ROUTED),
    ("dots1", "Dots1Config", "Dots1TopkRouter", ONE_GROUP),
    ("solar_open", "SolarOpenConfig", "SolarOpenTopkRouter", ONE_GROUP),
    ("exaone_moe", "ExaoneMoeConfig", "ExaoneMoeTopkRouter", {**ROUTED, "num_experts": EXPERTS}),
    ("nemotron_h", "NemotronHConfig", "NemotronHTopkRouter", ROUTED),
    ("kimi_linear", "KimiLinearConfig", "KimiLinearTopkRouter", {**ROUTED, **SIMPLE}),
    ("mimo_v2_flash", "MiMoV2FlashConfig", "MiMoV2FlashTopkRouter", {**ONE_GROUP, "routed_scaling_factor": None}),
    ("afmoe", "AfmoeConfig", "AfmoeTokenChoiceRouter", {**NAMED, "route_scale": 2.5}),
    ("hy_v3", "HYV3Config", "HYV3TopKRouter", {**NAMED, "router_scaling_factor": 1.7}),
    ("minimax_m2", "MiniMaxM2Config", "MiniMaxM2TopKRouter", SIMPLE),
    ("lfm2_moe", "Lfm2MoeConfig", "Lfm2MoeTopKRouter", {**NAMED, "routed_scaling_factor": 0.5}),
    ("lfm2_moe", "Lfm2MoeConfig", "Lfm2MoeTopKRouter", {**NAMED, "use_expert_bias": False}),
    ("ernie4_5_moe", "Ernie4_5_MoeConfig", "Ernie4_5_MoeTopKRouter",
     {"hidden_size": HIDDEN, "moe_num_experts": EXPERTS, "moe_k": 4, "moe_norm_min": 0.3}),
    ("longcat_flash", "LongcatFlashConfig", "LongcatFlashTopkRouter",
     {"hidden_size": HIDDEN, "n_routed_experts": 10, "zero_expert_num": 6, "moe_topk": 5}),
    ("llama4", "Llama4TextConfig", "Llama4Router", {**SIMPLE, "num_experts_per_tok": 2}),
    ("phimoe", "PhimoeConfig", "PhimoeTopKRouter", {**SIMPLE, "num_experts_per_tok": 2, "router_jitter_noise": 0.2}),
    ("deepseek_v4", "DeepseekV4Config", "DeepseekV4TopKRouter", {**ONE_GROUP, "mlp_layer_types": ["moe"] * 2}),
    ("deepseek_v4", "DeepseekV4Config", "DeepseekV4HashRouter",
     {**ONE_GROUP, "mlp_layer_types": ["hash_moe"] * 2, "vocab_size": 50}),
    ("cohere2_moe", "Cohere2MoeConfig", "Cohere2MoeTopKRouter", NAMED),
    ("cohere2_moe", "Cohere2MoeConfig", "Cohere2MoeTopKRouter", {**NAMED, "expert_selection_fn": "sigmoid"}),
    ("cohere2_moe", "Cohere2MoeConfig", "Cohere2MoeTopKRouter",
     {**NAMED, "expert_selection_fn": "sigmoid", "norm_topk_prob": False}),
    ("gemma4", "Gemma4TextConfig", "Gemma4TextRouter",
     {"hidden_size": HIDDEN, "num_experts": EXPERTS, "top_k_experts": 4, "enable_moe_block": True}),
]  # fmt: skip


def make_router(module: str, config_class: str, router_class: str, values: dict) -> tuple:
    torch.manual_seed(11)
    code = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    configs = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    layers = {"num_hidden_layers": 2} if "mlp_layer_types" in values else {}
    config = getattr(configs, config_class)(**values, **layers)
    router = getattr(code, router_class)(config).eval()
    for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
        with torch.no_grad():
            if name == "tid2eid":
                tensor.copy_(torch.stack([torch.randperm(EXPERTS)[: tensor.shape[1]] for _ in tensor]))
            elif "bias" in name:
                tensor.normal_(std=0.3)
            else:
                tensor.normal_().mul_(1.0 if tensor.dim() == 1 else 0.4)
    return config, router


def dense(ids_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Weights laid out by expert: what a layer computes with, whatever the order of the slots."""
    out_TE = torch.zeros(ids_TK.shape[0], num_experts)
    return out_TE.scatter_add(1, ids_TK.long(), weights_TK.float())


def find(router: torch.nn.Module, *names: str) -> torch.Tensor | None:
    tensors = dict([*router.named_parameters(), *router.named_buffers()])
    return next((tensors[n].detach() for n in names if n in tensors), None)


@pytest.mark.parametrize(("module", "config_class", "router_class", "values"), CASES, ids=lambda v: str(v)[:40])
def test_rule_equals_transformers(module: str, config_class: str, router_class: str, values: dict) -> None:
    config, router = make_router(module, config_class, router_class, values)
    spec = router_spec(config, layer=0)
    assert spec == router_spec(config.to_dict(), layer=0)
    x_TD = torch.randn(TOKENS, HIDDEN)
    bias_E = find(router, "e_score_correction_bias", "moe_statics.e_score_correction_bias")
    token_ids_T = torch.randint(0, 50, (TOKENS,))
    with torch.no_grad():
        if module == "afmoe":
            bias_E = torch.randn(EXPERTS) * 0.3
            _, their_weights, their_ids = router(x_TD[None], bias_E)
        elif module in ("hy_v3", "minimax_m2", "lfm2_moe"):
            bias_E = torch.randn(EXPERTS) * 0.3 if spec.selection_bias else None
            _, their_weights, their_ids = router(x_TD, bias_E)
        elif router_class == "DeepseekV4HashRouter":
            _, their_weights, their_ids = router(x_TD, token_ids_T)
        elif module == "llama4":
            scores_TE, _ = router(x_TD)
            their_weights, their_ids = scores_TE, torch.arange(EXPERTS).expand(TOKENS, -1)
        else:
            _, their_weights, their_ids = router(x_TD)

    table_VK = find(router, "tid2eid")
    logits_TE = reference.router_logits(
        x_TD,
        find(router, "weight", "layer.weight", "wg.weight", "gate.weight", "classifier.weight", "proj.weight"),
        spec,
        find(router, "bias"),
        find(router, "scale"),
    )
    routing = reference.route(
        logits_TE,
        spec,
        selection_bias_E=None if bias_E is None else bias_E.flatten(),
        expert_scale_E=find(router, "per_expert_scale"),
        forced_ids_TK=None if table_VK is None else table_VK[token_ids_T],
    )
    ours_TE = dense(routing.expert_ids_TK, routing.weights_TK, spec.num_experts)
    theirs_TE = dense(their_ids, their_weights, spec.num_experts)
    if spec.zero_experts:
        used_TK = torch.arange(spec.top_k) < routing.counts_T[:, None]
        assert (routing.expert_ids_TK < spec.num_real_experts).all()
        assert (routing.weights_TK[~used_TK] == 0).all()
        assert 0 < routing.counts_T.float().mean() < spec.top_k
        identity_T = theirs_TE[:, spec.num_real_experts :].sum(-1)
        torch.testing.assert_close(routing.identity_weights_T, identity_T)
        theirs_TE = theirs_TE.clone()
        theirs_TE[:, spec.num_real_experts :] = 0.0
    torch.testing.assert_close(ours_TE, theirs_TE, rtol=1e-5, atol=1e-6)


def test_dbrx_p_norm() -> None:
    from transformers import DbrxConfig
    from transformers.models.dbrx.modeling_dbrx import DbrxFFN

    torch.manual_seed(3)
    ffn = {"hidden_size": HIDDEN, "ffn_hidden_size": 8, "moe_num_experts": EXPERTS, "moe_top_k": 4}
    for p in (1.0, 2.0, None):
        config = DbrxConfig(d_model=HIDDEN, ffn_config={**ffn, "moe_normalize_expert_weights": p})
        block = DbrxFFN(config)
        spec = router_spec(config)
        logits_TE = torch.randn(TOKENS, EXPERTS)
        their_weights, their_ids = block.route_tokens_to_experts(logits_TE)
        routing = reference.route(logits_TE, spec)
        torch.testing.assert_close(
            dense(routing.expert_ids_TK, routing.weights_TK, EXPERTS), dense(their_ids, their_weights, EXPERTS)
        )


def test_jetmoe_gates() -> None:
    from transformers import JetMoeConfig
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeTopKGating

    torch.manual_seed(3)
    gating = JetMoeTopKGating(HIDDEN, EXPERTS, 2)
    spec = router_spec(JetMoeConfig(num_local_experts=EXPERTS, num_experts_per_tok=2))
    index, rows, gates, sizes, logits_TE = gating(torch.randn(TOKENS, HIDDEN))
    experts = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(sizes))
    theirs_TE = torch.zeros(TOKENS, EXPERTS).index_put((rows, experts), gates)
    routing = reference.route(logits_TE, spec)
    torch.testing.assert_close(dense(routing.expert_ids_TK, routing.weights_TK, EXPERTS), theirs_TE)
    assert index.numel() == TOKENS * 2


@pytest.mark.parametrize("capacity", [1, 3, 64])
def test_switch_capacity_drops_later_rows(capacity: int) -> None:
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    torch.manual_seed(5)
    config = SwitchTransformersConfig(hidden_size=HIDDEN, num_experts=4, expert_capacity=capacity)
    router = SwitchTransformersTop1Router(config).eval()
    x_TD = torch.randn(TOKENS, HIDDEN)
    with torch.no_grad():
        chosen, probs, logits = router(x_TD[None])
        theirs_TE = (chosen * probs)[0]
    routing = reference.route(logits[0], router_spec(config))
    torch.testing.assert_close(dense(routing.expert_ids_TK, routing.weights_TK, 4), theirs_TE)
    assert torch.equal(routing.counts_T, chosen[0].sum(-1).int())


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("fraction", [0.2, 1.0, -1.0])
def test_nllb_capacity_and_two_normalisations(before: bool, fraction: float) -> None:
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

    torch.manual_seed(7)
    config = NllbMoeConfig(
        hidden_size=HIDDEN,
        num_experts=4,
        expert_capacity=9,
        moe_eval_capacity_token_fraction=fraction,
        normalize_router_prob_before_dropping=before,
    )
    router = NllbMoeTop2Router(config).eval()
    with torch.no_grad():
        _, theirs_TE, logits_TE = router(torch.randn(TOKENS, HIDDEN) * 3)
    spec = router_spec(config)
    routing = reference.route(logits_TE, spec)
    torch.testing.assert_close(dense(routing.expert_ids_TK, routing.weights_TK, 4), theirs_TE)
    assert (routing.counts_T < 2).any() == (fraction != 1.0)


def test_every_family_is_tested() -> None:
    modules = {case[0] for case in CASES} | {"dbrx", "jetmoe", "switch_transformers", "nllb-moe"}
    renamed = {"aria": "aria_text", "llama4": "llama4_text", "gemma4": "gemma4_text", "qwen3_5_moe": "qwen3_5_moe_text"}
    others = {"kimi_k2": "deepseek_v3", "qwen3_5_moe": "qwen3_5_moe_text"}
    assert {renamed.get(m, m) for m in modules} | set(others) == set(FAMILIES)
    assert all(FAMILIES[name] is FAMILIES[other] for name, other in others.items())


def test_layers_may_differ() -> None:
    values = {"model_type": "hunyuan_v1_moe", "num_experts": EXPERTS, "moe_topk": [4, 2]}
    assert [router_spec(values, layer).top_k for layer in (0, 1)] == [4, 2]


def test_ties_go_to_the_lower_number() -> None:
    logits_TE = torch.zeros(3, 8)
    logits_TE[1, 5] = 1.0
    spec = RouterSpec(num_experts=8, top_k=3)
    assert reference.route(logits_TE, spec).expert_ids_TK.tolist() == [[0, 1, 2], [5, 0, 1], [0, 1, 2]]
    groups = replace(spec, num_groups=4, top_groups=2, group_score="max")
    assert reference.route(logits_TE, groups).expert_ids_TK.tolist() == [[0, 1, 2], [5, 0, 1], [0, 1, 2]]


def test_sparsemixer_generalises_to_one_choice() -> None:
    logits_TE = torch.randn(9, 6)
    two = reference.route(logits_TE, RouterSpec(num_experts=6, top_k=2, score="sparsemixer", jitter=0.1))
    one = reference.route(logits_TE, RouterSpec(num_experts=6, top_k=1, score="sparsemixer", jitter=0.1))
    assert torch.equal(one.expert_ids_TK, two.expert_ids_TK[:, :1])
    assert torch.equal(one.weights_TK, two.weights_TK[:, :1])


def test_experts_with_weight_on_input_and_identity() -> None:
    torch.manual_seed(0)
    x_TD = torch.randn(5, 12)
    gate, up, down = torch.randn(3, 8, 12), torch.randn(3, 8, 12), torch.randn(3, 12, 8)
    spec = RouterSpec(num_experts=3, top_k=2, score="sigmoid", weight_on_input=True)
    routing = reference.route(torch.randn(5, 3), spec)
    out_TD = reference.experts(x_TD, gate, up, down, routing, "silu")
    expected_TD = torch.zeros_like(x_TD)
    for t in range(5):
        for e, w in zip(routing.expert_ids_TK[t].tolist(), routing.weights_TK[t], strict=True):
            x = x_TD[t] * w
            expected_TD[t] += down[e] @ (torch.nn.functional.silu(gate[e] @ x) * (up[e] @ x))
    torch.testing.assert_close(out_TD, expected_TD, rtol=1e-4, atol=1e-4)

    zeros = RouterSpec(num_experts=5, top_k=4, zero_experts=2)
    routing = reference.route(torch.randn(5, 5), zeros)
    with_identity = reference.experts(x_TD, gate, up, down, routing, "silu")
    without = reference.experts(x_TD, gate, up, down, replace(routing, identity_weights_T=None), "silu")
    torch.testing.assert_close(
        with_identity - without, routing.identity_weights_T[:, None] * x_TD, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"score": "tanh"}, "score"),
        ({"top_k": 9}, "top_k"),
        ({"num_groups": 3}, "num_groups=3"),
        ({"num_groups": 4, "top_groups": 1, "top_k": 3}, "do not fit"),
        ({"num_groups": 8, "top_groups": 4, "group_score": "top2_sum"}, "at least two"),
        ({"zero_experts": 8}, "zero_experts"),
        ({"softmax_after_topk": True, "score": "sigmoid"}, "softmax_after_topk"),
        ({"capacity": 3, "capacity_fraction": 0.5}, "not both"),
        ({"forced_experts": True, "selection_bias": True}, "forced_experts"),
    ],
)
def test_impossible_rules_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterSpec(**{"num_experts": 8, "top_k": 2, **wrong})


def test_missing_or_surplus_tensors_are_refused() -> None:
    logits_TE = torch.randn(2, 8)
    with pytest.raises(ValueError, match="needs selection_bias_E"):
        reference.route(logits_TE, RouterSpec(num_experts=8, top_k=2, selection_bias=True))
    with pytest.raises(ValueError, match="does not take expert_scale_E"):
        reference.route(logits_TE, RouterSpec(num_experts=8, top_k=2), expert_scale_E=torch.ones(8))
    with pytest.raises(ValueError, match=r"\(T, 8\)"):
        reference.route(torch.randn(2, 9), RouterSpec(num_experts=8, top_k=2))


def test_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="no routing rule known for model_type 'llama'"):
        router_spec({"model_type": "llama"})
