"""What a caller may ask of one request: how to choose tokens, when to stop, what to report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...kernels.api.ranges import check_flags, check_ranges, is_whole
from .quality import Quality, read_quality
from .reasoning_params import ReasoningParams
from .structured_outputs import StructuredOutputsParams, read_structured_outputs

GREEDY_EPSILON = 1e-5  # temperatures below this are greedy


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling settings of one request. Names and defaults are those that users of vLLM know.

    Arguments:
        n: how many completions to return for one prompt.
        temperature: 0 is greedy.
        top_p, top_k, min_p: nucleus, k best (0 or -1 turns it off), and minimum share of the best token's probability.
        repetition_penalty: > 1 discourages tokens of prompt and output; presence_penalty and frequency_penalty look at
            the output only.
        logit_bias: token id → amount added to its logit.
        allowed_token_ids: the output consists of these tokens only; None: of all.
        bad_words: texts that the output never holds as the tokens that they have alone or after a space.
        seed: makes the request's random draws repeatable, whatever runs beside it.
        max_tokens, min_tokens: limits on the output's length; no stop ends the output before ``min_tokens``.
            ``max_tokens=None`` means: until the model's maximum length.
        stop: strings that end the output; they may span tokens. include_stop_str_in_output keeps them in the text.
        stop_token_ids: tokens that end the output.
        ignore_eos: go on past the model's end-of-sequence tokens.
        logprobs: report this many best tokens per position, beside the chosen one. -1 is not allowed.
        prompt_logprobs: the same for the prompt's tokens.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: turn ids into text; off, ``text`` stays empty and ``stop`` must be empty.
        structured_outputs: the form that the output must have; a :class:`StructuredOutputsParams`, the same of vLLM's,
            or a mapping of its fields. It ends where the form is complete. guided_decoding: its older name.
        reasoning: how the model writes reasoning in front of its answer, and how long that may be; the form of
            ``structured_outputs`` begins behind it. A :class:`ReasoningParams`. None: nothing is known of it.
        quality: ``exact``: every token comes from all layers and experts. A :class:`Quality`, or a mapping of its
            fields: the risk that the caller accepts; the engine spends what a certificate says that it needs, or runs
            exactly where there is none, and says which. None: what ``exit_thresholds``, ``expert_keep`` and
            ``experts_per_token`` say.
        exit_thresholds: for studies, with ``quality=None``: layers in front of an exit → calibrated probability, from
            which on a token exits there. Exits that are not named are skipped. Nothing is certified.
        expert_keep: for studies, with ``quality=None``: of the experts that a router chose, a decoded token uses the
            fewest whose calibrated contributions reach this share of their sum, less in layers whose experts matter
            less; 1 is all. A mapping says it layer by layer instead; layers that are not named use all.
        experts_per_token: likewise, the most experts that a decoded token uses in a layer, beside those always on.
        keep_states: return the vectors that the tokens were chosen from, for measurements.

    Raises:
        ValueError: naming the field and the value that is out of range.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    structured_outputs: StructuredOutputsParams | None = None
    guided_decoding: Any = None
    reasoning: ReasoningParams | None = None
    quality: str | Quality | None = "exact"
    exit_thresholds: dict[int, float] = field(default_factory=dict)
    expert_keep: float | Mapping[int, float] | None = None
    experts_per_token: int | Mapping[int, int] | None = None
    keep_states: bool = False

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        words = (self.bad_words,) if isinstance(self.bad_words, str) else tuple(self.bad_words or ())
        object.__setattr__(self, "bad_words", words)
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        object.__setattr__(self, "exit_thresholds", dict(self.exit_thresholds or {}))
        object.__setattr__(self, "quality", read_quality(self.quality))
        self._read_structured_outputs()
        for name in ("expert_keep", "experts_per_token"):
            if isinstance(limits := getattr(self, name), Mapping):
                object.__setattr__(self, name, dict(limits) or None)
        self._check_types()
        self._check()

    def _read_structured_outputs(self) -> None:
        older = read_structured_outputs(self.guided_decoding, "guided_decoding")
        if older is not None and self.structured_outputs is not None:
            raise ValueError("structured_outputs and guided_decoding are the same; give one of them")
        object.__setattr__(self, "structured_outputs", older or read_structured_outputs(self.structured_outputs))
        object.__setattr__(self, "guided_decoding", None)

    def _check_types(self) -> None:
        """Of what callers in Python may give; other types would be cut to whole numbers, or taken for true, later."""
        check_flags(self)
        check_ranges(self, "seed")
        if not isinstance(self.reasoning, ReasoningParams | None):
            raise ValueError(f"reasoning must be ReasoningParams, not {str(self.reasoning)[:100]!r}")
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(self, name) or ():
                if not is_whole(token):
                    raise ValueError(f"{name} must hold token ids, not {token!r}")
        for name in ("stop", "bad_words"):
            for text in getattr(self, name):
                if not isinstance(text, str):
                    raise ValueError(f"{name} must hold texts, not {text!r}")

    def _check(self) -> None:
        check_ranges(self, "n", least=1, most=128)
        check_ranges(self, "temperature", least=0, most=100)
        check_ranges(self, "top_p", above=0, most=1)
        check_ranges(self, "top_k", least=-1)
        check_ranges(self, "min_p", least=0, most=1)
        check_ranges(self, "repetition_penalty", above=0, most=100)
        check_ranges(self, "presence_penalty", "frequency_penalty", least=-2, most=2)
        check_ranges(self, "logit_bias", least=-100, most=100)
        check_ranges(self, "max_tokens", least=1)
        check_ranges(self, "min_tokens", "logprobs", "prompt_logprobs", least=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is greater than max_tokens={self.max_tokens}")
        if any(not s for s in self.stop):
            raise ValueError("stop strings must not be empty")
        if any(not word.strip() for word in self.bad_words):
            raise ValueError("bad_words must not be blank")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must not be empty")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True")
        self._check_quality()

    def _check_quality(self) -> None:
        if self.exit_thresholds and self.quality is not None:
            raise ValueError(f"exit_thresholds contradict quality={self.quality!r}; set quality=None")
        check_ranges(self, "exit_thresholds", least=0, most=1)
        check_ranges(self, "expert_keep", above=0, most=1)
        check_ranges(self, "experts_per_token", least=1, below=2**31)
        for name in ("expert_keep", "experts_per_token"):
            if (limits := getattr(self, name)) is not None and self.quality is not None:
                raise ValueError(f"{name}={limits} contradicts quality={self.quality!r}; set quality=None")

    @property
    def greedy(self) -> bool:
        """Whether every step takes the most likely token."""
        return self.temperature < GREEDY_EPSILON
