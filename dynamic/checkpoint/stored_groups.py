"""Groups of inputs that share a scale, as checkpoints store them and as our formats have them.

Shape suffixes: O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.api.formats import GROUPS, INT4
from ...kernels.api.quantized_weight import QuantizedWeight
from .stored_codes import width
from .stored_weight import StoredWeight


@dataclass(frozen=True, kw_only=True)
class Groups:
    """The groups of some inputs.

    Arguments:
        theirs, ours: inputs per group as stored, and as our format has them: groups are cut where it has no such size,
            or where the inputs do not begin with a group.
        stored: the groups that the inputs are in.
        index_G: which of those each of ours is in.
    """

    theirs: int
    ours: int
    stored: slice
    index_G: torch.Tensor

    def spread(self, values_OG: torch.Tensor) -> torch.Tensor:
        """Values of the stored groups for each of ours."""
        return values_OG[:, self.index_G]


def groups_of(theirs: int, inputs: slice, total: int) -> Groups:
    """The groups of some inputs.

    Arguments:
        theirs: inputs per group.
        inputs: begin in the middle of a group only where it is all inputs, or at a multiple of 32.
        total: all inputs.
    """
    sizes = (theirs, *reversed(GROUPS)) if theirs in GROUPS else tuple(reversed(GROUPS))
    ours = next(g for g in sizes if theirs >= total or (theirs % g == 0 and inputs.start % g == 0))
    stored = slice(inputs.start // theirs, -(-inputs.stop // theirs))
    index_G = torch.arange(inputs.start, inputs.stop, ours) // theirs - stored.start
    return Groups(theirs=theirs, ours=ours, stored=stored, index_G=index_G)


def known_group(weight: StoredWeight, group: int, inputs: int) -> int:
    """The group size; one that spans all inputs, or several of ours, is split later."""
    if group not in GROUPS and (group < 1 or group % GROUPS[0]) and group < inputs:
        raise weight.error(f"groups of {group} inputs are no multiple of {GROUPS[0]}")
    return group


def check_order(weight: StoredWeight, part: str, inputs: slice, group: int) -> None:
    """Raises CheckpointError unless groups are contiguous."""
    if not weight.has(part):
        return
    index_I = weight.read(part, inputs).long()
    if not torch.equal(index_I, torch.arange(inputs.start, inputs.stop) // group) and not bool((index_I == -1).all()):
        raise weight.error(
            f"its groups are scattered over the inputs ({part}); only checkpoints whose groups are contiguous load:"
            " quantise without desc_act, or with static groups"
        )


def int4_step(group: int, shape: tuple[int, ...]) -> int:
    """Parts of an int4 weight may begin at multiples of so many inputs."""
    return 1 if group == -1 or group >= shape[1] else GROUPS[0]


def grouped_int4(
    data: torch.Tensor, scale_OG: torch.Tensor, zero_OG: torch.Tensor | None, inputs: slice, groups: Groups
) -> QuantizedWeight:
    """An int4 weight in groups of ours, from codes that are packed and scales and zero points of the stored groups."""
    return QuantizedWeight(
        format=INT4,
        data=data.contiguous(),
        scale=groups.spread(scale_OG),
        inputs=width(inputs),
        group=groups.ours,
        zero=None if zero_OG is None else groups.spread(zero_OG).contiguous(),
    )
