"""Offline use of an engine: generate for many prompts, get whole results back."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

from ..text.no_tokenizer import NoTokenizer
from .config import EngineConfig
from .engine import Engine, EngineFull
from .outputs import CompletionOutput, RequestOutput
from .request_limits import FORM_ERROR
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from ..model.loaded import LoadedModel
    from ..text.tokenizer import Tokenizer

Prompt = str | list[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]


class OfflineEngine:
    """A loaded model with an engine of its own."""

    def __init__(self, model: LoadedModel, config: EngineConfig | None = None) -> None:
        self.model = model
        self.engine = Engine(model, config or EngineConfig())
        self._num_requests = 0

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; its ``hf()`` is the one of transformers."""
        return self.model.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's ``generation_config.json`` recommends."""
        names = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
        names |= {"repetition_penalty": "repetition_penalty", "max_new_tokens": "max_tokens"}
        defaults = self.model.generation_defaults
        chosen = {ours: defaults[theirs] for theirs, ours in names.items() if defaults.get(theirs) is not None}
        return SamplingParams(**chosen)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts; results come in the prompts' order.

        Arguments:
            prompts: a text, a list or array of token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}`` (both
                may hold ``cache_salt`` and ``priority``), or a list of these.
            sampling_params: for all prompts, or one per prompt; None takes the model's own defaults.
            use_tqdm: show a progress bar.

        Raises:
            ValueError: for any prompt or setting that cannot run, before the first token is computed.
        """
        requests = [self._read_prompt(prompt) for prompt in _as_list(prompts)]
        return self._run(requests, sampling_params, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations through the model's chat template.

        Arguments:
            messages: a list of ``{"role": …, "content": …}``, or a list of such lists.
            add_generation_prompt: begin the assistant's turn.
            tools: JSON schemas of functions, for templates that know them.
            chat_template_kwargs: further variables of the template.

        Raises:
            ValueError: as :meth:`generate`, and when the template refuses a conversation.
        """
        conversations: Any = [messages] if messages and isinstance(messages[0], Mapping) else messages
        variables = dict(chat_template_kwargs or {}) | ({} if tools is None else {"tools": tools})
        tokenizer = self.model.tokenizer
        requests = []
        for conversation in conversations:
            text = tokenizer.chat_prompt(conversation, add_generation_prompt, **variables)
            requests.append(_Prompt(text, tokenizer.encode(text, add_special_tokens=False)))
        return self._run(requests, sampling_params, use_tqdm)

    def _read_prompt(self, prompt: Prompt) -> _Prompt:
        if isinstance(prompt, str):
            return _Prompt(prompt, self.model.tokenizer.encode(prompt))
        if isinstance(prompt, Mapping):
            extras = {name: prompt[name] for name in ("cache_salt", "priority") if prompt.get(name) is not None}
            unknown = set(prompt) - {"prompt", "prompt_token_ids", "cache_salt", "priority"}
            if unknown or not ({"prompt", "prompt_token_ids"} & set(prompt)):
                raise ValueError(f"a prompt dict needs 'prompt' or 'prompt_token_ids'; this one has {sorted(prompt)}")
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if ids is not None:
                return _Prompt(text, _token_ids(ids), extras)
            if not isinstance(text, str):
                raise ValueError(f"a prompt must be a text or token ids, not {text!r}")
            return _Prompt(text, self.model.tokenizer.encode(text), extras)
        return _Prompt(None, _token_ids(prompt))

    def _run(
        self,
        requests: list[_Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        params = self._read_params(sampling_params, len(requests))
        for request, settings in zip(requests, params, strict=True):
            self.engine.check(request.token_ids, settings)
        ids = [str(self._num_requests + i) for i in range(len(requests))]
        self._num_requests += len(requests)
        outputs = {
            request_id: RequestOutput(
                request_id, request.text, request.token_ids, [CompletionOutput(i) for i in range(settings.n)]
            )
            for request_id, request, settings in zip(ids, requests, params, strict=True)
        }
        queue = deque(zip(ids, requests, params, strict=True))
        try:
            self._work_off(queue, outputs, use_tqdm)
        finally:
            self.engine.abort(ids)  # an interrupted call leaves nothing behind
        return list(outputs.values())

    def _work_off(
        self, queue: deque[tuple[str, _Prompt, SamplingParams]], outputs: dict[str, RequestOutput], use_tqdm: bool
    ) -> None:
        from tqdm.auto import tqdm

        unfinished = len(queue)
        tokens, started = 0, time.perf_counter()
        with tqdm(
            total=unfinished, desc="Generating", unit="prompt", disable=not use_tqdm or None, dynamic_ncols=True
        ) as bar:
            while unfinished:
                self._feed(queue)
                for delta in self.engine.step():
                    output = outputs.get(delta.request_id)
                    if output is None:  # somebody else's, added to the engine directly
                        continue
                    if delta.error is not None and delta.error_code != FORM_ERROR:
                        raise RuntimeError(f"request {delta.request_id} failed: {delta.error}")
                    output.add(delta)
                    tokens += sum(len(c.token_ids) for c in delta.completions)
                    if delta.finished:
                        unfinished -= 1
                        bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):.1f} tokens/s", refresh=False)
                        bar.update()

    def _feed(self, queue: deque[tuple[str, _Prompt, SamplingParams]]) -> None:
        """Hand the engine as many requests as its queue takes."""
        while queue:
            request_id, prompt, params = queue[0]
            try:
                self.engine.add_request(request_id, prompt.token_ids, params, **prompt.extras)
            except EngineFull:
                return
            queue.popleft()

    def _read_params(
        self, sampling_params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * count
        if not all(isinstance(params, SamplingParams) for params in sampling_params):
            raise ValueError(f"sampling_params must be SamplingParams, one or one per prompt, not {sampling_params!r}")
        if len(sampling_params) != count:
            raise ValueError(f"{len(sampling_params)} sampling_params for {count} prompts; give one, or one per prompt")
        if isinstance(self.model.tokenizer, NoTokenizer):
            return [replace(params, detokenize=False) for params in sampling_params]
        return list(sampling_params)


@dataclass(frozen=True, slots=True)
class _Prompt:
    text: str | None
    token_ids: list[int]
    extras: dict[str, Any] = field(default_factory=dict)


def _as_list(prompts: Any) -> list[Any]:
    prompts = _listed(prompts)
    is_one = isinstance(prompts, str | bytes | bytearray | Mapping) or isinstance(next(iter(prompts), None), Real)
    return [prompts] if is_one else list(prompts)


def _token_ids(given: Any) -> list[int]:
    """What :meth:`Engine.check` takes: it refuses what ids cannot be."""
    given = _listed(given)
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | bytearray | Mapping):
        raise ValueError(f"a prompt must be a text or token ids, not {type(given).__name__}")
    return list(given)


def _listed(given: Any) -> Any:
    """Arrays as lists of Python's numbers."""
    return given.tolist() if hasattr(given, "tolist") else given
