"""A quantiser in its own Python environment, for ``quantized_checkpoints.py``: writes a checkpoint and its logits.

It imports nothing but that environment's libraries. ``SOURCE`` is a checkpoint in Hugging Face layout with a tokenizer,
``FOLDER`` a directory that gets one of each recipe's name. ``RECIPE.safetensors`` in it has token ids and two sets
of the library's own logits, float32: as it runs the model, and with its dequantised weights but inputs that are not
rounded. Where the library failed, ``RECIPE.error`` has the reason.
"""

import argparse
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file

WINDOWS, TOKENS = 32, 64


def calibration_ids(vocabulary: int) -> torch.Tensor:
    """Random token ids, (WINDOWS, TOKENS): what random weights were trained on."""
    return torch.randint(3, vocabulary, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(11))


def with_llmcompressor(source: Path, target: Path, recipe: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantised by llm-compressor, run by it in memory, and saved as compressed-tensors."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.awq import AWQModifier
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM

    if not torch.cuda.is_available():  # it pins memory for a device that is not there
        torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[method-assign]

    def groups(**weights: object) -> dict[str, QuantizationScheme]:
        return {"group_0": QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(type="int", **weights))}

    ignore = ["lm_head", "re:.*gate$", "re:.*router.*"]
    grouped = {"num_bits": 4, "strategy": "group", "group_size": 64}
    recipes: dict[str, Callable[[], object]] = {
        "gptq": lambda: GPTQModifier(config_groups=groups(**grouped, symmetric=True), ignore=ignore),
        "awq-asym": lambda: AWQModifier(config_groups=groups(**grouped, symmetric=False), ignore=ignore),
        "int8-groups": lambda: QuantizationModifier(
            config_groups=groups(num_bits=8, strategy="group", group_size=32, symmetric=True), ignore=ignore
        ),
        **{
            scheme: lambda scheme=scheme: QuantizationModifier(targets="Linear", scheme=scheme, ignore=ignore)
            for scheme in ("W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK")
        },
    }
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = calibration_ids(model.config.vocab_size)
    rows = [{"input_ids": row, "attention_mask": [1] * TOKENS} for row in ids.tolist()]
    model = oneshot(
        model=model,
        tokenizer=str(source),
        dataset=Dataset.from_list(rows),
        recipe=recipes[recipe](),
        num_calibration_samples=WINDOWS,
        max_seq_length=TOKENS,
        pipeline="basic" if recipe.startswith(("W", "FP8", "int8")) else "sequential",
    )
    as_run = logits_of(model)
    schemes = [(m, m.quantization_scheme) for m in model.modules() if hasattr(m, "quantization_scheme")]
    for module, scheme in schemes:
        module.quantization_scheme = scheme.model_copy(update={"input_activations": None})
    dequantized = logits_of(model)
    for module, scheme in schemes:
        module.quantization_scheme = scheme
    model.save_pretrained(target, save_compressed=True)
    return as_run, dequantized


def with_gptqmodel(source: Path, target: Path, recipe: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantised by GPTQModel, saved in GPTQ's or AWQ's layout, and read back and dequantised by it."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    settings = {
        "gptq": {},
        "gptq-asym": {"sym": False},
        "gptq-act-order": {"desc_act": False, "act_group_aware": True},
        "gptq-v2": {"format": "gptq_v2"},
        "awq": {"quant_method": "awq", "format": "gemm"},
    }[recipe]
    model = GPTQModel.load(str(source), QuantizeConfig(bits=4, group_size=64, **settings), device="cpu")
    ids = calibration_ids(model.model.config.vocab_size)
    rows = [{"input_ids": row, "attention_mask": [1] * TOKENS} for row in ids.tolist()]
    model.quantize(rows, batch_size=1)
    model.save(str(target))
    kernel = BACKEND.TORCH_AWQ if recipe == "awq" else BACKEND.TORCH
    read = GPTQModel.load(str(target), device="cpu", backend=kernel, dtype=torch.float16).model
    for name, module in list(read.named_modules()):
        if hasattr(module, "qweight"):  # its kernels run in 16 bits only: take the weights out of them
            module.scales = module.scales.float()
            if recipe == "awq":
                weight_IO = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, 64)
            else:
                weight_IO = module.dequantize_weight()
            linear = torch.nn.Linear(*weight_IO.shape, bias=False)
            linear.weight.data = weight_IO.T.float().contiguous()
            read.set_submodule(name, linear)
    logits = logits_of(read.float())
    return logits, logits


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Of the first window, (T, V)."""
    with torch.no_grad():
        return model(calibration_ids(model.config.vocab_size)[:1]).logits[0].float()


LIBRARIES = {"llmcompressor": with_llmcompressor, "gptqmodel": with_gptqmodel}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("recipes", nargs="+")
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = {name: version(name) for name in (args.library, "torch", "transformers")}
    for recipe in args.recipes:
        torch.manual_seed(0)
        target = args.folder / recipe
        try:
            as_run, dequantized = LIBRARIES[args.library](args.source, target, recipe)
        except Exception as error:  # whatever keeps a library from making a checkpoint is a result
            target.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
            continue
        vocabulary = json.loads((args.source / "config.json").read_text())["vocab_size"]
        tensors = {
            "ids": calibration_ids(vocabulary)[0],
            "as_run": as_run.contiguous(),
            "dequantized": dequantized.clone().contiguous(),
        }
        save_file(tensors, target.with_suffix(".safetensors"), metadata=versions)


if __name__ == "__main__":
    main()
