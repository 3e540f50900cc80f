"""The ASGI application: an engine behind OpenAI's endpoints."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute

from ..dynamic.contract.full_runs import FullRuns
from ..dynamic.engine.engine import Engine
from ..dynamic.engine.outputs import RequestDelta
from ..dynamic.engine.sampling_params import SamplingParams
from ..version import __version__
from .auth import Authentication, KeyRing
from .bridge import EngineBridge, EngineRequest
from .compute_usage import QUALITY, QUALITY_REASON
from .context import ServerContext
from .contracts import ContractManager
from .errors import install_error_handlers
from .gate import Admission, BodyBudget, Gate
from .json_body import BodyReader
from .messages_writer import MessageErrors
from .metrics import ServerMetrics
from .middleware import HeaderLimit, HostCheck, RequestContext, SlashlessPath, is_loopback
from .request_checks import RequestChecks
from .response_store import ResponseStore
from .routes.chat import chat_routes
from .routes.completions import completion_routes
from .routes.contracts import contract_routes
from .routes.messages import message_routes
from .routes.operations import operation_routes
from .routes.responses import response_routes
from .routes.tokens import token_routes
from .settings import ServerSettings
from .structured import IGNORED_HEADER
from .submission import RequestTimes
from .text import TextPool

OPEN_PATHS = frozenset({"/health", "/ping"})


def make_context(engine: Engine, settings: ServerSettings, contracts: ContractManager) -> ServerContext:
    """Assemble the parts of a server, which owns the engine from here on.

    Arguments:
        engine: not used by anyone else.
        settings: of the server.
        contracts: opened.
    """
    model = engine.model
    name = settings.served_model_name or model.name
    metrics = ServerMetrics(name)

    def on_delta(times: RequestTimes, delta: RequestDelta, made_at: float) -> None:
        try:
            metrics.on_delta(times, delta, made_at)
        finally:
            contracts.on_delta(delta)

    def on_abort(request_ids: Sequence[str]) -> None:
        try:
            metrics.on_abort(len(request_ids))
        finally:
            contracts.ended(request_ids)

    bridge = EngineBridge(
        engine,
        hang_timeout=settings.hang_timeout,
        on_delta=on_delta,
        on_abort=on_abort,
        idle_work=FullRuns(decoder=model.decoder, monitor=lambda: contracts.monitor).work,
    )
    contracts.on_pending, contracts.between_steps = bridge.wake, bridge.call
    text = TextPool(model.tokenizer, settings.text_threads, settings.limits.max_text_characters)
    return ServerContext(
        settings=settings,
        model=model,
        model_name=name,
        max_model_len=engine.max_model_len,
        bridge=bridge,
        contracts=contracts,
        gate=Gate(settings.limits.max_open_requests),
        bodies=BodyBudget(settings.limits.max_bodies_bytes),
        metrics=metrics,
        text=text,
        reader=BodyReader(limits=settings.limits, run=text.run_large),
        checks=RequestChecks(limits=settings.limits, vocab_size=engine.vocab_size, served_model=name),
        responses=ResponseStore(settings.limits.max_stored_responses, settings.limits.max_stored_bytes),
    )


def create_app(context: ServerContext) -> FastAPI:
    """The ASGI application of a server. Its lifespan starts and stops the engine's thread.

    Raises:
        ValueError: the file of API keys cannot be read.
    """
    settings = context.settings

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        context.bridge.start()
        if settings.warm_up:
            await warm_up(context.bridge)
            await context.text.warm_up()
        context.metrics.observe_engine(context.bridge, context.gate)
        context.metrics.observe_contracts(context.contracts)
        yield
        context.text.close()
        await context.bridge.stop()
        await context.contracts.close()

    # The interactive documentation would fetch scripts from elsewhere; /openapi.json holds the same.
    app = FastAPI(
        title="dynamoe",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # SlashlessPath does it without another request
    )
    kinds = (completion_routes, chat_routes, response_routes, message_routes)
    routers = [routes(context) for routes in (*kinds, token_routes, contract_routes, operation_routes)]
    for router in routers:
        app.include_router(router)
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    install_error_handlers(app, routes)

    keys = KeyRing(settings.all_api_keys(), settings.admin_key)
    open_paths = OPEN_PATHS | {"/"} if settings.public_page else OPEN_PATHS
    limits = settings.limits
    # The middleware added last is the outermost.
    app.add_middleware(
        Admission, gate=context.gate, bodies=context.bodies, limits=limits, paths=_paths_of_bodies(routes)
    )
    app.add_middleware(Authentication, keys=keys, open_paths=open_paths)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["DELETE", "GET", "HEAD", "POST"],
            allow_headers=["*"],  # clients add their own, as OpenAI's x-stainless-*; the origin is what counts
            expose_headers=["retry-after", "x-priority", "x-request-id", IGNORED_HEADER, QUALITY, QUALITY_REASON],
        )
    loopback = settings.uds is None and is_loopback(settings.host)
    if settings.allowed_hosts or (loopback and not keys.required):
        app.add_middleware(HostCheck, allowed=settings.allowed_hosts, loopback=loopback)
    app.add_middleware(SlashlessPath)
    app.add_middleware(HeaderLimit, max_bytes=limits.max_header_bytes)
    app.add_middleware(RequestContext, on_done=context.metrics.on_http)
    app.add_middleware(MessageErrors)
    _describe_errors(app)
    return app


def _paths_of_bodies(routes: Sequence[APIRoute]) -> frozenset[str]:
    return frozenset(route.path for route in routes if "POST" in (route.methods or ()))


async def warm_up(bridge: EngineBridge) -> None:
    """Run one tiny request, which starts thread pools and builds lazily built kernels before the first user."""
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    submission = await bridge.submit([EngineRequest(prompt_token_ids=[0, 0], params=params)])
    async for _ in submission.batches():
        pass


def _describe_errors(app: FastAPI) -> None:
    """Remove FastAPI's 422 from the OpenAPI document: such requests get 400 in OpenAI's error format."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return document

    app.openapi = openapi  # type: ignore[method-assign]
