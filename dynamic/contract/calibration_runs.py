"""Losses of requests at every setting of a path, as the deployed stack serves them; stored, so that a run can resume.

Shape suffixes: M settings, from the safest on; N requests; T tokens of the longest output; K lengths.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.outputs import RequestOutput
from ..engine.sampling_params import GREEDY_EPSILON, SamplingParams
from .served_loss import token_losses

if TYPE_CHECKING:
    from ..engine.offline import OfflineEngine

PROBABILITIES = (0.995, 0.99, 0.98, 0.97, 0.96, 0.95, 0.93, 0.91, 0.88, 0.85, 0.8, 0.75, 0.7, 0.6)
SHORTEST = 8  # tokens: outputs that are cut before are not covered
_GROUP = 256  # requests that are decoded and judged together


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of the path.

    Arguments:
        exit_thresholds: layers in front of an exit → calibrated probability from which on a row exits.
        expert_keep: share of the calibrated contributions that a token's experts reach; None uses all experts.
    """

    exit_thresholds: dict[int, float]
    expert_keep: float | None = None

    def params(self, max_tokens: int, temperature: float = 0.0, seed: int | None = None) -> SamplingParams:
        """Sampling settings of a request; as by default, an end-of-text token ends the output."""
        return SamplingParams(
            temperature=temperature,
            seed=seed,
            max_tokens=max_tokens,
            detokenize=False,
            keep_states=temperature >= GREEDY_EPSILON,
            quality=None,
            exit_thresholds=self.exit_thresholds,
            expert_keep=self.expert_keep,
        )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Losses and executed work of a setting on some requests.

    Arguments:
        losses_NT: of each served token, float32; NaN behind an output's end.
        layers_share: share of the decoded tokens' layers that was launched.
        experts_share: share of these layers' experts that was launched.
        decoded: decoded tokens, without each output's first, which comes from the prompt.
    """

    losses_NT: np.ndarray
    layers_share: float
    experts_share: float
    decoded: int

    @cached_property
    def _prefix_means_NT(self) -> np.ndarray:
        """Of the first 1, 2, … tokens of every output; behind its end, of all of it. float64."""
        counts_NT = np.minimum(np.arange(1, self.losses_NT.shape[1] + 1), self.lengths_N[:, None])
        return np.nancumsum(self.losses_NT.astype(np.float64), 1) / counts_NT

    @property
    def lengths_N(self) -> np.ndarray:
        """Tokens of each output."""
        return (~np.isnan(self.losses_NT)).sum(1)

    @property
    def losses_N(self) -> np.ndarray:
        """The loss of each request: the mean over its tokens."""
        return self._prefix_means_NT[:, -1]

    @property
    def cut_losses_KN(self) -> np.ndarray:
        """The loss of each request if its output is cut at :data:`SHORTEST` … T tokens."""
        return np.ascontiguousarray(self._prefix_means_NT[:, min(SHORTEST, self.losses_NT.shape[1]) - 1 :].T)

    @property
    def worst_cut_N(self) -> np.ndarray:
        """The largest of :attr:`cut_losses_KN` of each request."""
        return self.cut_losses_KN.max(0)

    @property
    def token_loss(self) -> float:
        """The mean over all tokens: long outputs count more than short ones."""
        return float(np.nanmean(self.losses_NT.astype(np.float64)))


def path_through(
    exits: Sequence[int], probabilities: Sequence[float] = PROBABILITIES, keeps: Sequence[float] = ()
) -> list[Setting]:
    """The same probability at every exit, from the safest to the boldest, and an expert budget beside each.

    Arguments:
        keeps: expert-keep schedule: ``expert_keep`` of every setting, not rising; empty: all experts.

    Raises:
        ValueError: for probabilities that do not fall, keeps that rise or are not as many, a model without exits.
    """
    if keeps and len(keeps) != len(probabilities):
        raise ValueError(f"there are {len(probabilities)} probabilities and {len(keeps)} keeps; give one for each")
    if any(later > earlier for earlier, later in itertools.pairwise(keeps)):
        raise ValueError(f"keeps must not rise from the safest to the boldest, not {list(keeps)}")
    if not exits:
        raise ValueError("the model has no exits: there is nothing to calibrate")
    if any(later >= earlier for earlier, later in itertools.pairwise(probabilities)):
        raise ValueError(f"probabilities must fall from the safest to the boldest, not {list(probabilities)}")
    pairs = itertools.zip_longest(probabilities, keeps)
    return [Setting(exit_thresholds=dict.fromkeys(exits, p), expert_keep=keep) for p, keep in pairs]


def measure(
    llm: OfflineEngine,
    prompts: Sequence[list[int]],
    setting: Setting,
    max_tokens: int,
    file: Path,
    *,
    temperature: float = 0.0,
    progress: bool = True,
) -> Measured:
    """Serve requests at a setting and judge the outputs; or read the result of an earlier run.

    Arguments:
        temperature: of all requests; each has its own seed, the same at every setting.
        file: JSON result, written atomically.

    Raises:
        ValueError: when the file belongs to other requests or another setting.
    """
    facts = {"setting": asdict(setting), "prompts": prompts_hash(prompts), "max_tokens": max_tokens}
    facts |= {"temperature": temperature} if temperature else {}
    facts = json.loads(json.dumps(facts))  # keys become text, as in the file
    if file.exists():
        record = json.loads(file.read_text())
        if {name: record.get(name) for name in facts} != facts:
            raise ValueError(f"{file} holds another measurement; take another output directory")
        return _measured(record)
    found, works = [], []
    params = [setting.params(max_tokens, temperature, seed) for seed in range(len(prompts))]
    for outputs in _served(llm, prompts, params, progress):
        found += [losses_T for (losses_T,) in token_losses(llm.model.decoder, outputs, temperature)]
        works += [decoded_work(output, llm.model.spec.num_layers) for output in outputs]
    decoded, rows, full, experts, skipped = (sum(counts) for counts in zip(*works, strict=True))
    share = rows / full if full else 1.0
    losses_NT = np.full((len(found), max_tokens), np.nan, dtype=np.float32)
    for row_T, losses_T in zip(losses_NT, found, strict=True):
        row_T[: len(losses_T)] = losses_T
    packed = base64.b64encode(zlib.compress(losses_NT.astype("<f4").tobytes())).decode()
    record = {**facts, "losses": packed, "layers_share": share, "decoded": decoded}
    record["experts_share"] = 1 - skipped / experts if experts else 1.0
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(record))
    partial.rename(file)
    return _measured(record)


def prompts_hash(prompts: Sequence[Sequence[int]]) -> str:
    """The SHA-256 of token ids, in their order."""
    return hashlib.sha256(json.dumps([list(prompt) for prompt in prompts]).encode()).hexdigest()


def read_measured(file: Path) -> Measured:
    """What :func:`measure` left in a file."""
    return _measured(json.loads(file.read_text()))


def decoded_work(output: RequestOutput, num_layers: int) -> tuple[int, int, int, int, int]:
    """What was executed for a request's decoded tokens: without the prompt, which always runs in full, and the last
    token, which is never fed back.

    Returns: how many tokens; rows times layers that were launched, and that the full model launches; rows times experts
        that the routers chose in the launched layers, and those of them that a budget left out.
    """
    compute = output.compute
    assert compute is not None
    prompt = len(output.prompt_token_ids) - output.num_cached_tokens
    tokens = sum(len(completion.token_ids) - 1 for completion in output.outputs)
    experts = compute.full_expert_rows - prompt * sum(compute.segment_experts)
    layer_rows = compute.layer_rows - num_layers * prompt
    return tokens, layer_rows, num_layers * tokens, experts, compute.skipped_experts


def _served(llm: OfflineEngine, prompts: Sequence[list[int]], params: Sequence[SamplingParams], progress: bool):
    from tqdm import tqdm

    name = ", ".join(f"{layer}: {p}" for layer, p in params[0].exit_thresholds.items())
    with tqdm(total=len(prompts), desc=f"{{{name}}}", unit="request", disable=not progress or None) as bar:
        for start in range(0, len(prompts), _GROUP):
            part = [list(prompt) for prompt in prompts[start : start + _GROUP]]
            yield llm.generate(part, params[start : start + len(part)], use_tqdm=False)
            bar.update(len(part))


def _measured(record: dict[str, Any]) -> Measured:
    losses_X = np.frombuffer(zlib.decompress(base64.b64decode(record["losses"])), dtype="<f4")
    return Measured(
        losses_NT=losses_X.reshape(-1, record["max_tokens"]),
        layers_share=record["layers_share"],
        experts_share=record["experts_share"],
        decoded=record["decoded"],
    )
