"""The text part of a checkpoint: its configuration, and what its tensors are called here.

Checkpoints of models for images and text keep the text model in a part of ``config.json`` and under names of its own.
It is served as the text model that it is; what belongs to images and sound is left out, and named.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..checkpoint.config_reader import IRRELEVANT_KEYS, ConfigReader
from ..checkpoint.weights import CheckpointError

logger = logging.getLogger(__name__)

Rename = Callable[[Iterable[str]], dict[str, str]]  # names of files → names that are used here, of what is kept

# What the text model is called in models for images, and the family whose mathematics it has: their rotations in three
# dimensions are the plain ones where all three positions are the same, as they are for text.
_FAMILY_OF_TEXT = {
    **{"qwen2_vl": "qwen2", "qwen2_vl_text": "qwen2", "qwen2_5_vl": "qwen2", "qwen2_5_vl_text": "qwen2"},
    **{"qwen3_vl_text": "qwen3", "qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"},
}
_OTHER_PARTS = ("vision_config", "audio_config")
_OUTER_KEYS = IRRELEVANT_KEYS | {
    *(*_OTHER_PARTS, "audio_token_id", "audio_token_index", "boi_token_id", "eoi_token_id", "ignore_index"),
    *("boi_token_index", "eoi_token_index"),
    *("image_grid_pinpoints", "image_seq_length", "image_token_id", "image_token_index", "multimodal_projector_bias"),
    *("perceiver_config", "projector_hidden_act", "scale_factor", "spatial_merge_size", "text_config"),
    *("use_image_newline_parameter", "video_token_id", "video_token_index", "vision_aspect_ratio"),
    *("vision_end_token_id", "vision_feature_layer", "vision_feature_select_strategy", "vision_start_token_id"),
    *("vision_token_id", "mm_tokens_per_image", "boi_token_index", "eoi_token_index"),
    *("boa_token_id", "eoa_token_id", "eoa_token_index", "vision_soft_tokens_per_image"),
}
# The text model takes these from around it where it does not have them itself.
_INHERITED = ("bos_token_id", "compression_config", "dtype", "eos_token_id", "quantization_config", "torch_dtype")
# Sizes that transformers leaves out of a text_config where they are its own defaults.
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_DEFAULTS: dict[str, tuple[int, ...]] = {
    "llama": (32000, 4096, 11008, 32, 32, 2048),
    "mistral": (32000, 4096, 14336, 32, 32, 131072),
    "mixtral": (32000, 4096, 14336, 32, 32, 131072),
    "qwen2": (151936, 4096, 22016, 32, 32, 32768),
    "qwen3": (151936, 4096, 22016, 32, 32, 32768),
    "gemma3_text": (262208, 2304, 9216, 26, 8, 131072),
    "gemma4_text": (262144, 2304, 9216, 30, 8, 131072),
    "llama4_text": (202048, 5120, 8192, 48, 40, 131072),
    "ministral3": (131072, 4096, 14336, 34, 32, 262144),
}
_PREFIXES = ("model.", "", "model.language_model.", "language_model.model.", "language_model.", "model.text_model.")
_HEADS = ("lm_head.", "language_model.lm_head.")
_OTHER_NAMES = re.compile(
    r"(model\.)?(vision_tower|vision_model|vision_encoder|vision_language_adapter|visual|multi_modal_projector|"
    r"embed_vision|embed_audio|mm_projector|image_newline|patch_merger|connector|audio_tower|audio_projection|audio_model)\b"
)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the text model; that of a model for text alone stays as it is, but for its family's name.

    Raises:
        CheckpointError: naming a key that is not understood, or that says two things.
    """
    inner = config.get("text_config")
    if inner is None and not has_other_parts(config):
        text = dict(config)
    elif inner is None:
        text = {key: value for key, value in config.items() if key not in _OUTER_KEYS - IRRELEVANT_KEYS}
    elif not isinstance(inner, Mapping):
        raise ConfigReader(config).error("text_config", inner, "an object")
    else:
        text = _inner(config, inner)
    kind = text.get("model_type")
    family = _FAMILY_OF_TEXT.get(kind, kind) if isinstance(kind, str) else kind
    if family != kind:
        text |= {"model_type": family, **_plain_rotations(text)}
    if inner is not None and family in _DEFAULTS:
        sizes = dict(zip((*_SIZES, "max_position_embeddings"), _DEFAULTS[str(family)], strict=True))
        text = sizes | {key: value for key, value in text.items() if value is not None or key not in sizes}
    return text


def has_other_parts(config: Mapping[str, Any]) -> bool:
    """Whether the model is also one for images or sound."""
    return any(config.get(key) for key in _OTHER_PARTS)


def text_names(config: Mapping[str, Any]) -> Rename:
    """What turns the names of a checkpoint's tensors into those that are used here, ``model.layers.…``.

    Arguments:
        config: the whole of ``config.json``.

    Returns: a function from all names to a table; names of other parts than text are not in it. It raises
        CheckpointError where two text models are in the files.
    """

    def rename(names: Iterable[str]) -> dict[str, str]:
        names = list(names)
        left_out = [name for name in names if _OTHER_NAMES.match(name)] if has_other_parts(config) else []
        others = set(left_out)
        kept = [name for name in names if name not in others]
        found = [prefix for prefix in _PREFIXES if any(name.startswith(f"{prefix}embed_tokens.") for name in kept)]
        if len(found) > 1:
            raise CheckpointError(f"the files hold two text models: {found[0]}embed_tokens and {found[1]}embed_tokens")
        if left_out:
            roots = sorted({re.sub(r"^((?:model\.)?[^.]+).*", r"\1", name) for name in left_out})
            logger.warning(
                "the model is served for text alone: %d tensors of %s are left out", len(left_out), ", ".join(roots)
            )
        head = next((head for head in _HEADS if any(name.startswith(head) for name in kept)), _HEADS[0])
        prefix = found[0] if found else "model."
        return {name: _renamed(name, prefix, head) for name in kept}

    return rename


def _renamed(name: str, prefix: str, head: str) -> str:
    if name.startswith(head):
        return "lm_head." + name.removeprefix(head)
    return "model." + name.removeprefix(prefix) if name.startswith(prefix) else name


def _inner(config: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    """What is in ``text_config``, and what it takes from around it."""
    if inner.get("text_config") is not None:
        raise ConfigReader(inner, "config.json: text_config").error("text_config", inner["text_config"], "absent")
    text = {key: value for key, value in inner.items() if key not in _OUTER_KEYS - IRRELEVANT_KEYS}
    text |= {key: config[key] for key in _INHERITED if text.get(key) is None and config.get(key) is not None}
    outer = ConfigReader(config)
    # Where either says so, the head may be missing from the files; one that is there is used.
    if outer.flag("tie_word_embeddings", False):
        text["tie_word_embeddings"] = True
    same = {key for key, value in config.items() if key in text and text[key] == value}
    outer.refuse_unread(_OUTER_KEYS | set(_INHERITED) | same)
    for key in ("quantization_config", "compression_config"):
        if config.get(key) and config[key] != text[key]:
            raise outer.error(key, config[key], "the same as in text_config")
    return text


def _plain_rotations(text: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the rotations, for text alone."""
    out: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(values := text.get(key), Mapping):
            kept = {name: value for name, value in values.items() if name not in ("mrope_section", "mrope_interleaved")}
            out[key] = {n: "default" if n in ("type", "rope_type") and v == "mrope" else v for n, v in kept.items()}
    return out
