"""The table of model families: how a ``config.json`` becomes a :class:`ModelSpec`, and what tensors are called.

Rules and defaults are those of transformers 5.23, whose modelling code the tests compare with. A new family is a new
entry in one of :mod:`.family_tables`, not a new model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..checkpoint.config_reader import IRRELEVANT_KEYS, NEUTRAL_VALUES, ConfigReader
from ..checkpoint.weights import CheckpointError
from .attention.registry import attention_kind
from .blocks import has_ffn
from .family import Family
from .family_tables.afmoe import AFMOE
from .family_tables.attention_variants import ATTENTION_VARIANTS
from .family_tables.gemma import GEMMA
from .family_tables.gpt_oss import GPT_OSS
from .family_tables.granite_swa import GRANITE_SWA
from .family_tables.hybrids import HYBRIDS
from .family_tables.kimi_linear import KIMI_LINEAR
from .family_tables.latent import LATENT
from .family_tables.layer_norms import LAYER_NORMS
from .family_tables.layer_types import LAYER_TYPES
from .family_tables.llama_like import LLAMA_LIKE
from .family_tables.nemotron import NEMOTRON
from .family_tables.olmo import OLMO
from .family_tables.own import OWN
from .family_tables.shared_experts import SHARED_EXPERTS
from .family_tables.state_spaces import STATE_SPACES
from .rope_config import rope_spec
from .spec import LayerSpec, ModelSpec

MAX_LAYERS = 10_000  # a mistake beyond; how many there are is compared with the files later

FAMILIES: dict[str, Family] = {
    **LLAMA_LIKE,
    **ATTENTION_VARIANTS,
    **SHARED_EXPERTS,
    **LAYER_TYPES,
    **GPT_OSS,
    **GRANITE_SWA,
    **HYBRIDS,
    **NEMOTRON,
    **STATE_SPACES,
    **GEMMA,
    **LAYER_NORMS,
    **AFMOE,
    **OLMO,
    **LATENT,
    **KIMI_LINEAR,
    **OWN,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a configuration names.

    Raises:
        CheckpointError: when it names none or one that is not supported; the message lists those that are.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(f"model_type {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def model_spec(config: Mapping[str, Any]) -> ModelSpec:
    """What the model described by a ``config.json`` computes.

    Arguments:
        config: the JSON object. Both the keys that transformers 5 writes (``rope_parameters``) and the older ones
            (``rope_theta``, ``rope_scaling``) are understood.

    Raises:
        CheckpointError: for an unsupported family, a missing or malformed value, or a key that would change the
            mathematics in a way that is not supported; the message names key and value.
    """
    family = family_of(config)
    reader = ConfigReader({**family.defaults, **family.settings(config)})
    try:
        spec = _model_spec(reader, family)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error
    reader.refuse_unread(IRRELEVANT_KEYS | family.ignored, {**NEUTRAL_VALUES, **family.fixed})
    return spec


def _model_spec(config: ConfigReader, family: Family) -> ModelSpec:
    max_position = config.integer("max_position_embeddings")
    num_layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
    layers = tuple(_layer_spec(config, family, layer) for layer in range(num_layers))
    if not layers:
        raise ValueError("num_hidden_layers must be at least 1")
    paged = [number for number, layer in enumerate(layers) if layer.attention.keeps_keys]
    if not paged:
        raise ValueError("at least one layer must have keys and values")
    ropes = {}
    for number in paged:
        attention = layers[number].attention
        channels = (attention.rotary_channels, attention.unrotated_channels)
        ropes[number] = rope_spec(config, family, number, *channels, max_position)
    for rope in ropes.values():
        if rope.rope_type == "yarn":
            max_position = max(max_position, int(rope.original_max_position * rope.factor))
        max_position = min(max_position, rope.longest or max_position)
    max_position = min(max_position, *(layer.attention.dense_positions or max_position for layer in layers))
    model_rope = ropes[paged[0]]
    own = {number: rope for number, rope in ropes.items() if rope != model_rope}
    layers = tuple(replace(layer, rope=own.get(number)) for number, layer in enumerate(layers))
    norm, norm_eps = family.norm(config, family.norm_eps)
    return ModelSpec(
        family=str(config.get("model_type")),
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size"),
        max_position=max_position,
        layers=layers,
        rope=model_rope,
        norm=norm,
        norm_eps=norm_eps,
        activation=family.activation(config),
        mlp_bias=family.mlp_bias(config),
        tie_embeddings=config.flag("tie_word_embeddings", family.tie_embeddings),
        eos_token_ids=config.integers("eos_token_id"),
        bos_token_id=next(iter(config.integers("bos_token_id")), None),
        **family.scales(config),
    )


def mtp_layer_specs(config: Mapping[str, Any], count: int) -> tuple[LayerSpec, ...]:
    """What the first ``count`` layers compute that predict further tokens.

    Raises:
        CheckpointError: as for :func:`model_spec`, or when the family's are not known.
    """
    if not count:
        return ()
    family = family_of(config)
    if family.mtp is None:
        raise CheckpointError(f"layers that predict further tokens are not known of {config.get('model_type')} models")
    settings = {**family.defaults, **family.settings(config)}
    layers = ConfigReader(settings).integer("num_hidden_layers")
    more = {key: [kind] * (layers + count) if isinstance(kind, str) else kind for key, kind in family.mtp.items()}
    reader, specs = ConfigReader({**settings, **more, "num_hidden_layers": layers + count}), []
    for number in range(layers, layers + count):
        spec = _layer_spec(reader, family, number)
        channels = (spec.attention.rotary_channels, spec.attention.unrotated_channels)
        rope = rope_spec(reader, family, number, *channels, reader.integer("max_position_embeddings"))
        specs.append(replace(spec, rope=rope))
    return tuple(specs)


def _layer_spec(config: ConfigReader, family: Family, layer: int) -> LayerSpec:
    moe, blocks = family.moe(config, layer), family.blocks(config, layer)
    ffn_size = family.dense_size(config) if moe is None and has_ffn(blocks) else 0
    attention = attention_kind(family.attention(config, layer)).from_config(config, family, layer)
    return LayerSpec(attention=attention, ffn_size=ffn_size, moe=moe, blocks=blocks)
