"""Equal beginnings share pages: a chain of digests names the content of every full block."""

from __future__ import annotations

from array import array
from hashlib import blake2b

from .block_pool import BlockPool
from .request import Sequence

DIGEST_BYTES = 16


class PrefixCache:
    """Finds and publishes the full blocks of sequences.

    The digest of a block covers its tokens, all blocks before it and the request's ``cache_salt``: requests with
    different salts never share, and so cannot learn about each other from their timing.

    Arguments:
        pool: where the pages live.
        page_size: tokens per block.
        enabled: when off, nothing is found or published.
    """

    def __init__(self, pool: BlockPool, page_size: int, enabled: bool) -> None:
        self.pool = pool
        self.page_size = page_size
        self.enabled = enabled

    def lookup(self, sequence: Sequence, kv_shard: int = 0) -> list[int]:
        """Pages of a KV shard that hold the beginning of a sequence's tokens. At least one token is left to compute.

        They are exact, so a sequence that was approximate before it lost its pages takes none beyond that point.
        """
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

    def publish(self, sequence: Sequence, first_block: int) -> None:
        """Let the computed full blocks of a sequence be found, from ``first_block`` on, as far as they are exact."""
        blocks = min(sequence.num_computed, sequence.first_approximate) // self.page_size
        if not self.enabled or blocks <= first_block:
            return
        self._extend_digests(sequence, blocks)
        for block in range(first_block, blocks):
            self.pool.publish(sequence.pages[block], sequence.block_digests[block])

    def _extend_digests(self, sequence: Sequence, blocks: int) -> None:
        digests, size = sequence.block_digests, self.page_size
        for block in range(len(digests), blocks):
            parent = digests[-1] if digests else _root(sequence.request.cache_salt)
            tokens = array("q", sequence.token_ids[block * size : (block + 1) * size])
            digests.append(blake2b(tokens.tobytes(), key=parent, digest_size=DIGEST_BYTES).digest())


def _root(salt: str | None) -> bytes:
    return blake2b(b"" if salt is None else b"\0" + salt.encode(), digest_size=DIGEST_BYTES).digest()
