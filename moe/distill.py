"""Distillation of an upcycled mixture from its dense parent, layer by layer: routers, and experts if asked.

An upcycled model contains its parent: with every expert on, it *is* the parent. Training learns which experts a token
can do without. Each layer is trained alone, on the inputs that the parent gives it, so that no gradient crosses
layers and a two-core machine needs minutes.

The hard choice of k experts is trained through a soft one: a gate near 1 above the k-th best score and near 0 below.

Shape suffixes: T tokens, B windows, L positions, D hidden size, E routed experts, F neurons of one expert, N neurons.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ..kernels.api.ranges import check_ranges


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How layers are distilled.

    Arguments:
        kept: shares of the routed experts that training aims at; one is drawn per step.
        steps, batch_rows, learning_rate: of Adam, per layer.
        softness: width of the soft gate, as a share of the spread of a token's scores.
        train_experts: also train the experts' weights. Then the model with all experts on is no longer its parent.
        held_out: share of the windows that errors are measured on.
        seed: of batches and draws.

    Raises:
        ValueError: naming the value that is out of range.
    """

    kept: tuple[float, ...] = (0.5, 0.75)
    steps: int = 200
    batch_rows: int = 512
    learning_rate: float = 2e-3
    softness: float = 0.2
    train_experts: bool = False
    held_out: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kept", tuple(self.kept))
        if not self.kept:
            raise ValueError("kept must hold shares between 0 and 1; it is empty")
        check_ranges(self, "kept", "held_out", above=0, below=1)


@dataclass(kw_only=True)
class ExpertLayer:
    """The feed-forward layer of an upcycled model, float32; always-on experts come first in N."""

    gate_ND: torch.Tensor
    up_ND: torch.Tensor
    down_DN: torch.Tensor
    router_ED: torch.Tensor
    always_on: int

    def parts(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the always-on experts add (T, D), and what every routed expert would add (E, T, D)."""
        hidden_TN = F.silu(F.linear(x_TD, self.gate_ND)) * F.linear(x_TD, self.up_ND)
        size = self.gate_ND.shape[0] // (self.router_ED.shape[0] + self.always_on)
        cut = self.always_on * size
        fixed_TD = F.linear(hidden_TN[:, :cut], self.down_DN[:, :cut])
        hidden_ETF = hidden_TN[:, cut:].unflatten(1, (-1, size)).transpose(0, 1)
        down_EFD = self.down_DN[:, cut:].unflatten(1, (-1, size)).permute(1, 2, 0)
        return fixed_TD, torch.bmm(hidden_ETF, down_EFD)

    def hard(self, x_TD: torch.Tensor, k: int) -> torch.Tensor:
        """The layer's output with its k best routed experts per token, as the engine computes it."""
        fixed_TD, parts_ETD = self.parts(x_TD)
        scores_TE = F.linear(x_TD, self.router_ED)
        mask_TE = torch.zeros_like(scores_TE).scatter_(1, scores_TE.topk(k).indices, 1.0)
        return fixed_TD + torch.einsum("te,etd->td", mask_TE, parts_ETD)

    def soft(self, x_TD: torch.Tensor, k: int, softness: float) -> torch.Tensor:
        """The same with gates that a gradient passes."""
        fixed_TD, parts_ETD = self.parts(x_TD)
        scores_TE = F.linear(x_TD, self.router_ED)
        ordered_TE = scores_TE.detach().sort(-1, descending=True).values
        # Half way between the last expert that is taken and the first that is not.
        threshold_T1 = ordered_TE[:, k - 1 : k + 1].mean(-1, keepdim=True)
        width_T1 = softness * scores_TE.detach().std(-1, keepdim=True) + 1e-6
        gates_TE = torch.sigmoid((scores_TE - threshold_T1) / width_T1)
        return fixed_TD + torch.einsum("te,etd->td", gates_TE, parts_ETD)


def relative_error(student_TD: torch.Tensor, teacher_TD: torch.Tensor) -> torch.Tensor:
    """Squared error as a share of the teacher's squared length, mean over tokens. Each token counts the same."""
    return ((student_TD - teacher_TD).square().sum(-1) / teacher_TD.square().sum(-1).clamp_min(1e-12)).mean()


def distill_layer(layer: ExpertLayer, x_TD: torch.Tensor, config: DistillConfig) -> None:
    """Train a layer in place to give its parent's output with only a share of its routed experts.

    Arguments:
        x_TD: the layer's (normed) inputs in the parent, float32.
    """
    with torch.no_grad():
        teacher_TD = F.linear(F.silu(F.linear(x_TD, layer.gate_ND)) * F.linear(x_TD, layer.up_ND), layer.down_DN)
    names = ["router_ED"] + (["gate_ND", "up_ND", "down_DN"] if config.train_experts else [])
    # Adam's step does not depend on a gradient's size: scale the router to unit size first, which keeps the ranking.
    layer.router_ED = layer.router_ED / layer.router_ED.square().mean().sqrt().clamp_min(1e-12)
    groups = []
    for name in names:
        parameter = getattr(layer, name).clone().requires_grad_()
        setattr(layer, name, parameter)
        scale = 1.0 if name == "router_ED" else parameter.detach().square().mean().sqrt().item()
        groups.append({"params": [parameter], "lr": config.learning_rate * scale})
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    generator = torch.Generator().manual_seed(config.seed)
    routed = layer.router_ED.shape[0]
    for step in range(config.steps):
        rows = torch.randint(x_TD.shape[0], (config.batch_rows,), generator=generator)
        k = expert_count(config.kept[step % len(config.kept)], routed)
        optimizer.zero_grad()
        relative_error(layer.soft(x_TD[rows], k, config.softness), teacher_TD[rows]).backward()
        optimizer.step()
        schedule.step()
    for name in names:
        setattr(layer, name, getattr(layer, name).detach())


def expert_count(share: float, routed: int) -> int:
    """How many of the routed experts a share is; at least one, and not all."""
    return min(max(1, round(share * routed)), routed - 1)


def distill_checkpoint(
    source: Path, target: Path, tokens_BL: torch.Tensor, config: DistillConfig
) -> list[dict[str, Any]]:
    """Distil all layers of a checkpoint of family ``dynamoe`` into a new one.

    Arguments:
        source: directory with the upcycled model. target: is made.
        tokens_BL: text, int64; its last windows are held out.

    Returns: per layer and share of experts, the error on held-out text before and after: ``layer``, ``kept``,
        ``before``, ``after``. Also in ``distill.json``.

    Raises:
        ValueError: when the source is not of that family, or there are too few windows.
    """
    settings = json.loads((source / "config.json").read_text())
    if settings["model_type"] != "dynamoe":
        raise ValueError(f"{source} is {settings['model_type']!r}; only upcycled models (dynamoe) are distilled")
    held_out = max(1, round(tokens_BL.shape[0] * config.held_out))
    if tokens_BL.shape[0] <= held_out:
        raise ValueError(f"{tokens_BL.shape[0]} windows of text are too few to train on and to measure on")
    weights = load_file(source / "model.safetensors")
    errors: list[dict[str, Any]] = []
    for number, x_BLD in enumerate(_ffn_inputs(settings, weights, tokens_BL)):
        layer = _layer(weights, number, settings["num_always_on_experts"])
        train_TD, test_TD = x_BLD[:-held_out].flatten(0, 1), x_BLD[-held_out:].flatten(0, 1)
        with torch.no_grad():
            fixed_TD, parts_ETD = layer.parts(test_TD)
            teacher_TD = fixed_TD + parts_ETD.sum(0)
        before = _errors(layer, test_TD, teacher_TD, config)
        distill_layer(layer, train_TD, config)
        after = _errors(layer, test_TD, teacher_TD, config)
        errors += [
            {"layer": number, "kept": share, "before": was, "after": now}
            for share, was, now in zip(config.kept, before, after, strict=True)
        ]
        _store(layer, weights, number)
    target.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.name != "model.safetensors":
            shutil.copyfile(file, target / file.name)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    (target / "distill.json").write_text(json.dumps(errors, indent=1))
    return errors


@torch.no_grad()
def _ffn_inputs(settings: dict[str, Any], weights: dict[str, torch.Tensor], tokens_BL: torch.Tensor):
    """The parent's inputs to every feed-forward layer, (B, L, D) float32, in the order of the layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    parent = LlamaForCausalLM(LlamaConfig.from_dict({**settings, "model_type": "llama"})).eval().float()
    parent.load_state_dict({k: v.float() for k, v in weights.items() if not k.endswith("router.weight")}, strict=False)
    inputs: list[torch.Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))  # type: ignore[union-attr]
        for layer in parent.model.layers
    ]
    try:
        parent.model(input_ids=tokens_BL, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _names(number: int) -> dict[str, str]:
    prefix = f"model.layers.{number}.mlp."
    return {
        "gate_ND": prefix + "gate_proj.weight",
        "up_ND": prefix + "up_proj.weight",
        "down_DN": prefix + "down_proj.weight",
        "router_ED": prefix + "router.weight",
    }


def _layer(weights: dict[str, torch.Tensor], number: int, always_on: int) -> ExpertLayer:
    return ExpertLayer(always_on=always_on, **{part: weights[name].float() for part, name in _names(number).items()})


def _store(layer: ExpertLayer, weights: dict[str, torch.Tensor], number: int) -> None:
    for part, name in _names(number).items():
        weights[name] = getattr(layer, part).to(weights[name].dtype).contiguous()


@torch.no_grad()
def _errors(layer: ExpertLayer, x_TD: torch.Tensor, teacher_TD: torch.Tensor, config: DistillConfig) -> list[float]:
    routed = layer.router_ED.shape[0]
    return [relative_error(layer.hard(x_TD, expert_count(s, routed)), teacher_TD).item() for s in config.kept]
