"""``dynamoe experts``: measures each expert's contribution on text, for expert budgets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch

from ...exits.segments import Segment
from ...exits.sidecar import backbone_hash
from ...exits.training.progress import progress_line
from ...kernels.api.ranges import check_ranges
from ...kernels.api.types import ExpertWeights, Routing
from ...kernels.torch.backend import TorchBackend
from ...moe.contribution import ContributionMeter, ExpertScales, LayerScales, slot_norms
from ...moe.sidecar import JSON_FILE, save_scales
from ..convert.model_store import SHIPPED_MODELS, resolve_model
from ..model.budgeted_layers import limited_layers
from ..model.decoder import Decoder
from ..model.loader import load_decoder
from ..model.machine import use_threads
from ..model.moe_spec import MoESpec
from ..model.prompt_pass import fresh_cache
from ..text.calibration_text import reference_pages, token_windows
from ..text.documentation_packages import collect_folder
from ..text.tokenizer import Tokenizer

_STEP_ROWS = 1024  # tokens that run at once


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """``dynamoe experts``.

    Arguments:
        model: a local directory; the result is written beside its weights.
        windows: of text that are run.
        window_tokens: length of each.
        text_folder: a folder of .txt and .html files; nothing takes the language reference that every Python has.
        dtype: that the model runs in: ``float32``, ``bfloat16``, ``float16``, or ``auto`` (the checkpoint's own).
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        backend: which kernels compute; ``auto`` takes the fastest that run here.
        threads: CPU threads; null leaves torch's own choice.

    Raises:
        ValueError: naming the key and the value that is out of range.
    """

    FREE_TEXT: ClassVar[frozenset[str]] = frozenset({"text_folder"})

    model: str | None = None
    windows: int = 128
    window_tokens: int = 256
    text_folder: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "windows", "window_tokens", "threads", least=1)


def make_expert_scales(
    config: ExpertsConfig, *, progress: bool = True, say: Callable[[str], None] = print
) -> ExpertScales:
    """Measure a model's experts and write ``experts.json`` beside its weights.

    Arguments:
        progress: show a progress line.

    Raises:
        ValueError: for a model without routers that weigh their experts, text that is too short, or a directory that
            cannot be written to.
    """
    use_threads(config.threads)
    if config.model is None:
        raise ValueError("model=DIRECTORY is needed: the result is written beside its weights")
    if config.model in SHIPPED_MODELS:
        # Its certificates are bound to the files beside it.
        raise ValueError(f"model={config.model} is part of the package; copy its directory and name the copy")
    path = resolve_model(config.model, progress=progress)
    decoder = load_decoder(path, dtype=config.dtype, device=config.device, backend=config.backend, progress=progress)
    limited_layers(decoder.spec)  # raises before any text is read where there is nothing to measure
    if config.window_tokens > decoder.spec.max_position:
        raise ValueError(f"window_tokens={config.window_tokens} exceeds the model's {decoder.spec.max_position}")
    pages = reference_pages(held_out=False)
    if config.text_folder is not None:
        parts = collect_folder(Path(config.text_folder).expanduser())
        pages = [document for part in parts for document in part.documents]
    tokenizer = Tokenizer.from_directory(path)
    windows_NL = token_windows(tokenizer.backend, pages, count=config.windows, length=config.window_tokens)
    with progress_line(windows_NL.numel(), "token", progress) as watch:
        measured = measure_scales(decoder, windows_NL, watch)
    scales = ExpertScales(layers=measured, tokens=windows_NL.numel(), backbone_sha256=backbone_hash(path))
    try:
        save_scales(scales, path)
    except OSError as error:
        raise ValueError(f"cannot write {path / JSON_FILE}: {error}; copy the model and name the copy") from error
    say(f"{path / JSON_FILE}: contribution scales of {sum(s is not None for s in measured)} layers")
    return scales


def measure_scales(
    decoder: Decoder, windows_NL: torch.Tensor, watch: Callable[[int], None] | None = None
) -> tuple[LayerScales | None, ...]:
    """Run text through a decoder and measure its experts' contributions.

    Arguments:
        windows_NL: token ids of N windows of L tokens, int64.
        watch: called with the number of tokens done.

    Returns: what was measured in each layer; None for layers without experts.

    Raises:
        ValueError: for a model without routers that weigh their experts, or no text.
    """
    limited = limited_layers(decoder.spec)
    mixtures = {number: cast(MoESpec, decoder.spec.layers[number].moe) for number in limited}
    if any(moe.latent_size for moe in mixtures.values()):
        raise ValueError(f"what experts of latents add is not measured; this {decoder.spec.family} model has them")
    meters = {number: ContributionMeter(moe.router.num_experts) for number, moe in mixtures.items()}
    watched = copy.copy(decoder)
    watched.stack = None  # operation by operation, so that the experts' operation is intercepted
    backend = _MeasuringBackend(decoder, meters)
    watched.backend = cast(TorchBackend, backend)
    whole = Segment(index=0, layers=range(decoder.spec.num_layers))
    length, done = windows_NL.shape[1], 0
    for part_NL in windows_NL.split(max(1, _STEP_ROWS // length)):
        kv, batch = fresh_cache(decoder, [length] * len(part_NL))
        watched.run_segment(whole, decoder.embed(part_NL.flatten().to(decoder.device)), kv, batch)
        done += part_NL.numel()
        if watch is not None:
            watch(done)
    return tuple(meters[n].scales() if n in meters else None for n in range(decoder.spec.num_layers))


class _MeasuringBackend:
    """A decoder's backend whose experts are measured while they run.

    Arguments:
        meters: by layer.
    """

    def __init__(self, decoder: Decoder, meters: dict[int, ContributionMeter]) -> None:
        self._backend = decoder.backend
        self._stream_T = torch.empty(0)
        self._layers = {
            id(decoder.layers[n].ffn): (meter, cast(Any, decoder.spec.layers[n].moe).num_always_on)
            for n, meter in meters.items()
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def add_rms_norm(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The last norm before a layer's experts also gives the residual stream that they add to."""
        normed_TD, stream_TD = self._backend.add_rms_norm(*arguments)
        self._stream_T = stream_TD.float().norm(dim=-1)
        return normed_TD, stream_TD

    def experts(self, x_TD: torch.Tensor, weights: ExpertWeights, routing: Routing) -> torch.Tensor:
        meter, first = self._layers[id(weights)]  # always-on experts come first; the router does not choose them
        norms_TK = slot_norms(x_TD, weights, routing, self._backend)
        chosen = (routing.expert_ids_TK[:, first:] - first, routing.weights_TK[:, first:], norms_TK[:, first:])
        meter.add(*chosen, self._stream_T)
        return self._backend.experts(x_TD, weights, routing)
