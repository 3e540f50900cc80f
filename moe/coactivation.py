"""Grouping the neurons of a feed-forward layer by which tokens they fire on.

Shape suffixes: T tokens, N neurons, E groups.
"""

from __future__ import annotations

import torch


def affinity(energy_TN: torch.Tensor) -> torch.Tensor:
    """How much two neurons fire on the same tokens, (N, N): the covariance of their energies over tokens.

    A covariance rather than a correlation, because the more the energy of a whole group varies from token to token,
    the more there is to gain from leaving the group out where it is weak; strong neurons decide most of that.

    Arguments:
        energy_TN: non-negative firing strength of every neuron on every token, float32.
    """
    centred_TN = energy_TN - energy_TN.mean(0)
    return centred_TN.T @ centred_TN / energy_TN.shape[0]


def assign_balanced(preference_NE: torch.Tensor, size: int) -> torch.Tensor:
    """Put ``size`` neurons into every group as a stable matching.

    Deferred acceptance (Gale and Shapley, 1962): every unassigned neuron proposes to the next group on its list; a
    group keeps the ``size`` candidates with the highest preference. Ties go to the lower number.

    Arguments:
        preference_NE: how well each neuron fits each group; N must be E * size.

    Returns: the group of each neuron, (N,), int64.
    """
    num_neurons, num_groups = preference_NE.shape
    assert num_neurons == num_groups * size
    choices_NE = preference_NE.argsort(dim=1, descending=True, stable=True)
    asked_N = torch.zeros(num_neurons, dtype=torch.int64)
    group_N = torch.full((num_neurons,), -1, dtype=torch.int64)
    while (free_N := (group_N < 0).nonzero()[:, 0]).numel():
        group_N[free_N] = choices_NE[free_N, asked_N[free_N]]
        asked_N[free_N] += 1
        for group in group_N[free_N].unique().tolist():
            members = (group_N == group).nonzero()[:, 0]
            order = preference_NE[members, group].argsort(descending=True, stable=True)
            group_N[members[order[size:]]] = -1
    return group_N


def balanced_groups(affinity_NN: torch.Tensor, num_groups: int, *, rounds: int = 20, seed: int = 0) -> torch.Tensor:
    """Split neurons into equal groups that fire together: k-means in affinity space with groups of equal size.

    Starts from neurons far from each other (k-means++, Arthur and Vassilvitskii, 2007) and stops early when a round
    changes nothing.

    Arguments:
        affinity_NN: symmetric, larger means firing together more often.
        num_groups: must divide N.
        rounds: most rounds of re-assignment.
        seed: seeds the starting neurons; the same seed gives the same groups.

    Returns: the group of each neuron, (N,), int64; every group has N / num_groups members.

    Raises:
        ValueError: when ``num_groups`` does not divide N.
    """
    num_neurons = affinity_NN.shape[0]
    if num_groups < 1 or num_neurons % num_groups:
        raise ValueError(f"{num_neurons} neurons cannot be split into {num_groups} equal groups")
    size = num_neurons // num_groups
    group_N = assign_balanced(affinity_NN[:, _spread_seeds(affinity_NN, num_groups, seed)], size)
    for _ in range(rounds):
        member_NE = torch.nn.functional.one_hot(group_N, num_groups).to(affinity_NN.dtype)
        # Without its own entry, which would tie every neuron to the group that it already is in.
        total_NE = affinity_NN @ member_NE - affinity_NN.diagonal()[:, None] * member_NE
        changed_N = assign_balanced(total_NE / (size - member_NE).clamp_min(1), size)
        if torch.equal(changed_N, group_N):
            break
        group_N = changed_N
    return group_N


def _spread_seeds(affinity_NN: torch.Tensor, num_groups: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    variance_N = affinity_NN.diagonal()
    tiny = torch.finfo(torch.float32).tiny
    seeds = [int(torch.randint(affinity_NN.shape[0], (1,), generator=generator))]
    while len(seeds) < num_groups:
        squared_distance_NS = variance_N[:, None] + variance_N[seeds] - 2 * affinity_NN[:, seeds]
        # At least tiny, so that the draw stays possible when all neurons are alike.
        weights_N = squared_distance_NS.amin(1).clamp_min(tiny)
        weights_N[seeds] = 0
        seeds.append(int(torch.multinomial(weights_N, 1, generator=generator)))
    return torch.tensor(seeds)
