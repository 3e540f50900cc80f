"""Which layers of a model an expert budget can limit, and the calibrated scales that lie beside its checkpoint."""

from __future__ import annotations

from pathlib import Path

from ...exits.sidecar import backbone_hash
from ...moe.contribution import LayerScales
from ...moe.sidecar import JSON_FILE, load_scales
from .spec import ModelSpec


def limited_layers(spec: ModelSpec) -> list[int]:
    """Numbers of the layers whose experts a budget can limit.

    Raises:
        ValueError: when there is none, or a router whose weights are constant says nothing about contributions.
    """
    routers = {n: layer.moe.router for n, layer in enumerate(spec.layers) if layer.moe is not None}
    if not routers:
        raise ValueError(f"an expert budget needs experts; this {spec.family} model has none")
    constant = [n for n, router in routers.items() if router.score == "constant"]
    if constant:
        raise ValueError(
            f"an expert budget needs routers that weigh their experts; in layer {constant[0]} of this {spec.family}"
            f" model every expert that is chosen has weight 1"
        )
    return list(routers)


def read_scales(directory: Path, spec: ModelSpec) -> tuple[LayerScales | None, ...]:
    """What lies beside a checkpoint, one entry per layer; all None where nothing does.

    Raises:
        ValueError: for a damaged file, or one that was measured on other weights or another shape.
    """
    found = load_scales(directory)
    if found is None:
        return (None,) * spec.num_layers
    file, sha256 = directory / JSON_FILE, backbone_hash(directory)
    if found.backbone_sha256 != sha256:
        raise ValueError(
            f"{file} was measured on other weights: it names {found.backbone_sha256[:12]}, the safetensors files beside"
            f" it hash to {sha256[:12]}; remove {JSON_FILE}; dynamoe experts makes it anew"
        )
    wanted = [0 if layer.moe is None else layer.moe.router.num_experts for layer in spec.layers]
    held = [0 if layer is None else layer.scale_E.numel() for layer in found.layers]
    if held != wanted:
        raise ValueError(f"{file} holds scales for {held} experts per layer; the model has {wanted}")
    return found.layers
