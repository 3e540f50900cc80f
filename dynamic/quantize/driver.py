"""Quantises a checkpoint layer by layer: memory holds one layer and the residual stream of the text.

Every layer reads the output of the quantised layers before it, so that it can compensate for their errors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...exits.sidecar import TENSOR_FILE, backbone_hash
from ...kernels.select import select_backend
from ...kernels.torch.backend import TorchBackend
from ..checkpoint.compressed_writer import compressed_config
from ..checkpoint.directory import copy_tokenizer, write_json, write_tensors
from ..checkpoint.weights import DTYPES, CheckpointError, read_json
from ..model.attention.gqa import GqaSpec
from ..model.blocks import PRE_NORM
from ..model.layout import EMBEDDING
from ..model.model_files import ModelFiles, open_files
from .inputs import OneLayer
from .layer import layer_tensors, pack_layer, read_layer
from .methods import CalibratedMethod, LayerMethod

PROGRESS, REPORT = "quantization_progress.json", "quantization_report.json"
_REST, _INDEX = "model-rest.safetensors", "model.safetensors.index.json"


def quantize_checkpoint(
    source: Path,
    target: Path,
    windows_NL: torch.Tensor,
    method: CalibratedMethod,
    *,
    device: torch.device | None = None,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Quantise a checkpoint into another directory; an interrupted run is resumed.

    Arguments:
        source: directory in Hugging Face layout, its weights not quantised.
        target: a directory that does not exist, is empty, or holds an unfinished run with the same settings.
        windows_NL: the calibration text, token ids, int64: N windows of L tokens.
        method: for projections and experts. Routers, norms, embedding and LM head are unchanged.
        device: that calibrates, in float32.
        progress: show a progress bar.

    Returns: the report that is written beside the weights: the error of every layer's output, and which rows its
        experts were calibrated on.

    Raises:
        ValueError: for a source that is quantised already, a target that holds something else, or windows longer than
            the model's context.
    """
    from tqdm import tqdm

    origin = _open(source, method)
    if windows_NL.shape[1] > origin.spec.max_position:
        raise ValueError(f"windows of {windows_NL.shape[1]} tokens exceed the model's {origin.spec.max_position}")
    backend = select_backend(device or torch.device("cpu"), torch.float32, "auto")
    settings = {
        "method": asdict(method),
        "source_sha256": backbone_hash(source),
        "text_sha256": hashlib.sha256(windows_NL.contiguous().numpy().tobytes()).hexdigest(),
        "windows": list(windows_NL.shape),
    }
    layers: list[dict[str, Any]] = _begin(target, settings)
    stream_NLD = _stream(origin, target, len(layers), windows_NL)
    bar = tqdm(
        total=origin.spec.num_layers, initial=len(layers), desc="Quantising", unit="layer", disable=not progress or None
    )
    with bar:
        for number in range(len(layers), origin.spec.num_layers):
            stream_NLD, report = _one_layer(origin, target, number, stream_NLD, method, backend)
            write_tensors(_stream_file(target, number + 1), {"stream": stream_NLD})
            layers.append(report)
            write_json(target / PROGRESS, {"settings": settings, "layers": layers})
            _stream_file(target, number).unlink(missing_ok=True)
            origin.checkpoint.release()
            bar.update()
    report = {"settings": settings, "layers": layers}
    _finish(origin, target, method, report)
    if (source / TENSOR_FILE).is_file() or (source / "experts.json").is_file():
        say("exits, contributions of experts and certificates belong to the unquantised weights and are left out")
    return report


def _open(source: Path, method: CalibratedMethod) -> ModelFiles:
    files = open_files(source)
    if files.stored is not None:
        raise ValueError(f"{source} is quantised already; name the checkpoint that it was made of")
    kinds = [layer.attention for layer in files.spec.layers]
    if other := [kind.kind for kind in kinds if not isinstance(kind, GqaSpec)]:
        raise ValueError(f"{source} has attention of kind {other[0]!r}; only {GqaSpec.kind!r} can be quantised")
    spec = files.spec
    if method.name != "gptq" and (spec.norm != "rms" or any(layer.blocks != PRE_NORM for layer in spec.layers)):
        raise ValueError(
            f"quantization={method.name} folds scales into norms in front of attention and FFN; those of {spec.family} "
            "are others, use gptq"
        )
    return files


def _begin(target: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Reports of the layers that are finished."""
    progress = target / PROGRESS
    if (target / "config.json").exists() or (target.exists() and not target.is_dir()):
        raise ValueError(f"output={target} holds a model already; name a directory that does not exist")
    if progress.is_file():
        found = read_json(progress)
        if found.get("settings") != settings:
            raise ValueError(
                f"output={target} holds an unfinished run with other settings; give it the same method, model and text,"
                " or name another directory"
            )
        return list(found["layers"])
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"output={target} is not empty; name a directory that does not exist")
    target.mkdir(parents=True, exist_ok=True)
    write_json(progress, {"settings": settings, "layers": []})
    return []


def _stream(origin: ModelFiles, target: Path, finished: int, windows_NL: torch.Tensor) -> torch.Tensor:
    """The residual stream of the text after the finished layers, float32."""
    if finished == origin.spec.num_layers:
        return torch.empty(0)  # nothing is left to run
    if finished:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = _stream_file(target, finished)
        try:
            return load_file(file)["stream"]
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise ValueError(f"{file} is missing or damaged ({error}); remove {target} and start again") from error
    rows_NLD = origin.checkpoint.view(EMBEDDING)[windows_NL].float()
    return rows_NLD * origin.spec.embedding_scale


@torch.inference_mode()
def _one_layer(
    origin: ModelFiles,
    target: Path,
    number: int,
    stream_NLD: torch.Tensor,
    method: CalibratedMethod,
    backend: TorchBackend,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Quantise a layer and write it; returns the stream after it, and its report."""
    spec, layout = origin.spec, origin.layout.layers[number]
    layer = read_layer(origin.checkpoint, layout, spec)
    exact = OneLayer(spec, number, pack_layer(backend, layer, spec.activation), backend)
    expected_NLD, inputs = exact.watch(stream_NLD)
    del exact
    dtype = DTYPES[origin.checkpoint[next(iter(layout.norms.values())).name].dtype]
    worker = LayerMethod(method, spec, dtype)
    layer, inputs = worker.scaled(layer, inputs)
    quantized = worker.quantized(layer, inputs)
    prefix = f"model.layers.{number}."
    write_tensors(target / _layer_file(number), layer_tensors(quantized, layout, origin.family, prefix, dtype))
    packed = pack_layer(backend, quantized, spec.activation, method.scheme)
    after_NLD = OneLayer(spec, number, packed, backend).run(stream_NLD)
    added = (expected_NLD - stream_NLD).norm()
    error = float((after_NLD - expected_NLD).norm() / added.clamp(min=torch.finfo(torch.float32).tiny))
    return after_NLD, {"layer": number, "relative_error": error, "experts": dict(worker.sources)}


def _finish(origin: ModelFiles, target: Path, method: CalibratedMethod, report: dict[str, Any]) -> None:
    """Write what is not quantised, the index, and last the configuration, which completes the model."""
    checkpoint = origin.checkpoint
    names = [EMBEDDING, *(tensor.name for tensor in origin.layout.final_norm.values())]
    names += [name for name in (origin.layout.lm_head, origin.layout.lm_head_bias) if name]
    write_tensors(target / _REST, {name: checkpoint.view(name).clone() for name in names})
    copy_tokenizer(origin.path, target)
    files = [*(_layer_file(number) for number in range(origin.spec.num_layers)), _REST]
    weight_map = {name: file for file in files for name in _names_in(target / file)}
    write_json(target / _INDEX, {"metadata": {}, "weight_map": weight_map})
    write_json(target / REPORT, report)
    kept = ["lm_head"]
    for layout in origin.layout.layers:
        kept += [name.removesuffix(".weight") for name in (layout.router, layout.shared_gate) if name]
    int8 = method.scheme.kind == "int8"
    group, symmetric = (None, True) if int8 else (method.group, method.symmetric)
    settings = compressed_config(kept, group=group, symmetric=symmetric, int8_rows=int8)
    config = {**origin.config, "quantization_config": settings}
    _stream_file(target, origin.spec.num_layers).unlink(missing_ok=True)
    write_json(target / "config.json", config)
    (target / PROGRESS).unlink()


def _names_in(file: Path) -> list[str]:
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except OSError as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from error


def _layer_file(number: int) -> str:
    return f"model-layer-{number:03d}.safetensors"


def _stream_file(target: Path, finished: int) -> Path:
    return target / f"stream-{finished:03d}.safetensors"
