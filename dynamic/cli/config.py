"""Typed configurations of the commands, and how they reach Hydra.

A key's default is in its dataclass and its explanation in the class's docstring; ``conf/`` holds presets only. Settings
that a component already has a dataclass for (the engine's, the server's) use that class, so nothing is defined twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, cast

from omegaconf import DictConfig, OmegaConf

from ...kernels.api.ranges import check_ranges
from ..convert.model_config import SharedModelConfig
from ..engine.config import EngineConfig
from ..model.load_config import WeightCacheConfig


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are chosen and when the output ends; null takes the model's own ``generation_config.json``.

    Arguments:
        temperature: 0 is greedy.
        top_p: nucleus: the most likely tokens that together have this probability.
        top_k: the k most likely tokens; 0 is off.
        min_p: tokens with at least this share of the best one's probability.
        repetition_penalty: above 1 it discourages tokens of prompt and output.
        presence_penalty: taken off the logits of tokens that the output has.
        frequency_penalty: taken off once per occurrence in the output.
        seed: makes the draws repeatable.
        max_tokens: longest output; null goes on to the model's maximum length.
        min_tokens: no stop ends the output before this many tokens.
        stop: strings that end the output.
        ignore_eos: go on past the model's end-of-sequence tokens.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 512
    min_tokens: int = 0
    stop: list[str] = field(default_factory=list)
    ignore_eos: bool = False


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SharedModelConfig):
    """``dynamoe generate``.

    Arguments:
        prompt: the text, taken as it stands, whatever it contains; ``-``, or nothing and a pipe, reads standard input.
        prompt_file: file that holds the text.
        system: system message before the prompt, with ``chat=true``.
        chat: put the prompt into the model's chat template, when it has one; false continues the bare text.
    """

    FREE_TEXT: ClassVar[frozenset[str]] = frozenset({"prompt", "prompt_file", "system"})

    prompt: str | None = None
    prompt_file: str | None = None
    system: str | None = None
    chat: bool = True
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """``dynamoe prepare``. ``output``, ``group``, ``symmetric`` and what follows them belong to quantisation with
    calibration; ``dtype``, ``backend``, ``quantize_lm_head`` and ``weight_cache`` to that of a start.

    Arguments:
        model: a Hub id to fetch, the name of a shipped model to convert: ``default``; or what is to be quantised.
        quantization: ``none``; what other commands do at their start, such as ``int8``: the weights are kept for them;
            ``gptq`` or ``awq``: int4 weights; ``smoothquant``: int8 weights and activations.
        dtype, backend, quantize_lm_head: as the commands will have them.
        weight_cache: see :class:`WeightCacheConfig`.
        output: directory for the quantised checkpoint; an unfinished run in it is resumed.
        group: inputs that share a scale, with int4: 32, 64 or 128.
        symmetric: whether int4 groups have no zero point of their own.
        windows: windows of calibration text.
        window_tokens: length of each.
        text_folder: a folder of .txt and .html files; null takes the language reference that every Python has.
        device: that calibrates, in float32: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        threads: CPU threads; null leaves torch's own choice.
    """

    FREE_TEXT: ClassVar[frozenset[str]] = frozenset({"output", "text_folder"})

    model: str = "default"
    quantization: str = "none"
    dtype: str = "auto"
    backend: str = "auto"
    quantize_lm_head: bool = True
    output: str | None = None
    group: int = 64
    symmetric: bool = True
    windows: int = 128
    window_tokens: int = 256
    text_folder: str | None = None
    device: str = "auto"
    threads: int | None = None
    weight_cache: WeightCacheConfig = field(default_factory=WeightCacheConfig)

    def __post_init__(self) -> None:
        check_ranges(self, "windows", "window_tokens", "threads", least=1)


def schema(config_class: type) -> DictConfig:
    """A dataclass as a structured config that may be changed.

    OmegaConf makes configs of frozen dataclasses read-only; here overrides are still to be applied.
    """
    config = OmegaConf.structured(config_class)
    _unlock(config)
    return config


def _unlock(config: DictConfig) -> None:
    config._set_flag("readonly", None)
    for key in config:
        child = config._get_node(key)
        if isinstance(child, DictConfig):
            if OmegaConf.get_type(child) is dict:  # a mapping whose keys are the caller's
                child._set_flag("struct", False)
            _unlock(child)


def register(command: str, config_class: type) -> None:
    """Make a command's schema known to Hydra under the name that its file in ``conf/`` begins with."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=f"{command}_schema", node=schema(config_class))


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a configuration: its dotted path, its default and its explanation."""

    path: str
    default: Any
    help: str


def keys(config: object, prefix: str = "") -> Iterator[Key]:
    """Every key of a configuration object, groups opened: the model first, then in the order of the fields."""
    explanations = _explanations(type(config))
    groups = []
    for item in sorted(fields(cast(Any, config)), key=lambda item: item.name != "model"):
        value = getattr(config, item.name)
        if is_dataclass(value):
            groups.append((item.name, value))
        else:
            yield Key(path=prefix + item.name, default=value, help=explanations.get(item.name, ""))
    for name, value in groups:
        yield from keys(value, f"{prefix}{name}.")


def _explanations(config_class: type) -> dict[str, str]:
    """What the ``Arguments:`` of a dataclass's docstring, and of those it extends, say about each field."""
    found: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        _, _, section = (base.__doc__ or "").partition("Arguments:\n")
        entries = re.split(r"^ {8}(?=\S)", section.split("\n\n")[0], flags=re.MULTILINE)
        for entry in entries[1:]:
            names, _, text = " ".join(entry.replace("``", "").split()).partition(": ")
            found.update(dict.fromkeys(names.split(", "), text))
    return found
