"""``dynamoe generate``: one prompt, its continuation streamed to the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ..engine.sampling_params import SamplingParams
from .config import GenerateConfig, SamplingConfig

if TYPE_CHECKING:
    from ..engine.engine import Engine
    from ..text.tokenizer import Tokenizer

__all__ = ["GenerateConfig", "generate"]

_MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def generate(config: GenerateConfig) -> None:
    """Run the command.

    Raises:
        ValueError: for settings, a model or a prompt that cannot be used.
    """
    # Settings are checked before torch is imported and a model loaded, which takes seconds.
    prompt = read_prompt(config, sys.stdin)
    sampling_params(config.sampling, {})
    from ..convert.load_model import load_model
    from ..engine.engine import Engine

    model = load_model(config.model, **config.load_arguments())
    prompt_ids = encode_prompt(model.tokenizer, prompt, chat=config.chat, system=config.system)
    params = sampling_params(config.sampling, model.generation_defaults)
    for text in stream(Engine(model, config.engine), prompt_ids, params):
        sys.stdout.write(text)
        sys.stdout.flush()
    print()


def read_prompt(config: GenerateConfig, standard_input: TextIO) -> str:
    """The prompt from the command line, a file or standard input.

    Raises:
        ValueError: when there is none, two, or an empty one.
    """
    if config.prompt is not None and config.prompt_file is not None:
        raise ValueError("give either prompt= or prompt_file=, not both")
    if config.prompt_file is not None:
        prompt = _text_of(Path(config.prompt_file))
    elif config.prompt not in (None, "-"):
        prompt = config.prompt
    elif config.prompt == "-" or not standard_input.isatty():
        prompt = standard_input.read()
    else:
        raise ValueError("there is no prompt: give prompt=…, prompt_file=… or a pipe")
    # The trailing line break of a file or a pipe is not part of the prompt.
    prompt = prompt.removesuffix("\n") if config.prompt in (None, "-") else prompt
    if not prompt:
        raise ValueError("the prompt is empty")
    return prompt


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from error


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, chat: bool, system: str | None = None) -> list[int]:
    """Token ids of a prompt: in the chat template where there is one and ``chat`` is set, else as it stands.

    Raises:
        ValueError: for a system message that nothing would carry.
    """
    if chat and tokenizer.has_chat_template:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        return tokenizer.encode(tokenizer.chat_prompt(messages), add_special_tokens=False)
    if system is not None:
        raise ValueError("system= needs chat=true and a model with a chat template")
    return tokenizer.encode(prompt)


def sampling_params(config: SamplingConfig, model_defaults: Mapping[str, Any]) -> SamplingParams:
    """The command's settings, the model's own where they are null."""
    settings: dict[str, Any] = vars(config) | {"stop": tuple(config.stop)}
    for name in _MODEL_DEFAULTS:
        if settings[name] is None:
            settings[name] = model_defaults.get(name)
    chosen: dict[str, Any] = {k: v for k, v in settings.items() if v is not None or k == "max_tokens"}
    return SamplingParams(**chosen)


def stream(engine: Engine, prompt_ids: list[int], params: SamplingParams) -> Iterator[str]:
    """The text of one completion, in chunks as they arrive."""
    engine.add_request("generate", prompt_ids, params)
    while engine.has_unfinished():
        for delta in engine.step():
            if delta.error is not None:
                raise ValueError(delta.error)
            for completion in delta.completions:
                yield completion.text
