"""Checkpoints of the methods' reference implementations, read by us:
``python benchmarks/quantized_checkpoints.py --llmcompressor PYTHON --gptqmodel PYTHON``.

Each library runs in a Python environment of its own (``pip install llmcompressor``, ``pip install gptqmodel``) and
quantises a tiny dense model and a tiny mixture of experts with random weights (``quantized_checkpoints_worker.py``).
We load what it wrote, in float32, and compare logits with its own. ``error`` is the largest difference from what its
dequantised weights give, as a share of the largest logit. Where inputs are rounded, theirs per token and ours per 128
inputs, ``distance`` (of ours) and ``their_distance`` are those from the logits without rounded inputs.
"""

import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark import RESULTS, command_line, surroundings, write
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.model.loader import load_decoder
from dynamoe.kernels.api.tolerance import error
from quantization_quality import logits

RECIPES = {
    "llmcompressor": ("gptq", "awq-asym", "int8-groups", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK"),
    "gptqmodel": ("gptq", "gptq-asym", "gptq-act-order", "gptq-v2", "awq"),
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {}),
    "experts": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True},
    ),
}
SHARED = {
    **{"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512},
}
MOST = 2e-5  # of error, where inputs are not rounded
WORKER = Path(__file__).with_name("quantized_checkpoints_worker.py")


def write_model(kind: str, directory: Path) -> Path:
    """A model with random weights whose every part matters, and a tokenizer, which the libraries ask for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, settings = MODELS[kind]
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**SHARED, **settings}, bos_token_id=0, eos_token_id=0), dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]), generator=generator)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_model("tiny") / name, directory)
    return directory


@torch.inference_mode()
def our_logits(path: Path, ids_T: torch.Tensor, backend: str) -> torch.Tensor:
    """Of every position of a prompt, (T, V), float32."""
    return logits(load_decoder(path, dtype="float32", backend=backend, device="cpu"), ids_T)


def distance(logits_TV: torch.Tensor, expected_TV: torch.Tensor) -> float:
    """As a share of the expected length."""
    return float((logits_TV - expected_TV).norm() / expected_TV.norm())


def make(source: Path, folder: Path, python: str, library: str, recipes: Sequence[str]) -> None:
    """Let a library quantise a model, each recipe into a directory of its own."""
    folder.mkdir()
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2"}  # it starts with no fewer
    interpreter = os.path.abspath(shutil.which(python) or python)
    command = [interpreter, str(WORKER), library, str(source), str(folder), *recipes]
    # Some of the libraries write a folder of logs where they run.
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL, cwd=folder)


def compare(source: Path, target: Path) -> dict[str, Any]:
    """One recipe on one model: how far our logits are from the library's own."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    file = target.with_suffix(".safetensors")
    if not file.exists():
        return {"made": False, "reason": target.with_suffix(".error").read_text()[:300]}
    theirs = load_file(file)
    with safe_open(file, framework="pt") as opened:
        versions = opened.metadata()
    try:
        ours = {backend: our_logits(target, theirs["ids"], backend) for backend in ("torch", "cpu")}
    except ValueError as refusal:
        return {"made": True, "loads": False, "reason": str(refusal), "versions": versions}
    exact = theirs["dequantized"]
    row: dict[str, Any] = {
        "made": True,
        "loads": True,
        "unquantised_error": error(our_logits(source, theirs["ids"], "torch"), exact),
        "error": {backend: error(found, exact) for backend, found in ours.items()},
        "versions": versions,
    }
    row["holds"] = all(value <= MOST for value in row["error"].values())
    if not row["holds"]:
        row["distance"] = {backend: distance(found, exact) for backend, found in ours.items()}
        row["their_distance"] = distance(theirs["as_run"], exact)
        row["holds"] = all(value <= 1.05 * row["their_distance"] for value in row["distance"].values())
    return row


def main() -> None:
    parser = command_line(__doc__)
    for library in RECIPES:
        parser.add_argument(f"--{library}", metavar="PYTHON", help="the interpreter of an environment that has it")
        parser.add_argument(f"--{library}-recipes", nargs="+", default=RECIPES[library], choices=RECIPES[library])
    parser.add_argument("--output", type=Path, default=RESULTS / "quantized_checkpoints.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in MODELS:
            source = write_model(kind, folder / kind)
            for library in RECIPES:
                if not (python := getattr(args, library)):
                    continue
                made, recipes = folder / f"{kind}-{library}", getattr(args, f"{library}_recipes")
                make(source, made, python, library, recipes)
                for recipe in recipes:
                    rows.append({"model": kind, "library": library, "recipe": recipe, **compare(source, made / recipe)})
                    print(json.dumps(rows[-1]), flush=True)
                write(args.output, {**surroundings(), "rows": rows})


if __name__ == "__main__":
    main()
