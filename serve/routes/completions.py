"""``POST /v1/completions``."""

from __future__ import annotations

import uuid

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...dynamic.text.detokenizer import TokenStarts
from ..choices import ChoicesWriter
from ..context import ServerContext
from ..formats import CompletionFormat, Prompt
from ..generation import Generation, params_per_prompt
from ..json_body import body_route
from ..sampling import COMPLETION_MAX_TOKENS
from ..structured import wanted_form
from ..wire.openai import CompletionRequest
from ..wire.openai_answers import POST_ERRORS, CompletionResponse
from ..wire.openapi import answer_or_stream


def completion_routes(context: ServerContext) -> APIRouter:
    """The completions endpoint of one server."""
    router = APIRouter(tags=["OpenAI"], route_class=body_route(context.reader))

    @router.post("/v1/completions", responses={**answer_or_stream(CompletionResponse), **POST_ERRORS})
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts, given as text or as token ids. With ``stream`` the answer is a stream of
        server-sent events."""
        given = context.checks.completion(body)
        form, form_field = wanted_form(body)
        prompts = [await _encode(context, prompt, body) for prompt in given]
        drop_output = body.max_tokens == 0
        answer = CompletionFormat(
            id=f"cmpl-{uuid.uuid4().hex}",
            tokenizer=context.model.tokenizer,
            prompts=prompts,
            n=body.n or 1,
            echo=bool(body.echo),
            drop_output=drop_output,
            logprobs=body.logprobs is not None,
            prompt_logprobs=body.prompt_logprobs is not None,
            compute=body.streams_compute,
            skip_special_tokens=body.skip_special_tokens is not False,
        )
        return await Generation(
            context=context,
            request=request,
            body=body,
            prompts=prompts,
            params=params_per_prompt(context, body, prompts, COMPLETION_MAX_TOKENS, form),
            writer=ChoicesWriter(body=body, model=context.model_name, format=answer),
            form_field=form_field,
            drop_output=drop_output,
        ).respond()

    return router


async def _encode(context: ServerContext, prompt: str | list[int], body: CompletionRequest) -> Prompt:
    text = context.text
    offsets = body.echo and body.logprobs is not None
    if isinstance(prompt, str):
        special = True if body.add_special_tokens is None else body.add_special_tokens
        if not offsets:
            return Prompt(await text.encode(prompt, special), prompt)
        token_ids, starts = await text.encode_with_starts(prompt, special)
        return Prompt(token_ids, prompt, starts)
    if not body.echo:
        return Prompt(prompt)
    write = TokenStarts(context.model.tokenizer, False).add_all
    starts = await text.run_sized(len(prompt), write, prompt) if offsets else ()
    return Prompt(prompt, await text.decode(prompt, skip_special_tokens=False), starts)
