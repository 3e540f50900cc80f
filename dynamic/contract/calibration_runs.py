"""Losses of requests at every setting of a path, as the deployed stack serves them; stored, so that a run can resume.

Shape suffixes: M settings, from the safest on; N requests; T tokens of the longest output; K lengths.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.outputs import RequestOutput
from ..engine.sampling_params import GREEDY_EPSILON, SamplingParams
from ..model.kv_cache import group_page_bytes
from .served_loss import token_losses
from .setting_path import Setting

if TYPE_CHECKING:
    from ..engine.offline import OfflineEngine
    from ..model.decoder import Decoder

SHORTEST = 8  # tokens: outputs that are cut before are not covered
_GROUP = 256  # requests that are decoded and judged together


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Losses and executed work of a setting on some requests.

    Arguments:
        losses_NT: of each served token, float32; NaN behind an output's end.
        layers_share: share of the decoded tokens' layers that was launched.
        experts_share: share of these layers' experts that was launched.
        decoded: decoded tokens, without each output's first, which comes from the prompt.
        weight_bytes, full_weight_bytes: of weights, that an output token read, and that it reads with all layers and
            experts at this precision.
        cache_bytes: of keys and values, that an output token read.
        work: what the measurement took: ``requests``, ``tokens`` served; ``rows`` that the engine ran and that it had
            in its prefix cache (``cached_rows``); ``judged_rows`` of the full model and those that needed no pass,
            because another setting had served the same output (``known_rows``); ``seconds`` of serving and judging
            (``judge_seconds``).
    """

    losses_NT: np.ndarray
    layers_share: float
    experts_share: float
    decoded: int
    weight_bytes: float = 0.0
    full_weight_bytes: float = 0.0
    cache_bytes: float = 0.0
    work: Mapping[str, float] = field(default_factory=dict)

    @property
    def bytes_per_token(self) -> float:
        """Of weights and cache."""
        return self.weight_bytes + self.cache_bytes

    @property
    def seconds_per_token(self) -> float:
        """Of serving, prompts included."""
        return self.work["seconds"] / max(1, self.work["tokens"])

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
    def worst_case_cuts_KN(self) -> np.ndarray:
        """:attr:`cut_losses_KN` of requests that go on past the model's end of text, if every further token is lost."""
        filled_NT = np.nan_to_num(self.losses_NT.astype(np.float64), nan=1.0)
        means_NT = filled_NT.cumsum(1) / np.arange(1, filled_NT.shape[1] + 1)
        return np.ascontiguousarray(means_NT[:, min(SHORTEST, filled_NT.shape[1]) - 1 :].T)

    @property
    def worst_cut_N(self) -> np.ndarray:
        """The largest of :attr:`cut_losses_KN` of each request."""
        return self.cut_losses_KN.max(0)

    @property
    def token_loss(self) -> float:
        """The mean over all tokens: long outputs count more than short ones."""
        return float(np.nanmean(self.losses_NT.astype(np.float64)))


class Judge:
    """The full model's verdicts on outputs. A greedy output is judged once, whichever settings serve it.

    Arguments:
        decoder: the full model in the precision that losses are measured against.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.rows = self.known_rows = 0
        self._known: dict[bytes, np.ndarray] = {}

    def losses(self, outputs: Sequence[RequestOutput], temperature: float, served: Decoder) -> list[np.ndarray]:
        """Of every served token of requests with one completion, float64, (T,) each.

        Arguments:
            temperature: of these requests; 0 is greedy.
            served: the decoder that served them; its LM head made the distributions that their tokens were drawn from.
        """
        keys = [_output_key(output) for output in outputs]
        new = {key: output for key, output in zip(keys, outputs, strict=True) if key not in self._known}
        if temperature >= GREEDY_EPSILON:  # a distance depends on how a token was served, not only on the token
            found = token_losses(self.decoder, outputs, temperature, served)
            self.rows += sum(_rows(output) for output in outputs)
            return [losses_T for (losses_T,) in found]
        found = token_losses(self.decoder, list(new.values()), temperature)
        self._known |= {key: losses_T for key, (losses_T,) in zip(new, found, strict=True)}
        rows = sum(_rows(output) for output in new.values())
        self.rows += rows
        self.known_rows += sum(_rows(output) for output in outputs) - rows
        return [self._known[key] for key in keys]


def measure(
    llm: OfflineEngine,
    prompts: Sequence[list[int]],
    setting: Setting,
    max_tokens: int,
    file: Path,
    *,
    temperature: float = 0.0,
    progress: bool = True,
    judge: Judge | None = None,
    deployment: str = "",
) -> Measured:
    """Serve requests at a setting and judge the outputs; or read the result of an earlier run.

    Arguments:
        temperature: of all requests; each has its own seed, the same at every setting.
        file: JSON result, written atomically.
        judge: None: the model that serves, with all its layers and experts.
        deployment: hash of what serves, for the record.

    Raises:
        ValueError: when the file belongs to other requests or another setting.
    """
    facts = {"setting": setting.as_json(), "prompts": prompts_hash(prompts), "max_tokens": max_tokens}
    facts |= {"temperature": temperature} if temperature else {}
    facts |= {"deployment": deployment} if deployment else {}
    facts = json.loads(json.dumps(facts))  # keys become text, as in the file
    if file.exists():
        record = json.loads(file.read_text())
        if {name: record.get(name) for name in facts} != facts:
            raise ValueError(f"{file} holds another measurement; take another output directory")
        return _measured(record)
    judge = judge or Judge(llm.model.decoder)
    judged_before, known_before = judge.rows, judge.known_rows
    found, works, costs, cached = [], [], [], 0
    seconds, judge_seconds, started = 0.0, 0.0, time.perf_counter()
    params = [setting.params(max_tokens, temperature, seed) for seed in range(len(prompts))]
    for outputs in _served(llm, prompts, params, str(setting), progress):
        served = time.perf_counter()
        found += judge.losses(outputs, temperature, llm.model.decoder)
        works += [decoded_work(output, llm.model.spec.num_layers) for output in outputs]
        costs += [_bytes_read(llm, output) for output in outputs]
        cached += sum(output.num_cached_tokens for output in outputs)
        seconds, judge_seconds = seconds + served - started, judge_seconds + time.perf_counter() - served
        started = time.perf_counter()
    decoded, rows, full, experts, skipped = (sum(counts) for counts in zip(*works, strict=True))
    tokens, ran, weights, full_weights, cache = (sum(counts) for counts in zip(*costs, strict=True))
    share = rows / full if full else 1.0
    losses_NT = np.full((len(found), max_tokens), np.nan, dtype=np.float32)
    for row_T, losses_T in zip(losses_NT, found, strict=True):
        row_T[: len(losses_T)] = losses_T
    packed = base64.b64encode(zlib.compress(losses_NT.astype("<f4").tobytes())).decode()
    record = {**facts, "losses": packed, "layers_share": share, "decoded": decoded}
    record["experts_share"] = 1 - skipped / experts if experts else 1.0
    record |= {"weight_bytes": weights / tokens, "full_weight_bytes": full_weights / tokens}
    record["cache_bytes"] = cache / tokens
    record["work"] = {
        "requests": len(found),
        "tokens": tokens,
        "rows": ran,
        "cached_rows": cached,
        "judged_rows": judge.rows - judged_before,
        "known_rows": judge.known_rows - known_before,
        "seconds": seconds,
        "judge_seconds": judge_seconds,
    }
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


def _served(
    llm: OfflineEngine, prompts: Sequence[list[int]], params: Sequence[SamplingParams], name: str, progress: bool
):
    from tqdm import tqdm

    with tqdm(total=len(prompts), desc=name, unit="request", disable=not progress or None) as bar:
        for start in range(0, len(prompts), _GROUP):
            part = [list(prompt) for prompt in prompts[start : start + _GROUP]]
            yield llm.generate(part, params[start : start + len(part)], use_tqdm=False)
            bar.update(len(part))


def _output_key(output: RequestOutput) -> bytes:
    (completion,) = output.outputs
    text = json.dumps([list(output.prompt_token_ids), list(completion.token_ids)])
    return hashlib.sha256(text.encode()).digest()


def _rows(output: RequestOutput) -> int:
    """Of a pass over prompt and output."""
    return len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1


def _bytes_read(llm: OfflineEngine, output: RequestOutput) -> tuple[int, int, int, int, int]:
    """Output tokens, rows that ran, and bytes that were read for these tokens: of weights, of all weights, of keys and
    values."""
    compute, spec = output.compute, llm.model.spec
    assert compute is not None
    size = llm.engine.config.block_size
    page_bytes = group_page_bytes(spec, llm.engine.runner.exits.kv[0].keys_BGPC.dtype, size)
    contexts_T = len(output.prompt_token_ids) + np.arange(len(output.outputs[0].token_ids))
    cache = sum(
        int((contexts_T if window is None else np.minimum(contexts_T, window)).sum()) * each // size
        for window, each in zip(spec.page_windows, page_bytes, strict=True)
    )
    tokens = compute.tokens
    return tokens.count, compute.segment_rows[0], tokens.weight_bytes, tokens.full_weight_bytes, cache


def _measured(record: dict[str, Any]) -> Measured:
    losses_X = np.frombuffer(zlib.decompress(base64.b64decode(record["losses"])), dtype="<f4")
    rest = ("layers_share", "experts_share", "decoded", "weight_bytes", "full_weight_bytes", "cache_bytes", "work")
    return Measured(
        losses_NT=losses_X.reshape(-1, record["max_tokens"]), **{name: record[name] for name in rest if name in record}
    )
