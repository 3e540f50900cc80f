"""Requests served at a setting and by the full model in turns: losses, executed work, time.

Shape suffixes: N requests, G groups of requests that are timed together; all float64.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..contract.calibration_runs import decoded_work
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
    """What requests lost and took.

    Arguments:
        losses_N: share of served tokens that are not the reference's choice after the served prefix, float64.
        executed: see :func:`executed`.
        throughput: output tokens per second, prompts included in the time, and the ratio to the full model's; the
            intervals resample groups.
    """

    losses_N: np.ndarray
    executed: dict[str, Estimate]
    throughput: dict[str, Estimate]


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
    losses, every, times, full_times = [], [], [], []
    for number, part in enumerate(np.array_split(np.arange(len(prompts)), min(groups, len(prompts)))):
        chosen = [list(prompts[place]) for place in part]
        timed = {}
        for setting in (full, params) if number % 2 else (params, full):
            timed[setting is params] = _timed(llm, chosen, setting)
        outputs, *spent = timed[True]
        times.append(spent)
        full_times.append(timed[False][1:])
        losses.append(disagreements(reference, outputs))
        every += outputs
        done(len(chosen))
    (tokens_G, seconds_G), (full_tokens_G, full_seconds_G) = np.array(times).T, np.array(full_times).T
    throughput = {
        "tokens_per_second": ratio(tokens_G, seconds_G),
        "full_tokens_per_second": ratio(full_tokens_G, full_seconds_G),
        "speed": ratio(tokens_G / seconds_G, full_tokens_G / full_seconds_G),
    }
    return Served(losses_N=np.concatenate(losses), executed=executed(every, llm.model.spec), throughput=throughput)


def _timed(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> tuple[list[RequestOutput], float, float]:
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return outputs, float(sum(len(o.outputs[0].token_ids) for o in outputs)), time.perf_counter() - started


def executed(outputs: Sequence[RequestOutput], spec: ModelSpec) -> dict[str, Estimate]:
    """Work per decoded token, and shares of the full model's; nothing where no token was decoded.

    Prompts, which run in full, are left out, and so is each output's first token, which comes from the prompt. The LM
    head, which is never saved, counts in ``flops``, as do the keys and values of skipped layers.
    """
    works = [decoded_work(output, spec.num_layers) for output in outputs]
    tokens_N, rows_N, full_rows_N, experts_N, skipped_N = np.array(works, dtype=np.float64).T
    if not tokens_N.sum():
        return {}
    found = {"layers_per_token": ratio(rows_N, tokens_N), "layers_share": ratio(rows_N, full_rows_N)}
    if experts_N.sum():
        found["experts_per_layer"] = ratio(experts_N - skipped_N, rows_N)
        found["experts_share"] = ratio(experts_N - skipped_N, experts_N)
    ran_N = np.array([_layer_flops(output, spec) for output in outputs], dtype=np.float64)
    full_N, head_N = full_layer_flops(spec, 1) * tokens_N, head_flops(spec, 1) * tokens_N
    return found | {
        "layer_flops_share": ratio(ran_N, full_N),
        "flops_share": ratio(ran_N + head_N, full_N + head_N),
        "mflops_per_token": ratio((ran_N + head_N) / 1e6, tokens_N),
    }


def _layer_flops(output: RequestOutput, spec: ModelSpec) -> int:
    """Of the decoded tokens: attention and experts, and the keys and values of skipped layers."""
    assert output.compute is not None
    prompt = len(output.prompt_token_ids) - output.num_cached_tokens
    ran = layer_flops(spec, output.compute) + projection_flops(spec, output.compute)
    return ran - full_layer_flops(spec, prompt)
