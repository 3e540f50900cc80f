"""Metadata of GGUF files, read key by key: every key is used, or known to mean nothing here, or the file is refused."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..checkpoint.config_reader import LARGEST_NUMBER, TypedReader
from ..checkpoint.gguf_file import GgufArray, GgufFile
from ..checkpoint.weights import CheckpointError

# Keys, or beginnings of keys, that describe the file and not what the model computes.
_DESCRIPTIONS = (
    *("general.", "quantize.", "imatrix.", "split.", "GGUF.", "tokenizer.huggingface.json"),
    # Tokens of infilling have their names in the vocabulary as well.
    *("tokenizer.ggml.fim_", "tokenizer.ggml.prefix_token_id", "tokenizer.ggml.suffix_token_id"),
    *("tokenizer.ggml.middle_token_id", "tokenizer.ggml.token_type_count"),
)
_DESCRIPTIONS_OF_ARCHITECTURES = (".tensor_data_layout", ".rope.scaling.finetuned")
# Keys of architectures that change what is computed, and the values that do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    ".attention.causal": (True,),
    ".attention.clamp_kqv": (0.0,),
    ".attention.max_alibi_bias": (0.0,),
    ".attention.output_scale": (0.0, 1.0),
    ".attention.scale": (0.0,),
    ".attention.sliding_window": (0,),
    ".attn_logit_softcapping": (0.0,),
    ".embedding_scale": (0.0, 1.0),
    ".expert_count": (0,),
    ".expert_gating_func": (0, 1),
    ".expert_group_count": (0, 1),
    ".expert_group_used_count": (0, 1),
    ".expert_shared_count": (0,),
    ".expert_used_count": (0,),
    ".expert_weights_scale": (0.0, 1.0),
    ".final_logit_softcapping": (0.0,),
    ".leading_dense_block_count": (0,),
    ".logit_scale": (0.0, 1.0),
    ".pooling_type": (0,),
    ".residual_scale": (0.0, 1.0),
    ".router_logit_softcapping": (0.0,),
    ".use_parallel_residual": (False,),
}


class Metadata(TypedReader):
    """The metadata of a file. Every read is typed and remembered.

    Keys that begin with a dot belong to the file's architecture: ``.block_count`` is ``llama.block_count``.

    Arguments:
        file: whose metadata.

    Raises:
        CheckpointError: when the file is not of a model.
    """

    def __init__(self, file: GgufFile) -> None:
        self.file = file.files[0]
        self._values = file.metadata
        self._read: set[str] = set()
        self.architecture = ""
        self.architecture = self.text("general.architecture")
        for key, wanted in (("general.type", "model"), ("general.quantization_version", 2)):
            if (value := self.get(key, wanted)) != wanted:
                raise self.error(key, value, repr(wanted))

    def full(self, key: str) -> str:
        """A key as it stands in the file."""
        return self.architecture + key if key.startswith(".") else key

    def get(self, key: str, default: Any = None) -> Any:
        """The raw value; a key that is missing gives the default."""
        self._read.add(self.full(key))
        return self._values.get(self.full(key), default)

    def has(self, key: str) -> bool:
        """Whether a key is there; that is no use of it."""
        return self.full(key) in self._values

    @property
    def num_layers(self) -> int:
        """How many layers the model has, without the last blocks, which predict further tokens."""
        return self.integer(".block_count") - self.integer(".nextn_predict_layers", 0)

    def array_of_layers(self, key: str) -> list[Any]:
        """An array with a number for each layer; those of the blocks behind them may follow.

        Raises:
            CheckpointError: for anything else, or when it is missing.
        """
        layers = self.num_layers
        return self.numbers(key, layers, self.integer(".block_count"))[:layers].tolist()

    def by_layer(self, key: str, default: int | None = None) -> list[int]:
        """As :meth:`integer`, for every layer: an array, or one number for all of them."""
        if not isinstance(self.get(key), GgufArray):
            return [self.integer(key, default)] * self.num_layers
        values = self.array_of_layers(key)
        if not all(type(number) is int and 0 <= number < 2**31 for number in values):
            raise self.error(key, values[:20], "whole numbers of at least 0")
        return values

    def of_all_layers(self, key: str, default: int | None = None, *, zeros: bool = False) -> int:
        """As :meth:`integer`; an array for all layers must hold one value.

        Arguments:
            zeros: layers that lack what the key is of may hold 0.
        """
        if not isinstance(self.get(key), GgufArray):
            return self.integer(key, default)
        values = sorted(set(self.by_layer(key)))
        if zeros and len(values) > 1:
            values = [value for value in values if value]
        if len(values) != 1:
            raise self.error(key, values, "the same for all layers")
        return values[0]

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number, as the decimal that its 32 bits stand for."""
        return _decimal(super().number(key, default))

    def strings(self, key: str, most: int) -> list[str]:
        """An array of texts.

        Arguments:
            most: how many there may be.

        Raises:
            CheckpointError: for anything else, or when it is missing.
        """
        value = self._required(key, None)
        if isinstance(value, GgufArray) and value.count > most:
            raise self.error(key, value, f"at most {most} texts")
        try:
            found = value.strings() if isinstance(value, GgufArray) else None
        except UnicodeDecodeError as error:
            raise self.error(key, str(error), "texts in UTF-8") from error
        if found is None:
            raise self.error(key, value, "an array of texts")
        return found

    def numbers(self, key: str, *counts: int) -> np.ndarray:
        """An array of numbers.

        Arguments:
            counts: how many there must be, or may be as well.

        Raises:
            CheckpointError: for anything else, or when it is missing.
        """
        value = self._required(key, None)
        found = value.numbers() if isinstance(value, GgufArray) else None
        if found is None or len(found) not in counts:
            raise self.error(key, value, f"an array of {counts[0]} numbers")
        return found

    def raw(self, beginning: str) -> dict[str, Any]:
        """By key, whatever begins so, as JSON has it."""
        return {
            key: _decimal(value) if isinstance(value, float) else value if isinstance(value, int | str) else "an array"
            for key, value in self._values.items()
            if key.startswith(beginning)
        }

    def error(self, key: str, value: Any, expected: str) -> CheckpointError:
        """The error for a value that cannot be used."""
        shown = f"an array of {value.count}" if isinstance(value, GgufArray) else repr(value)
        return CheckpointError(f"{self.file}: {self.full(key)} must be {expected}, not {shown[:200]}")

    def refuse_unread(self) -> None:
        """Reject what was not read and is not known to mean nothing.

        Raises:
            CheckpointError: naming key and value.
        """
        neutral = {self.full(key): values for key, values in _NEUTRAL.items()}
        for key, value in self._values.items():
            if key in self._read or key.startswith(_DESCRIPTIONS):
                continue
            if key in map(self.full, _DESCRIPTIONS_OF_ARCHITECTURES) or value in neutral.get(key, ()):
                continue
            shown = f"an array of {value.count}" if isinstance(value, GgufArray) else repr(value)[:200]
            raise CheckpointError(
                f"{self.file}: {key[:200]!r} = {shown} is not supported for the architecture {self.architecture!r},"
                " and ignoring it could give wrong results"
            )

    def lacks(self, key: str) -> CheckpointError:
        """The error for a value that must be there."""
        return CheckpointError(f"{self.file} lacks the metadata entry {self.full(key)!r}")


def _decimal(value: float) -> float:
    """What a float32 stands for: the shortest decimal number that rounds to it, such as 1e-6."""
    if abs(value) >= LARGEST_NUMBER or float(np.float32(value)) != value:
        return value
    return float(str(np.float32(value)))
