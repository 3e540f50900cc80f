"""Requests, and the sequences (one per completion) that the scheduler moves through the engine."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from .sampling_params import SamplingParams
from .token_costs import TokenTally
from .token_counts import TokenCounts

if TYPE_CHECKING:
    from .outputs import PositionLogprobs
    from .quality import ContractOutcome
    from .request_budget import RequestBudget
    from .text import OutputText

_MASK_64 = (1 << 64) - 1


NEVER = 1 << 62


class State(Enum):
    """Where a sequence is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class StopTokens:
    """Tokens that end an output, as one request sees them."""

    eos: frozenset[int]
    listed: frozenset[int]

    @property
    def all(self) -> frozenset[int]:
        return self.eos | self.listed


class Request:
    """One prompt and what was asked about it.

    Arguments:
        arrival: running number; earlier requests go first among equals.
        max_total_tokens: prompt and output together never get longer.
        base_seed: seeds the draws when the request brings no seed of its own.
        exit_logits_E: per exit of the model, the probe's logit from which on its output leaves there (float32, inf:
            never); None for a request whose tokens run all layers.
        expert_budget: how many experts its output may use; None for one that uses all.
        contract: what became of the risk that its caller accepts.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int,
        cache_salt: str | None,
        arrival: int,
        max_total_tokens: int,
        stop_tokens: StopTokens,
        base_seed: int,
        exit_logits_E: np.ndarray | None = None,
        contract: ContractOutcome | None = None,
        expert_budget: RequestBudget | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.priority = priority
        self.cache_salt = cache_salt
        self.arrival = arrival
        self.stop_tokens = stop_tokens
        self.exit_logits_E = exit_logits_E
        self.contract = contract
        self.expert_budget = expert_budget
        limit = max_total_tokens - len(prompt_token_ids)
        self.max_output_tokens = limit if params.max_tokens is None else min(limit, params.max_tokens)
        # The leading number keeps seeds that callers choose apart from those that the engine derives.
        self.seed_words = (0, base_seed & _MASK_64, arrival) if params.seed is None else (1, params.seed & _MASK_64)
        self.sequences: list[Sequence] = [Sequence(self, 0)]
        self.prompt_logprobs: list[PositionLogprobs | None] | None = [None] if self.wants_prompt_logprobs else None
        self.num_cached_tokens = 0
        self.arrival_time = time.monotonic()
        self.queue_seconds: float | None = None  # until the first step that ran a part of it
        self.delivered = False  # a delta has gone out
        self.full_rows = 0  # rows that ran all layers in steps without exits
        self.ended_rows: list[int] | None = None  # in steps with exits; see ExitRunner.ended_rows
        self.projected_rows = 0  # rows times layers whose keys and values were projected
        self.skipped_experts = 0  # rows times experts that its budget left out
        self.tokens = TokenTally()

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None

    @property
    def prompt_logprobs_complete(self) -> bool:
        return self.prompt_logprobs is None or len(self.prompt_logprobs) == len(self.prompt_token_ids)

    @property
    def finished(self) -> bool:
        return len(self.sequences) == self.params.n and all(s.state is State.FINISHED for s in self.sequences)


class Sequence:
    """One completion: its tokens, its pages, and what the sampler keeps about it."""

    __slots__ = (
        "block_digests",
        "counts",
        "depths",
        "draws",
        "first_approximate",
        "first_page",
        "home",
        "index",
        "kept_blocks",
        "num_computed",
        "num_evicted",
        "num_prompt",
        "pages",
        "rank",
        "request",
        "skipped_experts",
        "state",
        "text",
        "token_ids",
    )

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.index = index
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt = len(request.prompt_token_ids)
        self.num_computed = 0  # tokens whose keys and values are in the pages
        self.home = 0  # where its pages are, while it has any
        self.pages = array("i")
        self.first_page = 0  # those before were given back: no later token sees them
        self.num_evicted = 0  # tokens whose pages a cache policy gave up: cache index = position - num_evicted
        self.kept_blocks: list[int] = []  # under a cache policy: numbers of the full blocks that are in the pages
        self.block_digests: list[bytes] = []  # of the full blocks of token_ids, as far as they were needed
        self.rank = (request.priority, request.arrival, index)
        self.state = State.WAITING
        self.text: OutputText | None = None
        self.counts = TokenCounts(request.prompt_token_ids) if TokenCounts.needed(request.params) else None
        self.draws: np.random.Generator | None = None
        self.depths = array("h")  # of a request with exits: layers that each computed position behind the prompt ran
        self.first_approximate = NEVER  # position from which on keys and values are not those of the full model
        self.skipped_experts = 0  # that the row of the last token did without

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    def draw(self) -> float:
        """The next uniform number in [0, 1) of this completion's own stream."""
        if self.draws is None:
            words = np.random.SeedSequence([*self.request.seed_words, self.index])
            self.draws = np.random.Generator(np.random.Philox(words))
        return float(self.draws.random())

    def record_depth(self, position: int, depth: int, num_layers: int) -> None:
        """Remember how many layers a position behind the prompt ran.

        What is remembered outlives the sequence's pages: should they be lost, every position leaves again where it
        left, so that the pages and all later tokens become what they were.
        """
        if position - self.num_prompt == len(self.depths):
            self.depths.append(depth)
            if depth < num_layers:
                self.mark_approximate(position)

    def mark_approximate(self, position: int) -> None:
        """Say that keys and values from this position on are not those of the full model."""
        self.first_approximate = min(self.first_approximate, position)

    def append(self, token_id: int) -> None:
        """Add a sampled token."""
        self.token_ids.append(token_id)
        if self.counts is not None:
            self.counts.add(token_id)
