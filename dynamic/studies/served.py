"""Requests served at a setting and by the full model in turns: losses, executed work, time.

Shape suffixes: N requests, G groups of requests that are timed together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..contract.calibration_runs import decoded_layers
from ..contract.intervals import Estimate, ratio
from ..contract.served_loss import disagreements
from ..model.flops import full_layer_flops, head_flops, layer_flops, projection_flops

if TYPE_CHECKING:
    from ..engine.outputs import RequestOutput
    from ..engine.sampling_params import SamplingParams
    from ..llm import LLM
    from ..model.decoder import Decoder
    from ..model.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Served:
    """Float64, by request (N,) or by group (G,). Work is that of decoded tokens: prompts, which run in full, are left
    out, and so is each output's first token, which comes from the prompt.

    Arguments:
        losses_N: share of served tokens that are not the reference's choice after the served prefix.
        decoded_N: tokens decoded behind the prompts' own.
        layer_rows_N, full_layer_rows_N: rows times layers, launched and of the full model.
        expert_rows_N, full_expert_rows_N: rows times experts, launched and without a budget in the layers that ran.
        layer_flops_N, full_layer_flops_N: attention and experts; head_flops_N: the LM head, which is never saved;
            projection_flops_N: keys and values of skipped layers.
        tokens_G, seconds_G: of the setting; full_tokens_G, full_seconds_G: of the full model.
    """

    losses_N: np.ndarray
    decoded_N: np.ndarray
    layer_rows_N: np.ndarray
    full_layer_rows_N: np.ndarray
    expert_rows_N: np.ndarray
    full_expert_rows_N: np.ndarray
    layer_flops_N: np.ndarray
    full_layer_flops_N: np.ndarray
    head_flops_N: np.ndarray
    projection_flops_N: np.ndarray
    tokens_G: np.ndarray
    seconds_G: np.ndarray
    full_tokens_G: np.ndarray
    full_seconds_G: np.ndarray

    def executed(self) -> dict[str, Estimate]:
        """Work per decoded token, and shares of the full model's.

        Raises:
            ValueError: when no token was decoded.
        """
        found = {
            "layers_per_token": ratio(self.layer_rows_N, self.decoded_N),
            "layers_share": ratio(self.layer_rows_N, self.full_layer_rows_N),
        }
        if self.full_expert_rows_N.sum():
            found["experts_per_layer"] = ratio(self.expert_rows_N, self.layer_rows_N)
            found["experts_share"] = ratio(self.expert_rows_N, self.full_expert_rows_N)
        ran_N = self.layer_flops_N + self.projection_flops_N
        return found | {
            "layer_flops_share": ratio(ran_N, self.full_layer_flops_N),
            "flops_share": ratio(ran_N + self.head_flops_N, self.full_layer_flops_N + self.head_flops_N),
            "mflops_per_token": ratio((ran_N + self.head_flops_N) / 1e6, self.decoded_N),
        }

    def throughput(self) -> dict[str, Estimate]:
        """Output tokens per second, prompts included in the time, and the ratio to the full model's; the intervals
        resample groups."""
        tokens, full = self.tokens_G / self.seconds_G, self.full_tokens_G / self.full_seconds_G
        return {
            "tokens_per_second": ratio(self.tokens_G, self.seconds_G),
            "full_tokens_per_second": ratio(self.full_tokens_G, self.full_seconds_G),
            "speed": ratio(tokens, full),
        }


def serve_in_turns(
    llm: LLM,
    reference: Decoder,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    groups: int,
    done: Callable[[int], object] = lambda requests: None,
) -> Served:
    """Serve requests group by group, the full model and the setting in turns, and judge what the setting served.

    Arguments:
        reference: judges, with all its layers and experts.
        params: the setting, greedy.
        groups: at most as many as there are requests.
        done: called after each group with the number of its requests.
    """
    full = replace(params, quality="exact", exit_thresholds={}, expert_keep=None, experts_per_token=None)
    for setting in (full, params):  # compiled kernels, measured segments
        llm.generate([list(prompts[0])], replace(setting, max_tokens=min(4, params.max_tokens or 4)), use_tqdm=False)
    losses, rows, times, full_times = [], [], [], []
    for number, part in enumerate(np.array_split(np.arange(len(prompts)), min(groups, len(prompts)))):
        chosen = [list(prompts[place]) for place in part]
        timed = {}
        for setting in (full, params) if number % 2 else (params, full):
            timed[setting is params] = _timed(llm, chosen, setting)
        outputs, *spent = timed[True]
        times.append(spent)
        full_times.append(timed[False][1:])
        losses.append(disagreements(reference, outputs))
        rows += [_work(output, llm.model.spec) for output in outputs]
        done(len(chosen))
    columns = np.array(rows, dtype=np.float64).T
    (tokens_G, seconds_G), (full_tokens_G, full_seconds_G) = np.array(times).T, np.array(full_times).T
    names = ("decoded", "layer_rows", "full_layer_rows", "expert_rows", "full_expert_rows")
    names += ("layer_flops", "full_layer_flops", "head_flops", "projection_flops")
    return Served(
        losses_N=np.concatenate(losses),
        **{f"{name}_N": column for name, column in zip(names, columns, strict=True)},
        tokens_G=tokens_G,
        seconds_G=seconds_G,
        full_tokens_G=full_tokens_G,
        full_seconds_G=full_seconds_G,
    )


def _timed(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> tuple[list[RequestOutput], float, float]:
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return outputs, float(sum(len(o.outputs[0].token_ids) for o in outputs)), time.perf_counter() - started


def _work(output: RequestOutput, spec: ModelSpec) -> tuple[float, ...]:
    compute = output.compute
    assert compute is not None
    prompt = len(output.prompt_token_ids) - output.num_cached_tokens
    decoded = len(output.outputs[0].token_ids) - 1
    rows, full_rows = decoded_layers(output, spec.num_layers)
    full_experts = compute.full_expert_rows - prompt * sum(compute.segment_experts)
    return (
        decoded,
        rows,
        full_rows,
        full_experts - compute.skipped_experts,
        full_experts,
        layer_flops(spec, compute) - full_layer_flops(spec, prompt),
        full_layer_flops(spec, decoded),
        head_flops(spec, decoded),
        projection_flops(spec, compute),
    )
