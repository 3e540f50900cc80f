"""What the engine says about requests: deltas after every step, and whole results for callers who wait."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .quality import ContractOutcome


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCost:
    """What the rows that chose some generated tokens ran, one row per token.

    A prompt's last row chooses the first token of each of its completions, so that this one counts with all layers.

    Arguments:
        count: tokens.
        layers: in front of their read-outs.
        experts: used in these layers.
        weight_bytes: of the weights that the rows need, each read as if it ran alone: the layers in front of the
            read-out with the experts that were used, the read-out's adapter, the projections that fill in keys and
            values of the layers behind it, and the LM head. Embeddings and probes are left out.
        full_weight_bytes: the same for all layers with all experts.
    """

    count: int = 0
    layers: int = 0
    experts: int = 0
    weight_bytes: int = 0
    full_weight_bytes: int = 0

    def __add__(self, other: TokenCost) -> TokenCost:
        return TokenCost(
            count=self.count + other.count,
            layers=self.layers + other.layers,
            experts=self.experts + other.experts,
            weight_bytes=self.weight_bytes + other.weight_bytes,
            full_weight_bytes=self.full_weight_bytes + other.full_weight_bytes,
        )


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of one token at one position, its rank (1 is the best) and its text."""

    logprob: float
    rank: int
    decoded_token: str


PositionLogprobs = dict[int, Logprob]  # token id → Logprob; the chosen token is always in it


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """What the model executed for a request: prompt, output, and whatever was computed again. Counted at the launches.

    Arguments:
        segment_layers: layers of each segment between the model's exits.
        segment_rows: rows launched through each segment.
        segment_experts: experts that a row uses in each segment without a budget: chosen ones and those always on.
        projected_rows: rows times layers that were skipped; their keys and values were made of the state at an exit.
        skipped_experts: rows times experts that a budget left out of layers that ran.
        tokens: what chose the generated tokens; a part of the above.
    """

    segment_layers: tuple[int, ...]
    segment_rows: tuple[int, ...]
    segment_experts: tuple[int, ...]
    projected_rows: int = 0
    skipped_experts: int = 0
    tokens: TokenCost = TokenCost()

    @property
    def layer_rows(self) -> int:
        """Rows times layers executed."""
        return sum(layers * rows for layers, rows in zip(self.segment_layers, self.segment_rows, strict=True))

    @property
    def full_expert_rows(self) -> int:
        """Rows times experts that the executed layers would have used without a budget."""
        return sum(experts * rows for experts, rows in zip(self.segment_experts, self.segment_rows, strict=True))

    @property
    def expert_rows(self) -> int:
        """Rows times experts executed."""
        return self.full_expert_rows - self.skipped_experts


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """What went between the processes of one model, as rank 0 saw it.

    Arguments:
        received: bytes from other ranks, by what for: ``sums``, ``embedding``, ``logits``, ``stages``, ``dispatch``,
            ``combine``, ``sizes``, ``rows``.
        expert_rows: by rank of the expert axis, rows times experts that it ran, in the layers of the first stage; empty
            without that axis.
    """

    received: dict[str, int]
    expert_rows: tuple[int, ...]


@dataclass(slots=True)
class CompletionDelta:
    """What one step added to one of a request's ``n`` completions."""

    index: int
    token_ids: list[int]
    text: str
    logprobs: list[PositionLogprobs] | None = None
    finish_reason: str | None = None  # stop | length | abort | error
    stop_reason: int | str | None = None  # the token id or string that stopped it
    layers: list[int] = field(default_factory=list)  # in front of the read-out that chose each token
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

    def add(self, delta: RequestDelta) -> None:
        """Append what a step added."""
        for completion in delta.completions:
            self.outputs[completion.index].add(completion)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        self.finished, self.compute, self.contract = delta.finished, delta.compute, delta.contract
