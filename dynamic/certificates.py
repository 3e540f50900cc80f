"""The certificates that a server may use: read, and held against what runs."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..exits.certificate import RequestFacts, differences, load_certificate
from ..exits.contracts import Contracts
from .deployment import deployment
from .quality import ContractOutcome, Quality
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..exits.certificate import Scalar
    from .engine.engine import Engine

CERTIFICATES = "certificates"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """Contracts that an engine may run requests under.

    Arguments:
        contracts: valid for what runs.
        refused: why others are not, one sentence each.
    """

    contracts: Contracts = field(default_factory=Contracts)
    refused: tuple[str, ...] = ()

    def settle(
        self, quality: Quality, params: SamplingParams, max_tokens: int
    ) -> tuple[SamplingParams, ContractOutcome]:
        """What a request spends, as raw settings or ``exact``, and what to tell its caller.

        Arguments:
            max_tokens: the longest output that it may get.
        """
        facts = RequestFacts(
            greedy=params.greedy,
            temperature=params.temperature,
            max_tokens=max_tokens,
            adjusted=adjusts_scores(params),
        )
        found = self.contracts.resolve(quality.alpha, quality.delta, facts)
        reason = found.reason
        if found.certificate is None and self.refused:
            reason = f"{reason}; refused: {'; '.join(self.refused)}"
        outcome = ContractOutcome(
            quality=quality, certificate=found.certificate.id if found.certificate else None, reason=reason
        )
        if found.certificate is None:
            return replace(params, quality="exact"), outcome
        keep = found.certificate.expert_budget.get("expert_keep")
        spends = replace(
            params,
            quality=None,
            exit_thresholds=dict(found.certificate.exit_thresholds),
            expert_keep=None if keep is None else float(keep),
        )
        return spends, outcome


def offer_for(engine: Engine, directory: Path | None) -> Offer:
    """What an engine may offer.

    Arguments:
        directory: of certificates; None takes those that lie beside the model, if any do.

    Raises:
        ValueError: see :func:`read_offer`.
    """
    found = engine.model.path / CERTIFICATES if directory is None else directory
    if directory is None and not found.is_dir():
        return Offer()
    return read_offer(found, deployment(engine.model, engine.runner.exits))


def read_offer(directory: Path, running: Mapping[str, Scalar]) -> Offer:
    """The certificates of a directory that hold for what runs; others are refused, with the reason in the log.

    Raises:
        ValueError: for a directory that is not there, a file that is no certificate, or two that contradict each other.
    """
    if not directory.is_dir():
        raise ValueError(f"no such directory of certificates: {directory}")
    valid, refused = [], []
    for file in sorted(directory.glob("*.json")):
        certificate = load_certificate(file)
        different = differences(certificate.deployment, running)
        if different:
            refused.append(f"certificate {certificate.id}: {', '.join(different)}")
            logger.warning("refused %s", refused[-1])
        else:
            valid.append(certificate)
    return Offer(contracts=Contracts(valid), refused=tuple(refused))


def adjusts_scores(params: SamplingParams) -> bool:
    """Whether a request's own settings change what the model would choose, cut its distribution, or forbid its end."""
    penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
    cut = not params.greedy and (params.top_p < 1 or params.top_k > 0 or params.min_p > 0)
    return bool(penalised or params.logit_bias or params.min_tokens or params.ignore_eos or cut)
