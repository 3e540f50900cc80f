"""``GET /v1/contracts``: the catalog and its monitor. ``POST /v1/contracts/reload``: read the certificates again."""

from __future__ import annotations

from fastapi import APIRouter

from ...dynamic.contract.certificate import Certificate
from ...dynamic.contract.monitor import ContractState
from ..context import ServerContext
from ..contract_metrics import picks, wealth
from ..errors import ApiError, unavailable
from ..json_body import body_route
from ..wire.openai import ReloadRequest
from ..wire.openai_answers import ContractBet, ContractCard, ContractList, ContractScope, HeldOutLoss, error_responses


def contract_routes(context: ServerContext) -> APIRouter:
    """The contracts' endpoints of one server."""
    router = APIRouter(tags=["operation"], route_class=body_route(context.reader))
    manager = context.contracts

    async def described() -> ContractList:
        if not await manager.refresh():
            raise unavailable("The monitor's disk fails.", "monitor_failed")
        catalog = manager.catalog
        return ContractList(
            object="list",
            data=[_card(item, manager.states.get(item.id)) for item in catalog.contracts.certificates],
            refused=list(catalog.refused),
            monitored_share=manager.settings.share,
        )

    @router.get("/v1/contracts", responses=error_responses(401, 500, 503))
    async def list_contracts() -> ContractList:
        """The certificates of the catalog, the boldest first, and the monitor's state of each."""
        return await described()

    @router.post("/v1/contracts/reload", responses=error_responses(400, 401, 403, 408, 409, 413, 429, 500, 503))
    async def reload_contracts(body: ReloadRequest) -> ContractList:
        """Read the certificates' directory again. If a file is invalid, the catalog does not change."""
        try:
            await manager.reload()
        except ValueError as error:
            raise ApiError(409, f"Nothing has changed: {error}.", code="bad_certificates") from error
        return await described()

    return router


def _card(certificate: Certificate, state: ContractState | None) -> ContractCard:
    return ContractCard(
        id=certificate.id,
        object="contract",
        state="unwatched" if state is None else "reverted" if _for_all(state) else "watched",
        alpha=certificate.alpha,
        delta=certificate.delta,
        method=certificate.method,
        requests=certificate.requests,
        loss=certificate.loss,
        created=certificate.created,
        scope=ContractScope(**vars(certificate.scope)),
        exit_thresholds={str(layers): value for layers, value in sorted(certificate.exit_thresholds.items())},
        expert_budget=dict(certificate.expert_budget),
        reference=dict(certificate.reference),
        speed=certificate.held_out.speed,
        evidence=bool(certificate.evidence),
        held_out=HeldOutLoss(**vars(certificate.held_out)),
        monitor=None if state is None else _bet(state),
    )


def _for_all(state: ContractState) -> bool:
    """Whether it is reverted for everybody, or for all tenants that there were."""
    return state.process.fired or 0 < state.bets.tenants == state.bets.reverted


def _bet(state: ContractState) -> ContractBet:
    return ContractBet(
        picks=picks(state),
        running=state.picks.running,
        pending=state.picks.pending,
        interrupted=state.picks.interrupted,
        losses=state.bets.losses,
        realised_risk=state.bets.mean,
        wealth=wealth(state),
        fires_at=1 / state.process.delta,
        fired_at_loss=state.bets.fired_at if state.process.fired_at is None else state.process.fired_at,
        tenants=state.bets.tenants,
        reverted_tenants=state.bets.reverted,
        everybody=state.process.fired,
    )
