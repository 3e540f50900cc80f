"""Which part of every tensor a rank keeps; no other part is read from disk.

Shape suffixes as in ``kernels/api/types.py``; X several experts' neurons side by side.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from ...kernels.api.quantized_weight import QuantizedWeight
from ...kernels.api.ranges import parse_bytes
from ...kernels.torch.backend import TorchBackend
from ...moe.placement import ExpertLoad, read_placement, write_load
from ..checkpoint.quantized_checkpoint import QuantizedCheckpoint
from ..checkpoint.stored_weight import Index, Part, Runs
from ..checkpoint.weights import Checkpoint, CheckpointError, StoredCodes
from ..model.layer_weights import LayerWeights
from ..model.layout import EMBEDDING, FFNLayout, LayerLayout, Layout
from ..model.moe_spec import MoESpec
from ..model.parts import part_of, width
from ..model.quantization import Method
from ..model.spec import ModelSpec
from .config import ParallelConfig
from .context import ParallelContext
from .stages import SIZES, layer_sizes, split_into_stages, stand_in

logger = logging.getLogger(__name__)

Cut = Callable[[torch.Tensor], torch.Tensor]


class ShardedCheckpoint:
    """Hands out this rank's part of every tensor that is split.

    Arguments:
        whole: the checkpoint; of a quantised one nothing but parts comes any more.
        cuts: by name, of tensors that are split; those of quantised ones are :class:`Part` or :class:`Runs`.

    Attributes:
        split_bytes, whole_bytes: read so far of tensors that are split, and of those that every rank keeps.
        replicated: names of the latter, and their bytes.
    """

    def __init__(self, whole: Checkpoint, cuts: Mapping[str, Cut]) -> None:
        self.whole = whole
        self._cuts = cuts
        self.split_bytes = self.whole_bytes = 0
        self._split: dict[object, int] = {}
        self.replicated: dict[str, int] = {}
        if isinstance(whole, QuantizedCheckpoint):
            parts = {name: cut for name, cut in cuts.items() if isinstance(cut, Part | Runs)}
            whole.restrict(parts, self._read)

    def describe(self) -> str:
        """What was read: of tensors that are split, and of those that are not, largest first."""
        kinds: Counter[str] = Counter()
        for name, count in self.replicated.items():
            kinds[re.sub(r"\.\d+\.", ".N.", name)] += count
        kept = ", ".join(f"{kind} {count / 2**20:.2f}" for kind, count in kinds.most_common())
        whole = f"{self.whole_bytes / 2**20:.2f} MiB of whole ones" + (f": {kept}" if kept else "")
        return f"{self.split_bytes / 2**20:.2f} MiB of tensors that are split, and {whole}"

    def view(self, name: str) -> torch.Tensor:
        """See :meth:`Checkpoint.view`; pages of other ranks' parts are not touched."""
        whole = self.whole.view(name)
        if isinstance(self.whole, QuantizedCheckpoint) and self.whole.keeps_codes(name):
            return whole  # it is a part already
        return self._counted(name, whole, self._cuts[name](whole) if name in self._cuts else whole)

    def quantized(self, name: str) -> StoredCodes | None:
        """See :meth:`Checkpoint.quantized`; codes, scales and zero points of this rank's part."""
        return self.whole.quantized(name)

    def release(self) -> None:
        """See :meth:`Checkpoint.release`."""
        self.whole.release()

    def _read(self, name: str, index: Index) -> torch.Tensor:
        """One of the tensors of a quantised weight."""
        whole = self.whole.raw(name)
        return self._counted(name, whole, whole[index], repr(index))

    def _counted(self, name: str, whole: torch.Tensor, part: torch.Tensor, place: str = "") -> torch.Tensor:
        if part.nbytes == whole.nbytes:
            self.replicated[name] = whole.nbytes
            self.whole_bytes = sum(self.replicated.values())
        else:
            self.split_bytes += part.nbytes - self._split.get((name, place), 0)  # looking twice is reading once
            self._split[name, place] = part.nbytes
        return part


class Shard:
    """What one rank holds of a model.

    Arguments:
        spec: the whole model.
        context: the ranks.
        exit_layers: after how many layers rows may exit.

    Attributes:
        stages: of the model; held: layers of this rank's stage.
        read_bytes: of the checkpoint, by rank; empty until :meth:`all_layers`.
        whole: the model; spec: the same with this rank's heads only.
        vocabulary: tokens whose embeddings and outputs this rank keeps, on the first stage.
        placement: by layer with a mixture, the experts of each rank of the expert axis.
        cuts: by the names of tensors that are split.
        input_cuts: of tensors whose inputs the tensor axis splits: where each part begins.

    Raises:
        ValueError: for a model that cannot be split like this.
    """

    def __init__(self, spec: ModelSpec, context: ParallelContext, exit_layers: Collection[int] = ()) -> None:
        tensor, rank = context.config.tensor, context.tensor_rank
        self.context = context
        self.whole = spec
        self.spec = replace(
            spec, layers=tuple(replace(layer, attention=layer.attention.part(tensor, rank)) for layer in spec.layers)
        )
        self.stages = split_into_stages(spec, context.config.pipeline, exit_layers)
        self.held = self.stages.layers[context.stage]
        self.vocabulary = part_of(spec.vocab_size, tensor, rank)
        self.placement = self._place(context.config)
        self.cuts: dict[str, Cut] = {}
        self.input_cuts: dict[str, list[int]] = {}
        self.read_bytes: tuple[int, ...] = ()

    @property
    def placed(self) -> str:
        """What a deployment says about the placement: sums run in another order with another one."""
        if self.context.config.placement is None or self.context.config.rebalance_steps:
            return ""
        return f", experts placed as {hashlib.sha256(repr(self.placement).encode()).hexdigest()[:12]}"

    def _place(self, config: ParallelConfig) -> dict[int, list[list[int]]]:
        if config.placement is not None:
            return read_placement(Path(config.placement).expanduser(), self.whole.experts_by_layer, config.expert)
        placement = {}
        for number, layer in enumerate(self.whole.layers):
            if layer.moe:
                parts = (_split("experts", layer.moe.num_experts, config.expert, part) for part in range(config.expert))
                placement[number] = [list(range(part.start, part.stop)) for part in parts]
        return placement

    def layout(self, layout: Layout) -> Layout:
        """See :meth:`.Placement.layout`; fills :attr:`cuts`."""
        for name in (EMBEDDING, layout.lm_head, layout.lm_head_bias):
            if name:
                self.cuts[name] = Part(outputs=self.vocabulary)
        return replace(layout, layers=tuple(self._layer(layer, n) for n, layer in enumerate(layout.layers)))

    def check_quantization(self, name: str, method: Method) -> None:
        """See :meth:`.Placement.check_quantization`: no scale of weights or inputs may belong to several ranks."""
        if method.block_out > 1 and self.input_cuts:
            raise ValueError(
                f"quantization={name} has scales for blocks of outputs, which {self.context.config} splits"
            )
        group = max(method.group or 1, method.scheme.group or 1)  # powers of two
        for tensor, starts in self.input_cuts.items():
            if wrong := [start for start in starts if start % group]:
                raise ValueError(
                    f"quantization={name} has scales for {group} inputs each; {self.context.config} splits {tensor!r} "
                    f"at input {wrong[0]}"
                )

    def checkpoint(self, whole: Checkpoint) -> ShardedCheckpoint:
        """This rank's part of a checkpoint.

        Raises:
            CheckpointError: where a scale of quantised weights would belong to several ranks; on all of them.
        """
        if isinstance(whole, QuantizedCheckpoint):
            for name, starts in self.input_cuts.items():
                step = whole.input_step(name) if whole.keeps_codes(name) else 1
                if wrong := [start for start in starts if start % step]:
                    raise CheckpointError(
                        f"the quantised weight {name!r} has scales for groups of its inputs; {self.context.config} "
                        f"splits it at input {wrong[0]}, which is no multiple of {step}"
                    )
        return ShardedCheckpoint(whole, self.cuts)

    def quantize(self, name: str, weight: torch.Tensor, method: Method) -> QuantizedWeight:
        """See :meth:`.Placement.quantize`."""
        if method.group is not None or name not in self.input_cuts:
            return method.quantize(weight)
        low, high = weight.aminmax(dim=-1, keepdim=True)  # abs() would copy the weight
        dist.all_reduce(wide := torch.maximum(high, -low).float(), dist.ReduceOp.MAX, group=self.context.tensor_group)
        # One input more, as large as any of the whole row, sets the scale.
        whole = method.quantize(torch.cat((weight, wide.to(weight.dtype)), -1))
        return whole.columns(0, weight.shape[-1])

    @property
    def mixtures(self) -> dict[int, MoESpec]:
        """Layers whose experts are spread, by number; where a router decides nothing, every KV shard has them all."""
        layers = enumerate(self.whole.layers)
        return {number: layer.moe for number, layer in layers if layer.moe is not None and not layer.moe.is_dense}

    def kept(self, number: int, layer: LayerWeights, backend: TorchBackend) -> LayerWeights:
        """See :meth:`.Placement.kept`: where experts move, with room for an equal share of them and for copies.

        Raises:
            ValueError: for experts that cannot move.
        """
        config, mixtures = self.context.config, self.mixtures
        if not config.rebalance_steps or number not in mixtures:
            return layer
        experts, memory = mixtures[number].num_experts, parse_bytes(config.copies_memory, "parallel.copies_memory")
        of_layer = memory // len(mixtures.keys() & set(self.held))
        room = -(-experts // config.expert) + of_layer // (layer.ffn.nbytes // layer.ffn.num_experts)
        try:
            return replace(layer, ffn=backend.with_room(layer.ffn, min(room, experts)))
        except ValueError as error:
            raise ValueError(f"parallel.rebalance_steps: layer {number} of this model: {error}") from error

    def all_layers(self, layers: Sequence[LayerWeights], source: ShardedCheckpoint) -> list[LayerWeights]:
        """This rank's layers, and what the ranks of the same place in other stages tell of theirs."""
        logger.info("rank %d has read %s", self.context.world_rank, source.describe())
        told = torch.zeros(1 + self.spec.num_layers * SIZES, dtype=torch.int64)
        told[0] = source.split_bytes + source.whole_bytes
        sizes_LX = told[1:].view(-1, SIZES)
        for number, weights in zip(self.held, layers, strict=True):
            sizes_LX[number] = torch.tensor(layer_sizes(weights))
        found = self.context.gather(told)
        self.read_bytes = tuple(int(numbers[0]) for numbers in found)
        peers = found[self.context.rank :: self.context.config.stage_size]
        sizes = torch.stack([numbers[1:] for numbers in peers]).sum(0).view(-1, SIZES).tolist()
        held = dict(zip(self.held, layers, strict=True))
        return [held.get(number) or stand_in(self.spec, numbers) for number, numbers in enumerate(sizes)]

    def _layer(self, layout: LayerLayout, number: int) -> LayerLayout:
        tensor, rank = self.context.config.tensor, self.context.tensor_rank
        cuts = self.whole.layers[number].attention.cuts(layout.attention, tensor, rank)
        for name, rows in cuts.outputs.items():
            if callable(rows):
                self.cuts[name] = rows
                continue
            runs = [Part(outputs=run) for run in (rows if isinstance(rows, tuple) else (rows,))]
            self.cuts[name] = runs[0] if len(runs) == 1 else Runs(tuple(runs))
        self.cuts |= {name: Part(inputs=parts[rank]) for name, parts in cuts.inputs.items()}
        for name, parts in cuts.inputs.items():
            self._cut_inputs([name], [part.start for part in parts])
        linears = layout.attention.linears.values()
        added_up = [linear for linear in linears if not cuts.inputs.keys().isdisjoint(linear.weights)]
        for linear in (*added_up, *layout.latents[1:]):  # what experts give is made of parts of it
            self.cuts |= dict.fromkeys(linear.biases if rank else (), torch.zeros_like)
        spread = number in self.mixtures
        experts = self.placement[number][self.context.expert_rank] if spread else list(range(layout.ffn.num_experts))
        ffn = self._ffn(layout.ffn, experts)
        return replace(layout, ffn=ffn, shared=self._ffn(layout.shared, [0]) if layout.shared else None)

    def _cut_inputs(self, names: Sequence[str], starts: list[int]) -> None:
        if len(starts) > 1:
            self.input_cuts |= dict.fromkeys(names, starts)

    def _ffn(self, layout: FFNLayout, experts: list[int]) -> FFNLayout:
        """Some experts, a dense FFN or a shared expert: the tensor axis splits their neurons."""
        if not layout.num_experts:
            return layout
        count, size, parts = layout.num_experts, layout.expert_size, self.context.config.tensor
        neurons = _split("neurons", size, parts, self.context.tensor_rank)
        self._cut_inputs(layout.down, [part_of(size, parts, part).start for part in range(parts)])
        in_order = experts == list(range(experts[0], experts[-1] + 1))
        run = slice(experts[0], experts[-1] + 1) if in_order else experts  # a view of the file where it can be one
        part = replace(layout, num_experts=len(experts), expert_size=width(neurons))
        if layout.biases:
            part = replace(part, biases=tuple(_of(names, experts) for names in layout.biases))
            for name in (*part.biases[0], *part.biases[1]):
                self.cuts[name] = Part(outputs=neurons)
            if self.context.tensor_rank:
                self.cuts |= dict.fromkeys(part.biases[2], torch.zeros_like)
        if layout.gate_up:
            self.cuts[layout.gate_up] = partial(_fused, layout=layout, experts=run, neurons=neurons)
            self.cuts[layout.down[0]] = lambda down: layout.fused(layout.fused(down)[run, :, neurons])
            return part
        if len(layout.down) == count:
            gate, up, down = (_of(names, experts) for names in (layout.gate, layout.up, layout.down))
            part = replace(part, gate=gate, up=up, down=down)
            for name in (*part.gate, *part.up):
                self.cuts[name] = Part(outputs=neurons)
            for name in part.down:
                self.cuts[name] = Part(inputs=neurons)
            return part
        for name in (*layout.gate, *layout.up):
            self.cuts[name] = lambda x_XD: x_XD.unflatten(0, (count, size))[run, neurons].flatten(0, 1)
        self.cuts[layout.down[0]] = lambda x_DX: x_DX.unflatten(1, (count, size))[:, run, neurons].flatten(1)
        return part


def record_load(context: ParallelContext, load: ExpertLoad, spec: ModelSpec) -> None:
    """Bring the counts of KV shards and stages together, if they are wanted; the last thing that all ranks do."""
    if context.config.record_load is None:
        return
    counts = context.gather(load.rows_NE.cpu())
    if context.leads:
        rows_NE = torch.stack(counts[:: context.config.tensor]).sum(0)
        write_load(rows_NE, spec.experts_by_layer, spec.family, Path(context.config.record_load).expanduser())


def _split(what: str, total: int, parts: int, part: int) -> slice:
    if total < parts:
        raise ValueError(f"{total} {what} cannot be spread over {parts} processes")
    return part_of(total, parts, part)


def _of(names: tuple[str, ...], experts: list[int]) -> tuple[str, ...]:
    """The names of some experts' tensors, where experts have such."""
    return tuple(names[expert] for expert in experts) if names else ()


def _fused(tensor: torch.Tensor, layout: FFNLayout, experts: slice | list[int], neurons: slice) -> torch.Tensor:
    """Gate and up of some experts' neurons from the fused tensor."""
    x_EXD, size = layout.fused(tensor), layout.expert_size
    ups = slice(size + neurons.start, size + neurons.stop)
    return layout.fused(torch.cat((x_EXD[experts, neurons], x_EXD[experts, ups]), 1))
