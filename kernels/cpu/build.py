"""Build and load the C++ kernels: once per source, compiler and torch version, kept in the user's cache.

A library lies beside its hash and is loaded only if it has that hash: one that a crash or a full disk has cut off or
filled with zeros would end the process by a signal. Such a one is built again.

``$DYNAMOE_CPU_EXTRA_SOURCES`` names C++ files (``:`` between them) that are compiled against ``csrc`` and loaded with
the kernels. Such a file may register an instruction set of its own, as those in ``csrc/isa`` do.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from ..api.disk import flush

SOURCES = Path(__file__).parent / "csrc"
EXTRA_SOURCES = "DYNAMOE_CPU_EXTRA_SOURCES"
_FLAGS = (
    "-O3",
    "-std=c++20",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-falign-loops=64",  # short loops in one cache line each, whatever the code in front of them
    "-Wall",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
)


class BuildError(RuntimeError):
    """The kernels could not be built or loaded; the message says why."""


def cache_directory() -> Path:
    """Where built kernels lie: ``$XDG_CACHE_HOME/dynamoe/kernels`` or ``~/.cache/dynamoe/kernels``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dynamoe" / "kernels"


def _compiler() -> tuple[str, str]:
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None:
        raise BuildError(f"no C++ compiler: {name!r} is not on the path")
    if shutil.which("ninja") is None and not (Path(sys.executable).parent / "ninja").exists():
        raise BuildError("ninja is not installed")
    try:
        version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"the C++ compiler {path} does not run: {error}") from error
    return path, version.splitlines()[0]


def _source_files() -> list[Path]:
    return sorted(p for p in SOURCES.rglob("*") if p.suffix in (".cpp", ".h"))


def _build_name(compiler: str) -> str:
    digest = hashlib.sha256()
    for text in (torch.__version__, str(torch.compiled_with_cxx11_abi()), compiler, sys.version, *_FLAGS):
        digest.update(text.encode() + b"\0")
    for path in _source_files():
        digest.update(str(path.relative_to(SOURCES)).encode() + b"\0" + path.read_bytes())
    return f"dynamoe_cpu_{digest.hexdigest()[:16]}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The kernel releases this lock when its holder dies, unlike the lock file of torch's own loader.
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(progress: bool = False) -> Path:
    """The shared library with the kernels, compiled now unless it already was.

    Arguments:
        progress: say on standard error that a build is going on.

    Raises:
        BuildError: no compiler, or it failed; carries the end of its output.
    """
    compiler = _compiler()
    sources = [path for path in _source_files() if path.suffix == ".cpp"]
    what = "the CPU kernels" if progress else None
    return _built(compiler, _build_name(compiler[1]), sources, [], what)


def _build_extra(library: Path, source: Path) -> Path:
    """The shared library of one extra file, which finds what it needs in that of the kernels."""
    try:
        digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise BuildError(f"${EXTRA_SOURCES}: {error}") from error
    return _built(_compiler(), f"{library.stem}_{digest}", [source.resolve()], [str(library)], str(source))


def _built(compiler: tuple[str, str], name: str, sources: list[Path], link: list[str], what: str | None) -> Path:
    path, version = compiler
    directory = cache_directory() / name
    library = directory / f"{name}.so"
    if _is_intact(library):
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / "build.lock"):
        if _is_intact(library):
            return library
        if what:
            print(f"compiling {what} with {version} (about a minute, once)", file=sys.stderr, flush=True)
        _store(_compile(path, name, directory, sources, link), library)
    return library


def _hash_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _is_intact(library: Path) -> bool:
    try:
        return _hash_file(library).read_bytes() == hashlib.sha256(library.read_bytes()).hexdigest().encode()
    except OSError:
        return False


def _store(built: Path, library: Path) -> None:
    """Move a library to its place, and its hash beside it, all of it on the disk before it can be found."""
    digest = built.with_suffix(".sha256")
    digest.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
    for path in (built, digest):
        flush(path)
    os.replace(digest, _hash_file(library))
    os.replace(built, library)
    flush(library.parent)
    shutil.rmtree(built.parent, ignore_errors=True)


def _compile(compiler: str, name: str, directory: Path, sources: list[Path], link: list[str]) -> Path:
    from torch.utils import cpp_extension  # slow to import, and only needed here

    work = directory / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    previous = {key: os.environ.get(key) for key in ("CXX", "PATH")}
    os.environ["CXX"] = compiler
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        cpp_extension.load(
            name=name,
            sources=[str(path) for path in sources],
            extra_cflags=list(_FLAGS),
            extra_ldflags=link,
            extra_include_paths=[str(SOURCES)],
            build_directory=str(work),
            is_python_module=False,
        )
    except (RuntimeError, OSError) as error:
        raise BuildError(f"compiling the CPU kernels failed: {str(error)[-4000:]}") from error
    finally:
        for key, value in previous.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
    return work / f"{name}.so"


def load() -> None:
    """Make ``torch.ops.dynamoe_cpu`` available, building it first if need be, which it says on standard error.

    Raises:
        BuildError: it could not be built or loaded.
    """
    loaded()


@cache  # what is loaded stays, whatever happens to the sources
def loaded() -> Path:
    """The library that this process has loaded, now unless it was before; see :func:`load`."""
    library = build(progress=True)
    _load(library)
    for source in filter(None, os.environ.get(EXTRA_SOURCES, "").split(os.pathsep)):
        _load(_build_extra(library, Path(source)))
    return library


def is_loaded() -> bool:
    """Whether :func:`load` has been called, and could do it."""
    return loaded.cache_info().currsize > 0


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise BuildError(f"loading {library} failed: {error}") from error


def isas() -> tuple[str, ...]:
    """The kernels' instruction sets, the best first, whether or not this processor has them.

    Raises:
        BuildError: as :func:`load`.
    """
    load()
    return tuple(torch.ops.dynamoe_cpu.isas())
