"""From prompts to an answer: submit to the engine, then collect everything or stream it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request
from starlette.responses import Response

from ..dynamic.engine.engine import EngineFull
from ..dynamic.engine.grammar_compiler import CompiledGrammar
from ..dynamic.engine.outputs import CompletionOutput, RequestDelta, RequestOutput
from ..dynamic.engine.quality import ContractOutcome, ContractUnavailable
from ..dynamic.engine.request_limits import FORM_ERROR
from ..dynamic.engine.sampling_params import SamplingParams
from ..dynamic.engine.structured_outputs import StructuredOutputsParams
from .auth import Caller
from .bridge import EngineRequest
from .choices import AnswerWriter
from .compute_usage import ComputeTally, quality_headers
from .context import ServerContext
from .contracts import tenant
from .errors import ApiError, invalid, overloaded, unavailable
from .formats import Prompt, Used
from .json_answer import JsonAnswer
from .sampling import requested_length, sampling_params, with_length
from .streaming import EventStream, aborted_on_disconnect
from .structured import compiled_form, ignored_header
from .submission import ClientGone, EngineFailure, Submission
from .wire.openai import GenerationRequest


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Runs one HTTP request through the engine."""

    context: ServerContext
    request: Request
    body: GenerationRequest
    prompts: Sequence[Prompt]
    params: Sequence[SamplingParams]  # one per prompt
    writer: AnswerWriter
    form_field: str = ""  # of the request, that asks for a form of the answer
    drop_output: bool = False

    def _tally(self) -> ComputeTally:
        cap = self.body.experts_per_token
        asked = None if cap is None else f"experts_per_token={cap} was asked for, for which no risk is certified"
        return ComputeTally(self.context.model.spec, asked)

    async def respond(self) -> Response:
        """Run the prompts and answer as the client asked, whole or streamed.

        Raises:
            ApiError: the engine refuses the request, or fails before the answer has begun.
        """
        grammar = await self._grammar()
        submission, contracts = await self._submit(grammar)
        if self.body.stream:
            response: Response = EventStream(self._events(submission), submission)
        else:
            response = await self._collect(submission)
        if self._priority > (self.body.priority or 0):
            response.headers["x-priority"] = str(self._priority)  # in place of the one that was asked for
        response.headers.update(quality_headers(contracts))
        if grammar is not None:
            response.headers.update(ignored_header(grammar))
        return response

    async def _grammar(self) -> CompiledGrammar | None:
        form = self.params[0].structured_outputs
        if form is None:
            return None
        return await compiled_form(self.context.bridge.engine.grammars, self.context.text, form, self.form_field)

    @property
    def _priority(self) -> int:
        return max(self.body.priority or 0, self.context.settings.min_priority)

    async def _submit(self, grammar: CompiledGrammar | None) -> tuple[Submission, list[ContractOutcome]]:
        """Resolve the contracts and submit the prompts to the engine, which accepts all of them or none.

        Returns: also what became of the contracts, if any were asked for.
        """
        caller: Caller = self.request.state.caller
        requests = [
            EngineRequest(
                prompt_token_ids=prompt.token_ids,
                params=params,
                priority=self._priority,
                cache_salt=caller.cache_salt(self.body.cache_salt),
                grammar=grammar,
            )
            for prompt, params in zip(self.prompts, self.params, strict=True)
        ]
        self.request.state.log["answer_id"] = self.writer.id
        try:
            resolved = [await self._resolve(request) for request in requests]
            submission = await self.context.bridge.submit(resolved)
        except BaseException as error:
            self.context.contracts.refused(request.request_id for request in requests)
            match error:
                case ContractUnavailable():
                    raise ApiError(409, f"{error}.", param="quality", code="contract_unavailable") from error
                case ValueError():
                    raise invalid(f"{error}.") from error
                case EngineFull():
                    raise overloaded("Too many requests are waiting.", error.retry_after_seconds) from error
                case EngineFailure(code="request_failed"):
                    raise failed(error) from error
                case EngineFailure():
                    raise unavailable(str(error), error.code) from error
            raise
        self.request.state.submitted = True
        return submission, [request.contract for request in resolved if request.contract is not None]

    async def _resolve(self, request: EngineRequest) -> EngineRequest:
        params, contract = await self.context.contracts.resolve(
            request.request_id, request.prompt_token_ids, request.params, self._tenant()
        )
        return replace(request, params=params, contract=contract)

    def _tenant(self) -> str:
        caller: Caller = self.request.state.caller
        return tenant(caller.key_id, self.request.client.host if self.request.client else None)

    async def _collect(self, submission: Submission) -> Response:
        outputs = [
            RequestOutput(
                request_id=request_id,
                prompt=None,
                prompt_token_ids=prompt.token_ids,
                outputs=[CompletionOutput(index) for index in range(params.n)],
            )
            for request_id, prompt, params in zip(submission.ids, self.prompts, self.params, strict=True)
        ]
        tally = self._tally()
        try:
            async with aborted_on_disconnect(self.request.receive, submission):
                async for batch in submission.batches():
                    for number, delta in batch:
                        check_delta(delta)
                        outputs[number].add(delta)
                        tally.add(delta)
        except ClientGone:
            return Response(status_code=499)  # for the log only
        except EngineFailure as error:
            raise failed(error) from error
        # Log-probabilities of a long prompt are megabytes of JSON.
        return await self.context.text.run(self._write, outputs, tally)

    def _write(self, outputs: Sequence[RequestOutput], tally: ComputeTally) -> Response:
        used = self._used(
            sum(len(output.token_ids) for result in outputs for output in result.outputs),
            sum(result.num_cached_tokens for result in outputs),
            tally.as_json(),
        )
        answer = self.writer.whole(outputs, used)
        self._log(used, [output.finish_reason for result in outputs for output in result.outputs])
        return JsonAnswer(answer)

    async def _events(self, submission: Submission) -> AsyncIterator[bytes]:
        tokens = 0
        cached = [0] * len(self.prompts)
        reasons: list[str | None] = []
        tally = self._tally()
        try:
            async for batch in submission.batches():
                before = tokens
                for number, delta in batch:
                    check_delta(delta)
                    cached[number] = max(cached[number], delta.num_cached_tokens)
                    tally.add(delta)
                    for completion in delta.completions:
                        tokens += len(completion.token_ids)
                        if completion.finish_reason is not None:
                            reasons.append(completion.finish_reason)
                large = any(delta.prompt_logprobs for _, delta in batch)  # those of a long prompt are megabytes
                events = await self._written(large, self.writer.add, batch, self._used(before, sum(cached)))
                if events:
                    yield events
        except ClientGone:
            reasons.append("client_gone")
            self._log(self._used(tokens, sum(cached)), reasons)
            return
        except EngineFailure as error:
            reasons.append(error.code)
            self._log(self._used(tokens, sum(cached)), reasons)
            yield await self._written(False, self.writer.fail, failed(error))
            return
        used = self._used(tokens, sum(cached), tally.as_json())
        self._log(used, reasons)
        yield await self._written(False, self.writer.end, used)

    async def _written(self, large: bool, write: Callable[..., bytes], *arguments: Any) -> bytes:
        if large or self.writer.large:
            return await self.context.text.run(write, *arguments)
        return write(*arguments)

    def _used(self, completion_tokens: int, cached_tokens: int, compute: dict[str, Any] | None = None) -> Used:
        prompt_tokens = sum(len(prompt.token_ids) for prompt in self.prompts)
        return Used(prompt_tokens, 0 if self.drop_output else completion_tokens, cached_tokens, compute)

    def _log(self, used: Used, reasons: Sequence[str | None]) -> None:
        self.request.state.log.update(
            prompt_tokens=used.prompt_tokens,
            completion_tokens=used.completion_tokens,
            cached_tokens=used.cached_tokens,
            finish=",".join(sorted({reason or "none" for reason in reasons})),
            stream=bool(self.body.stream),
        )


def failed(error: EngineFailure) -> ApiError:
    """The error for a client whose request the engine does not finish."""
    if error.code == "shutting_down":
        return unavailable(str(error), error.code)
    if error.code == FORM_ERROR:
        return invalid(f"{error}.", code=error.code)
    return ApiError(500, str(error), code=error.code)


def check_delta(delta: RequestDelta) -> None:
    """Raise a failure that the engine reports for one request.

    Raises:
        EngineFailure: the engine ended the request without finishing it.
    """
    if delta.error is not None:
        raise EngineFailure(delta.error, delta.error_code)
    for completion in delta.completions:
        if completion.finish_reason in ("error", "abort"):
            raise EngineFailure(f"The engine ended the request: {completion.finish_reason}.", "request_failed")


def params_per_prompt(
    context: ServerContext,
    body: GenerationRequest,
    prompts: Sequence[Prompt],
    default_length: int | None,
    form: StructuredOutputsParams | None,
) -> list[SamplingParams]:
    """Sampling settings of every prompt; they differ only in ``max_tokens``, which depends on the prompt's length.

    Arguments:
        default_length: used when the client asks for none.
        form: of the answer.

    Raises:
        ApiError: status 400 for settings that make no sense, or that do not fit the model's length.
    """
    params = sampling_params(body, context.model.generation_defaults, context.settings.default_quality, form)
    sized = [
        with_length(
            params,
            requested=requested_length(body),
            default=default_length,
            cap=context.settings.limits.max_tokens,
            prompt_tokens=len(prompt.token_ids),
            max_model_len=context.max_model_len,
        )
        for prompt in prompts
    ]
    entries = sum(_logprob_entries(prompt, params) for prompt, params in zip(prompts, sized, strict=True))
    if entries > context.settings.limits.max_logprob_entries:
        message = f"The answer would hold up to {entries} log-probabilities, more than "
        raise invalid(f"{message}{context.settings.limits.max_logprob_entries}.", "logprobs")
    return sized


def _logprob_entries(prompt: Prompt, params: SamplingParams) -> int:
    entries = 0 if params.prompt_logprobs is None else len(prompt.token_ids) * (params.prompt_logprobs + 1)
    if params.logprobs is not None:
        entries += params.n * (params.max_tokens or 0) * (params.logprobs + 1)
    return entries
