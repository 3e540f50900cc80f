"""Experts in a bounded memory: those that steps use most often stay, the others are read when they are needed.

A slot holds one expert, of any layer, at an address that stays. Before a layer's experts run they are brought in; what
the next layer is expected to use is read meanwhile. An expert in use in this step, or being read, keeps its slot; else
the one goes that the fewest of the last steps have used.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch

from ..checkpoint.expert_file import PAGE, ExpertFile, ExpertReadError
from .counters import ExpertTraffic

READERS = 4  # threads: a disk is fast only with several requests at once
_KEPT = 1 - 1 / 64  # of the load, from one use of a layer to the next: a window of 64 steps
Numbers = np.ndarray[Any, np.dtype[np.int64]]
Guess = Callable[[], Numbers | None]


def page_aligned(count: int) -> torch.Tensor:
    """So many bytes of memory, whole pages, as words of 32 bits; reading past the system's cache needs them."""
    words: torch.Tensor = torch.ops.dynamoe_cpu.allocate((count + PAGE) // 4)
    first = -words.data_ptr() % PAGE // 4
    return words[first : first + count // 4]


class ExpertPool:
    """The experts of a model that are in memory. One thread may use it.

    Arguments:
        file: has all of them.
        memory: bytes for slots.

    Raises:
        ValueError: the memory does not hold the experts of one layer, which a step may use all at once.
    """

    def __init__(self, file: ExpertFile, memory: int) -> None:
        self.file = file
        layers = file.layers.values()
        self.slot_bytes = max(records.stride for records in layers)
        most, total = max(records.num_experts for records in layers), sum(records.num_experts for records in layers)
        if memory < most * self.slot_bytes:
            raise ValueError(
                f"expert_memory must hold the {most} experts of a layer, {most * self.slot_bytes} bytes, not {memory}"
            )
        self.num_experts, self.num_slots = total, min(memory // self.slot_bytes, total)
        self.absent_bytes = (total - self.num_slots) * self.slot_bytes
        self.words = page_aligned(self.num_slots * self.slot_bytes)
        self._bytes = self.words.numpy().view(np.uint8).reshape(self.num_slots, self.slot_bytes)
        shape = max(file.layers) + 1, most
        self._load = np.zeros(shape)  # of the last steps, how many have used each expert
        self._slot_of: Numbers = np.full(shape, -1)
        self._key_of: Numbers = np.full(self.num_slots, -1)  # where each slot's expert is in these
        self._early = np.zeros(self.num_slots, bool)  # read ahead, and not used since
        self._reading: dict[int, Future[None]] = {}  # by slot
        self._places = {number: torch.full((2, most), -1) for number in file.layers}
        self._expected: tuple[int, frozenset[int]] = -1, frozenset()
        self._readers = ThreadPoolExecutor(READERS, "expert-reader")
        self._counts = dict.fromkeys(ExpertTraffic.__dataclass_fields__, 0)

    def traffic(self) -> ExpertTraffic:
        """What was counted so far."""
        return ExpertTraffic(**self._counts)

    def bring(self, layer: int, used: Numbers, following: int = -1, guess: Guess | None = None) -> torch.Tensor:
        """Have experts of a layer in memory until the next call.

        Arguments:
            used: their numbers, rising, each once.
            following, guess: a layer that will run soon, and what says, while experts are read, which it will
                probably use, each once.

        Returns: where their parts begin in :attr:`words`, in bytes: (2, experts), int64; -1: not there.

        Raises:
            ExpertReadError: one of them cannot be read. The pool can still be used.
        """
        self._settle()
        self._count(layer, used)
        self._cancel_others(layer, used)
        while True:
            slots = self._slot_of[layer, used]
            missing = used[slots < 0]
            pinned = np.zeros(self.num_slots, bool)
            pinned[slots[slots >= 0]] = True
            if self._start(layer, missing, pinned) == len(missing):
                break
            wait(self._reading.values(), return_when="FIRST_COMPLETED")  # reads of what will not be used hold slots
            self._settle()
        if guess is not None and (expected := guess()) is not None:
            self._expected = following, frozenset(expected.tolist())
            self._read_ahead(following, expected, pinned)
        self._wait(self._slot_of[layer, used])
        places, records = self._places[layer], self.file.layers[layer]
        places.fill_(-1)
        first = self._slot_of[layer, used] * self.slot_bytes
        places[:, torch.from_numpy(used)] = torch.from_numpy(np.stack((first, first + records.second)))
        return places[:, : records.num_experts].contiguous()

    def _count(self, layer: int, used: Numbers) -> None:
        slots = self._slot_of[layer, used]
        there = slots[slots >= 0]
        early = int(self._early[there].sum())
        self._early[there] = False
        counts = self._counts
        counts["uses"] += len(used)
        counts["hits"] += len(there) - early
        counts["early"] += early
        if self._expected[0] == layer:
            counts["foreseen"] += sum(expert in self._expected[1] for expert in used.tolist())
            counts["foreseeable"] += len(used)
        self._load[layer] *= _KEPT
        self._load[layer, used] += 1

    def _start(self, layer: int, experts: Numbers, pinned: np.ndarray, early: bool = False) -> int:
        """Start to read as many experts as there are slots for that may be taken; pins them. Returns how many."""
        load = np.where(self._key_of < 0, -1.0, self._load.flat[self._key_of])
        load[pinned] = np.inf
        load[list(self._reading)] = np.inf
        count = min(len(experts), int(np.isfinite(load).sum()))
        slots = np.argpartition(load, count - 1)[:count] if count else np.empty(0, np.int64)
        for slot, expert in zip(slots.tolist(), experts.tolist(), strict=False):
            self._free(slot)
            self._slot_of[layer, expert], self._key_of[slot] = slot, layer * self._load.shape[1] + expert
            self._early[slot] = early
            record = self._bytes[slot, : self.file.layers[layer].stride]
            self._reading[slot] = self._readers.submit(self.file.read, layer, expert, record)
            self._counts["reads"] += 1
            self._counts["read_bytes"] += len(record)
        pinned[slots] = True
        return count

    def _read_ahead(self, layer: int, experts: Numbers, pinned: np.ndarray) -> None:
        slots = self._slot_of[layer, experts]
        pinned[slots[slots >= 0]] = True
        self._start(layer, experts[slots < 0], pinned, early=True)

    def _free(self, slot: int) -> None:
        if (key := int(self._key_of[slot])) >= 0:
            self._slot_of.flat[key] = self._key_of[slot] = -1
            self._early[slot] = False

    def _settle(self) -> None:
        """Take note of what was read. What failed is read again when it is needed, and fails there."""
        for slot, future in list(self._reading.items()):
            if future.done():
                del self._reading[slot]
                if future.cancelled() or future.exception() is not None:
                    self._free(slot)

    def _cancel_others(self, layer: int, used: Numbers) -> None:
        """Do not begin to read what was expected of a layer and is not used."""
        first, wanted = layer * self._load.shape[1], set(self._slot_of[layer, used].tolist())
        for slot, future in list(self._reading.items()):
            of_layer = 0 <= self._key_of[slot] - first < self._load.shape[1]
            if of_layer and slot not in wanted and future.cancel():
                self._counts["reads"] -= 1
                self._counts["read_bytes"] -= self.file.layers[layer].stride
        self._settle()

    def _wait(self, slots: Numbers) -> None:
        failed: ExpertReadError | None = None
        for slot in slots.tolist():
            if (future := self._reading.pop(slot, None)) is not None:
                try:
                    future.result()
                except ExpertReadError as error:
                    self._free(slot)
                    failed = error
        if failed is not None:
            raise failed

    def close(self) -> None:
        """End the readers and close the file."""
        self._readers.shutdown(cancel_futures=True)
        self.file.close()
