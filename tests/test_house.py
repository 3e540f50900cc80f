"""The layout that everything rests on: imports run one way, never in a circle, and are relative inside the package."""

from __future__ import annotations

import ast
import graphlib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": set(),
    "moe": {"kernels"},
    "exits": {"kernels"},
    "dynamic": {"moe", "exits", "kernels"},
    "serve": {"dynamic", "moe", "exits", "kernels"},
    "conf": set(),
}


@dataclass(frozen=True)
class Import:
    """One imported module, as a path from the package's root: ``("kernels", "ops")``; ``()`` is the root itself."""

    source: Path
    line: int
    target: tuple[str, ...]
    name: str
    for_types: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} imports {'.'.join(self.target) or 'the package root'}"


def package_files(root: Path) -> list[Path]:
    """The package's Python files, relative to its root."""
    folders = [root.glob("*.py"), *(root.joinpath(folder).rglob("*.py") for folder in MAY_IMPORT)]
    return sorted(path.relative_to(root) for files in folders for path in files)


def is_module(root: Path, parts: tuple[str, ...]) -> bool:
    path = root.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


def relative_imports(root: Path, source: Path) -> Iterator[Import]:
    """Every relative import of a file, wherever it stands in it; those under ``if TYPE_CHECKING`` never run."""
    tree = ast.parse(root.joinpath(source).read_text(), str(source))
    type_blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    for_types = {id(inner) for block in type_blocks for statement in block.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = source.parts[: len(source.parts) - node.level]
            module = (*folder, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                target = (*module, alias.name)
                target = target if is_module(root, target) else module
                yield Import(source, node.lineno, target, alias.name, id(node) in for_types)


def backward_imports(root: Path) -> list[Import]:
    """Imports that run against serve → dynamic → {moe, exits} → kernels.

    The root hands out what lies below it, so that nothing below may ask it for more than the version.
    """
    found = []
    for source in package_files(root):
        if len(source.parts) == 1:
            continue
        folder = source.parts[0]
        for item in relative_imports(root, source):
            allowed = item.target[:1] in {(name,) for name in (folder, *MAY_IMPORT[folder])}
            if not allowed and not (item.target == () and item.name == "__version__"):
                found.append(item)
    return found


def absolute_imports(root: Path) -> list[str]:
    """Absolute imports of the package's own parts: by its name, or as if its folders were top-level packages."""
    own = {"dynamoe", *MAY_IMPORT}
    found = []
    for source in package_files(root):
        for node in ast.walk(ast.parse(root.joinpath(source).read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            found += [f"{source}:{node.lineno} {name}" for name in names if name.split(".")[0] in own]
    return found


def import_order(root: Path) -> list[Path]:
    """The files in an order in which each comes after all that it imports; graphlib.CycleError if there is none.

    A class and its user may name each other's types: that runs nothing.
    """
    graph: dict[Path, set[Path]] = {}
    for source in package_files(root):
        graph[source] = set()
        for item in relative_imports(root, source):
            path = Path(*item.target)
            target = path / "__init__.py" if root.joinpath(path).is_dir() else path.with_suffix(".py")
            if item.target and not item.for_types and target != source and root.joinpath(target).exists():
                graph[source].add(target)
    return list(graphlib.TopologicalSorter(graph).static_order())


def test_imports_run_one_way() -> None:
    assert [str(item) for item in backward_imports(ROOT)] == []


def test_imports_are_relative() -> None:
    assert absolute_imports(ROOT) == []


def test_no_import_cycle() -> None:
    assert Path("dynamic/engine/sampling_params.py") in import_order(ROOT)


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("kernels/a.py", "from ..moe import router"),
        ("kernels/cpu/a.py", "from ...moe.router import X"),
        ("moe/a.py", "from ..exits.probe import Probe"),
        ("exits/a.py", "def f():\n    from ..moe import router"),
        ("dynamic/engine/a.py", "from ...serve import app"),
        ("dynamic/a.py", "from .. import LLM"),
        ("moe/a.py", "if TYPE_CHECKING:\n    from ..dynamic.spec import ModelSpec"),
    ],
)
def test_backward_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert [str(item.source) for item in backward_imports(tmp_path)] == [file]


def test_import_cycle_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "dynamic"
    folder.mkdir()
    (folder / "a.py").write_text("from .b import x\n")
    (folder / "b.py").write_text("def x():\n    from . import a\n    return a\n")
    with pytest.raises(graphlib.CycleError):
        import_order(tmp_path)


@pytest.mark.parametrize("line", ["import dynamoe.kernels.select", "from kernels import ops", "import serve"])
def test_absolute_import_is_found(tmp_path: Path, line: str) -> None:
    (tmp_path / "dynamic").mkdir()
    (tmp_path / "dynamic" / "a.py").write_text(line + "\n")
    assert absolute_imports(tmp_path) == [f"dynamic/a.py:1 {line.split()[1]}"]


def test_kernels_never_shadows_the_package_of_that_name() -> None:
    """Hugging Face ships a package ``kernels``, which transformers looks for; a folder without __init__ yields."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_every_package_folder_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {".".join(("dynamoe", *source.parent.parts)) for source in package_files(ROOT)}
    assert sorted(listed) == sorted(folders)
