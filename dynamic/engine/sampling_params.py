"""What a caller may ask of one request: how to choose tokens, when to stop, what to report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real

from .quality import Quality, read_quality

GREEDY_EPSILON = 1e-5  # temperatures below this are greedy
_TYPES = (
    (("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"), Integral, "a whole number"),
    (("temperature", "top_p", "min_p", "repetition_penalty"), Real, "a number"),
    (("presence_penalty", "frequency_penalty"), Real, "a number"),
    (("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"), bool, "true or false"),
    (("detokenize", "keep_states"), bool, "true or false"),
)
_OPTIONAL = frozenset({"seed", "max_tokens", "logprobs", "prompt_logprobs"})


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
        for name in ("expert_keep", "experts_per_token"):
            if isinstance(limits := getattr(self, name), Mapping):
                object.__setattr__(self, name, dict(limits) or None)
        self._check_types()
        self._check()

    def _check_types(self) -> None:
        """Of what callers in Python may give; other types would be cut to whole numbers, or taken for true, later."""
        for names, kind, words in _TYPES:
            for name in names:
                value = getattr(self, name)
                if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
                    continue
                if value is not None or name not in _OPTIONAL:
                    raise ValueError(f"{name} must be {words}, not {value!r}")
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token in getattr(self, name) or ():
                if not isinstance(token, Integral) or isinstance(token, bool):
                    raise ValueError(f"{name} must hold token ids, not {token!r}")
        for name in ("stop", "bad_words"):
            for text in getattr(self, name):
                if not isinstance(text, str):
                    raise ValueError(f"{name} must hold texts, not {text!r}")

    def _check(self) -> None:
        limits: tuple[tuple[str, float, float], ...] = (
            ("n", 1, 128),
            ("temperature", 0, 100),
            ("min_p", 0, 1),
            ("presence_penalty", -2, 2),
            ("frequency_penalty", -2, 2),
            ("min_tokens", 0, float("inf")),
        )
        for name, low, high in limits:
            value = getattr(self, name)
            if not low <= value <= high:  # NaN fails this too
                raise ValueError(f"{name} must be between {low} and {high}, not {value}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")
        if self.top_k < -1:
            raise ValueError(f"top_k must be -1 or 0 (off) or positive, not {self.top_k}")
        if not 0 < self.repetition_penalty <= 100:
            raise ValueError(f"repetition_penalty must be in (0, 100], not {self.repetition_penalty}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens} is greater than max_tokens={self.max_tokens}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, not {value}")
        if any(not s for s in self.stop):
            raise ValueError("stop strings must not be empty")
        if any(not word.strip() for word in self.bad_words):
            raise ValueError("bad_words must not be blank")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise ValueError("allowed_token_ids must not be empty")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise ValueError(f"logit_bias of token {token} must be between -100 and 100, not {bias}")

        self._check_quality()

    def _check_quality(self) -> None:
        if self.exit_thresholds and self.quality is not None:
            raise ValueError(f"exit_thresholds contradict quality={self.quality!r}; set quality=None")
        for layer, probability in self.exit_thresholds.items():
            if not 0 <= probability <= 1:
                raise ValueError(f"exit_thresholds[{layer}] must be a probability between 0 and 1, not {probability}")
        for name in ("expert_keep", "experts_per_token"):
            limits = getattr(self, name)
            if limits is None:
                continue
            if self.quality is not None:
                raise ValueError(f"{name}={limits} contradicts quality={self.quality!r}; set quality=None")
            for limit in limits.values() if isinstance(limits, Mapping) else (limits,):
                if name == "expert_keep" and not 0 < limit <= 1:
                    raise ValueError(f"expert_keep must be in (0, 1], not {limit}")
                if name == "experts_per_token" and (type(limit) is not int or not 1 <= limit < 2**31):
                    raise ValueError(f"experts_per_token must be a whole number, at least 1, not {limit}")

    @property
    def greedy(self) -> bool:
        """Whether every step takes the most likely token."""
        return self.temperature < GREEDY_EPSILON
