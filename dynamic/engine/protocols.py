"""The protocols that plug-ins follow. :mod:`.plugins` loads the classes; each runs where the engine has its place.

What a plug-in decides about a row must depend on this row alone: results may not change with the rows beside it.

Shape suffixes: V vocabulary, R rows, D hidden size, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

from .sampling_params import SamplingParams

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ..text.tokenizer import Tokenizer
    from .draws import Draws
    from .grammar_compiler import CompiledGrammar


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessorContext:
    """What a logits processor is made from.

    Arguments:
        params: of the request.
        prompt_token_ids: of the request; not to be changed.
        stop_token_ids: tokens that end its output.
        tokenizer: of the model; None where a test makes a request without one.
        grammar: of a request for structured outputs, compiled.
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    stop_token_ids: frozenset[int] = frozenset()
    tokenizer: Tokenizer | None = None
    grammar: CompiledGrammar | None = None


class LogitsProcessor(Protocol):
    """Edits the logits of one completion before the filters; keeps whatever it needs to know about the output.

    Made with a :class:`ProcessorContext` as the only argument, for requests for which :meth:`needed` says so. An
    exception in any method ends the engine.

    Attributes:
        changes_distribution: whether it may change the probability of any token. A request whose processors do is not
            covered by certificates, which speak of the model's own distribution.
    """

    changes_distribution: ClassVar[bool]

    def __init__(self, context: ProcessorContext) -> None: ...

    @staticmethod
    def needed(params: SamplingParams) -> bool:
        """Whether a request needs one."""
        ...

    def edit(self, logits_V: torch.Tensor) -> None:
        """Change the logits (float32) of the next token in place; ``-inf`` forbids a token."""
        ...

    def accept(self, token_id: int) -> None:
        """The output has one more token."""
        ...

    def rollback(self, count: int) -> None:
        """The newest ``count`` tokens are taken back: be as before they were accepted."""
        ...

    def fork(self) -> Self:
        """A processor in the same state, for another completion; from now on the two do not affect each other."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceSnapshot:
    """A completion as a drafter sees it.

    Arguments:
        key: (request id, number of the completion): names the completion in later calls.
        token_ids: prompt and output so far; not to be changed, and valid during the call only.
        num_prompt: how many of them are the prompt's.
        params: of the request.
        cache_salt: only requests of the same salt may learn from each other's outputs.
        draws: its random numbers; a drafter that samples with those of a position agrees with the model more often.
    """

    key: tuple[str, int]
    token_ids: Sequence[int]
    num_prompt: int
    params: SamplingParams
    cache_salt: str | None
    draws: Draws

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt


class Drafter(Protocol):
    """Guesses what comes next. One serves all completions of an engine. What it guesses never changes an output."""

    def propose(self, sequences: Sequence[SequenceSnapshot], limits: Sequence[int]) -> list[list[int]]:
        """The likely next tokens of each completion, at most as many as its limit; none where it has no idea."""
        ...

    def accept(self, key: tuple[str, int], token_ids: Sequence[int]) -> None:
        """A completion's output has these further tokens, drafted or not."""
        ...

    def rollback(self, key: tuple[str, int], count: int) -> None:
        """The newest ``count`` tokens of a completion are taken back."""
        ...

    def forget(self, key: tuple[str, int]) -> None:
        """A completion is over."""
        ...


class CachePolicy(Protocol):
    """Decides which pages of a sequence are kept, for one group of layers.

    Made with (layers, page size). What it evicts may depend on its arguments only: a sequence that lost its pages is
    computed again, and asked about again.
    """

    def __init__(self, layers: range, page_size: int) -> None: ...

    def evict(self, blocks: Sequence[int], num_computed: int) -> Collection[int]:
        """Which full blocks of a sequence no later token shall see; their pages are given up for good.

        Asked when a prompt is complete, and from then on whenever a block of output is full.

        Arguments:
            blocks: the full blocks that are still kept, rising; not to be changed. Block ``b`` holds the positions
                from ``b`` times the page size on.
            num_computed: tokens whose keys and values have been computed.
        """
        ...


class Router(Protocol):
    """Chooses the experts of rows."""

    def route(self, scores_RE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts (int32) and their weights (float32), both (R, K), from the router's scores."""
        ...


class ExitPolicy(Protocol):
    """Decides which rows leave the model at an exit."""

    def exits(self, layers: int, x_RD: torch.Tensor, logits_R: torch.Tensor) -> torch.Tensor:
        """Which rows leave, bool, (R,).

        Arguments:
            layers: in front of the exit.
            x_RD: the residual stream.
            logits_R: of the exit's probe.
        """
        ...


class ExpertRule(Protocol):
    """Decides how many of its chosen experts a row uses."""

    def keep(self, layer: int, contributions_RK: np.ndarray) -> np.ndarray:
        """Which of the chosen experts are used, bool, (R, K), from their estimated contributions."""
        ...
