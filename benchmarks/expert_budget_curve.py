"""What expert budgets give up and save, through the engine: ``python benchmarks/expert_budget_curve.py MODEL``.

Held-out prompts are continued greedily at several settings of ``expert_keep`` and ``experts_per_token``. One full pass
over what was served tells which token the full model would have chosen after each *served* prefix. Per setting: the
share of served tokens that are not that token, with a 95 % interval by resampling requests; the share of experts that
was launched for decoded tokens, counted from ``RequestOutput.compute``; tokens per second, each setting beside a run
of the full model. The model must have been through ``dynamoe experts``. Written to
``results/expert_budget_curve_NAME.json``.
"""

from typing import Any

from benchmark import write
from exits_curve import HEADER, curve_command_line, facts, load, measure


def main() -> None:
    parser = curve_command_line(__doc__)
    parser.add_argument("--keep", type=float, nargs="*", default=[0.95, 0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--experts", type=int, nargs="*", default=[1], help="settings of experts_per_token")
    options = parser.parse_args()
    llm, prompts = load(options)
    print(HEADER)
    settings: list[dict[str, Any]] = [{}, *({"expert_keep": keep} for keep in options.keep)]
    settings += [{"experts_per_token": count} for count in options.experts]
    result = facts(options, prompts) | {"points": measure(llm, prompts, settings, options.tokens)}
    write(options.output / f"expert_budget_curve_{result['model']}.json", result)


if __name__ == "__main__":
    main()
