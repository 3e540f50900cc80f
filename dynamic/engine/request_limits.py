"""Checks of a request, and why one has ended without a token."""

from __future__ import annotations

from .fault_log import FaultLog
from .grammar_processor import GrammarError
from .request import Sequence
from .sampling_params import SamplingParams

FORM_ERROR = "structured_output_failed"


def check_request(prompt: list[int], params: SamplingParams, max_model_len: int, vocab_size: int) -> None:
    """Check a prompt, and the token ids and counts in its settings.

    Raises:
        ValueError: naming the value that does not fit the model.
    """
    if not prompt:
        raise ValueError("the prompt is empty")
    for kind in set(map(type, prompt)):
        if kind is bool or not hasattr(kind, "__index__"):
            raise ValueError(f"a prompt must hold token ids, not {kind.__name__}")
    if len(prompt) >= max_model_len:
        raise ValueError(
            f"the prompt has {len(prompt)} tokens; with at least one token of output, "
            f"at most {max_model_len - 1} fit (max_model_len={max_model_len})"
        )
    for name, tokens in (
        ("prompt_token_ids", prompt),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", params.allowed_token_ids or ()),
    ):
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise ValueError(f"{name} holds {token}; the vocabulary has ids 0 to {vocab_size - 1}")
    for name in ("logprobs", "prompt_logprobs"):
        if (count := getattr(params, name)) is not None and count > vocab_size:
            raise ValueError(f"{name}={count} exceeds the vocabulary of {vocab_size}")


def why_no_token(sequence: Sequence, faults: FaultLog) -> tuple[str, str]:
    """What to tell the caller of a sequence for which no token could be chosen, and the error's code.

    Arguments:
        faults: gets what is not for the caller.
    """
    if sequence.failure is None:
        if sequence.grammar is None:
            what = "the logits are not finite, or the request's rules forbid all tokens"
            return f"no token can be chosen: {what}", "request_failed"
        rules = "logit_bias, allowed_token_ids, bad_words, min_tokens, plug-ins"
        return f"no token fits both the structured output and the request's other rules ({rules})", FORM_ERROR
    name, error = sequence.failure
    if isinstance(error, GrammarError):
        return str(error), FORM_ERROR
    faults.report(f"plug-in {name}", error)
    return f"the server's plug-in {name} failed: {type(error).__name__}", "request_failed"  # the rest is in the log
