"""A checkpoint of which a rank reads its own part only, counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping

import torch

from ..checkpoint.quantized_checkpoint import QuantizedCheckpoint
from ..checkpoint.stored_weight import Index, Part
from ..checkpoint.weights import Checkpoint, StoredWeights

Cut = Callable[[torch.Tensor], torch.Tensor]


class ShardedCheckpoint:
    """Hands out this rank's part of every tensor that is split.

    Arguments:
        whole: the checkpoint; of a quantised one nothing but parts comes any more.
        cuts: by name, of tensors that are split; those of quantised ones are :class:`Part`.

    Attributes:
        split_bytes, whole_bytes: read so far of tensors that are split, and of those that every rank keeps.
        replicated: names of the latter, and their bytes.
    """

    def __init__(self, whole: Checkpoint, cuts: Mapping[str, Cut]) -> None:
        self.whole = whole
        self._cuts = cuts
        self.split_bytes = self.whole_bytes = 0
        self._split: dict[str, int] = {}
        self.replicated: dict[str, int] = {}
        if isinstance(whole, QuantizedCheckpoint):
            parts = {name: cut for name, cut in cuts.items() if isinstance(cut, Part)}
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

    def quantized(self, *names: str) -> StoredWeights | None:
        """See :meth:`Checkpoint.quantized`; codes, scales and zero points of this rank's part."""
        return self.whole.quantized(*names)

    def release(self) -> None:
        """See :meth:`Checkpoint.release`."""
        self.whole.release()

    def _read(self, name: str, index: Index) -> torch.Tensor:
        """One of the tensors of a quantised weight."""
        whole = self.whole.raw(name)
        return self._counted(name, whole, whole[index])

    def _counted(self, name: str, whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
        if part.nbytes == whole.nbytes:
            self.replicated[name] = whole.nbytes
            self.whole_bytes = sum(self.replicated.values())
        else:
            self.split_bytes += part.nbytes - self._split.get(name, 0)  # looking twice is reading once
            self._split[name] = part.nbytes
        return part
