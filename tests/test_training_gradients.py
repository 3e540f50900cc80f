"""Functions of the training that bring their own gradients: against torch's, against the oracle, by differences."""

from __future__ import annotations

import pytest
import torch
from dynamoe.dynamic.train.attention import causal_attention, norm_and_rotate, rope_table
from dynamoe.dynamic.train.functions import fork_normed, rms_norm
from dynamoe.kernels.api.types import Routing
from dynamoe.kernels.reference import operations as reference
from dynamoe.moe.trainable_experts import mixture


@pytest.mark.parametrize("tokens", [1, 7, 50])  # fewer tokens than experts, and empty experts
def test_expert_gradients_match_the_oracle(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    experts, top_k, width, hidden = 8, 2, 12, 20

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float().requires_grad_()

    x, gate_up, down = leaf(tokens, hidden), leaf(experts, 2, width, hidden), leaf(experts, hidden, width)
    logits = leaf(tokens, experts)
    weight = torch.randn(tokens, hidden, generator=generator)
    leaves = (x, gate_up, down, logits)

    def oracle(weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        routing = Routing(expert_ids_TK=ids_TK.int(), weights_TK=weights_TK)
        return reference.experts(x, gate_up[:, 0], gate_up[:, 1], down, routing, "silu")

    def ours(weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        return mixture(x, gate_up.flatten(1, 2), down, ids_TK, weights_TK)

    found = []
    for operation in (oracle, ours):
        weights_TK, ids_TK = logits.softmax(-1).topk(top_k)
        out = operation(weights_TK, ids_TK)
        found.append((out, *torch.autograd.grad((out * weight).sum(), leaves, materialize_grads=True)))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_expert_gradients_pass_gradcheck() -> None:
    torch.manual_seed(0)
    ids_TK = torch.tensor([[0, 2], [2, 1], [0, 2]])  # expert 3 gets nothing
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (4, 6, 4), (4, 4, 3), (3, 2))]
    assert torch.autograd.gradcheck(lambda x, gu, d, w: mixture(x, gu, d, ids_TK, w), inputs)


@pytest.mark.parametrize("length", [1, 64, 100])  # one query, exactly one block, a ragged second block
def test_attention_and_its_gradients_match_torch(length: int) -> None:
    torch.manual_seed(length)
    q = torch.randn(2, 4, length, 8, requires_grad=True)
    k, v = (torch.randn(2, 2, length, 8, requires_grad=True) for _ in range(2))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    got_NLD = causal_attention(q.unflatten(1, (2, 2)).transpose(2, 3).contiguous(), k, v)
    got = got_NLD.unflatten(2, (4, 8)).transpose(1, 2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    pull = torch.randn_like(expected)
    for ours, torchs in zip(
        torch.autograd.grad(got, (q, k, v), pull), torch.autograd.grad(expected, (q, k, v), pull), strict=True
    ):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)


def test_norm_and_rotation_of_heads_and_their_gradients_match_torch() -> None:
    torch.manual_seed(0)
    heads, kv_heads, channels = 4, 2, 8
    qkv = torch.randn(3, 5, heads + 2 * kv_heads, channels, requires_grad=True)
    weights = [torch.randn(channels, requires_grad=True) for _ in range(2)]
    table = rope_table(5, channels, 100.0, torch.device("cpu"))
    cos, sin = (t[:, None] for t in table)

    def expected() -> list[torch.Tensor]:
        outs = []
        for x, weight in zip(qkv.split((heads, kv_heads, kv_heads), 2)[:2], weights, strict=True):
            a, b = torch.nn.functional.rms_norm(x, (channels,), weight, 1e-6).chunk(2, -1)
            outs.append(torch.cat((a * cos - b * sin, b * cos + a * sin), -1))
        by_group = outs[0].unflatten(2, (kv_heads, -1)).transpose(1, 2)
        return [by_group, outs[1].transpose(1, 2), qkv[:, :, heads + kv_heads :].transpose(1, 2)]

    leaves = (qkv, *weights)
    pulls = [torch.randn_like(t) for t in expected()]
    results = []
    for outs in (expected(), norm_and_rotate(qkv, *weights, table, kv_heads, 1e-6)):
        total = sum((out * pull).sum() for out, pull in zip(outs, pulls, strict=True))
        results.append([*outs, *torch.autograd.grad(total, leaves)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_fork_before_a_sublayer_adds_both_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: fork_normed(x, 1e-6), x)


def test_rms_norm_and_its_gradients_match_torch() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    expected, got = torch.nn.functional.rms_norm(x, (16,), weight, 1e-6), rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(got, expected)
    pull = torch.randn_like(expected)
    for ours, torchs in zip(
        torch.autograd.grad(got, (x, weight), pull), torch.autograd.grad(expected, (x, weight), pull), strict=True
    ):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-5)
