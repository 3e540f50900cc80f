"""Endpoints about the server itself: models, health, version, metrics, the page."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import FileResponse

from ...version import __version__
from ..context import ServerContext
from ..errors import unavailable
from ..request_checks import check_model
from ..wire.openai_answers import HealthResponse, LoadResponse, ModelCard, ModelList, VersionResponse, error_responses

PAGE = Path(__file__).parents[1] / "static" / "index.html"
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def operation_routes(context: ServerContext) -> APIRouter:
    """The operator's endpoints of one server."""
    router = APIRouter(tags=["operation"])

    def card() -> ModelCard:
        return ModelCard(
            id=context.model_name,
            object="model",
            created=context.started_at,
            owned_by="dynamoe",
            root=context.model.name,
            max_model_len=context.max_model_len,
        )

    @router.head("/v1/models", include_in_schema=False)
    @router.get("/v1/models", tags=["OpenAI"], responses=error_responses(401, 500))
    async def list_models() -> ModelList:
        """The models that are served: one."""
        return ModelList(object="list", data=[card()])

    @router.head("/v1/models/{model:path}", include_in_schema=False)
    @router.get("/v1/models/{model:path}", tags=["OpenAI"], responses=error_responses(401, 404, 500))
    async def retrieve_model(model: str) -> ModelCard:
        """One model."""
        check_model(model, context.model_name)
        return card()

    @router.head("/ping", include_in_schema=False)
    @router.head("/health", include_in_schema=False)
    @router.get("/ping", responses=error_responses(503))
    @router.get("/health", responses=error_responses(503))
    async def health() -> HealthResponse:
        """200 while requests can be served; 503 when the engine is dead or hung, or the server is shutting down."""
        failure = context.bridge.failure()
        if failure is not None:
            raise unavailable(str(failure), failure.code)
        if context.gate.draining:
            raise unavailable("The server is shutting down.", "shutting_down")
        return HealthResponse(status="ok")

    @router.get("/load", responses=error_responses(401, 500))
    async def load() -> LoadResponse:
        """How many requests the server works on, as routers in front of several servers ask."""
        return LoadResponse(server_load=context.gate.num_open)

    @router.get("/version", responses=error_responses(401, 500))
    async def version() -> VersionResponse:
        """The version of the package."""
        return VersionResponse(version=__version__)

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}} | error_responses(401, 403, 500),
    )
    async def metrics() -> Response:
        """Prometheus metrics."""
        await context.contracts.refresh()  # if the disk fails, the states stay as they were
        return Response(context.metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    if context.settings.playground:

        @router.get("/", include_in_schema=False)
        async def page() -> FileResponse:
            """A page to talk to the model."""
            return FileResponse(PAGE, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    return router
