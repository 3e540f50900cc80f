"""A weight format that lives in this file: 16 values in a table, scales that are powers of two, one per 32 inputs.

It registers a method of quantisation and a layout of checkpoints. Nothing in the package knows it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from dynamoe.dynamic.checkpoint import quantized_checkpoint
from dynamoe.dynamic.checkpoint.quantized_checkpoint import register_layout
from dynamoe.dynamic.checkpoint.stored_layout import StoredLayout, want
from dynamoe.dynamic.checkpoint.stored_weight import StoredWeight
from dynamoe.dynamic.checkpoint.weights import CheckpointError
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.llm import LLM
from dynamoe.dynamic.model import quantization
from dynamoe.dynamic.model.quantization import Method, register_method
from dynamoe.kernels.api.codes import Codes
from dynamoe.kernels.api.formats import INT8_PER_GROUP, UNQUANTIZED, ActivationScheme, Format
from dynamoe.kernels.api.quantized_weight import QuantizedWeight
from dynamoe.kernels.api.rounding import in_chunks
from dynamoe.kernels.api.support import TORCH, quantised_outcomes
from dynamoe.kernels.cpu.backend import CpuBackend
from safetensors.torch import load_file
from stored_layouts import unfused, write

GROUP = 32
TABLE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
TOY = Format(name="toy", codes=Codes(bits=4, table=TABLE), groups=(GROUP,), scales=(torch.float8_e8m0fnu,))
SETTINGS = {"quant_method": "toy", "values": "e2m1"}
PROMPTS = [[5, 9, 33, 100, 7], list(range(40, 70))]
PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1)


def quantize(weight: torch.Tensor) -> QuantizedWeight:
    """The nearest values, under the power of two that brings a group's largest one below 8."""

    def rounded(w_OI: torch.Tensor) -> QuantizedWeight:
        groups_OGX = F.pad(w_OI, (0, -w_OI.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
        scale_OG = torch.exp2(groups_OGX.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2)
        distance = ((groups_OGX / scale_OG[..., None])[..., None] - torch.tensor(TABLE)).abs()
        codes_OI = distance.argmin(-1).to(torch.uint8).flatten(1)[:, : w_OI.shape[1]]
        scale = scale_OG.to(torch.float8_e8m0fnu)
        return QuantizedWeight(
            format=TOY, data=TOY.codes.pack(codes_OI), scale=scale, inputs=w_OI.shape[1], group=GROUP
        )

    return in_chunks(weight, rounded)


def stands_for(toy: QuantizedWeight) -> torch.Tensor:
    """By the definition of the format, without the package's own decoding."""
    codes_OI = torch.stack((toy.data & 15, toy.data >> 4), -1).flatten(1).long()
    exponents_OG = toy.scale.view(torch.uint8).float() - 127
    scale_OI = torch.exp2(exponents_OG).repeat_interleave(GROUP, 1)[:, : codes_OI.shape[1]]
    return torch.tensor(TABLE)[codes_OI] * scale_OI


class ToyLayout(StoredLayout):
    """``toy_codes``, (O, ⌈I / 2⌉) bytes, and ``toy_scale``, (O, G)."""

    markers: ClassVar[tuple[str, ...]] = ("toy_codes",)
    parts: ClassVar[tuple[str, ...]] = ("toy_codes", "toy_scale")

    def scheme(self, weight: StoredWeight) -> ActivationScheme:
        return UNQUANTIZED

    def shape(self, weight: StoredWeight) -> tuple[int, ...]:
        outputs, width = weight.info("toy_codes", "U8").shape
        weight.shaped("toy_scale", (outputs, -(-2 * width // GROUP)), "F8_E8M0")
        return outputs, 2 * width

    def input_step(self, weight: StoredWeight) -> int:
        return GROUP

    def load(self, weight: StoredWeight) -> QuantizedWeight | torch.Tensor:
        outputs, inputs = weight.kept.of(self.shape(weight))
        data, scale = weight.read("toy_codes", outputs).clone(), weight.read("toy_scale", outputs).clone()
        whole = QuantizedWeight(format=TOY, data=data, scale=scale, inputs=2 * data.shape[1], group=GROUP)
        return whole.columns(inputs.start, inputs.stop)


class WidenedLayout(ToyLayout):
    """The same, of weights that run dequantised where that is allowed."""

    kept = False

    def load(self, weight: StoredWeight) -> torch.Tensor:
        toy = super().load(weight)
        assert isinstance(toy, QuantizedWeight)
        return toy.dequantize()

    def keeps(self, weight: StoredWeight) -> bool:
        return self.kept

    def admit(self, weights: Iterable[StoredWeight], dequantize: bool) -> None:
        if not dequantize:
            raise CheckpointError(f"{next(iter(weights)).name} needs dequantize=true")


def open_toy(settings: Mapping[str, Any]) -> ToyLayout:
    want(settings, "values", "e2m1")
    return ToyLayout()


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    register_method("toy", Method(quantize, group=GROUP))
    register_layout("toy", open_toy)
    yield
    del quantization._METHODS["toy"], quantized_checkpoint._LAYOUTS["toy"]


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight") or ".experts." in name


@pytest.fixture
def paths(make_checkpoint: Callable[..., Path], tmp_path: Path) -> dict[str, Path]:
    """A mixture of experts; the same with toy weights; and with what those stand for."""
    source = make_checkpoint("mixtral")
    weights = unfused(load_file(source / "model.safetensors"))
    stored, plain = {}, dict(weights)
    for name, weight in weights.items():
        if is_linear(name):
            toy, module = quantize(weight), name.removesuffix(".weight")
            stored |= {f"{module}.toy_codes": toy.data, f"{module}.toy_scale": toy.scale}
            plain[name] = stands_for(toy)
        else:
            stored[name] = weight
    return {
        "source": source,
        "stored": write(source, tmp_path / "stored", stored, SETTINGS),
        "plain": write(source, tmp_path / "plain", plain, None),
    }


def answers(path: Path, backend: str, dtype: str, **arguments: Any) -> list[tuple[list[int], list[float]]]:
    """Tokens, and their log-probabilities."""
    llm = LLM(path, backend=backend, dtype=dtype, progress=False, **arguments)
    outputs = [output.outputs[0] for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
    return [
        (o.token_ids, [step[token].logprob for token, step in zip(o.token_ids, o.logprobs or [], strict=True)])
        for o in outputs
    ]


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", "float32"), ("cpu", "bfloat16"), ("torch", "float32")])
def test_a_model_runs_on_toy_weights(
    paths: dict[str, Path], backend: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = answers(paths["plain"], backend, dtype)
    assert expected != answers(paths["source"], backend, dtype)
    assert "toy" not in caplog.text
    at_load = answers(paths["source"], backend, dtype, quantization="toy", quantize_lm_head=False)
    stored = answers(paths["stored"], backend, dtype)
    assert stored == at_load
    if backend == "cpu":  # without kernels of its own the format is dequantised while it is loaded
        assert stored == expected
        assert f"the cpu backend has no kernel for toy weights: they run as torch.{dtype}" in caplog.text
    else:
        assert [tokens for tokens, _ in stored] == [tokens for tokens, _ in expected]
        for (_, found), (_, wanted) in zip(stored, expected, strict=True):
            assert found == pytest.approx(wanted, abs=1e-4)


def test_a_layout_may_dequantise(paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(quantized_checkpoint._LAYOUTS, "toy", lambda settings: WidenedLayout())
    widened = answers(paths["stored"], "cpu", "float32", dequantize=True)
    assert widened == answers(paths["plain"], "cpu", "float32")
    with pytest.raises(CheckpointError, match=r"layers\..* needs dequantize=true"):
        answers(paths["stored"], "cpu", "float32")
    monkeypatch.setattr(WidenedLayout, "kept", True)
    with pytest.raises(CheckpointError, match=r"layers\..*WidenedLayout keeps it, and yet loads it as torch.float32"):
        answers(paths["stored"], "cpu", "float32", dequantize=True)


def test_the_file_holds_codes_and_the_deployment_says_so(paths: dict[str, Path]) -> None:
    llm = LLM(paths["stored"], backend="torch", dtype="bfloat16", device="cpu", progress=False)
    plain = LLM(paths["plain"], backend="torch", dtype="bfloat16", device="cpu", progress=False)
    sizes = [model.model.decoder.layers[0].ffn.nbytes for model in (llm, plain)]
    assert sizes[0] <= 0.3 * sizes[1]
    assert quantised_outcomes(TOY) == {"cpu": TORCH, "triton": TORCH}
    quantised = LLM(paths["source"], quantization="toy", backend="cpu", progress=False)
    assert quantised.model.decoder.quantization == "toy, LM head and embedding int8"


def test_refusals(paths: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="values must be e2m1, not 'e3m0'"):
        open_toy({**SETTINGS, "values": "e3m0"})
    with pytest.raises(ValueError, match="int8 activations do not go with toy weights"):
        CpuBackend("cpu", torch.float32).pack_quantized_linear(quantize(torch.randn(4, 64)), None, INT8_PER_GROUP)
    with pytest.raises(ValueError, match="method named 'toy' already"):
        register_method("toy", Method(quantize))
    with pytest.raises(ValueError, match="weights named 'toy' already"):
        register_layout("toy", open_toy)
    config = paths["stored"] / "config.json"
    settings = json.loads(config.read_text())
    settings["quantization_config"]["quant_method"] = "tin"
    config.write_text(json.dumps(settings))
    with pytest.raises(
        ValueError, match="quant_method must be one of compressed-tensors, gptq, awq, fp8, mxfp4, toy, not 'tin'"
    ):
        LLM(paths["stored"], progress=False)
