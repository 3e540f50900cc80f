"""``POST /v1/chat/completions``."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..context import ServerContext
from ..formats import ChatFormat, Prompt
from ..generation import Generation, params_per_prompt
from ..json_body import body_route
from ..structured import wanted_form
from ..tool_format import ToolCallFormat
from ..tools import tool_use
from ..wire.openai import ChatCompletionRequest
from ..wire.openai_answers import POST_ERRORS, ChatCompletionResponse, answer_or_stream


def chat_routes(context: ServerContext) -> APIRouter:
    """The chat endpoint of one server."""
    router = APIRouter(tags=["OpenAI"], route_class=body_route(context.reader))

    @router.post("/v1/chat/completions", responses={**answer_or_stream(ChatCompletionResponse), **POST_ERRORS})
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation. With ``stream`` the answer is a stream of server-sent events."""
        messages = context.checks.chat(body)
        use = tool_use(body)
        form, form_field = wanted_form(body) if use is None else (use.form, "tools")
        tools = [] if use is None else use.tools
        _, token_ids = await context.text.encode_chat(messages, tools=tools, **body.rendering)
        prompts = [Prompt(token_ids)]
        default_length = context.model.generation_defaults.get("max_new_tokens")
        write = ChatFormat if use is None else ToolCallFormat
        return await Generation(
            context=context,
            request=request,
            body=body,
            prompts=prompts,
            params=params_per_prompt(context, body, prompts, default_length, form),
            form_field=form_field,
            format=write(
                id=f"chatcmpl-{uuid.uuid4().hex}",
                top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
                tokenizer=context.model.tokenizer,
                compute=body.streams_compute,
                echo=messages[-1]["content"] if body.echo and messages[-1]["role"] == "assistant" else "",
            ),
        ).respond()

    return router
