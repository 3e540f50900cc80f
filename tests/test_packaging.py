"""The wheel: all that is needed at run time is in it, nothing else, and it runs from anywhere beside any `kernels`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("conf", "dynamic", "exits", "kernels", "moe", "serve")
PROJECT_FILES = ("pyproject.toml", "README.md", "LICENSE", "py.typed", "__init__.py", "version.py", "__main__.py")
BUILT = shutil.ignore_patterns("__pycache__", "*.so", "build")


def run(*command: str, cwd: Path, path: Path | None = None, stdin: str = "") -> str:
    """Run a command outside the repository, with ``path`` before the installed packages; returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source: Path, target: Path) -> Path:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(target), str(source), cwd=target)
    (wheel,) = target.glob("*.whl")
    return wheel


def install(wheel: Path | str, site: Path, *options: str) -> None:
    command = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *options, "--target", str(site))
    run(*command, str(wheel), cwd=site.parent)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy: a build leaves folders behind in its source.
    source = tmp_path_factory.mktemp("source")
    for name in PROJECT_FILES:
        shutil.copy(ROOT / name, source / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=BUILT)
    (source / "kernels" / "triton" / "tuned").mkdir(exist_ok=True)
    (source / "kernels" / "triton" / "tuned" / "some-gpu.json").write_text("{}")
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but the installed wheel in it."""
    site = tmp_path_factory.mktemp("installed") / "site"
    install(wheel, site, "--no-index")
    return site


def test_wheel_has_no_other_top_level_package(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name.split("-")[0] for name in names} == {"dynamoe"}
    assert len(names) == 2  # the package and its metadata


def test_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    """Not only Python: configurations, C++ sources, web pages, whatever lies in the package's folders."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *FOLDERS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    expected = {f"dynamoe/{name}" for name in listed.stdout.split() if (ROOT / name).is_file()}
    assert len(expected) > 20
    expected.add("dynamoe/kernels/triton/tuned/some-gpu.json")  # measurements of a GPU, which may be put there
    assert expected - set(zipfile.ZipFile(wheel).namelist()) == set()


@pytest.mark.parametrize("command", ["", "serve", "generate", "bench", "prepare"])
def test_help_runs_from_the_wheel(site: Path, tmp_path: Path, command: str) -> None:
    arguments = [command] if command else []
    out = run(sys.executable, "-m", "dynamoe", *arguments, "--help", cwd=tmp_path, path=site)
    assert f"usage: dynamoe {command or 'COMMAND'} [key=value" in out
    assert list(tmp_path.iterdir()) == []


def test_generates_from_the_wheel(site: Path, tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    model = make_checkpoint("mixtral")
    work = tmp_path / "elsewhere"
    work.mkdir()
    code = "import dynamoe.dynamic.model.loader as m; print(m.__file__)"
    where = run(sys.executable, "-c", code, cwd=work, path=site)
    assert Path(where.strip()).is_relative_to(site)
    command = ("-m", "dynamoe", "generate", f"model={model}", "chat=false", "sampling.max_tokens=8")
    out = run(sys.executable, *command, cwd=work, path=site, stdin="The capital of France")
    assert out.strip()
    assert list(work.iterdir()) == []


def test_tiny_comes_with_the_wheel_and_runs_early_exits(site: Path, tmp_path: Path) -> None:
    model = site / "dynamoe" / "dynamic" / "shipped" / "tiny"
    assert sum(file.stat().st_size for file in model.rglob("*")) < 20e6
    code = (
        "from dynamoe import LLM, SamplingParams; llm = LLM('tiny', progress=False);"
        "p = SamplingParams(temperature=0, max_tokens=24, quality=None, exit_thresholds={4: 0.7, 8: 0.7, 12: 0.7});"
        "(o,) = llm.generate(['To install the package, run'], p, use_tqdm=False);"
        "print(min(o.outputs[0].layers), max(o.outputs[0].layers), len(o.outputs[0].token_ids))"
    )
    low, high, count = map(int, run(sys.executable, "-c", code, cwd=tmp_path, path=site).split())
    assert low < 16
    assert high == 16
    assert count > 1


OURS_AND_THEIRS = """
import importlib.util, sys
import transformers.utils
import dynamoe.kernels.select
if sys.argv[1] == "with":
    import kernels
    print(kernels.__file__)
else:
    print(transformers.utils.is_kernels_available())
assert "dynamoe.kernels.select" in sys.modules and not hasattr(sys.modules.get("kernels"), "ops")
"""


@pytest.mark.parametrize("from_repository", [False, True])
def test_runs_without_a_package_named_kernels(site: Path, tmp_path: Path, from_repository: bool) -> None:
    """transformers must not take our folder for Hugging Face's package, even when it is in the current directory."""
    cwd = ROOT if from_repository else tmp_path
    assert run(sys.executable, "-c", OURS_AND_THEIRS, "without", cwd=cwd, path=site).split() == ["False"]


def check_beside_kernels(site: Path, kernels_site: Path, cwd: Path) -> Path:
    # Theirs comes last, where an installed package is: our folder, in the current directory, comes first.
    path = Path(f"{site}{os.pathsep}{kernels_site}")
    file = run(sys.executable, "-c", OURS_AND_THEIRS, "with", cwd=cwd, path=path).strip()
    assert Path(file).is_relative_to(kernels_site)
    return path


@pytest.mark.parametrize("from_repository", [False, True])
def test_runs_beside_a_package_named_kernels(site: Path, tmp_path: Path, from_repository: bool) -> None:
    source = tmp_path / "source"
    (source / "kernels").mkdir(parents=True)
    (source / "kernels" / "__init__.py").write_text("THEIRS = True\n")
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "kernels"\nversion = "99.0"\n[tool.setuptools]\npackages = ["kernels"]\n'
    )
    built = tmp_path / "wheel"
    built.mkdir()
    install(build_wheel(source, built), tmp_path / "theirs", "--no-index")
    check_beside_kernels(site, tmp_path / "theirs", ROOT if from_repository else tmp_path)


@pytest.mark.slow
def test_generates_beside_hugging_faces_kernels(
    site: Path, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    """The real package, from the package index."""
    install("kernels", tmp_path / "theirs")
    path = check_beside_kernels(site, tmp_path / "theirs", ROOT)
    command = ("-m", "dynamoe", "generate", f"model={make_checkpoint('llama')}", "chat=false", "sampling.max_tokens=8")
    assert run(sys.executable, *command, cwd=tmp_path, path=path, stdin="The capital of France").strip()
