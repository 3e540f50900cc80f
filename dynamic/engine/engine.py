"""The engine: requests in, deltas out, one step at a time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from operator import index
from typing import TYPE_CHECKING

import torch

from ...kernels.api.ranges import is_whole
from ..model.counters import Compute
from ..model.kv_cache import bytes_per_sequence, group_page_bytes
from ..model.machine import own_thread_for
from .block_pool import BlockPool
from .cache_size import count_pages, longest_sequence, make_cache
from .chunk_limit import FARTHEST, ChunkLimit
from .config import EngineConfig
from .contracts import ContractResolver, NoContracts
from .eviction import load_cache_policy
from .exit_runner import launched_rows
from .fault_log import FaultLog
from .grammar_compiler import CompiledGrammar, GrammarCompiler
from .logits_processors import processor_classes
from .logprobs import position_logprobs
from .outputs import CompletionDelta, PositionLogprobs, RequestDelta
from .plugins import load_plugins
from .protocols import LogitsProcessor
from .quality import ContractOutcome, Quality, required
from .request import Request, Sequence, StopTokens
from .request_limits import check_request, why_no_token
from .runner import Runner
from .sampler import NO_TOKEN, sample
from .sampling_params import SamplingParams
from .schedule import Schedule
from .scheduler import Scheduler
from .state_slots import StateSlots
from .stats import EngineStats, Pace
from .step_times import StepTimes, measure_step_times
from .text import OutputText
from .token_costs import TokenCosts, TokenTally
from .warm_up import warm_up

if TYPE_CHECKING:
    from ..model.loaded import LoadedModel

logger = logging.getLogger(__name__)


class EngineFull(Exception):
    """The queue is full; ``retry_after_seconds`` is a guess of when it will not be."""

    def __init__(self, waiting: int, retry_after_seconds: float) -> None:
        super().__init__(f"{waiting} sequences are waiting already; try again in {retry_after_seconds:.0f} s")
        self.retry_after_seconds = retry_after_seconds


class Engine:
    """Runs requests on one model. Not thread-safe: one thread drives it. After an exception out of ``step`` it is dead.

    Raises:
        ValueError: when the memory for keys and values does not hold one sequence of the configured length, and for a
            plug-in that cannot be loaded.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig | None = None) -> None:
        self.model = model
        self.config = config = config or EngineConfig()
        spec, decoder = model.spec, model.decoder
        self.logits_plugins = load_plugins(config.logits_processors, LogitsProcessor)
        self.logits_processors = processor_classes(plugin.implementation for plugin in self.logits_plugins)
        self.vocab_size: int = spec.vocab_size
        self._eos = _eos_token_ids(model)
        self.grammars = GrammarCompiler(model.tokenizer, spec.vocab_size, config.structured, self._eos)
        kv_shards, device = decoder.kv_shards, torch.device(decoder.device)
        num_pages, num_snapshots = count_pages(config, spec, decoder.kv_dtype, device, kv_shards)
        num_states = config.max_num_seqs + num_snapshots
        self._state_bytes = bytes_per_sequence(spec) * num_states * kv_shards
        self.max_model_len = longest_sequence(config, spec, num_pages // kv_shards)
        pool = BlockPool(num_pages, kv_shards)
        cache = make_cache(config, spec, pool, num_snapshots, self.max_model_len)
        states = StateSlots(config.max_num_seqs) if spec.has_states else None
        self.cache_plugins, eviction = load_cache_policy(config, spec, pool)
        self.scheduler = Scheduler(config, pool, cache, spec.longest_window, eviction, states)
        self.runner = Runner(decoder, num_pages, config.block_size, num_states, cache.windows)
        self._page_bytes = group_page_bytes(spec, decoder.kv_dtype, config.block_size)
        warm_up(decoder, config, self.max_model_len)
        self.step_times: StepTimes | None = None  # if they were asked for
        slowdown = None if config.prefill_slowdown == "auto" else config.prefill_slowdown
        if config.measure_step_times or slowdown is not None:
            beyond = None if config.measure_step_times else (config.max_num_seqs, FARTHEST)
            self.step_times = measure_step_times(decoder, self.runner.kv, config.max_num_batched_tokens, beyond)
            if slowdown is not None:
                self.scheduler.chunk_limit = ChunkLimit.of(slowdown, self.step_times)
        self._segment_layers = tuple(len(segment.layers) for segment in decoder.segments)
        self.contracts: ContractResolver = NoContracts()  # that requests may run under
        self._segment_experts = tuple(spec.experts_in(segment.layers) for segment in decoder.segments)
        self._requests: dict[str, Request] = {}
        self._arrivals = self._prompt_tokens = 0
        self._costs = TokenCosts(decoder)
        self._tokens, self._pace = TokenTally(), Pace()
        self._faults = FaultLog(logger)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Iterable[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
        contract: ContractOutcome | None = None,
        grammar: CompiledGrammar | None = None,
    ) -> None:
        """Queue a request; :meth:`step` returns its deltas.

        Arguments:
            priority: lower goes first; equal ones go by arrival.
            cache_salt: only requests with the same salt share prefixes.
            contract: what became of a contract that the caller has resolved: ``params`` say what may be spent. Left
                out, a :class:`Quality` in ``params`` is resolved by :attr:`contracts`.
            grammar: of its structured outputs; left out, they are compiled here, which blocks.

        Raises:
            ValueError: for an id in use, an empty or too long prompt, token ids outside the vocabulary, exits that the
                model does not have, an expert budget that it cannot keep, structured outputs that cannot be compiled.
            EngineFull: when ``max_waiting`` sequences wait already.
        """
        if request_id in self._requests:
            raise ValueError(f"request id {request_id!r} is in use")
        if not is_whole(priority):
            raise ValueError(f"priority must be a whole number, not {priority!r}")
        if not isinstance(cache_salt, str | None):
            raise ValueError(f"cache_salt must be a text, not {cache_salt!r}")
        prompt = list(prompt_token_ids)
        self._check(prompt, params)
        prompt = [index(token) for token in prompt]
        if len(self.scheduler.waiting) >= self.config.max_waiting:
            raise EngineFull(len(self.scheduler.waiting), self._pace.seconds_per_request)
        if grammar is None and params.structured_outputs is not None:
            grammar = self.grammars.compile(params.structured_outputs)
        spends = params
        if isinstance(params.quality, Quality):
            longest = min(self.max_model_len - len(prompt), params.max_tokens or self.max_model_len)
            spends, contract = self.contracts.resolve(params.quality, params, longest)
            required(contract)
        request = Request(
            request_id,
            prompt,
            params,
            priority=index(priority),
            cache_salt=cache_salt,
            arrival=self._arrivals,
            max_total_tokens=self.max_model_len,
            stop_tokens=StopTokens(
                eos=frozenset() if params.ignore_eos else self._eos, listed=frozenset(params.stop_token_ids)
            ),
            base_seed=self.config.seed,
            exit_logits_E=self.runner.exits.logit_thresholds(spends.exit_thresholds),
            expert_budget=self.runner.budgets.of_request(spends),
            contract=contract,
            processors=self.logits_processors,
            tokenizer=self.model.tokenizer,
            grammar=grammar,
        )
        self._arrivals += 1
        if not self._requests:
            self._pace.resume()
        self._requests[request_id] = request
        self.scheduler.add(request.sequences[0])

    def check(self, prompt: list[int], params: SamplingParams) -> None:
        """Raise the ValueError that :meth:`add_request` would raise for this prompt and these settings.

        Structured outputs that are not known yet are compiled for it, which blocks.
        """
        self._check(prompt, params)
        if params.structured_outputs is not None:
            self.grammars.check(params.structured_outputs)

    def _check(self, prompt: list[int], params: SamplingParams) -> None:
        check_request(prompt, params, self.max_model_len, self.vocab_size)
        self.runner.exits.logit_thresholds(params.exit_thresholds)
        self.runner.budgets.of_request(params)
        if isinstance(params.quality, Quality) and params.quality.require:
            longest = min(self.max_model_len - len(prompt), params.max_tokens or self.max_model_len)
            required(self.contracts.resolve(params.quality, params, longest)[1])

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop requests and free their pages at once; unknown or finished ids are ignored. No delta follows."""
        for request_id in request_ids:
            if request := self._requests.pop(request_id, None):
                for sequence in request.sequences:
                    self.scheduler.finish(sequence)

    def has_unfinished(self) -> bool:
        """Whether any request is still running or waiting."""
        return bool(self._requests)

    @torch.inference_mode()
    def step(self) -> list[RequestDelta]:
        """Run one iteration; returns what it added to each request that it added something to."""
        schedule = self.scheduler.schedule()
        if not schedule.entries:
            return []
        hidden_TD = self.runner.run(schedule)
        self._record_computed(schedule, hidden_TD)
        sequences, rows = self._rows_to_sample(schedule)
        if not rows:
            return []
        kept = [(s, row) for s, row in zip(sequences, rows, strict=True) if s.request.params.keep_states]
        states = {sequence: hidden_TD[row].cpu().clone() for sequence, row in kept}
        logits_RV = self.runner.logits(hidden_TD, rows)
        with own_thread_for(logits_RV.numel()):
            token_ids, logprobs = self._choose(sequences, logits_RV)
        return self._postprocess(sequences, token_ids, logprobs, states)

    def stats(self) -> EngineStats:
        """A snapshot of the engine's numbers."""
        scheduler, pool, decoder = self.scheduler, self.scheduler.pool, self.model.decoder
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            state_bytes=self._state_bytes,
            free_pages=pool.num_free,
            total_pages=pool.num_pages,
            kv_usage=1 - pool.num_free / pool.num_pages,
            prefix_cache_queries=scheduler.prefix_cache_queries,
            prefix_cache_hits=scheduler.prefix_cache_hits,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._tokens.count,
            preemptions=scheduler.preemptions,
            segment_layers=self._segment_layers,
            segment_rows=launched_rows(self.runner.exits.ended_rows, self.runner.full_rows),
            segment_experts=self._segment_experts,
            projected_rows=self.runner.exits.projected_rows,
            skipped_experts=self.runner.budgets.skipped_experts,
            tokens=self._tokens.total(),
            exchange=decoder.exchange(),
            expert_traffic=decoder.expert_pool and decoder.expert_pool.traffic(),
            evicted_pages=scheduler.evicted_pages,
            cache_groups=scheduler.cache_groups(self._page_bytes),
        )

    def _record_computed(self, schedule: Schedule, hidden_TD: torch.Tensor) -> None:
        first_row = 0
        for entry in schedule.entries:
            request = entry.sequence.request
            if request.queue_seconds is None:
                request.queue_seconds = time.monotonic() - request.arrival_time
                request.num_cached_tokens = entry.start
            if not request.prompt_logprobs_complete:
                self._add_prompt_logprobs(request, hidden_TD, first_row, entry.start, entry.count)
            self.scheduler.computed(entry)
            first_row += entry.count

    def _add_prompt_logprobs(
        self, request: Request, hidden_TD: torch.Tensor, first_row: int, start: int, count: int
    ) -> None:
        """Report the prompt tokens that follow positions ``start : start + count``."""
        assert request.prompt_logprobs is not None
        assert request.params.prompt_logprobs is not None
        end = min(start + count, len(request.prompt_token_ids) - 1)
        chunk = self.runner.max_logit_rows
        for position in range(start, end, chunk):
            following = request.prompt_token_ids[position + 1 : min(position + chunk, end) + 1]
            row = first_row + position - start
            logprobs_RV = self.runner.logits(hidden_TD, range(row, row + len(following))).log_softmax(-1)
            num_best = [request.params.prompt_logprobs] * len(following)
            request.prompt_logprobs += position_logprobs(logprobs_RV, following, num_best, self.model.tokenizer)

    def _rows_to_sample(self, schedule: Schedule) -> tuple[list[Sequence], list[int]]:
        """The sequences that get a token in this step, and their rows. Completions of one prompt share a row."""
        sequences: list[Sequence] = []
        rows: list[int] = []
        last_row = -1
        for entry in schedule.entries:
            last_row += entry.count
            if entry.sequence.num_uncomputed == 0:
                forks = self.scheduler.fork(entry.sequence)
                sequences += forks
                rows += [last_row] * len(forks)
        return sequences, rows

    def _choose(
        self, sequences: list[Sequence], logits_RV: torch.Tensor
    ) -> tuple[list[int], dict[Sequence, PositionLogprobs]]:
        """Sample, and take down log-probabilities of the raw logits where they are asked for."""
        asked = [row for row, s in enumerate(sequences) if s.request.params.logprobs is not None]
        if not asked:
            return sample(logits_RV, sequences), {}
        # Before sampling, which overwrites its logits.
        logprobs_RV = (logits_RV if len(asked) == len(sequences) else logits_RV[asked]).log_softmax(-1)
        token_ids = sample(logits_RV, sequences)
        num_best = [sequences[row].request.params.logprobs or 0 for row in asked]
        # A row without a usable token ends with an error; any token stands in for it here.
        chosen = [max(token_ids[row], 0) for row in asked]
        found = position_logprobs(logprobs_RV, chosen, num_best, self.model.tokenizer)
        return token_ids, {sequences[row]: logprobs for row, logprobs in zip(asked, found, strict=True)}

    def _postprocess(
        self,
        sequences: list[Sequence],
        token_ids: list[int],
        logprobs: dict[Sequence, PositionLogprobs],
        states: dict[Sequence, torch.Tensor],
    ) -> list[RequestDelta]:
        """Append the tokens, end what is to end, and say what was added."""
        deltas: dict[Request, RequestDelta] = {}
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            request = sequence.request
            delta = deltas.get(request)
            if delta is None:
                delta = deltas[request] = RequestDelta(request.request_id, [])
                self._announce(request, delta)
            if token_id == NO_TOKEN:
                delta.error, delta.error_code = why_no_token(sequence, self._faults)
                completion = CompletionDelta(sequence.index, [], "", finish_reason="error")
            else:
                completion = self._advance(sequence, token_id)
                completion.logprobs = [logprobs[sequence]] if sequence in logprobs else None
                completion.states = [states[sequence]] if sequence in states else []
            delta.completions.append(completion)
            if completion.finish_reason is not None:
                self.scheduler.finish(sequence)
            elif sequence.ends_certified():
                self.scheduler.go_exact(sequence)
        for request, delta in deltas.items():
            if request.finished:
                delta.finished, delta.compute, delta.contract = True, self._compute(request), request.outcome()
                del self._requests[request.request_id]
                self._pace.finished()
        return list(deltas.values())

    def _announce(self, request: Request, delta: RequestDelta) -> None:
        """Add what is said once, with a request's first tokens."""
        if request.delivered:
            return
        request.delivered = True
        self._prompt_tokens += len(request.prompt_token_ids)
        delta.prompt_logprobs = request.prompt_logprobs
        delta.num_cached_tokens = request.num_cached_tokens
        delta.queue_seconds = request.queue_seconds

    def _advance(self, sequence: Sequence, token_id: int) -> CompletionDelta:
        """Append one token; decide whether the output ends with it; find the text to show."""
        request, params = sequence.request, sequence.request.params
        sequence.append(token_id)
        # In front of the exit head that chose the token; the first one comes from the prompt.
        layers = sequence.depths[-1] if sequence.depths else self.model.spec.num_layers
        cost = self._costs.of(layers, sequence.skipped_experts)
        sequence.skipped_experts = 0
        request.tokens.add(cost)
        self._tokens.add(cost)
        stop_enabled = sequence.num_output >= params.min_tokens
        delta = CompletionDelta(sequence.index, [token_id], "", layers=[cost.layers], experts=[cost.experts])
        ended = stop_enabled and token_id in request.stop_tokens.all
        if ended:
            delta.finish_reason = "stop"
            delta.stop_reason = None if token_id in request.stop_tokens.eos else token_id
        elif stop_enabled and sequence.grammar is not None and sequence.grammar.complete:
            delta.finish_reason = "stop"
        elif sequence.num_output >= request.max_output_tokens:
            delta.finish_reason = "length"
        if params.detokenize:
            shown = not ended or params.include_stop_str_in_output
            self._add_text(sequence, token_id if shown else None, stop_enabled, delta)
        return delta

    def _compute(self, request: Request) -> Compute:
        ended = request.ended_rows or [0] * len(self._segment_layers)
        return Compute(
            segment_layers=self._segment_layers,
            segment_rows=launched_rows(ended, request.full_rows),
            segment_experts=self._segment_experts,
            projected_rows=request.projected_rows,
            skipped_experts=request.skipped_experts,
            tokens=request.tokens.total(),
        )

    def _add_text(self, sequence: Sequence, token_id: int | None, stop_enabled: bool, delta: CompletionDelta) -> None:
        params = sequence.request.params
        if sequence.text is None:
            sequence.text = OutputText(self.model.tokenizer, params)
        stop = None
        if token_id is not None:
            delta.text, stop = sequence.text.add(token_id, stop_enabled)
        if stop is None and delta.finish_reason is not None:
            rest, stop = sequence.text.finish()
            delta.text += rest
        if stop is not None:
            delta.finish_reason, delta.stop_reason = "stop", stop


def _eos_token_ids(model: LoadedModel) -> frozenset[int]:
    its_own = model.tokenizer.eos_token_id
    ids = model.spec.eos_token_ids or (() if its_own is None else (its_own,))
    return frozenset(token for token in ids if 0 <= token < model.spec.vocab_size)
