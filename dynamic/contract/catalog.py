"""The contract catalog: certificates that are read from disk and valid for the running deployment."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ...exits.sidecar import backbone_hash
from ..engine.logits_processors import changes_distribution, processor_classes
from ..engine.protocols import LogitsProcessor
from ..engine.quality import ContractOutcome, Quality
from ..engine.sampling_params import SamplingParams
from .certificate import OutdatedCertificate, RequestFacts, differences, load_certificate
from .deployment import deployment
from .resolve import Contracts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ..engine.engine import Engine
    from .certificate import Certificate, Scalar

CERTIFICATES = "certificates"
_BITS = ("quantisation", "dtype", "keys_and_values")
_OTHER_BITS = "an engine runs in the precision that it was started with, so start one with that of the certificate"
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ContractCatalog:
    """Contracts that an engine may run requests under: a :class:`..engine.contracts.ContractResolver`.

    Arguments:
        contracts: valid for the running deployment.
        refused: why other certificates are not valid, one sentence each.
        processors: classes of the engine's logits processors.
    """

    contracts: Contracts = field(default_factory=Contracts)
    refused: tuple[str, ...] = ()
    processors: Sequence[type[LogitsProcessor]] = processor_classes()

    def resolve(
        self, quality: Quality, params: SamplingParams, max_tokens: int
    ) -> tuple[SamplingParams, ContractOutcome]:
        """A request's settings, as raw settings or ``exact``, and the outcome for its caller.

        Arguments:
            max_tokens: its longest possible output.
        """
        facts = RequestFacts(
            greedy=params.greedy,
            temperature=params.temperature,
            max_tokens=max_tokens,
            stops=bool(params.stop or params.stop_token_ids),
            ignore_eos=params.ignore_eos,
            adjusted=adjusts_scores(params, self.processors),
            constrained=params.structured_outputs is not None,
        )
        found = self.contracts.resolve(quality.alpha, quality.delta, facts)
        reason = found.reason
        if found.certificate is None and self.refused:
            reason = f"{reason}; refused: {'; '.join(self.refused)}"
        if found.certificate is None:
            return replace(params, quality="exact"), ContractOutcome(quality=quality, certificate=None, reason=reason)
        outcome = ContractOutcome(
            quality=quality,
            certificate=found.certificate.id,
            reason=reason,
            certified_tokens=found.certificate.scope.max_tokens,
        )
        return spent_under(found.certificate, params), outcome


class CertificateSource:
    """Reads an engine's certificates, repeatedly if wanted.

    Arguments:
        engine: whose deployment they must match.
        directory: of certificates; None takes those beside the model, if any.
    """

    def __init__(self, engine: Engine, directory: Path | None = None) -> None:
        self.directory = engine.model.path / CERTIFICATES if directory is None else directory
        self._needed = directory is not None
        self._engine = engine

    @cached_property
    def running(self) -> Mapping[str, Scalar]:
        """The engine's deployment. The first use hashes the model's files and runs it on fixed tokens: nothing else may
        step the engine meanwhile."""
        engine = self._engine
        return deployment(engine.model, engine.runner.exits, engine.logits_plugins, engine.cache_plugins)

    def prepare(self) -> None:
        """Hash the model's weights if there are certificates: the long part of :attr:`running`, beside the engine."""
        if self.directory.is_dir():
            backbone_hash(self._engine.model.path)

    def know_running(self) -> None:
        """Have :attr:`running` if there are certificates, so that :meth:`read` leaves the engine alone."""
        if self.directory.is_dir():
            _ = self.running

    def read(self) -> ContractCatalog:
        """The certificates that are valid for the running deployment; others are refused and the reason is logged.

        A directory may hold certificates of several deployments, as that of ``tiny`` does: of each contract, the
        nearest to the running deployment is read.

        Raises:
            ValueError: naming a missing directory, a file that is not a certificate, or two certificates that conflict.
        """
        if not self.directory.is_dir():
            if self._needed:
                raise ValueError(f"no such directory of certificates: {self.directory}")
            return ContractCatalog()
        valid = []
        certificates, refused = nearest(self.directory, self.running)
        for outdated in refused:
            logger.warning("refused: %s", outdated)
        for certificate in certificates:
            reason = self._refusal(certificate)
            if reason is None:
                valid.append(certificate)
            else:
                refused.append(f"certificate {certificate.id}: {reason}")
                logger.warning("refused %s", refused[-1])
        return ContractCatalog(
            contracts=Contracts(valid), refused=tuple(refused), processors=self._engine.logits_processors
        )

    def _refusal(self, certificate: Certificate) -> str | None:
        if different := differences(certificate.deployment, self.running):
            bits = any(certificate.deployment.get(name) != self.running.get(name) for name in _BITS)
            return ", ".join(different) + (f"; {_OTHER_BITS}" if bits else "")
        if unknown := sorted(certificate.expert_budget.keys() - {"expert_keep", "experts_per_token"}):
            return f"cannot be run: nothing spends the {unknown[0]} of its expert budget"
        try:
            self._engine.check([0], spent_under(certificate, SamplingParams()))
        except ValueError as error:
            return f"cannot be run: {error}"
        return None


def nearest(directory: Path, running: Mapping[str, Scalar]) -> tuple[list[Certificate], list[str]]:
    """The certificates in a directory; of several for the same contract and temperatures, those that differ least from
    the running deployment. And why others, which are outdated, are left out.

    Raises:
        ValueError: naming a file that is not a certificate.
    """
    found: dict[tuple[float, ...], list[tuple[int, Certificate]]] = {}
    outdated = []
    for file in sorted(directory.glob("*.json")):
        try:
            certificate = load_certificate(file)
        except OutdatedCertificate as error:
            outdated.append(str(error))
            continue
        scope = certificate.scope
        contract = certificate.alpha, certificate.delta, scope.lowest_temperature, scope.highest_temperature
        distance = len(differences(certificate.deployment, running))
        found.setdefault(contract, []).append((distance, certificate))
    kept = []
    for candidates in found.values():
        least = min(distance for distance, _ in candidates)
        kept += [certificate for distance, certificate in candidates if distance == least]
    return kept, outdated


def spent_under(certificate: Certificate, params: SamplingParams) -> SamplingParams:
    """A request's settings with those of a certificate, as raw settings."""
    keep, cap = (certificate.expert_budget.get(name) for name in ("expert_keep", "experts_per_token"))
    return replace(
        params,
        quality=None,
        exit_thresholds=dict(certificate.exit_thresholds),
        expert_keep=None if keep is None else float(keep),
        experts_per_token=None if cap is None else int(cap),
    )


def adjusts_scores(params: SamplingParams, processors: Iterable[type[LogitsProcessor]]) -> bool:
    """Whether a request's settings change or truncate the model's distribution."""
    cut = not params.greedy and (params.top_p < 1 or params.top_k > 0 or params.min_p > 0)
    return cut or changes_distribution(params, processors)
