"""Reading ``config.json`` key by key, and rejecting unknown keys that change the mathematics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .weights import CheckpointError

# Keys that alter the forward pass in some family, and the values with no effect. A family that understands a
# key reads it; a key that was not read must hold one of these values (or null).
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "attn_output_gate": (False,),
    "auto_map": (),
    "clip_qkv": (),
    "compression_config": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "first_k_dense_replace": (0,),
    "is_encoder_decoder": (False,),
    "kv_lora_rank": (),
    "layer_types": (),
    "lm_head_bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "mlp_only_layers": ([],),
    "moe_layer_freq": (1,),
    "n_group": (0, 1),
    "n_shared_experts": (0,),
    "no_rope_layers": ([],),
    "norm_topk_prob": (),
    "num_shared_experts": (0,),
    "parallel_attn": (False,),
    "partial_rotary_factor": (1,),
    "position_embedding_type": ("rope", "rotary"),
    "q_lora_rank": (),
    "qk_layernorm": (False,),
    "qkv_bias": (False,),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "routed_scaling_factor": (1,),
    "scoring_func": ("softmax",),
    "shared_expert_intermediate_size": (0,),
    "shared_intermediate_size": (0,),
    "sliding_window": (),
    "topk_group": (0, 1),
    "topk_method": ("greedy",),
    "use_alibi": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}

LARGEST_NUMBER = 1e30  # larger numbers are mistakes and would overflow float32


class ConfigReader:
    """A configuration of a checkpoint. Every read is typed and remembered.

    Arguments:
        values: the JSON object.
        what: what to call it in errors.
    """

    def __init__(self, values: Mapping[str, Any], what: str = "config.json") -> None:
        self.values = values
        self._what = what
        self._read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; a key that is missing or null gives the default."""
        self._read.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 0 that fits 32 bits.

        Raises:
            CheckpointError: when it is something else, or missing without a default.
        """
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise self.error(key, value, "a whole number of at least 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number.

        Raises:
            CheckpointError: as for :meth:`integer`.
        """
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST_NUMBER:
            raise self.error(key, value, "a finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false.

        Raises:
            CheckpointError: for anything else.
        """
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def choice(self, key: str, options: Mapping[str, str], default: str) -> str:
        """One of several names, translated into ours.

        Raises:
            CheckpointError: for any other value; the message lists the supported ones.
        """
        value = self.get(key, default)
        if not isinstance(value, str) or value not in options:
            raise self.error(key, value, f"one of {', '.join(options)}; nothing else is supported")
        return options[value]

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers, or a single one; empty when it is missing.

        Raises:
            CheckpointError: for anything else.
        """
        value = self.get(key, [])
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, bool) or not isinstance(number, int) or abs(number) >= 2**31 for number in numbers):
            raise self.error(key, value, "a whole number or a list of them")
        return tuple(numbers)

    def error(self, key: str, value: Any, expected: str) -> CheckpointError:
        """The error for a value that cannot be used."""
        return CheckpointError(f"{self._what}: {key} must be {expected}, not {str(value)[:200]!r}")

    def refuse_unread(self, ignored: frozenset[str] = frozenset()) -> None:
        """Reject keys that were not read although they change what the model computes.

        Arguments:
            ignored: keys that have no effect in this family.

        Raises:
            CheckpointError: naming key and value.
        """
        for key, neutral in NEUTRAL_VALUES.items():
            value = self.values.get(key)
            if key in self._read or key in ignored or value is None or value in neutral:
                continue
            if key == "layer_types" and isinstance(value, list) and set(value) <= {"full_attention"}:
                continue
            raise CheckpointError(
                f"{self._what}: {key}={str(value)[:200]} is not supported for model_type "
                f"{self.values.get('model_type')!r}, and ignoring it would give wrong results"
            )

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise CheckpointError(f"{self._what} lacks {key}")
        return value
