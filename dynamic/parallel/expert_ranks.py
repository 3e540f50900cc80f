"""The experts of one rank of the expert axis: how rows get to them, and how they move while the model runs.

All ranks of the axis do the same at the same time: rank 0 says between two steps when loads are gathered and when a
layer's experts move.

Shape suffixes as in ``kernels/api/types.py``; N layers, X ranks of the expert axis.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence

import torch

from ...kernels.api.types import ExpertWeights, Routing
from ...kernels.torch.backend import TorchBackend
from ...moe.dispatch import UNUSED, ExpertShares, share_experts
from ...moe.exchange import ExpertExchange, PendingDispatch
from ...moe.placement import ExpertLoad
from ...moe.rebalance import Places, evened_out, imbalance
from ...moe.slot_exchange import SlotExchange, place_experts
from ..model.layer_weights import LayerWeights
from ..model.moe_spec import MoESpec
from .plan import Message, Operation
from .shards import Shard

UNEVEN = 0.1  # over the mean: a layer whose ranks' work is more even is left alone
_CHANCE = 2.0  # likewise, times the mean's square root: so much may be the window's doing
_FEWEST_SLOTS = 64  # of a rank in a window, on average: fewer say little


class ExpertRanks:
    """Where a model's experts are, and this rank's side of the exchange.

    Arguments:
        shard: what this rank holds.
        backend: which keeps the weights.
        layers: of the model; stand-ins where another stage has them.

    Attributes:
        shares: of layers with a mixture, by number; none without an expert axis.
        imbalance: the most loaded rank's slots over the mean in the last window, None before its end.
        moves: experts that came to another rank, as rank 0 said.
    """

    def __init__(self, shard: Shard, backend: TorchBackend, layers: Sequence[LayerWeights]) -> None:
        self._context, self._backend = shard.context, backend
        self._config = config = shard.context.config
        self._mixtures = shard.mixtures if config.expert > 1 else {}
        axis, moving = shard.context.expert_axis, bool(config.rebalance_steps)
        self.exchange = (SlotExchange if moving else ExpertExchange)(shard.context, axis, config.padded_rows)
        self.shares: dict[int, ExpertShares] = {}
        self.imbalance: float | None = None
        self.moves = 0
        if not moving:
            self.shares |= {n: _shares(moe, shard.placement[n], backend) for n, moe in self._mixtures.items()}
            return
        if not self._mixtures:
            raise ValueError(f"parallel.rebalance_steps={config.rebalance_steps}: no router of this model has a choice")
        self._weights = {number: layers[number].ffn for number in shard.held if number in self._mixtures}
        room_N = self._room(len(layers))
        self._places: dict[int, Places] = {
            number: [[*experts, *[UNUSED] * (room_N[number] - len(experts))] for experts in shard.placement[number]]
            for number in self._mixtures
        }
        for number in self._mixtures:
            self._share(number)
        # Of the window that runs, and of this rank's rows: who chose which expert, and which rank ran it.
        self._load = ExpertLoad(shard.whole.experts_by_layer, backend.device)
        self._ran_NX = torch.zeros(len(layers), config.expert, dtype=torch.int64, device=backend.device)
        self._steps = 0
        self._waiting: deque[tuple[int, list[int]]] = deque()  # layers to look at, with the load of their experts

    def _room(self, layers: int) -> list[int]:
        """Places that every rank has for the experts of a layer; refuses ranks that keep experts in different ways."""
        told_N2 = torch.zeros(layers, 2, dtype=torch.int64)
        for number, weights in self._weights.items():
            kind = self._backend.expert_tensors(weights)[1]
            told_N2[number, 0] = weights.num_experts
            told_N2[number, 1] = int(hashlib.sha256(kind.encode()).hexdigest()[:12], 16)
        told = torch.stack(self._context.gather(told_N2))
        for tensor_rank in range(self._config.tensor):
            kinds_RN = told[tensor_rank :: self._config.tensor, :, 1]
            unlike_N = (kinds_RN != kinds_RN.amax(0)) & (kinds_RN != 0)
            if unlike_N.any():
                layer = int(unlike_N.any(0).nonzero()[0, 0])
                raise ValueError(
                    f"parallel.rebalance_steps: the experts of layer {layer} are kept in another way on each rank, "
                    "because their scales need other types"
                )
        rooms_RN = told[..., 0]
        return rooms_RN.where(rooms_RN > 0, 1 << 62).amin(0).tolist()

    def _share(self, number: int) -> None:
        self.shares[number] = _shares(self._mixtures[number], self._places[number], self._backend, placed=True)

    def dispatch(self, number: int, x_TD: torch.Tensor, routing: Routing) -> PendingDispatch:
        """Begin to send this rank's rows to the ranks of their experts."""
        pending = self.exchange.dispatch(x_TD, routing, self.shares[number])
        if self._config.rebalance_steps:
            self._load.observe(number, routing)
            self._ran_NX[number] += pending.slots_X
        return pending

    def run(self, weights: ExpertWeights, pending: PendingDispatch) -> torch.Tensor:
        """The sums of this rank's rows, float32; runs what other ranks have for its experts."""
        received = self.exchange.receive(pending)
        out_RD = received.rows
        if len(out_RD):
            out_RD = self._backend.experts(out_RD, weights, received.routing)
        return self.exchange.combine(pending, received, out_RD)

    def next_move(self) -> Message | None:
        """On rank 0, in front of a step: what all ranks do first, see :meth:`obey`; at most one layer moves."""
        if not self._config.rebalance_steps:
            return None
        while self._waiting:
            number, rows_E = self._waiting.popleft()
            places = self._places[number]
            if (found := evened_out(rows_E, places)) != places:
                blocks = (torch.tensor(found),)
                return Message(operation=Operation.MOVE, arguments=(number, len(places)), blocks=blocks)
        if self._steps >= self._config.rebalance_steps:
            return Message(operation=Operation.LOADS)
        self._steps += 1
        return None

    def obey(self, message: Message) -> None:
        """Gather the loads of the window that ends, or move one layer's experts; all ranks call this together.

        Raises:
            RuntimeError: when a rank has died or does not answer in time.
        """
        if message.operation is Operation.LOADS:
            self._end_window()
        else:
            number, ranks = message.arguments[:2]
            self._move(number, message.blocks[0].view(ranks, -1).tolist())
        # Loads from now on are of where experts are from now on.
        self._steps = 1  # the one that comes next
        self._load.rows_NE.zero_()
        self._ran_NX.zero_()

    def _end_window(self) -> None:
        with self._context.watched():
            found = self._context.gather(torch.cat((self._ran_NX, self._load.rows_NE), 1).cpu())
        total = torch.stack(found[:: self._config.tensor]).sum(0)  # the ranks of a tensor group have the same rows
        ran_NX, rows_NE = total[:, : self._config.expert], total[:, self._config.expert :]
        self.imbalance = imbalance(ran_NX.numpy())
        for number, moe in self._mixtures.items():
            mean = float(ran_NX[number].double().mean())
            if mean >= _FEWEST_SLOTS and ran_NX[number].max() > mean + max(UNEVEN * mean, _CHANCE * mean**0.5):
                self._waiting.append((number, rows_NE[number, : moe.num_experts].tolist()))

    def _move(self, number: int, places: Places) -> None:
        """Bring a layer's experts to other places: those that have them send them, those that get them write them."""
        before, self._places[number] = self._places[number], places
        coming = [
            [(place, expert) for place, expert in enumerate(experts) if expert not in (UNUSED, *before[rank])]
            for rank, experts in enumerate(places)
        ]
        self.moves += sum(map(len, coming))
        if number in self._weights:
            self._swap(number, before, coming)
        self._share(number)

    def _swap(self, number: int, before: Places, coming: Sequence[Sequence[tuple[int, int]]]) -> None:
        axis = self._context.expert_axis
        source = {expert: rank for rank in reversed(range(axis.size)) for expert in before[rank]}
        going = [[e for _, e in wanted if source[e] == axis.rank] for wanted in coming]
        sent = (
            torch.tensor([before[axis.rank].index(expert) for experts in going for expert in experts])
            .long()
            .to(self._backend.device)
        )
        by_source = sorted(coming[axis.rank], key=lambda pair: source[pair[1]])  # stable, as ranks send them
        received = [sum(source[expert] == rank for _, expert in by_source) for rank in range(axis.size)]
        places = torch.tensor([place for place, _ in by_source]).long().to(self._backend.device)
        for tensor in self._backend.expert_tensors(self._weights[number])[0]:
            rows = tensor[sent].flatten(1)
            found, work = self._context.swap(rows, list(map(len, going)), received, axis.group, "moves")
            self._context.finish(work)
            tensor[places] = found.view(-1, *tensor.shape[1:])


def _shares(moe: MoESpec, parts: Places, backend: TorchBackend, *, placed: bool = False) -> ExpertShares:
    top_k, on_input = moe.router.top_k + moe.num_always_on, moe.router.weight_on_input
    if placed:
        return place_experts(parts, moe.num_experts, top_k, backend.device, on_input)
    return share_experts(parts, top_k, backend.device, on_input)
