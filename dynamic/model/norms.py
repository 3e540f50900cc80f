"""Norms: which kinds there are, what their tensors are, and how they run.

Where the kind asks for float32, weights keep that dtype whatever the model computes in, and a norm rounds once, at its
end. Shape suffixes as in ``kernels/api/types.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...kernels.api.uncommon import FLOAT32_NORMS, LAYER_NORMS
from ...kernels.torch.backend import TorchBackend
from .channel_order import Order

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class NormKind:
    """A kind of norm.

    Arguments:
        centred: a layer norm (Ba et al. 2016) instead of a root-mean-square norm (Zhang and Sennrich 2019).
        biased: there is a bias, of a layer norm.
        offset: is added to the weight.
        float32: weights are float32; else they have the model's dtype.
    """

    centred: bool = False
    biased: bool = False
    offset: float = 0.0
    float32: bool = True

    @property
    def uncommon(self) -> set[str]:
        """See :attr:`.ModelSpec.uncommon`."""
        return {LAYER_NORMS} if self.centred else {FLOAT32_NORMS} if self.float32 else set()


NORM_KINDS = {
    "rms": NormKind(float32=False),
    "rms_float32": NormKind(),
    "rms_offset": NormKind(offset=1.0),
    "layer": NormKind(centred=True),
    "layer_bias": NormKind(centred=True, biased=True),
}


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """A tensor that is kept as it is: a norm, a logit for each head.

    Arguments:
        name: in the checkpoint.
        float32: it keeps this dtype whatever the model computes in.
        offset: is added to it.
        order: see :func:`.in_order`.
    """

    name: str
    shape: Shape
    float32: bool = False
    offset: float = 0.0
    order: Order = ()

    def dtype(self, model: torch.dtype) -> torch.dtype:
        """In which a model that computes in ``model`` keeps it."""
        return torch.float32 if self.float32 else model


def norm_tensor(kind: str, name: str, size: int) -> TensorLayout:
    """The weight of a norm.

    Arguments:
        kind: one of ``NORM_KINDS``.
        name: in the checkpoint.
    """
    norm = NORM_KINDS[kind]
    return TensorLayout(name=name, shape=(size,), float32=norm.float32, offset=norm.offset)


def norm_tensors(kind: str, modules: Mapping[str, str], size: int) -> dict[str, TensorLayout]:
    """The tensors of norms, by name; the biases by the name of the norm with ``_bias`` behind it.

    Arguments:
        modules: by name, what the checkpoint calls the norm.
    """
    out: dict[str, TensorLayout] = {}
    for name, module in modules.items():
        out[name] = norm_tensor(kind, f"{module}.weight", size)
        if NORM_KINDS[kind].biased:
            out[f"{name}_bias"] = TensorLayout(name=f"{module}.bias", shape=(size,), float32=True)
    return out


def run_norm(
    backend: TorchBackend,
    kind: str,
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Rows normed, (T, D), in the backend's dtype.

    Arguments:
        x_TD: float32, or in the backend's dtype.
    """
    if NORM_KINDS[kind].centred:
        return backend.layer_norm(x_TD, weight_D, bias_D, eps)
    return backend.rounded_rms_norm(x_TD, weight_D, eps)
