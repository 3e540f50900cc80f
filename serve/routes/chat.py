"""``POST /v1/chat/completions``."""

from __future__ import annotations

import uuid
from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..context import ServerContext
from ..errors import invalid
from ..formats import ChatFormat, Prompt
from ..generation import Generation, params_per_prompt
from ..json_body import body_route
from ..structured import wanted_form
from ..tool_format import AutoToolFormat, ToolCallFormat
from ..tools import ToolUse, tool_use
from ..wire.openai import ChatCompletionRequest
from ..wire.openai_answers import POST_ERRORS, ChatCompletionResponse, answer_or_stream


def chat_routes(context: ServerContext) -> APIRouter:
    """The chat endpoint of one server."""
    router = APIRouter(tags=["OpenAI"], route_class=body_route(context.reader))

    @router.post("/v1/chat/completions", responses={**answer_or_stream(ChatCompletionResponse), **POST_ERRORS})
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation. With ``stream`` the answer is a stream of server-sent events."""
        messages = context.checks.chat(body)
        use = await context.text.run(tool_use, body) if body.tools else tool_use(body)
        form, form_field = wanted_form(body) if use is None else (use.form, "tools")
        echo = messages[-1]["content"] if body.echo and messages[-1]["role"] == "assistant" else ""
        write = await _format(context, body, use, echo)
        tools = [] if use is None else use.tools
        _, token_ids = await context.text.encode_chat(messages, tools=tools, **body.rendering)
        prompts = [Prompt(token_ids)]
        default_length = context.model.generation_defaults.get("max_new_tokens")
        params = params_per_prompt(context, body, prompts, default_length, form)
        if isinstance(write, AutoToolFormat):  # whose markers may be special tokens
            params = [replace(settings, skip_special_tokens=False) for settings in params]
        return await Generation(
            context=context,
            request=request,
            body=body,
            prompts=prompts,
            params=params,
            form_field=form_field,
            format=write,
        ).respond()

    return router


async def _format(context: ServerContext, body: ChatCompletionRequest, use: ToolUse | None, echo: str) -> ChatFormat:
    """How the answer is written.

    Raises:
        ApiError: status 400 where the model may call tools, but its calls could not be read.
    """
    tokenizer, compute = context.model.tokenizer, body.streams_compute
    answer, top_logprobs = f"chatcmpl-{uuid.uuid4().hex}", (body.top_logprobs or 0) if body.logprobs else None
    if use is None:
        return ChatFormat(id=answer, tokenizer=tokenizer, top_logprobs=top_logprobs, compute=compute, echo=echo)
    if use.form is not None:
        return ToolCallFormat(id=answer, tokenizer=tokenizer, top_logprobs=top_logprobs, compute=compute)
    markers = await context.text.call_markers()
    if markers is None:
        message = "The calls that the model's chat template writes cannot be read; use tool_choice required or none."
        raise invalid(message, param="tool_choice", code="unsupported_parameter")
    special = () if body.skip_special_tokens is False else tokenizer.special_ids
    return AutoToolFormat(
        id=answer,
        tokenizer=tokenizer,
        top_logprobs=top_logprobs,
        compute=compute,
        markers=markers,
        names=use.names,
        special=tuple(sorted(name for token in special if (name := tokenizer.token_name(token)))),
        one_call=body.parallel_tool_calls is False,
    )
