"""Teacher forcing through the engine: each position is decoded on the engine's own path, with exits, budgets and KV
propagation, and the text's next token replaces the model's choice.

The judged distribution of a position is that of the engine's exit head, at the exit where the row exited, with the
cache as earlier rows wrote it. The first forced token comes from the context, which runs in full like every prompt.

Shape suffixes as in ``kernels/api/types.py``; N texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..contract.served_loss import full_states
from ..engine.engine import Engine, EngineFull
from ..model.counters import Compute

if TYPE_CHECKING:
    from ..engine.config import EngineConfig
    from ..engine.outputs import PositionLogprobs
    from ..engine.request import Sequence as EngineSequence
    from ..engine.sampling_params import SamplingParams
    from ..model.decoder import Decoder
    from ..model.loaded import LoadedModel

_REFERENCE_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class Forced:
    """Sums over the forced tokens of each text, float64, (N,).

    Arguments:
        tokens_N: how many.
        nll_N, reference_nll_N: negative log-likelihood of the text, in nats.
        kl_N: divergence of the exit head's distribution from the reference's, in nats.
        differ_N: positions where the most likely tokens of the two differ.
        computes: what was executed for each text.
    """

    tokens_N: np.ndarray
    nll_N: np.ndarray
    reference_nll_N: np.ndarray
    kl_N: np.ndarray
    differ_N: np.ndarray
    computes: list[Compute]


class ForcingEngine(Engine):
    """An engine that takes the next token of a text instead of the model's choice.

    Arguments: those of :class:`Engine`.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig) -> None:
        super().__init__(model, config)
        self.texts: dict[str, list[int]] = {}
        self.judge: Callable[[str, int, torch.Tensor], None] = lambda request_id, position, logprobs_V: None

    def _choose(
        self, sequences: list[EngineSequence], logits_RV: torch.Tensor
    ) -> tuple[list[int], dict[EngineSequence, PositionLogprobs]]:
        logprobs_RV = logits_RV.log_softmax(-1)
        chosen = []
        for sequence, logprobs_V in zip(sequences, logprobs_RV, strict=True):
            request_id, position = sequence.request.request_id, len(sequence.token_ids)
            self.judge(request_id, position, logprobs_V)
            chosen.append(self.texts[request_id][position])
        return chosen, {}


def force(
    engine: ForcingEngine,
    reference: Decoder,
    texts: Sequence[list[int]],
    context: int,
    params: SamplingParams,
    done: Callable[[int], object] = lambda texts: None,
) -> Forced:
    """Force texts through an engine, and compare its distributions with a full pass of the reference.

    Arguments:
        reference: runs all its layers and experts; its vocabulary is the engine's.
        texts: token ids, each longer than ``context``.
        params: the setting; its ``max_tokens`` is at least the longest forced part.
        done: called after every few texts with their number.
    """
    sums = {name: np.zeros(len(texts)) for name in ("nll", "reference_nll", "kl", "differ")}
    computes: list[Compute] = []
    longest = max(len(text) for text in texts) - context
    group = max(1, min(256, _REFERENCE_BYTES // (4 * reference.spec.vocab_size * longest)))
    for first in range(0, len(texts), group):
        part = texts[first : first + group]
        expected = _reference(reference, part, context)

        def judge(request_id: str, position: int, found_V: torch.Tensor, first: int = first, expected=expected) -> None:
            number = int(request_id)
            expected_V, token = expected[number - first][position - context], texts[number][position]
            sums["nll"][number] -= float(found_V[token])
            sums["reference_nll"][number] -= float(expected_V[token])
            expected_V, found_V = expected_V.double(), found_V.double()
            sums["kl"][number] += float((expected_V.exp() * (expected_V - found_V)).sum().clamp(min=0))
            sums["differ"][number] += float(expected_V.argmax() != found_V.argmax())

        engine.judge = judge
        computes += _run(engine, {str(first + n): text for n, text in enumerate(part)}, context, params)
        done(len(part))
    tokens_N = np.array([len(text) - context for text in texts], dtype=np.float64)
    return Forced(tokens_N=tokens_N, computes=computes, **{f"{name}_N": values for name, values in sums.items()})


@torch.inference_mode()
def _reference(decoder: Decoder, texts: Sequence[list[int]], context: int) -> list[torch.Tensor]:
    """Log-probabilities of the tokens behind each context, float32, one (L, V) per text."""
    x_RD = full_states(decoder, texts, [context] * len(texts))
    return [decoder.logits(part_LD).log_softmax(-1) for part_LD in x_RD.split([len(t) - context for t in texts])]


def _run(engine: ForcingEngine, texts: dict[str, list[int]], context: int, params: SamplingParams) -> list[Compute]:
    engine.texts = texts
    waiting, computes = list(reversed(texts.items())), dict[str, Compute]()
    try:
        while waiting or engine.has_unfinished():
            while waiting:
                request_id, text = waiting[-1]
                try:
                    own = replace(params, max_tokens=len(text) - context)
                    engine.add_request(request_id, text[:context], own)
                except EngineFull:
                    break
                waiting.pop()
            for delta in engine.step():
                if delta.error is not None:
                    raise ValueError(f"the engine failed a text: {delta.error}")
                if delta.compute is not None:
                    computes[delta.request_id] = delta.compute
    finally:
        engine.abort(texts)
    return [computes[request_id] for request_id in texts]
