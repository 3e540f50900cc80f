"""Text to tokens and back: ``/tokenize``, ``/detokenize``, ``/tokenizer_info``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from ..context import ServerContext
from ..errors import invalid
from ..json_answer import JsonAnswer
from ..json_body import body_route
from ..request_checks import check_model, check_supported, plain_messages
from ..tools import plain_tools
from ..wire.fields import DETOKENIZE, TOKENIZE
from ..wire.openai import DetokenizeRequest, TokenizeRequest
from ..wire.openai_answers import POST_ERRORS, DetokenizeResponse, TokenizeResponse, TokenizerInfo, error_responses


def token_routes(context: ServerContext) -> APIRouter:
    """The tokenizer's endpoints of one server."""
    router = APIRouter(tags=["tokens"], route_class=body_route(context.reader))
    tokenizer = context.model.tokenizer

    @router.post("/tokenize", responses={200: {"model": TokenizeResponse}, **POST_ERRORS})
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a prompt, or of a conversation in the model's chat template."""
        check_model(body.model, context.model_name)
        check_supported(body, TOKENIZE)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("Give either prompt or messages.", param="prompt")
        if body.prompt is not None:
            special = True if body.add_special_tokens is None else body.add_special_tokens
            tokens = await context.text.encode(body.prompt, special)
        else:
            messages, tools = plain_messages(body.messages or []), plain_tools(body.tools or ())
            if (body.model_extra or {}).get("tool_choice") == "none":  # as in a chat
                tools = []
            _, tokens = await context.text.encode_chat(messages, tools=tools, **body.rendering)
        most = context.settings.limits.max_json_values
        if len(tokens) > most:
            raise invalid(f"The text has {len(tokens)} tokens; one answer holds at most {most}.", param="prompt")

        def write() -> Response:
            answer: dict[str, Any] = {"count": len(tokens), "max_model_len": context.max_model_len, "tokens": tokens}
            if body.return_token_strs:
                answer["token_strs"] = [tokenizer.token_name(token) or "" for token in tokens]
            return JsonAnswer(answer)

        return await context.text.run_sized(len(tokens), write)

    @router.post("/detokenize", responses={200: {"model": DetokenizeResponse}, **POST_ERRORS})
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids. Special tokens are kept unless ``skip_special_tokens`` is true."""
        check_model(body.model, context.model_name)
        check_supported(body, DETOKENIZE)
        context.checks.token_ids(body.tokens, "tokens")
        text = await context.text.decode(body.tokens, bool(body.skip_special_tokens))
        return await context.text.run_sized(len(text), JsonAnswer, {"prompt": text})

    @router.get("/tokenizer_info", responses=error_responses(401, 500))
    async def tokenizer_info() -> TokenizerInfo:
        """What a client needs in order to use the tokenizer remotely."""
        special = tokenizer.special_tokens
        return TokenizerInfo(
            tokenizer_class=type(tokenizer).__name__,
            vocab_size=tokenizer.vocab_size,
            model_max_length=context.max_model_len,
            bos_token=special.get("bos_token"),
            eos_token=special.get("eos_token"),
            pad_token=special.get("pad_token"),
            unk_token=special.get("unk_token"),
            chat_template=tokenizer.chat_source,
        )

    return router
