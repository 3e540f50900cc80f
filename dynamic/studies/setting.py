"""The setting that a study measures: a contract, or raw thresholds and budgets."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...kernels.api.ranges import check_ranges
from ..contract.catalog import CERTIFICATES, nearest, spent_under
from ..contract.certificate import RequestFacts
from ..contract.quality_config import QualityConfig
from ..contract.resolve import Contracts
from ..engine.quality import Quality
from ..engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from ..llm import LLM
    from ..model.decoder import Decoder

EXPERT_RULES = ("contribution", "router_weight")


@dataclass(frozen=True, kw_only=True)
class StudiedQuality(QualityConfig):
    """What the requests of a study ask for. Nothing at all is ``exact``.

    Arguments:
        alpha: risk of a contract; null asks for none.
        delta: of the contract.
        uncertified: take the settings of the contract's certificate even where it does not hold here (another dtype, a
            cap on the experts beside it); the result says that it is uncertified.
        exit_threshold: without a contract: calibrated probability from which on a row exits, the same at every exit.
        exit_thresholds: likewise by exit, {layers: probability}; wins over exit_threshold.
        expert_keep: without a contract: share of the calibrated contributions that a token's experts reach.
        expert_share: likewise, but the share of the chosen experts that is to be executed; the study looks for the
            expert_keep that does it.
        expert_rule: by what experts are dropped: contribution (weight times calibrated scale) or router_weight.
        experts_per_token: most experts that a decoded token uses in a layer, beside those always on.
    """

    alpha: float | None = None
    delta: float = 0.05
    uncertified: bool = False
    exit_threshold: float | None = None
    exit_thresholds: dict[int, float] = field(default_factory=dict)
    expert_keep: float | None = None
    expert_share: float | None = None
    expert_rule: str = "contribution"
    experts_per_token: int | None = None

    def __post_init__(self) -> None:
        if self.expert_rule not in EXPERT_RULES:
            raise ValueError(f"quality.expert_rule must be one of {', '.join(EXPERT_RULES)}, not {self.expert_rule!r}")
        check_ranges(self, "alpha", "delta", where="quality.", above=0, below=1)
        check_ranges(self, "exit_threshold", "exit_thresholds", where="quality.", least=0, most=1)
        check_ranges(self, "expert_keep", "expert_share", where="quality.", above=0, most=1)
        check_ranges(self, "experts_per_token", where="quality.", least=1)
        if self.expert_share is not None and (self.expert_keep is not None or self.alpha is not None):
            raise ValueError(
                "quality.expert_share looks for an expert_keep; give neither expert_keep nor alpha with it"
            )
        raw = [name for name in ("exit_threshold", "expert_keep") if getattr(self, name) is not None]
        raw += ["exit_thresholds"] if self.exit_thresholds else []
        raw += [] if self.uncertified or self.experts_per_token is None else ["experts_per_token"]
        raw += [] if self.uncertified or self.expert_rule == EXPERT_RULES[0] else ["expert_rule"]
        if self.alpha is not None and raw:
            both = raw[0] in ("experts_per_token", "expert_rule")
            advice = "; quality.uncertified=true measures both" if both else ""
            raise ValueError(f"quality.alpha and quality.{raw[0]} contradict each other: give one of them{advice}")


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A setting for one model.

    Arguments:
        params: greedy; ``max_tokens`` is the study's.
        certificate: whose settings they are, if a contract chose them; promised: whether it holds for what runs.
        reason: in words, where there is a contract.
    """

    params: SamplingParams
    certificate: str | None = None
    promised: bool = False
    reason: str | None = None

    def facts(self) -> dict[str, Any]:
        """For the record."""
        return {
            "certificate": self.certificate,
            "promised": self.promised,
            "reason": self.reason,
            "exit_thresholds": {str(layer): p for layer, p in self.params.exit_thresholds.items()},
            "expert_keep": self.params.expert_keep,
            "experts_per_token": self.params.experts_per_token,
        }


def resolve(quality: StudiedQuality, llm: LLM, max_tokens: int) -> Resolved:
    """What the requests of a study spend on a model.

    Raises:
        ValueError: for a level, a threshold or a budget that cannot be kept, or certificates that cannot be read.
    """
    exact = SamplingParams(temperature=0.0, max_tokens=max_tokens, detokenize=False)
    if quality.alpha is not None:
        contract = Quality(alpha=quality.alpha, delta=quality.delta)
        if quality.uncertified:
            return _uncertified(quality, contract, llm, exact)
        spends, outcome = llm.engine.contracts.resolve(contract, replace(exact, quality=contract), max_tokens)
        covered = outcome.certified_tokens or 0
        held = outcome.certificate is not None and max_tokens <= covered
        beyond = (
            "" if held or not covered else f"; it covers {covered} tokens, here its settings run for all {max_tokens}"
        )
        reason = outcome.reason + beyond
        return Resolved(params=spends, certificate=outcome.certificate, promised=held, reason=reason)
    thresholds = dict(quality.exit_thresholds)
    if quality.exit_threshold is not None and not thresholds:
        probed = [e.after_layers for e in llm.model.decoder.exits.values() if e.probe is not None]
        if not probed:
            raise ValueError(f"quality.exit_threshold={quality.exit_threshold}: {llm.model.name} has no exits")
        thresholds = dict.fromkeys(probed, quality.exit_threshold)
    if not thresholds and quality.expert_keep is None and quality.experts_per_token is None:
        return Resolved(params=exact)
    params = replace(
        exact,
        quality=None,
        exit_thresholds=thresholds,
        expert_keep=quality.expert_keep,
        experts_per_token=quality.experts_per_token,
    )
    return Resolved(params=params)


def find_keep(executed_share: Callable[[float], float], wanted: float, rounds: int = 12) -> float:
    """The ``expert_keep`` whose executed share of the experts comes closest to what is wanted, by bisection.

    Arguments:
        executed_share: function from a keep to the share that it executes, which rises with it.
    """
    low, high, best = 0.0, 1.0, (math.inf, 1.0)
    for _ in range(rounds):
        middle = (low + high) / 2
        share = executed_share(middle)
        best = min(best, (abs(share - wanted), middle))
        low, high = (low, middle) if share > wanted else (middle, high)
    return best[1]


def by_router_weight(decoder: Decoder) -> None:
    """Let a decoder drop experts by the router's weight, without the calibrated scales; the layers' shares stay."""
    decoder.layers = tuple(replace(layer, contribution_scale_E=None) for layer in decoder.layers)
    decoder.stack = decoder.make_stack()


def _uncertified(quality: StudiedQuality, contract: Quality, llm: LLM, exact: SamplingParams) -> Resolved:
    directory = Path(quality.certificates).expanduser() if quality.certificates else llm.model.path / CERTIFICATES
    if not directory.is_dir():
        raise ValueError(f"no such directory of certificates: {directory}")
    contracts = Contracts(nearest(directory, llm.certificates.running)[0])
    facts = RequestFacts(greedy=True, temperature=0.0, max_tokens=exact.max_tokens or 1, adjusted=False)
    found = contracts.resolve(contract.alpha, contract.delta, facts)
    certificate = found.certificate
    spends = replace(exact, quality=None) if certificate is None else spent_under(certificate, exact)
    as_calibrated = quality.experts_per_token is None and quality.expert_rule == EXPERT_RULES[0]
    valid = {other.id for other in llm.catalog.contracts.certificates}
    covered = certificate is not None and facts.max_tokens <= certificate.scope.max_tokens
    holds = certificate is not None and covered and as_calibrated and certificate.id in valid
    return Resolved(
        params=spends
        if quality.experts_per_token is None
        else replace(spends, experts_per_token=quality.experts_per_token),
        certificate=None if certificate is None else certificate.id,
        promised=holds,
        reason=found.reason + ("" if holds else "; its settings run without a promise"),
    )
