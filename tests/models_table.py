"""What each model family does here, found by trying it: ``python tests/models_table.py FAMILY…`` prints rows.

``python tests/models_table.py --write`` puts all of them into ``docs/models.md``; a slow test compares them with it.
The checkpoints are those of the parity tests: random, tiny, made with transformers.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import test_families_parity_latent
import test_gguf
import test_gguf_families
import torch
from conftest import FAMILIES, add_exits
from dynamoe.dynamic.convert.load_model import load_model
from dynamoe.dynamic.engine.config import EngineConfig
from dynamoe.dynamic.engine.engine import Engine
from dynamoe.dynamic.engine.sampling_params import SamplingParams
from dynamoe.dynamic.model.families import FAMILIES as KNOWN
from engine_answers import answers
from family_parity import Variant, check_variant
from parallel_jobs import compare
from test_decoder import PagedSequences, random_prompts

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
PARITY = ("attention", "gpt_oss", "granite_swa", "latent", "nemotron", "norms", "shared", "states")
EXACT, CLOSE, REFUSED, NONE = "exact", "within tolerance", "refused", "—"
# Median over rows of the cosine between the logits and those of float32: of random weights, which quantise badly.
LEAST = {"bfloat16": 0.995, "int8": 0.97, "int4": 0.6, "int8 cache": 0.99}
LEAST_OF = {("kimi_linear", "int4"): 0.5}  # measured: 0.56
BOUNDS = "`within tolerance` in numbers:"


def variants() -> dict[str, Variant]:
    """One variant for each family, by its name."""
    found = {name: Variant(family=name, config=config) for name, config in FAMILIES.items()}
    for part in PARITY:
        try:
            module = importlib.import_module(f"test_families_parity_{part}")
        except ModuleNotFoundError:
            continue
        for value in vars(module).values():
            values = (
                value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else [value])
            )
            for key, variant in ((key, item) for key, item in values if isinstance(item, Variant)):
                name = str(key).replace("-", "_")
                if name in KNOWN:  # another family by the name of its class
                    found.setdefault(name, variant)
                elif variant.edit is None:
                    family = variant.family.removesuffix("_text")
                    found.setdefault(family if family in KNOWN else variant.family, variant)
    return found


def logits(directory: Path, **options: Any) -> torch.Tensor:
    """Of a prompt's rows in two steps."""
    decoder = load_model(directory, device="cpu", progress=False, **options).decoder
    (prompt,) = random_prompts([40])
    sequences = PagedSequences(decoder, 1)
    return torch.cat((sequences.run([prompt[:30]]), sequences.run([prompt[30:]]))).float()


def logprobs(directory: Path, backend: str, settings: dict[str, Any]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Of the greedy tokens of prompts that run together; and how many rows ran each segment."""
    model = load_model(directory, dtype="float32", device="cpu", backend=backend, progress=False)
    engine = Engine(model, EngineConfig(max_num_batched_tokens=24))
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, quality=None, logprobs=0, **settings)
    found = [answer.logprobs for answer in answers(engine, random_prompts([1, 7, 33]), params)]
    return torch.tensor(found), tuple(engine.stats().segment_rows)


def attempt(cell: Callable[[], str]) -> str:
    """What a cell says; a refusal by name is an answer, anything else that is raised is not."""
    try:
        return cell()
    except ValueError:
        return REFUSED


def row(variant: Variant, reference: Callable[[Path], Any]) -> dict[str, str]:
    """The cells of a family, by column."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        directory = check_variant(variant, root, reference)
        exact = logits(directory, dtype="float32")

        def close(name: str, **options: Any) -> Callable[[], str]:
            def cell() -> str:
                cosines = torch.cosine_similarity(logits(directory, **options), exact, dim=-1)
                least = LEAST_OF.get((variant.family, name), LEAST[name])
                assert cosines.median() > least, f"{variant}, {name}: {cosines.median()}"
                return CLOSE

            return cell

        def exits() -> str:
            path = Path(shutil.copytree(directory, root / "exits"))
            add_exits(path, {1: 0.9, 2: 0.9})
            settings = {"exit_thresholds": {1: 0.5, 2: 0.5}}
            (found, rows), (expected, same) = (logprobs(path, backend, settings) for backend in ("cpu", "torch"))
            assert torch.allclose(found, expected, atol=1e-3), f"{variant}: exits"
            assert rows == same, f"{variant}: rows {rows}, {same}"
            assert rows[0] > rows[-1], f"{variant}: no row exits"
            return EXACT

        def axis(name: str) -> Callable[[], str]:
            def cell() -> str:
                (root / name).mkdir()
                try:
                    compare(root / name, str(directory), {name: 2})
                except AssertionError as error:
                    if "ValueError" not in str(error) and "CheckpointError" not in str(error):
                        raise
                    return REFUSED
                except subprocess.TimeoutExpired as error:
                    raise AssertionError(f"{variant} on two processes along {name} took too long") from error
                return EXACT

            return cell

        cells = {
            "float32": lambda: EXACT,
            "bfloat16": close("bfloat16", dtype="bfloat16"),
            "int8": close("int8", dtype="float32", quantization="int8"),
            "int4": close("int4", dtype="float32", quantization="int4"),
            "int8 cache": close("int8 cache", dtype="float32", kv_cache_dtype="int8"),
            "exits": exits,
            "tensor axis": axis("tensor"),
            "expert axis": axis("expert"),
        }
        spec = load_model(directory, dtype="float32", device="cpu", progress=False).spec
        if not any(layer.moe for layer in spec.layers):
            del cells["expert axis"]
        found = {name: attempt(cell) for name, cell in cells.items()}
        name = variant.family.removesuffix("_text")
        return {**found, "GGUF": EXACT if {name, variant.family} & gguf_families() else REFUSED}


def gguf_families() -> set[str]:
    """Families whose GGUF files are tested against transformers."""
    latent = {variant.family for variant, _ in test_families_parity_latent.GGUF.values()}
    return {"gpt_oss", *latent, *(family for family, *_ in test_gguf.FILES.values()), *test_gguf_families.FAMILIES}


def bounds() -> str:
    """The paragraph of the page that says what is within tolerance."""
    least = ", ".join(f"{bound} in {name}" for name, bound in LEAST.items())
    own = ", ".join(f"`{family}` in {name}, {bound}" for (family, name), bound in LEAST_OF.items())
    text = f"{BOUNDS} the median over rows of the cosine between both logits is above {least}; for {own}."
    return textwrap.fill(text, 120)


COLUMNS = ("float32", "bfloat16", "int8", "int4", "int8 cache", "GGUF", "exits", "tensor axis", "expert axis")


def line(family: str, cells: dict[str, str]) -> str:
    """A row of the table."""
    return f"| `{family}` | " + " | ".join(cells.get(column, NONE) for column in COLUMNS) + " |"


def reference_model(directory: Path) -> Any:
    """The checkpoint as a transformers model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def main() -> None:
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    known = variants()
    assert set(KNOWN) <= {*known, "dynamoe"}, f"no checkpoint for {set(KNOWN) - set(known)}"
    lines = {}
    for name in names or [name for name in known if name in KNOWN]:
        lines[name] = line(name, row(known[name], reference_model))
        print(lines[name], flush=True)
    if "--write" in sys.argv:
        said = [bounds() if text.startswith(BOUNDS) else text for text in DOCUMENT.read_text().split("\n\n")]
        written = "\n\n".join(said).splitlines()
        kept = [text for text in written if not text.startswith("| `")]
        old = {t.split("`")[1]: t for t in written if t.startswith("| `")}
        place = kept.index("|" + "---|" * (len(COLUMNS) + 1)) + 1
        rows = [text for _, text in sorted({**old, **lines}.items())]
        DOCUMENT.write_text("\n".join([*kept[:place], *rows, *kept[place:]]) + "\n")


if __name__ == "__main__":
    main()
