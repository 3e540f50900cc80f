"""Numbers about an engine, for metrics and logs."""

from __future__ import annotations

from dataclasses import dataclass

from ..model.counters import Compute, Exchange, TokenCost


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """A snapshot. Counters count from the engine's start.

    Arguments:
        num_running, num_waiting: sequences.
        free_pages, total_pages: of the cache; free ones may still hold findable prefixes.
        kv_usage: share of the pages that sequences hold, 0 to 1.
        prefix_cache_queries, prefix_cache_hits: tokens looked up and found.
        prompt_tokens: prompt tokens of the requests whose prompt has been run.
        generation_tokens: tokens sampled.
        preemptions: sequences that lost their pages and were computed again.
        segment_layers, segment_rows: layers of each segment between exits, and rows that were launched through it.
        segment_experts: experts that a row uses in each segment without a budget.
        projected_rows: rows times layers whose keys and values were made of the state at an exit.
        skipped_experts: rows times experts that budgets left out of layers that ran.
        tokens: what chose the tokens sampled.
        exchange: between the processes that share the model; None where there is one.
        evicted_pages: that a cache policy gave up.
    """

    num_running: int
    num_waiting: int
    free_pages: int
    total_pages: int
    kv_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    prompt_tokens: int
    generation_tokens: int
    preemptions: int
    segment_layers: tuple[int, ...]
    segment_rows: tuple[int, ...]
    segment_experts: tuple[int, ...]
    projected_rows: int
    skipped_experts: int
    tokens: TokenCost
    exchange: Exchange | None = None
    evicted_pages: int = 0

    @property
    def compute(self) -> Compute:
        """What was executed since the engine's start, for all requests together."""
        return Compute(
            segment_layers=self.segment_layers,
            segment_rows=self.segment_rows,
            segment_experts=self.segment_experts,
            projected_rows=self.projected_rows,
            skipped_experts=self.skipped_experts,
            tokens=self.tokens,
        )
