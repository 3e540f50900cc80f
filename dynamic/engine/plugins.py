"""Loads classes that are not the package's own: ``FILE.py:Class``, or an entry point of an installed distribution.

Only the command line and :class:`..llm.LLM` name plug-ins, never a file that came with a checkpoint. What was loaded is
hashed, so that certificates are bound to it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import get_annotations
from pathlib import Path
from types import ModuleType
from typing import Any

from .protocols import CachePolicy, Drafter, ExitPolicy, ExpertRule, LogitsProcessor, Router

# Groups of entry points, one per protocol.
GROUPS: dict[type, str] = {
    LogitsProcessor: "dynamoe.logits_processors",
    CachePolicy: "dynamoe.cache_policies",
    Drafter: "dynamoe.drafters",
    Router: "dynamoe.routers",
    ExitPolicy: "dynamoe.exit_policies",
    ExpertRule: "dynamoe.expert_rules",
}
_CODE = (".py", ".so", ".pyd")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plugin:
    """A class that was loaded.

    Arguments:
        name: what it is called in the deployment: the file's name and the class, or the entry point.
        implementation: the class.
        sha256: of the file, or of all code of the package that the entry point is in.
    """

    name: str
    implementation: type[Any]
    sha256: str


def load_plugins(names: Iterable[str], protocol: type) -> tuple[Plugin, ...]:
    """Load plug-ins, in this order.

    Arguments:
        names: each ``FILE.py:Class``, or the name of an entry point in the protocol's group.
        protocol: one of :data:`GROUPS`.

    Raises:
        ValueError: for a file, a class or an entry point that is not there, code that cannot be imported, a class that
            lacks a part of the protocol.
    """
    return tuple(_load(name, protocol) for name in names)


def plugin_facts(plugins: Iterable[Plugin]) -> str:
    """Names and hashes, for the deployment."""
    return ", ".join(f"{plugin.name} {plugin.sha256}" for plugin in plugins)


def _load(name: str, protocol: type) -> Plugin:
    file, colon, class_name = name.rpartition(":")
    plugin = _from_file(name, Path(file).expanduser(), class_name) if colon else _from_entry_point(name, protocol)
    implementation = plugin.implementation
    if not isinstance(implementation, type):
        raise ValueError(f"plug-in {name!r} is {implementation!r}, not a class")
    if lacking := _lacking(implementation, protocol):
        raise ValueError(f"plug-in {name!r} is no {protocol.__name__}: it lacks {', '.join(lacking)}")
    return plugin


def _from_file(name: str, file: Path, class_name: str) -> Plugin:
    if file.suffix != ".py" or not class_name.isidentifier():
        raise ValueError(f"plug-in {name!r} must be FILE.py:Class, or the name of an entry point")
    try:
        source = file.read_bytes()
    except OSError as error:
        raise ValueError(f"plug-in {name!r}: {file} cannot be read: {error.strerror}") from error
    module = _module(name, file.resolve(), source)
    if not hasattr(module, class_name):
        raise ValueError(f"plug-in {name!r}: {file} has no class {class_name}")
    return Plugin(
        name=f"{file.name}:{class_name}",
        implementation=getattr(module, class_name),
        sha256=hashlib.sha256(source).hexdigest(),
    )


def _module(name: str, file: Path, source: bytes) -> ModuleType:
    """The module of exactly these bytes, which were hashed: the file may change meanwhile."""
    module_name = f"dynamoe_plugin_{hashlib.sha256(bytes(file) + b':' + source).hexdigest()[:16]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    module = sys.modules[module_name] = ModuleType(module_name)
    module.__file__ = str(file)
    try:
        exec(compile(source, file, "exec"), module.__dict__)
    except Exception as error:  # whatever the code raises
        del sys.modules[module_name]
        raise ValueError(f"plug-in {name!r}: {file} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _from_entry_point(name: str, protocol: type) -> Plugin:
    known = importlib.metadata.entry_points(group=GROUPS[protocol])
    found = list({point.value: point for point in known if point.name == name}.values())
    if len(found) != 1:
        several = f"several distributions have a plug-in {name!r}" if found else f"there is no plug-in {name!r}"
        names = ", ".join(sorted(known.names)) or "none"
        raise ValueError(f"{several} in the entry points {GROUPS[protocol]} ({names}); give FILE.py:Class otherwise")
    (point,) = found
    try:
        implementation = point.load()
    except Exception as error:  # whatever the code raises
        raise ValueError(
            f"plug-in {name!r} ({point.value}) cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return Plugin(name=f"{name} ({point.value})", implementation=implementation, sha256=_package_hash(point.module))


def _package_hash(module_name: str) -> str:
    """Of all code in the top-level package of a module that was imported."""
    top = sys.modules[module_name.partition(".")[0]]
    files: list[tuple[str, Path]] = []
    if hasattr(top, "__path__"):
        for folder in map(Path, top.__path__):
            files += [(str(f.relative_to(folder)), f) for f in folder.rglob("*") if f.suffix in _CODE and f.is_file()]
    elif top.__file__ is not None:
        files = [(Path(top.__file__).name, Path(top.__file__))]
    digest = hashlib.sha256()
    for path, file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{path} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _lacking(implementation: type, protocol: type) -> list[str]:
    """Public names of a protocol that a class has not got, or has only from the protocol itself."""
    names = [name for name in {**get_annotations(protocol), **vars(protocol)} if not name.startswith("_")]
    missing = object()
    lacking = []
    for name in names:
        declared, own = getattr(protocol, name, missing), getattr(implementation, name, missing)
        if own is missing or own is declared or (callable(declared) and not callable(own)):
            lacking.append(name)
    return lacking
