"""The interface of a layout of quantised weights in a checkpoint, and checks that layouts share.

A layout names the tensor that marks a quantised weight, and reads one weight or a part of it. Names are module
names, such as ``model.layers.0.self_attn.q_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch

from ...kernels.api.formats import ActivationScheme
from ...kernels.api.quantized_weight import QuantizedWeight
from .config_reader import ConfigReader
from .stored_weight import StoredWeight
from .weights import CheckpointError

FLOATS = ("F32", "F16", "BF16")
# Settings of GPTQ and AWQ that say how the codes were found, or which library's kernels shall read them.
CALIBRATION_KEYS = frozenset(
    {
        *("act_group_aware", "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs"),
        *("damp_auto_increment", "damp_percent", "dataset", "desc_act", "disable_exllama", "do_fuse", "exllama_config"),
        *("fuse_max_seq_len", "ignore", "lm_head", "max_input_length", "meta", "model_file_base_name"),
        *("model_name_or_path", "model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize"),
        *("modules_to_fuse", "modules_to_not_convert", "mse", "pack_impl", "pad_token_id", "quant_method"),
        *("static_groups", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama"),
    }
)
WHAT = "config.json: quantisation"
# In a regular expression: * + { and ?, but not the ? of a lazy repetition or of a group's kind.
_REPEATED = re.compile(r"[*+{]|(?<![(*+?}])\?")
_MOST_REPEATS, _MOST_STEPS = 4, 10**8


class StoredLayout(Protocol):
    """How a checkpoint's quantised weights are stored. Equal checkpoints have equal ``repr``.

    Layouts that extend it inherit :meth:`keeps` and :meth:`admit` of weights that all have a format of ours.

    Attributes:
        markers: the last part of tensor names by which a module is known to be quantised.
        parts: the last part of the names of all tensors that belong to such modules.
    """

    markers: ClassVar[tuple[str, ...]]
    parts: ClassVar[tuple[str, ...]]

    def scheme(self, weight: StoredWeight) -> ActivationScheme:
        """How the inputs of a weight are rounded."""
        ...

    def shape(self, weight: StoredWeight) -> tuple[int, ...]:
        """(O, I), from the files' headers; raises CheckpointError where the tensors do not fit together."""
        ...

    def input_step(self, weight: StoredWeight) -> int:
        """Parts may begin at multiples of so many inputs."""
        ...

    def load(self, weight: StoredWeight) -> QuantizedWeight | torch.Tensor:
        """What is wanted of a weight (:attr:`StoredWeight.kept`), float32 where no format of ours holds it.

        Raises:
            ValueError: where it is inconsistent.
        """
        ...

    def keeps(self, weight: StoredWeight) -> bool:
        """Whether a weight stays at its width: :meth:`load` gives no tensor."""
        return True

    def admit(self, weights: Iterable[StoredWeight], dequantize: bool) -> None:
        """Check that all weights may run as they would; ``dequantize`` says whether some may run dequantised.

        Raises:
            CheckpointError: naming one that may not.
        """


def setting_error(key: str, value: Any, expected: str) -> CheckpointError:
    """For a setting of ``quantization_config`` that is not understood."""
    return ConfigReader({}, WHAT).error(key, value, expected)


def want(settings: Mapping[str, Any], key: str, wanted: Any, alias: str = "") -> None:
    """Raises CheckpointError unless a setting has the only value that is understood."""
    value = settings.get(key, settings.get(alias))
    if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
        raise setting_error(key, value, f"{wanted}")


def group_size(settings: Mapping[str, Any], alias: str = "group_size") -> int:
    """Inputs that share a scale; -1: all of them.

    Raises:
        CheckpointError: for anything else.
    """
    value = settings.get("group_size", settings.get(alias))
    if isinstance(value, bool) or not isinstance(value, int) or not (1 <= value < 2**31 or value == -1):
        raise setting_error("group_size", value, "a positive whole number, or -1 for all inputs")
    return value


@lru_cache(maxsize=1 << 16)
def _begins(pattern: re.Pattern[str], name: str) -> bool:
    return pattern.match(name) is not None


@dataclass(frozen=True, kw_only=True)
class ModulePattern:
    """A regular expression out of a file, for names of modules.

    Arguments:
        pattern: it.
        repeats: how many of its parts may be there several times, or not at all.
    """

    pattern: re.Pattern[str]
    repeats: int

    @classmethod
    def of(cls, text: Any) -> ModulePattern:
        """From a text.

        Raises:
            CheckpointError: for one that is wrong, or could take for ever: with a repeated group, or many repetitions.
        """
        try:
            repeats = len(_REPEATED.findall(text)) if isinstance(text, str) else _MOST_REPEATS + 1
            if repeats > _MOST_REPEATS or re.search(r"\)[*+{]", text):
                raise ValueError
            return cls(pattern=re.compile(text), repeats=repeats)
        except (ValueError, OverflowError, RecursionError, re.error):
            raise setting_error("a pattern of module names", text, "a simple regular expression") from None

    def begins(self, name: str) -> bool:
        """Whether a name begins so.

        Raises:
            CheckpointError: for a name that is so long that finding out could take for ever.
        """
        if len(name) ** self.repeats > _MOST_STEPS:
            raise setting_error("a pattern of module names", self.pattern.pattern, f"simpler, for {name[:60]!r}…")
        return _begins(self.pattern, name)


def two_sizes(weight: StoredWeight, part: str) -> tuple[int, int]:
    """The shape of a tensor of 32-bit words.

    Raises:
        CheckpointError: when it has not two dimensions.
    """
    shape = weight.info(part, "I32").shape
    if len(shape) != 2:
        raise weight.error(f"{part} has shape {shape} and not two dimensions")
    return shape[0], shape[1]
