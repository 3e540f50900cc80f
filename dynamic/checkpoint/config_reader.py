"""Reading ``config.json`` key by key, and rejecting unknown keys that change the mathematics."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from .weights import CheckpointError, shown

# Keys that alter the forward pass in some family, and the values with no effect. A family that understands a
# key reads it; a key that was not read must hold one of these values (or null).
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "attn_output_gate": (False,),
    "clip_qkv": (),
    "compression_config": (),
    "decoder_sparse_step": (1,),
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
    "per_layer_config": ({},),
    "position_embedding_type": ("rope", "rotary"),
    "pruned_heads": ({},),
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
    "tie_encoder_decoder": (False,),
    "topk_group": (0, 1),
    "topk_method": ("greedy",),
    "use_alibi": (False,),
    "use_mrope": (False,),
    "use_parallel_residual": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}

# Keys that no forward pass of ours depends on, whatever they hold. A key in neither table is refused.
IRRELEVANT_KEYS = frozenset(
    {
        # where the file comes from and what reads it
        *("architectures", "auto_map", "dtype", "is_decoder", "is_llama_config", "model_type", "name_or_path"),
        *("prefix", "tokenizer_class", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version"),
        *("unsloth_fixed", "unsloth_version", "use_bfloat16", "xla_device"),
        # training and fine-tuning
        *("attention_dropout", "attn_pdrop", "classifier_dropout", "embd_pdrop", "embedding_dropout", "ep_size"),
        *("finetuning_task", "gradient_checkpointing", "hidden_dropout", "id2label", "init_method"),
        *("initializer_range", "label2id", "loss_type", "num_labels", "output_router_logits", "problem_type"),
        *("resid_pdrop", "residual_dropout", "router_aux_loss_coef", "router_jitter_noise", "router_z_loss_coef"),
        *("task_specific_params", "tf_legacy_loss"),
        # how something is computed or returned, not what
        *("attn_implementation", "chunk_size_feed_forward", "output_attentions", "output_hidden_states"),
        *("pretraining_tp", "return_dict", "tie_last_hidden_states", "use_cache"),
        # layers for further tokens, which are left out
        *("num_mtp_layers", "num_nextn_predict_layers"),
        # tokens that no decoder of ours meets
        *("cls_token_id", "decoder_start_token_id", "mask_token_id", "pad_token_id", "sep_token_id", "unk_token_id"),
        # sizes that only some layers or windows need; whoever needs them reads them
        *("intermediate_size", "max_sequence_length", "max_window_layers", "model_max_length"),
        # defaults of generation in files of older versions of transformers, which ignores them there as well
        *("assistant_confidence_threshold", "assistant_lookbehind", "encoder_repetition_penalty", "epsilon_cutoff"),
        *("eta_cutoff", "num_assistant_tokens", "num_assistant_tokens_schedule", "target_lookbehind"),
        *("bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping"),
        *("encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "forced_bos_token_id"),
        *("forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length"),
        *("no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences", "output_scores"),
        *("remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens"),
        *("temperature", "top_k", "top_p", "typical_p"),
    }
)

LARGEST_NUMBER = 1e30  # larger numbers are mistakes and would overflow float32


class TypedReader:
    """Values by key, each of a type. Who extends it says where they are from."""

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; a key that is missing gives the default."""
        raise NotImplementedError

    def error(self, key: str, value: Any, expected: str) -> CheckpointError:
        """The error for a value that cannot be used."""
        raise NotImplementedError

    def lacks(self, key: str) -> CheckpointError:
        """The error for a value that must be there."""
        raise NotImplementedError

    def integer(self, key: str, default: int | None = None, *, most: int = 2**31 - 1) -> int:
        """A whole number between 0 and ``most``.

        Raises:
            CheckpointError: when it is something else, or missing without a default.
        """
        value = self._required(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise self.error(key, value, f"a whole number of at least 0 and at most {most}")
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

    def text(self, key: str, default: str | None = None) -> str:
        """A text.

        Raises:
            CheckpointError: as for :meth:`integer`.
        """
        value = self._required(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "a text")
        return value

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise self.lacks(key)
        return value


class ConfigReader(TypedReader):
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

    def refuse_unread(
        self, ignored: Container[str] = IRRELEVANT_KEYS, neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL_VALUES
    ) -> None:
        """Reject keys that were not read, because they change what the model computes or may do so.

        Keys that are null, or begin with an underscore (a writer's private notes), say nothing.

        Arguments:
            ignored: keys that have no effect.
            neutral: by key, values that have none.

        Raises:
            CheckpointError: naming key and value.
        """
        for key, value in self.values.items():
            if key in self._read or key in ignored or value is None or key.startswith("_"):
                continue
            if value in neutral.get(key, ()):
                continue
            if key == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value):
                continue
            kind = self.values.get("model_type")
            where = "" if kind is None else f" for model_type {kind!r}"
            effect = "would give wrong results" if key in neutral else "could give wrong results: it is unknown"
            raise CheckpointError(
                f"{self._what}: {shown(key)}={shown(value)} is not supported{where}, and ignoring it {effect}"
            )

    def lacks(self, key: str) -> CheckpointError:
        """The error for a value that must be there."""
        return CheckpointError(f"{self._what} lacks {key}")
