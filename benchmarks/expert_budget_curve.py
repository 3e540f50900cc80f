"""What expert budgets give up and save, through the engine: ``python benchmarks/expert_budget_curve.py MODEL``.

Held-out prompts are continued greedily at several settings of ``expert_keep`` and ``experts_per_token``. One full pass
over what was served tells which token the full model would have chosen after each *served* prefix. Per setting: the
share of served tokens that are not that token, with a 95 % interval by resampling requests; the share of experts that
was launched for decoded tokens, counted from ``RequestOutput.compute``; tokens per second, each setting beside a run
of the full model. The model must have been through ``dynamoe experts``. Written to
``results/expert_budget_curve_NAME.json``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmark import write
from dynamoe.dynamic.engine.outputs import RequestOutput
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.llm import LLM
from exits_curve import Prompts, compared, curve_command_line, facts, load, timed


def executed_share(outputs: list[RequestOutput], experts_per_row: int) -> float:
    """Experts launched for decoded tokens as a share of what the routers chose; prompts use all and are left out."""
    full = experts_per_row * sum(len(o.outputs[0].token_ids) - 1 for o in outputs)
    return 1 - sum(o.compute.skipped_experts for o in outputs if o.compute is not None) / full


def measure(llm: LLM, prompts: Prompts, settings: list[dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    """One record per setting, no budget first."""
    exact = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    experts = llm.model.spec.experts_in(range(llm.model.spec.num_layers))
    timed(llm, prompts.tokens[:2], exact)
    points = []
    for setting in ({}, *settings):
        params = replace(exact, quality=None, **setting) if setting else exact
        outputs, _, figures = compared(llm, prompts, exact, params)
        points.append({**setting, **figures, "executed_expert_share": executed_share(outputs, experts)})
        print(row(setting, points[-1]), flush=True)
    return points


def row(setting: dict[str, Any], point: dict[str, Any]) -> str:
    """One line of the table."""
    name = ", ".join(f"{key}={value}" for key, value in setting.items()) or "all experts"
    low, high = point["interval_95"]
    speed = point["tokens_per_second"] / point["full_tokens_per_second"]
    loss = f"{point['disagreement']:.2%} | {low:.2%} … {high:.2%}"
    return f"| {name} | {loss} | {point['executed_expert_share']:.1%} | {speed:.2f} |"


def main() -> None:
    parser = curve_command_line(__doc__)
    parser.add_argument("--keep", type=float, nargs="*", default=[0.95, 0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--experts", type=int, nargs="*", default=[1], help="settings of experts_per_token")
    options = parser.parse_args()
    llm, prompts = load(options)
    print("| budget | differs | 95 % interval | experts executed | speed |\n|---|---:|---:|---:|---:|")
    settings: list[dict[str, Any]] = [{"expert_keep": keep} for keep in options.keep]
    settings += [{"experts_per_token": count} for count in options.experts]
    points = measure(llm, prompts, settings, options.tokens)
    result = facts(options, prompts) | {"points": points}
    write(options.output / f"expert_budget_curve_{result['model']}.json", result)


if __name__ == "__main__":
    main()
