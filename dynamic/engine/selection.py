"""The few best entries of long rows, without looking at every entry more than once.

Shape suffixes: R rows, V vocabulary, X blocks of a row, C entries of a block, N best entries.
"""

from __future__ import annotations

import torch

BLOCK = 64


def on_host(x: torch.Tensor) -> bool:
    """Whether the host reads a tensor without waiting for a device."""
    return x.device.type == "cpu"


def largest(values_RV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest entries of each row, falling, and where they are: what ``topk`` gives, up to equals.

    They all lie in the ``count`` blocks with the largest maxima (or equal entries do), and a maximum is far cheaper to
    find than an order.

    Returns: values and int64 places, both (R, N).
    """
    vocabulary = values_RV.shape[1]
    blocks = vocabulary // BLOCK
    if 4 * count > blocks:  # the blocks would hold much of the row
        values_RN, places_RN = values_RV.topk(count, -1)
        return values_RN, places_RN
    tail = blocks * BLOCK
    blocks_RXC = values_RV[:, :tail].unflatten(1, (blocks, BLOCK))
    chosen_RN = blocks_RXC.amax(-1).topk(count, -1).indices
    inside_RNC = blocks_RXC.gather(1, chosen_RN[:, :, None].expand(-1, -1, BLOCK))
    candidates = torch.cat((inside_RNC.flatten(1), values_RV[:, tail:]), 1)
    values_RN, among_RN = candidates.topk(count, -1)
    block_RN = chosen_RN.gather(1, (among_RN // BLOCK).clamp_(max=count - 1))
    in_tail_RN = among_RN >= count * BLOCK
    places_RN = torch.where(in_tail_RN, among_RN - count * BLOCK + tail, block_RN * BLOCK + among_RN % BLOCK)
    return values_RN, places_RN


def block_sums(values_RV: torch.Tensor) -> torch.Tensor:
    """Sums of the blocks of each row, the last of them shorter if need be, float64, (R, X).

    Row by row: how a sum over many rows is split between threads, and so its last bits, depends on their number.
    """
    tail = values_RV.shape[1] // BLOCK * BLOCK
    sums = [row_V[:tail].view(-1, BLOCK).sum(-1) for row_V in values_RV]
    if tail < values_RV.shape[1]:
        sums = [torch.cat((s, row_V[tail:].sum(-1, keepdim=True))) for s, row_V in zip(sums, values_RV, strict=True)]
    return torch.stack(sums).double()


def first_best(values_RV: torch.Tensor) -> tuple[list[int], list[float]]:
    """The place of each row's largest entry, the first of equals, and the entry.

    NaN counts as the largest.
    """
    if values_RV.device.type == "cpu":  # numpy's search is vectorised, torch's is not
        values = values_RV.numpy()
        places = [int(row_V.argmax()) for row_V in values]
        return places, [float(row_V[place]) for row_V, place in zip(values, places, strict=True)]
    places_R = values_RV.argmax(-1)
    return places_R.tolist(), values_RV.gather(1, places_R[:, None])[:, 0].tolist()
