"""``GET /v1/contracts``: what is on offer and how it does. ``POST /v1/contracts/reload``: new certificates."""

from __future__ import annotations

from fastapi import APIRouter

from ...dynamic.contract.certificate import Certificate
from ...dynamic.contract.monitor import ContractState
from ..context import ServerContext
from ..contract_metrics import picks, wealth
from ..errors import ApiError, unavailable
from ..wire.openai_answers import ContractBet, ContractCard, ContractList, ContractScope, HeldOutLoss, error_responses


def contract_routes(context: ServerContext) -> APIRouter:
    """The contracts' endpoints of one server."""
    router = APIRouter(tags=["operation"])
    desk = context.contracts

    async def described() -> ContractList:
        if not await desk.look():
            raise unavailable("The monitor's disk fails.", "monitor_failed")
        catalog = desk.catalog
        return ContractList(
            object="list",
            data=[
                _card(certificate, desk.states.get(certificate.id)) for certificate in catalog.contracts.certificates
            ],
            refused=list(catalog.refused),
            monitored_share=desk.settings.share,
        )

    @router.get("/v1/contracts", responses=error_responses(401, 500, 503))
    async def list_contracts() -> ContractList:
        """The certificates on offer, the boldest first, and what the monitor has seen of each."""
        return await described()

    @router.post("/v1/contracts/reload", responses=error_responses(401, 403, 409, 429, 500, 503))
    async def reload_contracts() -> ContractList:
        """Read the certificates' directory again and offer what is in it now. Where a file is wrong nothing changes."""
        try:
            await desk.reload()
        except ValueError as error:
            raise ApiError(409, f"Nothing has changed: {error}.", code="bad_certificates") from error
        return await described()

    return router


def _card(certificate: Certificate, state: ContractState | None) -> ContractCard:
    scope, held_out = certificate.scope, certificate.held_out
    return ContractCard(
        id=certificate.id,
        object="contract",
        state="unwatched" if state is None else "reverted" if state.process.fired else "watched",
        alpha=certificate.alpha,
        delta=certificate.delta,
        method=certificate.method,
        requests=certificate.requests,
        loss=certificate.loss,
        created=certificate.created,
        scope=ContractScope(**vars(scope)),
        exit_thresholds={str(layers): value for layers, value in sorted(certificate.exit_thresholds.items())},
        expert_budget=dict(certificate.expert_budget),
        held_out=HeldOutLoss(**vars(held_out)),
        monitor=None if state is None else _bet(state),
    )


def _bet(state: ContractState) -> ContractBet:
    return ContractBet(
        picks=picks(state),
        running=state.picks.running,
        pending=state.picks.pending,
        interrupted=state.picks.interrupted,
        losses=state.process.count,
        realised_risk=state.process.mean,
        wealth=wealth(state),
        fires_at=1 / state.process.delta,
        fired_at_loss=state.process.fired_at,
    )
