"""``/v1/responses``: answers, and those that are kept."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ..context import ServerContext
from ..conversation import read_conversation
from ..errors import ApiError, invalid, naming
from ..json_answer import JsonAnswer
from ..json_body import body_route
from ..response_store import StoredResponse, new_response_id, size_of
from ..responses_input import NAMES, answer_messages, as_chat, check_returnable
from ..responses_writer import ResponsesWriter
from ..text import LARGE_TEXT
from ..wire.openai_answers import POST_ERRORS, error_responses
from ..wire.openapi import answer_or_stream
from ..wire.responses import DeletedResponse, ResponsesRequest
from ..wire.responses import Response as ResponseAnswer


def response_routes(context: ServerContext) -> APIRouter:
    """The Responses API of one server."""
    router = APIRouter(tags=["OpenAI"], route_class=body_route(context.reader))

    def stored(request: Request, response_id: str) -> StoredResponse:
        found = context.responses.get(request.state.caller.key_id, response_id)
        if found is None:
            message = f"There is no response {response_id[:100]!r}, or it is not kept any more."
            raise ApiError(404, message, code="response_not_found")
        return found

    @router.post("/v1/responses", responses={**answer_or_stream(ResponseAnswer), **POST_ERRORS})
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Answer an input. With ``stream`` the answer is a stream of server-sent events with names."""
        previous = body.previous_response_id
        earlier = stored(request, previous).messages if previous is not None else ()
        keep = body.store is not False
        with naming(NAMES):
            chat, messages = await context.text.run(as_chat, body, earlier)
            if len(messages) > context.settings.limits.max_messages:
                most = context.settings.limits.max_messages
                raise invalid(f"input and what it continues have {len(messages)} messages, more than {most}.", "input")
            conversation = await read_conversation(context, chat)
            (params,) = conversation.params
            described = {
                "id": new_response_id(),
                "model": context.model_name,
                **_described(body),
                "temperature": params.temperature,
                "top_p": params.top_p,
            }
            described_size = await context.text.run(check_returnable, described)
            owner, size = request.state.caller.key_id, await context.text.run(size_of, messages)

            def finished(answer: dict[str, Any]) -> None:
                if keep:
                    context.responses.put(owner, answer, [*messages, *answer_messages(answer["output"])], size)

            writer = ResponsesWriter(
                described=described,
                parts=conversation.parts,
                top_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
                keep=finished,
                large=described_size > LARGE_TEXT,
            )
            return await conversation.respond(context, request, chat, writer)

    @router.get(
        "/v1/responses/{response_id}", responses={200: {"model": ResponseAnswer}, **error_responses(400, 401, 404, 500)}
    )
    async def retrieve_response(response_id: str, request: Request) -> Response:
        """A response that is kept."""
        if request.query_params.get("stream", "false") != "false":
            raise invalid("A response that is kept cannot be streamed.", param="stream")
        return await context.text.run(JsonAnswer, stored(request, response_id).answer)

    @router.delete("/v1/responses/{response_id}", responses=error_responses(401, 404, 500))
    async def delete_response(response_id: str, request: Request) -> DeletedResponse:
        """Forget a response."""
        stored(request, response_id)
        context.responses.delete(request.state.caller.key_id, response_id)
        return DeletedResponse(id=response_id, object="response", deleted=True)

    return router


def _described(body: ResponsesRequest) -> dict[str, Any]:
    """What a response says about its request."""
    text, reasoning = body.text, body.reasoning
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": None if reasoning is None else reasoning.effort, "summary": None},
        "store": body.store is not False,
        "text": {"format": {"type": "text"} if text is None or text.format is None else text.format},
        "tool_choice": body.tool_choice or "auto",
        "tools": [tool.model_dump(include=set(type(tool).model_fields)) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "truncation": "disabled",
    }
