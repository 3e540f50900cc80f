"""What a checkpoint recommends for generation (``generation_config.json``), as requests here take it.

A recommendation never stops a model from loading: what makes no sense, or is not done here, is named in one warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..checkpoint.config_reader import ConfigReader
from ..checkpoint.weights import read_json, shown

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
SMALLEST_TOP_P = 1e-9  # the most likely token alone, which is what 0 means
# Values that are in use for "off".
_OFF: dict[str, tuple[Any, ...]] = {"top_k": (0, -1), "max_new_tokens": (0, -1)}
_LIMITS: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (1, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 100.0),
    "max_new_tokens": (1, 2**31 - 1),
}
_WHOLE = ("top_k", "max_new_tokens")
# Keys that say how transformers computes, returns or pads something, and limits that the engine has itself. As with
# vLLM, whether tokens are drawn is said by the temperature alone.
_IRRELEVANT = frozenset(
    {
        *(
            "assistant_confidence_threshold",
            "assistant_early_exit",
            "assistant_ensemble_weight",
            "assistant_lookbehind",
        ),
        *("bos_token_id", "cache_config", "cache_implementation", "chat_format", "compile_config"),
        *("continuous_batching_config", "decoder_start_token_id", "disable_compile", "do_sample", "is_assistant"),
        *("low_memory", "max_cache_len", "max_length", "max_matching_ngram_size", "max_time", "max_window_size"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "output_attentions", "output_hidden_states"),
        *("output_logits", "output_scores", "pad_token_id", "prefill_chunk_size", "prompt_lookup_num_tokens"),
        *("return_dict_in_generate", "speculation_type", "target_lookbehind", "transformers_version"),
        *("trust_remote_code", "use_cache", "use_mtp"),
    }
)
# Keys that change the output where they hold something else.
_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "early_stopping": (False,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "length_penalty": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False, True),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "top_h": (1,),
    "typical_p": (1,),
    "watermarking_config": (),
}


def stop_tokens(path: Path, named: Iterable[int]) -> tuple[int, ...]:
    """Tokens that end a text: those that ``generation_config.json`` names, and then others.

    Arguments:
        path: the checkpoint's directory.
        named: by ``config.json`` and by the tokenizer.

    Raises:
        CheckpointError: when the file is there and malformed.
    """
    ids = (*_reader(path).integers("eos_token_id"), *named)
    return tuple(dict.fromkeys(number for number in ids if number >= 0))


def read_generation_defaults(path: Path) -> dict[str, Any]:
    """What ``generation_config.json`` recommends: any of temperature, top_p, top_k, min_p, repetition_penalty and
    max_new_tokens, in the ranges that requests may have.

    Arguments:
        path: the checkpoint's directory.

    Raises:
        CheckpointError: when the file is there and holds no JSON object.
    """
    config = _reader(path)
    left_out: dict[str, Any] = {}
    defaults: dict[str, Any] = {}
    for key, (least, most) in _LIMITS.items():
        value = config.get(key)
        if value is None or (not isinstance(value, bool) and value in _OFF.get(key, ())):
            continue
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not least <= value <= most or (key in _WHOLE and value != int(value)):
            left_out[key] = value
        else:
            defaults[key] = int(value) if key in _WHOLE else float(value)
    if defaults.get("top_p") == 0:
        defaults["top_p"] = SMALLEST_TOP_P
    for key, value in config.values.items():
        if key in _LIMITS or key in _IRRELEVANT or key == "eos_token_id" or key.startswith("_") or value is None:
            continue
        if value not in _WITHOUT_EFFECT.get(key, ()):
            left_out[key] = value
    if left_out:
        named = ", ".join(f"{shown(key)}={shown(value)}" for key, value in left_out.items())
        logger.warning("%s: not applied to requests: %s", path / FILE, named)
    return defaults


def _reader(path: Path) -> ConfigReader:
    file = path / FILE
    return ConfigReader(read_json(file) if file.exists() else {}, FILE)
