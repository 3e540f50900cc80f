"""Loading a model by its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.weights import CheckpointError
from ..model.generation_defaults import read_generation_defaults
from ..model.load_config import LoadConfig
from ..model.loaded import LoadedModel
from ..model.loader import load_decoder
from ..parallel.config import ParallelConfig
from ..parallel.start import follow_if_worker, joining


def load_model(
    model: str | Path,
    config: LoadConfig | None = None,
    *,
    progress: bool = True,
    parallel: ParallelConfig | None = None,
    experts_per_token: int | None = None,
    skip_tokenizer_init: bool = False,
    **options: Any,
) -> LoadedModel:
    """Load a model by name.

    Arguments:
        model: a local directory in Hugging Face layout, the name of a shipped model, a ``.gguf`` file, or a Hub id.
        config: how it is loaded.
        progress: show a progress bar.
        parallel: the processes that share the model. In all of them but rank 0 this function does not return: they
            serve rank 0 until it ends, and exit.
        experts_per_token: use fewer routed experts per token than the model was made for.
        skip_tokenizer_init: leave the tokenizer alone, or do without one; the model takes and gives token ids.
        options: fields of :class:`LoadConfig` that differ from ``config``.

    Raises:
        ValueError: when the model or the settings cannot be used.
    """
    from ..text.no_tokenizer import NoTokenizer
    from ..text.tokenizer import Tokenizer
    from .model_store import resolve_model

    settings = replace(config or LoadConfig(), **options)
    path = resolve_model(model, progress=progress)
    try:
        tokenizer = None if skip_tokenizer_init else Tokenizer.from_directory(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    generation_defaults = read_generation_defaults(path)
    decoder = load_decoder(
        path,
        settings,
        progress=progress,
        join=joining(parallel),
        experts_per_token=experts_per_token,
        stop_token_ids=[] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
    )
    follow_if_worker(decoder)
    spec = decoder.spec
    return LoadedModel(
        name=str(model),
        path=path,
        spec=spec,
        decoder=decoder,
        tokenizer=tokenizer or NoTokenizer(path, spec.vocab_size),
        generation_defaults=generation_defaults,
    )
