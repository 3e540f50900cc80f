"""Which experts to drop, and what to do with the rest: ``python benchmarks/expert_budget_rules.py MODEL``.

Held-out text runs through the model with every position on a budget, under several rules, each set so that an equal
share of the experts is skipped. Reported: the mean KL divergence of the next-token distribution from the full model's,
and the share of positions whose most likely token is unchanged. The model must have been through ``dynamoe experts``.
Written to ``results/expert_budget_rules_NAME.json``.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from benchmark import command_line, name_of, surroundings, write
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.llm import LLM
from dynamoe.dynamic.model.decoder import Decoder
from dynamoe.dynamic.model.prompt_pass import fresh_cache
from dynamoe.exits.segments import Segment
from dynamoe.kernels.api.types import ExpertBudget, Routing
from dynamoe.moe.contribution import keep_by_layer
from exits_curve import chosen_prompts

ROUNDS = 12  # of the search for the setting that skips the wanted share
STEP = 8  # windows that run at once


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How a budget is spent.

    Arguments:
        calibrated: by estimated contribution, otherwise by the router's weight.
        spread: over the layers by their impact, otherwise the same share everywhere.
        raise_weights: kept weights are raised so that a row's sum is unchanged.
    """

    calibrated: bool
    spread: bool
    raise_weights: bool = False


RULES = {
    "router weight, same share": Rule(calibrated=False, spread=False),
    "contribution, same share": Rule(calibrated=True, spread=False),
    "router weight, spread": Rule(calibrated=False, spread=True),
    "contribution, spread": Rule(calibrated=True, spread=True),
    "contribution, spread, weights raised": Rule(calibrated=True, spread=True, raise_weights=True),
}


class RuledBackend:
    """A decoder's backend that limits experts by a rule."""

    def __init__(self, backend: Any, rule: Rule) -> None:
        self._backend, self._rule = backend, rule

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def limit_experts(self, routing: Routing, scale_E: torch.Tensor | None, *limits: torch.Tensor) -> Routing:
        limited = self._backend.limit_experts(routing, scale_E if self._rule.calibrated else None, *limits)
        if not self._rule.raise_weights:
            return limited
        factor_T1 = routing.weights_TK.sum(-1, keepdim=True) / limited.weights_TK.sum(-1, keepdim=True)
        return replace(limited, weights_TK=limited.weights_TK * factor_T1)


def log_probabilities(
    decoder: Decoder, windows_NL: torch.Tensor, keep_L: list[float] | None
) -> Iterator[tuple[torch.Tensor, int]]:
    """Of every next token, a few windows at a time, and how many experts were skipped."""
    spec, length = decoder.spec, windows_NL.shape[1]
    whole = Segment(index=0, layers=range(spec.num_layers))
    for part_NL in windows_NL.split(STEP):
        rows = part_NL.numel()
        kv, batch = fresh_cache(decoder, [length] * len(part_NL))
        budget = None
        if keep_L is not None:
            budget = ExpertBudget(
                keep_TL=torch.tensor(keep_L).repeat(rows, 1),
                cap_TL=torch.full((rows, spec.num_layers), 2**31 - 1, dtype=torch.int32),
                skipped_T=torch.zeros(rows, dtype=torch.int64),
            )
        x_TD = decoder.run_segment(whole, decoder.embed(part_NL.flatten()), kv, batch, budget=budget)
        skipped = 0 if budget is None else int(budget.skipped_T.sum())
        yield decoder.logits(x_TD).log_softmax(-1), skipped


def measure(decoder: Decoder, windows_NL: torch.Tensor, rule: Rule, share: float) -> dict[str, float]:
    """Set a rule so that it skips a share of the experts, and compare with the full model."""
    ruled = copy.copy(decoder)
    ruled.stack, ruled.backend = None, cast(Any, RuledBackend(decoder.backend, rule))
    impacts = [decoder.expert_impacts[n] for n in range(decoder.spec.num_layers)]
    experts = decoder.spec.experts_in(range(decoder.spec.num_layers))

    def keeps(keep: float) -> list[float]:
        return keep_by_layer(keep, impacts if rule.spread else [1.0] * len(impacts))

    low, high = 0.0, 1.0
    few_NL = windows_NL[:STEP]
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        skipped = sum(count for _, count in log_probabilities(ruled, few_NL, keeps(middle)))
        low, high = (low, middle) if skipped < share * experts * few_NL.numel() else (middle, high)
    divergence, same, skipped = 0.0, 0, 0
    full = log_probabilities(decoder, windows_NL, None)
    for (expected_TV, _), (found_TV, count) in zip(
        full, log_probabilities(ruled, windows_NL, keeps(high)), strict=True
    ):
        divergence += float((expected_TV.exp() * (expected_TV - found_TV)).sum())
        same += int((expected_TV.argmax(-1) == found_TV.argmax(-1)).sum())
        skipped += count
    rows = windows_NL.numel()
    return {"keep": high, "skipped": skipped / (experts * rows), "kl": divergence / rows, "same_choice": same / rows}


def main() -> None:
    parser = command_line(__doc__, name=True, output=True)
    parser.add_argument("model", help="a model with calibrated experts in every layer: a name or a directory")
    parser.add_argument("--text", choices=("reference", "corpus"), default="reference")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--length", type=int, default=128, help="tokens per window, at most 192 with --text corpus")
    parser.add_argument("--skip", type=float, nargs="*", default=[0.1, 0.2, 0.3], help="shares of the experts")
    options = parser.parse_args()
    llm = LLM(resolve_model(options.model), dtype="float32", device="cpu", max_num_seqs=1)
    prompts = chosen_prompts(llm, options.text, options.windows, options.length)
    windows_NL = torch.tensor([prompt.tokens for prompt in prompts])
    points = []
    for share in options.skip:
        for name, rule in RULES.items():
            points.append({"rule": name, "wanted": share, **measure(llm.model.decoder, windows_NL, rule, share)})
            found = points[-1]
            print(f"{name:40} skipped {found['skipped']:.3f}  KL {found['kl']:.5f}  same {found['same_choice']:.2%}")
    name = name_of(options)
    result = {
        "model": name,
        "text": options.text,
        "windows": len(windows_NL),
        "length": options.length,
        **surroundings(),
        "points": points,
    }
    write(options.output / f"expert_budget_rules_{name}.json", result)


if __name__ == "__main__":
    main()
