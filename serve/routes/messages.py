"""``/v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..context import ServerContext
from ..conversation import read_conversation
from ..errors import naming
from ..json_body import body_route
from ..messages_input import NAMES, as_chat
from ..messages_writer import MessagesWriter
from ..tools import tool_use
from ..wire.messages import (
    CountTokensRequest,
    MessageAnswer,
    MessageErrorResponse,
    MessagesRequest,
    TokenCount,
)
from ..wire.openai import ChatCompletionRequest
from ..wire.openai_answers import POST_ERRORS
from ..wire.openapi import answer_or_stream

_ERRORS: Any = {code: {"model": MessageErrorResponse} for code in POST_ERRORS}


def message_routes(context: ServerContext) -> APIRouter:
    """The Messages API of one server."""
    router = APIRouter(tags=["Anthropic"], route_class=body_route(context.reader))

    async def chat_request(body: CountTokensRequest) -> ChatCompletionRequest:
        variables: dict[str, Any] = {}
        if body.thinking is not None and body.thinking.type != "adaptive":
            variables = await context.text.thinking_variables(body.thinking.type == "enabled")
        return await context.text.run(as_chat, body, variables)

    @router.post("/v1/messages", responses={**answer_or_stream(MessageAnswer), **_ERRORS})
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation. With ``stream`` the answer is a stream of server-sent events with names."""
        with naming(NAMES):
            chat = await chat_request(body)
            conversation = await read_conversation(context, chat)
            writer = MessagesWriter(id=f"msg_{uuid.uuid4().hex}", model=context.model_name, parts=conversation.parts)
            return await conversation.respond(context, request, chat, writer)

    @router.post("/v1/messages/count_tokens", responses=_ERRORS)
    async def count_tokens(body: CountTokensRequest) -> TokenCount:
        """How many tokens a conversation has."""
        with naming(NAMES):
            chat = await chat_request(body)
            messages, use = context.checks.chat(chat), await context.text.run(tool_use, chat)
            tools = [] if use is None else use.tools
            _, tokens = await context.text.encode_chat(messages, tools=tools, **chat.rendering)
            return TokenCount(input_tokens=len(tokens))

    return router
