"""From a conversation to what the engine needs and how its answer is read; every chat API comes through here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from starlette.responses import Response

from ..dynamic.engine.sampling_params import SamplingParams
from ..dynamic.engine.structured_outputs import StructuredOutputsParams
from .answer_parts import (
    AnswerParts,
    AnswerReader,
    ChannelReader,
    ListReader,
    MarkedReader,
    PlainReader,
    ReasoningReader,
)
from .choices import AnswerWriter
from .context import ServerContext
from .errors import invalid
from .formats import Prompt
from .generation import Generation, params_per_prompt
from .reasoning_markers import ReasoningMarkers
from .structured import wanted_form
from .tool_markers import CallMarkers
from .tools import ToolUse, tool_use
from .wire.openai import ChatCompletionRequest


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One request of a chat API.

    Arguments:
        prompts: one.
        params: of the prompt.
        parts: reads the answer.
        echo: text in front of every choice.
        form_field: of the request, that asks for a form of the answer.
    """

    prompts: list[Prompt]
    params: list[SamplingParams]
    parts: AnswerParts
    echo: str
    form_field: str

    async def respond(
        self, context: ServerContext, request: Request, body: ChatCompletionRequest, writer: AnswerWriter
    ) -> Response:
        """Generate the answer, and send it as this API does; see :meth:`.Generation.respond`."""
        return await Generation(
            context=context,
            request=request,
            body=body,
            prompts=self.prompts,
            params=self.params,
            form_field=self.form_field,
            writer=writer,
        ).respond()


async def read_conversation(context: ServerContext, body: ChatCompletionRequest) -> Conversation:
    """Check a request, and make its prompt.

    Raises:
        ApiError: status 400 for what is wrong, or cannot be honoured.
    """
    messages, text = context.checks.chat(body), context.text
    use = await text.run(tool_use, body) if body.tools else tool_use(body)
    form, form_field = wanted_form(body) if use is None else (use.form, "tools")
    markers = await text.reasoning_markers()
    calls = await _call_markers(context, use, markers)
    prompt, token_ids = await text.encode_chat(messages, tools=[] if use is None else use.tools, **body.rendering)
    last = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    opened = None if markers is None else markers.opened(prompt, last if body.continue_final_message else "")
    budget = None if body.thinking_token_budget in (None, -1) else body.thinking_token_budget
    if markers is None and budget is not None:
        message = "thinking_token_budget is not supported: the model's chat template marks no reasoning."
        raise invalid(message, param="thinking_token_budget", code="unsupported_parameter")
    prompts = [Prompt(token_ids)]
    default_length = context.model.generation_defaults.get("max_new_tokens")
    params = params_per_prompt(context, body, prompts, default_length, form)
    tokenizer = context.model.tokenizer
    special = tokenizer.special_names
    reasons = markers if opened is not False or (markers is not None and markers.channels) else None
    changes: dict[str, Any] = {}
    if reasons is not None and opened is not False and (form is not None or budget is not None):
        changes["reasoning"] = reasons.params(opened is True, budget)
    marked = reasons is not None and any(name in reasons.begin + reasons.end for name in special)
    if marked or calls is not None or (reasons is not None and reasons.channels):  # markers may be special tokens
        changes["skip_special_tokens"] = False
    parts = AnswerParts(
        tokenizer=tokenizer,
        reader=_reader(use, form, calls, reasons, opened, body.parallel_tool_calls is False),
        special=special if "skip_special_tokens" in changes and body.skip_special_tokens is not False else (),
        reasoning=None if reasons is None or opened is False else reasons.params(opened is True),
        hide_reasoning=body.include_reasoning is False,
    )
    return Conversation(
        prompts=prompts,
        params=[replace(settings, **changes) for settings in params],
        parts=parts,
        echo=last if body.echo else "",
        form_field=form_field,
    )


async def _call_markers(
    context: ServerContext, use: ToolUse | None, reasoning: ReasoningMarkers | None
) -> CallMarkers | None:
    """The markers of calls, where the model may call or not, and harmony's channels do not mark them.

    Raises:
        ApiError: status 400 where its calls could not be read.
    """
    if use is None or use.form is not None or (reasoning is not None and reasoning.channels):
        return None
    markers = await context.text.call_markers()
    if markers is None:
        message = "The calls that the model's chat template writes cannot be read; use tool_choice required or none."
        raise invalid(message, param="tool_choice", code="unsupported_parameter")
    return markers


def _reader(
    use: ToolUse | None,
    form: StructuredOutputsParams | None,
    calls: CallMarkers | None,
    reasoning: ReasoningMarkers | None,
    opened: bool | None,
    one_call: bool,
) -> Callable[[], AnswerReader]:
    """What makes the reader of a choice."""
    names = frozenset() if use is None else use.names

    def answer() -> AnswerReader:
        if use is not None and form is not None:
            return ListReader()
        return PlainReader() if calls is None else MarkedReader(calls, names, one_call)

    if reasoning is None:
        return answer
    if reasoning.channels:
        return lambda: ChannelReader(answer(), () if form is not None else names, one_call, opened)
    return lambda: ReasoningReader(reasoning, answer(), opened is True)
