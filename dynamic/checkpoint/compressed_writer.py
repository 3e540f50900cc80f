"""Quantised weights written as compressed-tensors lays them out: ``pack-quantized`` int4, ``int-quantized`` int8."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ...kernels.api.codes import pack_int4
from ...kernels.api.formats import INT4, INT8
from ...kernels.api.quantized_weight import QuantizedWeight


def compressed(name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """The tensors of a linear layer's weight.

    Arguments:
        name: of the weight, with ``.weight`` at its end.
        weight: (O, I), int8 or int4 without offsets: the library has zero points only.

    Raises:
        ValueError: for another format.
    """
    if weight.format == INT8:
        return {name: weight.data.contiguous(), f"{name}_scale": weight.scale.contiguous()}
    if weight.format != INT4 or weight.offset is not None:
        raise ValueError(f"{name!r} is {weight.format.name}; only int8 and int4 without offsets are written")
    out = {
        f"{name}_packed": _words(weight.data),
        f"{name}_scale": weight.scale.contiguous(),
        f"{name}_shape": torch.tensor(weight.shape),
    }
    if weight.zero is not None:
        out[f"{name}_zero_point"] = _words(pack_int4(weight.zero.T)).T.contiguous()
    return out


def _words(data: torch.Tensor) -> torch.Tensor:
    """Bytes of every row as whole little-endian 32-bit words, zeros at the end."""
    return F.pad(data, (0, -data.shape[-1] % 4)).contiguous().view(torch.int32)


def compressed_config(
    unquantized: Sequence[str], *, group: int | None, symmetric: bool = True, int8_rows: bool = False
) -> dict[str, Any]:
    """The entry of ``config.json`` for the weights.

    Arguments:
        unquantized: names of linear modules that stay as they are.
        group: inputs that share a scale of int4 weights; None: int8 weights, a scale for each output.
        symmetric: whether int4 weights have no zero points.
        int8_rows: whether the layers' inputs are rounded to int8.
    """
    weights: dict[str, Any] = {"type": "int", "symmetric": symmetric, "dynamic": False}
    if group is None:
        weights |= {"num_bits": 8, "strategy": "channel"}
    else:
        weights |= {"num_bits": 4, "strategy": "group", "group_size": group}
    rows = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    groups = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": rows if int8_rows else None,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if group is None else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": groups},
        "ignore": list(unquantized),
        "kv_cache_scheme": None,
    }
