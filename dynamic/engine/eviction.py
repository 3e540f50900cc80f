"""Gives up pages of running sequences where a cache policy says so.

A policy is asked when a prompt is complete, and from then on whenever a page of output is full. So prompts run in full,
and which tokens a row sees depends on its own sequence only. A sequence that was preempted is computed again in chunks
that end where the policy was asked, so that its rows see what they saw before.
"""

from __future__ import annotations

from array import array

from ..model.spec import ModelSpec
from .block_pool import BlockPool
from .config import EngineConfig
from .plugins import Plugin, load_plugins
from .protocols import CachePolicy
from .request import Sequence


class Eviction:
    """Asks the policy of one group of layers, whose pages these are.

    Attributes:
        evicted_pages: given up so far.
    """

    def __init__(self, policy: CachePolicy, pool: BlockPool, page_size: int) -> None:
        self._policy, self._pool, self._page_size = policy, pool, page_size
        self.evicted_pages = 0

    def chunk(self, sequence: Sequence) -> int:
        """How many tokens a sequence may compute before the policy is asked again."""
        computed, prompt = sequence.num_computed, sequence.num_prompt
        ahead = prompt - computed if computed < prompt else self._page_size - computed % self._page_size
        return min(ahead, sequence.num_uncomputed)

    def computed(self, sequence: Sequence) -> None:
        """A sequence's tokens up to ``num_computed`` are in its pages.

        It fails when the policy raises an error or names blocks that it does not hold.
        """
        size, kept = self._page_size, sequence.kept_blocks
        kept.extend(range(len(kept) + sequence.num_evicted // size, sequence.num_computed // size))
        behind_prompt = sequence.num_computed - sequence.num_prompt
        if behind_prompt < 0 or (behind_prompt and sequence.num_computed % size):
            return
        try:
            evicted = set(self._policy.evict(kept, sequence.num_computed))
            if unknown := evicted.difference(kept):
                raise ValueError(f"it evicts blocks {sorted(unknown)}; the sequence holds {kept}")
        except Exception as error:  # whatever the code raises
            sequence.fail(self._policy, error)
            return
        if not evicted:
            return
        self._pool.release(page for page, block in zip(sequence.pages, kept, strict=False) if block in evicted)
        own = [page for page, block in zip(sequence.pages, kept, strict=False) if block not in evicted]
        sequence.pages = array("i", own) + sequence.pages[len(kept) :]
        sequence.kept_blocks = [block for block in kept if block not in evicted]
        sequence.num_evicted += len(evicted) * size
        sequence.mark_approximate(sequence.num_computed)  # what comes now attends to less than the full model does
        self.evicted_pages += len(evicted)


def load_cache_policy(
    config: EngineConfig, spec: ModelSpec, pool: BlockPool
) -> tuple[tuple[Plugin, ...], Eviction | None]:
    """The plug-in that a configuration names, if any, and what gives up pages for it.

    All layers are one group, because they share the pages of a sequence.

    Raises:
        ValueError: for a plug-in that cannot be loaded, or a model with sliding windows or recurrent states.
    """
    if config.cache_policy is None:
        return (), None
    if any(layer.window is not None for layer in spec.layers):
        raise ValueError(
            f"engine.cache_policy={config.cache_policy} needs layers that see all positions; this {spec.family} model"
            " has a sliding window, which is counted in positions"
        )
    if spec.has_states:
        raise ValueError(
            f"engine.cache_policy={config.cache_policy} needs layers that keep all keys and values; this {spec.family}"
            " model has recurrent states, from which no position can be taken"
        )
    (plugin,) = load_plugins([config.cache_policy], CachePolicy)
    policy = plugin.implementation(range(spec.num_layers), config.block_size)
    return (plugin,), Eviction(policy, pool, config.block_size)
