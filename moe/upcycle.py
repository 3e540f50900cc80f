"""A dense feed-forward layer turned into a mixture of experts by splitting its neurons. No training.

Neurons that fire on the same tokens become one expert (MoEfication, Zhang et al. 2022); the neurons that matter most
everywhere become experts that are always on (CMoE, Pei et al. 2025). A linear router predicts from the layer's input
how much each of the other experts would contribute. With all experts on, the layer is the dense one up to the order
of summation.

Shape suffixes: T tokens, D hidden size, N neurons, E routed experts, F neurons of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .coactivation import affinity, balanced_groups


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """How a dense layer is split.

    Arguments:
        num_experts: experts per layer, those that are always on included; must divide the number of neurons.
        num_always_on: experts that every token uses.
        rounds: most rounds of clustering.
        ridge: regularisation of the router, as a share of the mean square of the layer's input.
        seed: seeds the clustering.

    Raises:
        ValueError: naming the value that is out of range.
    """

    num_experts: int = 16
    num_always_on: int = 2
    rounds: int = 20
    ridge: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, not {self.num_experts}")
        if not 0 <= self.num_always_on < self.num_experts:
            raise ValueError(f"num_always_on must be in 0 … {self.num_experts - 1}, not {self.num_always_on}")
        if self.ridge <= 0:
            raise ValueError(f"ridge must be positive, not {self.ridge}")


@dataclass(frozen=True, kw_only=True)
class ExpertSplit:
    """The plan of one layer: expert e owns neurons ``order_N[e * F : (e + 1) * F]``; those always on come first."""

    order_N: torch.Tensor  # int64, a permutation
    router_ED: torch.Tensor  # float32


def contributions(energy_TN: torch.Tensor, order_N: torch.Tensor, config: UpcycleConfig) -> torch.Tensor:
    """How much each routed expert adds to each token, (T, E): the root of its neurons' summed squared energies."""
    routed_TN = energy_TN[:, order_N].unflatten(1, (config.num_experts, -1))[:, config.num_always_on :]
    return routed_TN.square().sum(-1).sqrt()


def fit_router(x_TD: torch.Tensor, target_TE: torch.Tensor, ridge: float) -> torch.Tensor:
    """Ridge regression without intercept, (E, D): ``x @ router.T`` is the best linear estimate of ``target``."""
    gram_DD = (x_TD.T @ x_TD).double()
    gram_DD.diagonal().add_(ridge * gram_DD.diagonal().mean())
    return torch.linalg.solve(gram_DD, (x_TD.T @ target_TE).double()).T.float().contiguous()


def split_ffn(x_TD: torch.Tensor, hidden_TN: torch.Tensor, down_DN: torch.Tensor, config: UpcycleConfig) -> ExpertSplit:
    """Plan the experts of one layer from what it does on calibration text.

    Arguments:
        x_TD: the layer's (normed) input, float32.
        hidden_TN: ``act(gate x) * up x``, the input of the down projection, float32.
        down_DN: the down projection.

    Raises:
        ValueError: when the number of neurons is not a multiple of the number of experts.
    """
    num_neurons = hidden_TN.shape[1]
    if num_neurons % config.num_experts:
        raise ValueError(f"{num_neurons} neurons cannot be split into {config.num_experts} equal experts")
    expert_size = num_neurons // config.num_experts
    # A neuron adds hidden * down column to the residual stream; the length of that is what leaving it out would cost.
    energy_TN = hidden_TN.abs() * down_DN.float().norm(dim=0)
    strongest_N = energy_TN.mean(0).argsort(descending=True, stable=True)
    always_N, routed_N = strongest_N.tensor_split([config.num_always_on * expert_size])
    groups_N = balanced_groups(
        affinity(energy_TN[:, routed_N]),
        config.num_experts - config.num_always_on,
        rounds=config.rounds,
        seed=config.seed,
    )
    order_N = torch.cat((always_N, routed_N[groups_N.argsort(stable=True)]))
    target_TE = contributions(energy_TN, order_N, config)
    return ExpertSplit(order_N=order_N, router_ED=fit_router(x_TD, target_TE, config.ridge))
