"""Equal beginnings share pages: a chain of digests names the content of every full block."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Group
from hashlib import blake2b

from .block_pool import BlockPool
from .request import Sequence
from .schedule import Entry
from .state_slots import NO_SLOT
from .state_snapshots import StateSnapshots
from .window_pages import WindowPages

DIGEST_BYTES = 16


class PrefixCache:
    """Finds and publishes the full blocks of sequences.

    The digest of a block covers its tokens, all blocks before it and the request's ``cache_salt``: requests with
    different salts never share, and so cannot learn about each other from their timing.

    Arguments:
        pool: where the pages live.
        page_size: tokens per block.
        enabled: when off, nothing is found or published.
        snapshots: of recurrent states, for models that have them: only pages with states behind them can be shared.
        windows: of layers that see less than others: only pages can be shared behind which all is there that these see.
    """

    def __init__(
        self,
        pool: BlockPool,
        page_size: int,
        enabled: bool,
        snapshots: StateSnapshots | None = None,
        windows: Group[WindowPages] = (),
    ) -> None:
        self.pool = pool
        self.page_size = page_size
        self.enabled = enabled
        self._snapshots = snapshots
        self.windows = windows

    def lookup(self, sequence: Sequence, kv_shard: int = 0) -> tuple[list[int], int]:
        """Pages of a KV shard that hold the beginning of a sequence's tokens. At least one token is left to compute.

        With recurrent states, only pages up to the last one with states behind it can be shared; the second value is
        how many there are. Likewise with windows: up to the last one behind which none of what they see is lost.

        They are exact, so a sequence that was approximate before it lost its pages takes none beyond that point.
        """
        pages = self._found(sequence, kv_shard)
        blocks = before = len(pages)
        while blocks:
            for window in self.windows:
                blocks = window.usable(pages, blocks)
            if blocks and self._snapshots is not None:
                kept = self._snapshots.find(kv_shard, sequence.block_digests[blocks - 1])
                blocks -= kept is None
            if blocks == before:
                break
            before = blocks
        return pages[:blocks], len(pages)

    def _found(self, sequence: Sequence, kv_shard: int) -> list[int]:
        """The pages of :meth:`lookup`, whether there are states behind them or not."""
        request = sequence.request
        if not self.enabled or not request.prompt_logprobs_complete:
            return []  # logprobs of the prompt need every position to run
        blocks = min(sequence.num_tokens - 1, sequence.first_approximate) // self.page_size
        self._extend_digests(sequence, blocks)
        pages = []
        for digest in sequence.block_digests[:blocks]:
            page = self.pool.find(digest, kv_shard)
            if page is None:
                break
            pages.append(page)
        return pages

    def states_behind(self, sequence: Sequence, blocks: int) -> int:
        """The slot of the states behind so many blocks that :meth:`lookup` found in the sequence's KV shard."""
        assert self._snapshots is not None
        slot = self._snapshots.find(sequence.kv_shard, sequence.block_digests[blocks - 1]) if blocks else NO_SLOT
        assert slot is not None, f"there are no states behind {blocks} blocks"
        return slot

    def keep_states(self, entry: Entry) -> None:
        """Say where states of a model that has them are kept while an entry runs.

        That is behind the last full block of the prompt of which a token is left to compute; where other sequences'
        pages ended that begin like this one; every so many pages of the prompt; and behind the last full block of
        output, in place of the one before it.
        """
        sequence, size, end = entry.sequence, self.page_size, entry.start + entry.count
        blocks = range(entry.start // size + 1, end // size + 1)
        if not blocks or not self.enabled or self._snapshots is None:
            return
        prompt, stride = sequence.num_prompt, self._snapshots.stride
        borders = {(prompt - 1) // size * size, sequence.num_shared}
        kept = []
        for block in blocks:
            at = block * size
            in_prompt = at in borders or (at <= prompt and at % stride == 0)
            if not (in_prompt or (at > prompt and block == blocks[-1])) or at > sequence.first_approximate:
                continue
            self._extend_digests(sequence, block)
            if self._snapshots.find(sequence.kv_shard, sequence.block_digests[block - 1]) is None:
                slot = self._snapshots.take()
                if slot is not None:
                    kept.append((at, slot))
        entry.kept = tuple(kept)

    def publish_states(self, entry: Entry) -> None:
        """Let the states that a computed entry has kept be found, as far as they are exact."""
        sequence = entry.sequence
        for at, slot in entry.kept:
            assert self._snapshots is not None
            if at > sequence.first_approximate:
                self._snapshots.release(slot)
                continue
            digest = sequence.block_digests[at // self.page_size - 1]
            self._snapshots.publish(slot, sequence.kv_shard, digest)
            if at > sequence.num_prompt:
                if sequence.output_digest is not None:
                    self._snapshots.forget(sequence.kv_shard, sequence.output_digest)
                sequence.output_digest = digest

    def publish(self, sequence: Sequence, first_block: int) -> None:
        """Let the computed full blocks of a sequence be found, from ``first_block`` on, as far as they are exact."""
        blocks = min(sequence.num_computed, sequence.first_approximate) // self.page_size
        if not self.enabled or blocks <= first_block:
            return
        self._extend_digests(sequence, blocks)
        for block in range(first_block, blocks):
            page, digest = sequence.pages[block], sequence.block_digests[block]
            known = self.pool.find(digest, sequence.kv_shard)
            # The name goes to a page that has all of its content.
            if known is not None and known != page and not all(window.holds(known) for window in self.windows):
                self.pool.forget(known)
            self.pool.publish(page, digest)

    def _extend_digests(self, sequence: Sequence, blocks: int) -> None:
        digests, size = sequence.block_digests, self.page_size
        for block in range(len(digests), blocks):
            parent = digests[-1] if digests else _root(sequence.request.cache_salt)
            tokens = array("q", sequence.token_ids[block * size : (block + 1) * size])
            digests.append(blake2b(tokens.tobytes(), key=parent, digest_size=DIGEST_BYTES).digest())


def _root(salt: str | None) -> bytes:
    return blake2b(b"" if salt is None else b"\0" + salt.encode(), digest_size=DIGEST_BYTES).digest()
