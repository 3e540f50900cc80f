"""The layout that everything rests on: imports run one way, never in a circle, and are relative inside the package.

Every import counts, wherever it stands: those that run late and those that only name a type as well.
"""

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
# The parts of a folder, from the bottom; those of one line never import each other.
ORDER: dict[str, tuple[tuple[str, ...], ...]] = {
    "kernels": (("api",), ("reference",), ("torch",), ("cpu", "triton"), ("select",)),
    "dynamic": (
        ("text", "checkpoint"),
        ("model",),
        ("parallel",),
        ("engine",),
        ("speculation", "contract"),
        ("convert",),
        ("quantize", "train"),
        ("llm",),
        ("bench",),
        ("studies",),
        ("cli",),
    ),
}
LONGEST = 400  # lines of a file


@dataclass(frozen=True)
class Import:
    """One imported module, as a path from the package's root: ``("kernels", "ops")``; ``()`` is the root itself."""

    source: Path
    line: int
    target: tuple[str, ...]
    name: str

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
    """Every relative import of a file, wherever it stands in it."""
    for node in ast.walk(ast.parse(root.joinpath(source).read_text(), str(source))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = source.parts[: len(source.parts) - node.level]
            module = (*folder, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                target = (*module, alias.name)
                target = target if is_module(root, target) else module
                yield Import(source, node.lineno, target, alias.name)


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
            if not allowed and item.target != ("version",):
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


def upward_imports(root: Path) -> list[Import]:
    """Imports inside a folder that run against its order; a part that the order does not know is an error."""
    found = []
    for source in package_files(root):
        parts = ORDER.get(source.parts[0], ())
        if not parts or len(source.parts) < 2 or (source.name == "__init__.py" and len(source.parts) == 2):
            continue
        rank = {name: number for number, names in enumerate(parts) for name in names}
        own = source.parts[1].removesuffix(".py")
        assert own in rank, f"{source} lies in no part of {source.parts[0]}/ that the order knows"
        for item in relative_imports(root, source):
            if item.target[:1] == source.parts[:1] and len(item.target) > 1 and item.target[1] != own:
                assert item.target[1] in rank, f"{item}, which the order does not know"
                if rank[item.target[1]] >= rank[own]:
                    found.append(item)
    return found


def import_graph(root: Path) -> dict[Path, set[Path]]:
    """What every file imports."""
    graph: dict[Path, set[Path]] = {}
    for source in package_files(root):
        graph[source] = set()
        for item in relative_imports(root, source):
            path = Path(*item.target)
            target = path / "__init__.py" if root.joinpath(path).is_dir() else path.with_suffix(".py")
            if item.target and target != source and root.joinpath(target).exists():
                graph[source].add(target)
    return graph


def import_order(graph: dict[Path, set[Path]]) -> list[Path]:
    """The files, or folders, in an order in which each comes after all that it imports.

    Raises:
        graphlib.CycleError: if there is none.
    """
    return list(graphlib.TopologicalSorter(graph).static_order())


def folders_of(graph: dict[Path, set[Path]]) -> dict[Path, set[Path]]:
    """The same graph between folders; the package's own entry points at its root are left out."""
    folders: dict[Path, set[Path]] = {}
    for source, targets in graph.items():
        wanted = {target.parent for target in targets} - {source.parent, Path()}
        # A folder's first file may hand out what its subfolders hold, as a module at the root of one may use them.
        if len(source.parts) > 2:
            folders.setdefault(source.parent, set()).update(t for t in wanted if t not in source.parents)
    return folders


def test_imports_run_one_way() -> None:
    assert [str(item) for item in backward_imports(ROOT)] == []


def test_imports_are_relative() -> None:
    assert absolute_imports(ROOT) == []


def test_imports_inside_a_folder_run_one_way() -> None:
    assert [str(item) for item in upward_imports(ROOT)] == []


def test_no_circle_of_files_or_folders() -> None:
    graph = import_graph(ROOT)
    assert Path("dynamic/engine/sampling_params.py") in import_order(graph)
    assert Path("dynamic/engine") in import_order(folders_of(graph))


def test_no_file_is_longer_than_one_idea() -> None:
    sources = [path for folder in MAY_IMPORT for path in ROOT.joinpath(folder).rglob("*") if path.is_file()]
    long = [path for path in sources if path.suffix in (".py", ".cpp", ".h", ".js") and lines_of(path) > LONGEST]
    assert [str(path.relative_to(ROOT)) for path in long] == []


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("kernels/a.py", "from ..moe import router"),
        ("kernels/cpu/a.py", "from ...moe.router import X"),
        ("moe/a.py", "from ..exits.probe import Probe"),
        ("exits/a.py", "def f():\n    from ..moe import router"),
        ("dynamic/engine/a.py", "from ...serve import app"),
        ("dynamic/a.py", "from .. import LLM"),
        ("moe/a.py", "if TYPE_CHECKING:\n    from ..dynamic.model.spec import ModelSpec"),
    ],
)
def test_backward_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert [str(item.source) for item in backward_imports(tmp_path)] == [file]


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("dynamic/text/a.py", "from ..model.spec import X"),
        ("dynamic/model/a.py", "def f():\n    from ..engine import b"),
        ("dynamic/model/attention/a.py", "from ...engine.b import X"),
        ("dynamic/engine/a.py", "if TYPE_CHECKING:\n    from ..contract.b import X"),
        ("dynamic/quantize/a.py", "from ..train.b import X"),
        ("kernels/api/a.py", "from ..cpu.b import X"),
        ("kernels/triton/a.py", "from ..cpu.b import X"),
    ],
)
def test_upward_import_is_found(tmp_path: Path, file: str, line: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    assert [str(item.source) for item in upward_imports(tmp_path)] == [file]


@pytest.mark.parametrize(
    "line", ["def x():\n    from . import a\n    return a\n", "if TYPE_CHECKING:\n    from .a import x\n"]
)
def test_import_cycle_is_found(tmp_path: Path, line: str) -> None:
    folder = tmp_path / "dynamic"
    folder.mkdir()
    (folder / "a.py").write_text("from .b import x\n")
    (folder / "b.py").write_text(line)
    with pytest.raises(graphlib.CycleError):
        import_order(import_graph(tmp_path))


def test_cycle_of_folders_is_found(tmp_path: Path) -> None:
    for file, line in {
        "one/a": "from ..two.b import x",
        "one/c": "",
        "two/b": "",
        "two/d": "from ..one.c import y",
    }.items():
        path = tmp_path / "dynamic" / f"{file}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(line + "\n")
    import_order(import_graph(tmp_path))
    with pytest.raises(graphlib.CycleError):
        import_order(folders_of(import_graph(tmp_path)))


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
