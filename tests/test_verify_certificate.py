"""`verify`: derives a certificate's proof again from the stored losses, without the project, and refuses tampering."""

from __future__ import annotations

import ast
import base64
import json
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dynamoe.dynamic.cli.certificate import SCHEMA, certificate
from dynamoe.dynamic.cli.main import main
from dynamoe.dynamic.contract import verify_certificate
from dynamoe.dynamic.contract.bounds import BOUNDS
from dynamoe.dynamic.contract.calibration_runs import Measured
from dynamoe.dynamic.contract.catalog import CERTIFICATES
from dynamoe.dynamic.contract.certificate import Certificate, load_certificate, save_certificate
from dynamoe.dynamic.convert.model_store import resolve_model
from dynamoe.dynamic.studies.calibrate import CalibrateConfig, calibrate
from jsonschema import Draft202012Validator

SCRIPT = Path(verify_certificate.__file__)
TOKENS = 10
LEVEL = 0.3


@pytest.fixture(scope="module")
def run(make_exits: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint, and the certificate that two settings of a path gave."""
    checkpoint = make_exits("mixtral", {1: 0.1, 2: 0.1}, num_hidden_layers=3)
    output = tmp_path_factory.mktemp("verified")
    prompts = output / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt_token_ids": [5, 6, n]}) + "\n" for n in range(3, 90)))
    config = CalibrateConfig(
        model=str(checkpoint), output=str(output / "run"), prompts=str(prompts), alphas=(0.9,), requests=60,
        test_requests=10, max_tokens=TOKENS, probabilities=(0.99, 0.9), threads=1,
    )  # fmt: skip
    calibrate(config, progress=False, say=lambda text: None)
    (file,) = (output / "run" / CERTIFICATES).glob("*.json")
    return checkpoint, file


@pytest.fixture
def copy(run: tuple[Path, Path], tmp_path: Path) -> Path:
    """The certificate and its losses, to be tampered with."""
    return shutil.copytree(run[1].parent, tmp_path / "copy") / run[1].name


def found(file: Path, **given: Any) -> str:
    return "\n".join(verify_certificate.problems(file, **given)[0])


def rewritten(file: Path, **changes: Any) -> Path:
    """The certificate with other fields and an id that fits them."""
    changed = replace(load_certificate(file), **changes)
    save_certificate(changed, file)
    return file


def edited_losses(file: Path, edit: Callable[[np.ndarray], object], rename: bool) -> Path:
    """Change the losses of the certified setting; with ``rename``, certificate and file names follow."""
    losses = file.parent / "losses" / f"{load_certificate(file).evidence[-1]}.json"
    record = json.loads(losses.read_text())
    values = np.frombuffer(zlib.decompress(base64.b64decode(record["losses"])), dtype="<f4").copy()
    edit(values)
    record["losses"] = base64.b64encode(zlib.compress(values.tobytes())).decode()
    losses.write_text(json.dumps(record))
    if rename:
        import hashlib

        name = hashlib.sha256(losses.read_bytes()).hexdigest()
        losses.rename(losses.with_name(f"{name}.json"))
        rewritten(file, evidence=(*load_certificate(file).evidence[:-1], name))
    return file


def test_the_script_is_short_and_stands_alone() -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 200
    nodes = list(ast.walk(ast.parse(text)))
    imported = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"numpy"}


def test_alone_it_verifies_what_was_calibrated_but_not_other_weights(run: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, file = run
    script = shutil.copy(SCRIPT, tmp_path / "verify.py")
    command = [sys.executable, "-I", str(script), str(file), "--weights"]
    done = subprocess.run([*command, str(checkpoint)], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip().endswith(": verified")
    other = shutil.copytree(checkpoint, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert re.search("^weights: certified for .* has", found(file, weights=other), re.M)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda file: edited_losses(file, lambda losses: losses.fill(0), False), "losses of setting 2 were changed"),
        (lambda file: edited_losses(file, lambda losses: losses.fill(1), True), "setting 2 of the path is not proved"),
        (lambda file: edited_losses(file, lambda losses: losses.fill(-1), True), "losses outside 0 … 1"),
        (lambda file: rewritten(file, exit_thresholds={1: 0.5, 2: 0.5}), "exit_thresholds are not those"),
        (lambda file: rewritten(file, exit_thresholds={1: 0.99, 2: 0.9}), "exit_thresholds are not those"),
        (lambda file: rewritten(file, expert_budget={"expert_keep": 0.5}), "expert_budget is not the one"),
        (lambda file: rewritten(file, alpha=0.001), "setting 1 of the path is not proved"),
        (lambda file: rewritten(file, requests=600), r"losses of \(60, 10\) \(requests, tokens\), not what"),
        (
            lambda file: rewritten(file, deployment={**load_certificate(file).deployment, "kernels": "others"}),
            "deployment is not the one whose losses were measured",
        ),
        (lambda file: next((file.parent / "losses").glob("*.json")).unlink() or file, "setting . are missing"),
    ],
    ids=[
        *("better losses", "worse losses", "no losses", "threshold", "half a threshold", "budget", "alpha", "requests"),
        *("kernels", "missing"),
    ],
)  # fmt: skip
def test_tampering_is_found(copy: Path, tamper: Callable[[Path], Path], message: str) -> None:
    assert not found(copy)
    assert re.search(message, found(tamper(copy)))


def test_a_threshold_that_is_edited_in_the_file_does_not_fit_its_id(copy: Path) -> None:
    copy.write_text(re.sub(r'"1": 0\.\d+', '"1": 0.5', copy.read_text()))
    assert "the certificate was changed: it names the id" in found(copy)


def test_what_runs_is_compared(run: tuple[Path, Path]) -> None:
    running = dict(load_certificate(run[1]).deployment)
    assert not found(run[1], running=running)
    assert "kernels: certified for" in found(run[1], running={**running, "kernels": "of another build"})
    assert "logits: certified for" in found(run[1], running={k: v for k, v in running.items() if k != "logits"})


def test_its_bounds_and_its_means_are_the_projects() -> None:
    generator = np.random.default_rng(0)
    for name, bound in BOUNDS.items():
        for share in (0.0, 0.02, 0.2, 1.0):
            losses_N = (generator.random(150) < share).astype(float)
            losses_N *= 1 if name == "exact_binomial" else generator.random(150)
            for alpha in (0.05, 0.3):
                own = verify_certificate.METHODS[name](losses_N, alpha, 0.05)
                assert own == pytest.approx(bound(losses_N[None], alpha, 0.05)[0], rel=1e-9, abs=1e-300)
    losses_NT = generator.random((20, 12)).astype(np.float32)
    losses_NT[np.arange(12)[None] >= generator.integers(1, 16, 20)[:, None]] = np.nan
    measured = Measured(losses_NT=losses_NT, layers_share=1.0, experts_share=1.0, decoded=1)
    means = verify_certificate.cut_means(losses_NT.astype(np.float64), 8, False)
    np.testing.assert_allclose(means, measured.cut_losses_KN, rtol=1e-12)
    filled = verify_certificate.cut_means(losses_NT.astype(np.float64), 8, True)
    np.testing.assert_allclose(filled, measured.worst_case_cuts_KN, rtol=1e-12)


def test_the_schema_describes_every_certificate(run: tuple[Path, Path], copy: Path) -> None:
    schema = Draft202012Validator(json.loads(SCHEMA.read_text()))
    Draft202012Validator.check_schema(schema.schema)
    shipped = sorted((resolve_model("tiny") / CERTIFICATES).glob("*.json"))
    rewritten(copy, reference={"quantisation": "none"}, expert_budget={"experts_per_token": 2})
    for file in (*shipped, run[1], copy):
        content = json.loads(file.read_text())
        schema.validate(content)
        assert not schema.is_valid({**content, "alpha": 2})
        assert not schema.is_valid({**content, "colour": "red"})
    described = set(schema.schema["properties"])  # type: ignore[index]
    assert described == {"format", "id", *Certificate.__dataclass_fields__}


def test_the_command(run: tuple[Path, Path], copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, file = run
    own = load_certificate(file)
    assert main(["certificate", "verify", str(file.parent), f"model={checkpoint}"]) == 0
    assert f"{own.id} {file}: verified" in capsys.readouterr().out
    assert main(["certificate", "verify", str(file), f"model={checkpoint}", "dtype=bfloat16"]) == 1
    out = capsys.readouterr().out
    assert "refused" in out
    assert "dtype: certified for 'float32', 'bfloat16' runs" in out
    assert main(["certificate", "verify", "tiny"]) == 2
    assert "unproven: no losses are stored with it" in capsys.readouterr().out
    assert main(["certificate", "list", str(file.parent)]) == 0
    assert f"{own.id}  alpha=0.9 delta=0.05" in capsys.readouterr().out
    assert main(["certificate", "show", str(file)]) == 0
    out = capsys.readouterr().out
    assert "losses stored: " in out
    assert "speed: " in out
    rewritten(copy, alpha=0.95)
    assert main(["certificate", "diff", str(file), str(copy)]) == 0
    assert capsys.readouterr().out == "alpha: 0.9 / 0.95\n"
    assert main(["certificate", "schema"]) == 0
    assert capsys.readouterr().out == SCHEMA.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verfy", "tiny"], "there is no action 'verfy'; did you mean verify?"),
        (["show", "tiny"], "show takes one certificate, not 8 of them"),
        (["verify", "/nowhere"], "no such file or directory: /nowhere"),
        (["verify", "tiny", "modl=tiny"], "there is no key modl; did you mean model?"),
        (["deployment", "dtype=float32"], "model=MODEL is needed"),
        (["list", "tiny", "model=tiny"], "list takes no settings, not model"),
    ],
)
def test_mistakes_take_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certificate", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert certificate(["--help"]) == 0
