"""GGUF files turned into checkpoints in Hugging Face layout; quantised tensors keep their blocks.

Nothing is guessed: every tensor and every key of metadata is used, or known to mean nothing here, or the file is
refused; and every tensor of the model comes from the file.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.directory import LateTensor, write_json, write_tensors_one_by_one
from ..checkpoint.gguf_blocks import block_sizes
from ..checkpoint.gguf_file import GgufFile, GgufTensor
from ..checkpoint.gguf_layout import METHOD, stored_name
from ..checkpoint.weights import CheckpointError, TensorInfo
from ..model.families import family_of, model_spec, mtp_layer_specs
from ..model.layout import plan_layout
from ..model.mtp_layers import PREFIX as MTP
from ..model.mtp_layers import layers_found
from .gguf_architectures import gguf_names, model_config, parts_of
from .gguf_latent import SMALL
from .gguf_metadata import Metadata
from .gguf_parts import PLAIN, Part, Piece
from .gguf_settings import Architecture
from .gguf_tokenizer import read_vocabulary, write_tokenizer

logger = logging.getLogger(__name__)

_SMALL = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", *SMALL)  # weights that nothing runs quantised
# What the config, names and numbers of an imported file follow from.
_IMPORTER = (
    *("convert/gguf_*.py", "checkpoint/gguf_*.py", "checkpoint/directory.py"),
    *("model/families.py", "model/family.py", "model/mtp_layers.py", "model/family_tables/*.py", "model/rope.py"),
)
_NAMED_IN_CONFIG = ("bos_token", "eos_token", "pad_token")
_SAMPLING = {  # what the file calls recommended settings, and ``generation_config.json``
    **{f"general.sampling.{name}": name for name in ("top_k", "top_p", "min_p")},
    "general.sampling.temp": "temperature",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def importer_digest() -> str:
    """A hash of the code that imports, so that what an older one made is not used any more."""
    root = Path(__file__).parents[1]
    files = sorted(file for pattern in _IMPORTER for file in root.glob(pattern))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def import_gguf(path: Path, target: Path, *, keep_codes: bool = False, progress: bool = True) -> dict[str, str]:
    """Write config, tokenizer and weights of a GGUF file to a directory.

    Arguments:
        path: the file, or any part of a model that was split.
        target: a directory that exists and is empty.
        keep_codes: keep the blocks of quantised tensors; else they become float32, which holds them exactly.

    Returns: by name the SHA-256 of files that are large.

    Raises:
        CheckpointError: for a file that is damaged, or holds anything that is not understood; the message is one line
            that names the file and the tensor or key.
    """
    file = GgufFile(path)
    meta = Metadata(file)
    config, architecture = model_config(meta, file.tensors, lambda tensor: _numbers(file, tensor))
    vocabulary = read_vocabulary(meta, config["vocab_size"])
    config |= {f"{name}_id": index for name, index in vocabulary.special.items() if name in _NAMED_IN_CONFIG}
    config["dtype"] = _dtype({tensor.kind for tensor in file.tensors.values()})
    pieces = _pieces(file, config, architecture, meta.integer(".block_count"))
    model = {name: piece for name, piece in pieces.items() if not name.startswith(MTP)}
    _check(file, config, architecture, model)
    try:
        _check(file, config, architecture, pieces)
    except CheckpointError as error:
        logger.warning("what predicts further tokens is left out: %s", error)
        pieces = model
    # Others keep their names: loading says that they are not applied.
    generation = {_SAMPLING.get(key, key): value for key, value in meta.raw("general.sampling.").items()}
    write_tokenizer(meta, vocabulary, config["max_position_embeddings"], target)
    meta.refuse_unread()
    weights = target / "model.safetensors"
    quantised, digest = _write_weights(file, pieces, weights, keep_codes, progress)
    if quantised:
        config["quantization_config"] = {"quant_method": METHOD}
    write_json(target / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    if len(vocabulary.end_ids) > 1:
        ids["eos_token_id"] = vocabulary.end_ids
    write_json(target / "generation_config.json", {**ids, **generation})
    return {weights.name: digest}


def _dtype(kinds: set[str]) -> str:
    """The dtype that holds the numbers of all kinds; among blocks, which run as they are, bfloat16."""
    if kinds <= {"F32", "F64"}:
        return "float32"
    return "float16" if kinds <= {"F16", "F32", "F64"} else "bfloat16"


def _numbers(file: GgufFile, tensor: GgufTensor) -> torch.Tensor:
    """A small tensor in float32."""
    return Piece(tensor=tensor, part=Part(name=tensor.name, shape=tensor.shape)).numbers(file).flatten()


def _pieces(file: GgufFile, config: Mapping[str, Any], architecture: Architecture, num_blocks: int) -> dict[str, Piece]:
    """What the checkpoint will hold, by name.

    Raises:
        CheckpointError: naming a tensor that is not known, that has a type of no weights, or that is there twice.
    """
    pieces: dict[str, Piece] = {}
    for tensor in file.tensors.values():
        parts = parts_of(tensor, architecture, config, num_blocks)
        quantised = tensor.kind in block_sizes()
        if tensor.kind not in PLAIN and not (quantised and tensor.name.endswith(".weight") and len(tensor.shape) > 1):
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name!r} cannot have type {tensor.kind}")
        for part in parts:
            if part.name in pieces:
                other = pieces[part.name].tensor.name
                raise CheckpointError(f"{tensor.file}: tensors {other!r} and {tensor.name!r} are the same part")
            pieces[part.name] = Piece(tensor=tensor, part=part)
    return pieces


def _check(file: GgufFile, config: Mapping[str, Any], architecture: Architecture, pieces: Mapping[str, Piece]) -> None:
    """Check that the file holds the model's tensors, all of them and nothing else, in their shapes.

    Raises:
        CheckpointError: naming a tensor or a key.
    """
    shown = {
        name: TensorInfo(file=piece.tensor.file.name, dtype="F32", shape=piece.shape, begin=0, end=0)
        for name, piece in pieces.items()
    }
    try:
        plan_layout(model_spec(config), family_of(config), shown, mtp_layer_specs(config, layers_found(shown)))
    except CheckpointError as error:
        reason = gguf_names(architecture, config, str(error)).replace("config.json", "the metadata")
        raise CheckpointError(f"{file.files[0]}: {reason}") from error


def _write_weights(
    file: GgufFile, pieces: Mapping[str, Piece], target: Path, keep_codes: bool, progress: bool
) -> tuple[bool, str]:
    """Write all tensors, one at a time; returns whether some are quantised, and the file's hash."""
    from tqdm import tqdm

    late: dict[str, LateTensor] = {}
    quantised = False
    for name, piece in pieces.items():
        kind = piece.tensor.kind
        if kind in PLAIN and not piece.is_widened:
            late[name] = LateTensor(dtype=kind, shape=piece.shape, make=partial(piece.rows, file))
        elif keep_codes and not piece.is_widened and not piece.tensor.name.endswith(_SMALL):
            shape = (piece.shape[0], (piece.tensor.end - piece.tensor.begin) // piece.tensor.rows)
            late[stored_name(name, kind)] = LateTensor(dtype="U8", shape=shape, make=partial(piece.rows, file))
            quantised = True
        else:
            late[name] = LateTensor(dtype="F32", shape=piece.shape, make=partial(piece.numbers, file))
    with tqdm(total=len(late), desc="Converting", unit="tensor", disable=not progress or None) as bar:

        def done(name: str) -> None:
            bar.update()
            file.release()

        return quantised, write_tensors_one_by_one(target, late, done)
