"""Requests, and the sequences (one per completion) that the scheduler moves through the engine."""

from __future__ import annotations

import itertools
import math
import time
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from .draws import Draws
from .grammar_processor import GrammarProcessor
from .logits_processors import processor_classes
from .protocols import LogitsProcessor, ProcessorContext, SequenceSnapshot
from .sampling_params import SamplingParams
from .state_slots import NO_SLOT
from .token_costs import TokenTally

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer
    from .grammar_compiler import CompiledGrammar
    from .outputs import PositionLogprobs
    from .quality import ContractOutcome
    from .text import OutputText

NEVER = 1 << 62
LEVEL_ARRIVALS = 64  # later requests that pass one of priority 1, see age_rank


def age_rank(priority: int, arrival: int) -> float:
    """Where a request stands in the queue; lower goes first.

    A priority counts as a number of arrivals, which makes requests age: one of priority p > 0 lets at most
    64 · log2(1 + p) later ones of priority 0 pass, so that nobody waits for ever behind a stream of others.
    """
    return arrival + math.copysign(LEVEL_ARRIVALS * math.log2(1 + abs(priority)), priority)


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


@dataclass(frozen=True, kw_only=True)
class RequestBudget:
    """What every decoded token of a request may use: see :class:`ExpertBudget`; L layers."""

    keep_L: np.ndarray  # float32
    cap_L: np.ndarray  # int32


class Request:
    """One prompt and what was asked about it.

    Arguments:
        arrival: running number; earlier requests go first among equals.
        max_total_tokens: prompt and output together never get longer.
        base_seed: seeds the draws when the request brings no seed of its own.
        exit_logits_E: per exit of the model, the probe's logit from which on its output exits there (float32, inf:
            never); None for a request whose tokens run all layers.
        expert_budget: how many experts its output may use; None for one that uses all.
        contract: what became of the risk that its caller accepts.
        processors: kinds of logits processors that it may need, in their order.
        tokenizer: of the model, for those of them that read text.
        grammar: of a request for structured outputs, compiled.
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
        processors: Iterable[type[LogitsProcessor]] = processor_classes(),
        tokenizer: Tokenizer | None = None,
        grammar: CompiledGrammar | None = None,
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
        self.seed_words = (0, base_seed, arrival) if params.seed is None else (1, params.seed)
        context = ProcessorContext(
            params=params,
            prompt_token_ids=prompt_token_ids,
            stop_token_ids=stop_tokens.all,
            tokenizer=tokenizer,
            grammar=grammar,
        )
        own = tuple(kind(context) for kind in processors if kind.needed(params))
        self.sequences: list[Sequence] = [Sequence(self, 0, own)]
        self.prompt_logprobs: list[PositionLogprobs | None] | None = None if params.prompt_logprobs is None else [None]
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
    def prompt_logprobs_complete(self) -> bool:
        return self.prompt_logprobs is None or len(self.prompt_logprobs) == len(self.prompt_token_ids)

    def outcome(self) -> ContractOutcome | None:
        """What became of its contract; whether a completion went beyond it is known at the end."""
        if self.contract is None or not any(sequence.exact for sequence in self.sequences):
            return self.contract
        return replace(self.contract, exact_after=self.contract.certified_tokens)

    @property
    def finished(self) -> bool:
        return len(self.sequences) == self.params.n and all(s.state is State.FINISHED for s in self.sequences)


class Sequence:
    """One completion: its tokens, its pages, and what the sampler keeps about it."""

    __slots__ = (
        "_draws",
        "block_digests",
        "depths",
        "exact",
        "failure",
        "first_approximate",
        "first_page",
        "index",
        "kept_blocks",
        "kv_shard",
        "num_computed",
        "num_evicted",
        "num_prompt",
        "num_shared",
        "output_digest",
        "pages",
        "processors",
        "rank",
        "request",
        "seen",
        "skipped_experts",
        "state",
        "state_slot",
        "text",
        "token_ids",
    )

    def __init__(self, request: Request, index: int, processors: tuple[LogitsProcessor, ...] = ()) -> None:
        self.request = request
        self.index = index
        self.processors = processors
        self._draws: Draws | None = None
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt = len(request.prompt_token_ids)
        self.num_computed = 0  # tokens whose keys and values are in the pages
        self.kv_shard = 0  # where its pages are, while it has any
        self.pages = array("i")
        self.state_slot = NO_SLOT  # of its recurrent states, while it has any
        self.num_shared = 0  # tokens whose pages were there when it was admitted, whether they could be shared or not
        self.output_digest: bytes | None = None  # of the last block of output behind which its states were kept
        self.first_page = 0  # those before were given back: no later token sees them
        self.seen: dict[int, range] = {}  # blocks whose pages layers with shorter windows hold for it, by the window
        self.num_evicted = 0  # tokens whose pages a cache policy gave up: cache index = position - num_evicted
        self.kept_blocks: list[int] = []  # under a cache policy: numbers of the full blocks that are in the pages
        self.block_digests: list[bytes] = []  # of the full blocks of token_ids, as far as they were needed
        self.rank = (age_rank(request.priority, request.arrival), request.arrival, index)
        self.state = State.WAITING
        self.text: OutputText | None = None
        self.depths = array("h")  # of a request with exits: layers that each computed position behind the prompt ran
        self.first_approximate = NEVER  # position from which on keys and values are not those of the full model
        self.skipped_experts = 0  # that the row of the last token did without
        self.exact = False  # whether it runs in full from here on, whatever its request may spend
        self.failure: tuple[str, Exception] | None = None  # the plug-in that cannot go on with it, and why

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def grammar(self) -> GrammarProcessor | None:
        """What keeps its output in the wanted form: the last processor."""
        last = self.processors[-1] if self.processors else None
        return last if isinstance(last, GrammarProcessor) else None

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def num_together(self) -> int:
        """Of the tokens that are not computed, how many can run in one step where layers have recurrent states.

        No row may get to a layer before one that comes earlier in its sequence, whether it runs there or skips it: so
        only such rows run together as leave after equally many layers.
        """
        known, behind = self.depths, self.num_computed - self.num_prompt
        if self.exit_logits_E is None:
            return self.num_uncomputed
        if behind < 0:
            return min(self.num_uncomputed, -behind)  # prompts run all layers
        alike = itertools.takewhile(lambda depth: depth == known[behind], known[behind:])
        return max(1, sum(1 for _ in alike))

    @property
    def exit_logits_E(self) -> np.ndarray | None:
        """See :class:`Request`; None as soon as the sequence goes on exactly."""
        return None if self.exact else self.request.exit_logits_E

    @property
    def expert_budget(self) -> RequestBudget | None:
        """See :class:`Request`; None as soon as the sequence goes on exactly."""
        return None if self.exact else self.request.expert_budget

    def ends_certified(self) -> bool:
        """Whether its certificate covers no further token."""
        contract = self.request.contract
        return not self.exact and contract is not None and contract.certified_tokens == self.num_output

    def go_exact(self) -> None:
        """Forget how its positions ran: those that are computed from here on run in full."""
        self.exact = True
        del self.depths[:]
        self.first_approximate = NEVER

    @property
    def draws(self) -> Draws:
        """Its random numbers."""
        if self._draws is None:
            self._draws = Draws(self.request.seed_words, self.index)
        return self._draws

    def peek(self, ahead: int = 0) -> int:
        """The key of the noise that chooses the next output token, or one ``ahead`` of it (:meth:`Draws.peek`)."""
        return self.draws.peek(self.num_output + ahead)

    def snapshot(self) -> SequenceSnapshot:
        """What a drafter may see."""
        request = self.request
        return SequenceSnapshot(
            key=(request.request_id, self.index),
            token_ids=self.token_ids,
            num_prompt=self.num_prompt,
            params=request.params,
            cache_salt=request.cache_salt,
            draws=self.draws,
        )

    def fork(self, index: int) -> Sequence:
        """Another completion of the same prompt, without pages. This one has no output yet."""
        assert not self.num_output
        other = Sequence(self.request, index)
        other.failure = self.failure
        forks: list[LogitsProcessor] = []
        other._for_each(lambda processor: forks.append(processor.fork()), self.processors)
        other.processors = tuple(forks)
        return other

    def fail(self, plugin: object, error: Exception) -> None:
        """A plug-in has raised an error: the sequence gets no further token. The first one counts."""
        if self.failure is None:
            self.failure = type(plugin).__name__, error

    def _for_each(self, do: Callable[[LogitsProcessor], None], processors: Iterable[LogitsProcessor]) -> None:
        for processor in processors:
            try:
                do(processor)
            except Exception as error:  # whatever the code raises
                self.fail(processor, error)

    def record_depth(self, position: int, depth: int, num_layers: int) -> None:
        """Remember how many layers a position behind the prompt ran.

        What is remembered outlives the sequence's pages: should they be lost, every position exits again where it
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
        """Add a sampled token; the next one is drawn with the numbers of the next position."""
        self.token_ids.append(token_id)
        self._for_each(lambda processor: processor.accept(token_id), self.processors)

    def rollback(self, count: int) -> None:
        """Take the newest tokens back, whose keys and values were not computed yet and whose text nobody has seen."""
        assert 0 <= count <= min(self.num_output, self.num_uncomputed), f"{count} tokens cannot be taken back"
        del self.token_ids[len(self.token_ids) - count :]
        self._for_each(lambda processor: processor.rollback(count), self.processors)
