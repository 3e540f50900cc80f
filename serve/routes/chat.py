"""``POST /v1/chat/completions``."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..choices import ChoicesWriter
from ..context import ServerContext
from ..conversation import read_conversation
from ..formats import ChatFormat
from ..json_body import body_route
from ..wire.openai import ChatCompletionRequest
from ..wire.openai_answers import POST_ERRORS, ChatCompletionResponse
from ..wire.openapi import answer_or_stream


def chat_routes(context: ServerContext) -> APIRouter:
    """The chat endpoint of one server."""
    router = APIRouter(tags=["OpenAI"], route_class=body_route(context.reader))

    @router.post("/v1/chat/completions", responses={**answer_or_stream(ChatCompletionResponse), **POST_ERRORS})
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation. With ``stream`` the answer is a stream of server-sent events."""
        conversation = await read_conversation(context, body)
        choices = ChatFormat(
            id=f"chatcmpl-{uuid.uuid4().hex}",
            parts=conversation.parts,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            echo=conversation.echo,
            compute=body.streams_compute,
        )
        writer = ChoicesWriter(body=body, model=context.model_name, format=choices)
        return await conversation.respond(context, request, body, writer)

    return router
