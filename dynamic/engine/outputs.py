"""What the engine says about requests: deltas after every step, and whole results for callers who wait."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..model.counters import Compute
from .quality import ContractOutcome


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of one token at one position, its rank (1 is the best) and its text."""

    logprob: float
    rank: int
    decoded_token: str


PositionLogprobs = dict[int, Logprob]  # token id → Logprob; the chosen token is always in it


@dataclass(slots=True)
class CompletionDelta:
    """What one step added to one of a request's ``n`` completions."""

    index: int
    token_ids: list[int]
    text: str
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None  # stop | length | abort | error
    stop_reason: int | str | None = None  # the token id or string that stopped it
    layers: list[int] = field(default_factory=list)  # in front of the exit head that chose each token
    experts: list[int] = field(default_factory=list)  # that the row which chose each token used in these layers
    states: list[torch.Tensor] = field(default_factory=list)  # per token, if they are kept: what the LM head got, (D,)


@dataclass(slots=True)
class RequestDelta:
    """What one step added to a request. ``finished`` is set exactly once, on the last delta."""

    request_id: str
    completions: list[CompletionDelta]
    finished: bool = False
    prompt_logprobs: list[PositionLogprobs | None] | None = None  # once, when the prompt has been run
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    queue_seconds: float | None = None  # once, with the first tokens: from arrival to the first step that ran it
    error: str | None = None
    error_code: str = "request_failed"  # of the error: FORM_ERROR where the request is to blame
    compute: Compute | None = None  # once, with the last delta
    contract: ContractOutcome | None = None  # once, with the last delta, of a request that came with a contract


@dataclass(slots=True)
class CompletionOutput:
    """One whole completion."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    layers: list[int] = field(default_factory=list)  # per token
    experts: list[int] = field(default_factory=list)  # per token
    states: list[torch.Tensor] = field(default_factory=list)  # per token, if they are kept

    def add(self, delta: CompletionDelta) -> None:
        """Append what a step added."""
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self.layers.extend(delta.layers)
        self.experts.extend(delta.experts)
        self.states.extend(delta.states)
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


@dataclass(slots=True)
class RequestOutput:
    """A whole result, with the names that users of vLLM know."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    finished: bool = False
    num_cached_tokens: int = 0
    compute: Compute | None = None
    contract: ContractOutcome | None = None
    error: str | None = None  # why a completion has ended with the reason "error"

    def add(self, delta: RequestDelta) -> None:
        """Append what a step added."""
        for completion in delta.completions:
            self.outputs[completion.index].add(completion)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        self.finished, self.compute, self.contract = delta.finished, delta.compute, delta.contract
        self.error = delta.error or self.error
