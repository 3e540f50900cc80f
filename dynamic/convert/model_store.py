"""From the name of a model to a directory that holds it: local paths, shipped models, Hub ids, GGUF files.

Models that must be prepared are prepared once, in a cache (``DYNAMOE_HOME``, else ``dynamoe`` in the user's cache
directory), also if two processes need one at once. An interrupted preparation leaves no incomplete model, and one whose
files have been damaged since is prepared again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from ...kernels.api.disk import cache_home
from ..checkpoint.gguf_file import SUFFIX, find_gguf, gguf_parts
from ..text.sealed_directory import is_intact, seal
from .default_model import default_recipe, prepare_default
from .gguf_import import import_gguf, importer_digest

_HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "*.tiktoken")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

_PACKAGED = Path(__file__).parents[1] / "shipped"


def resolve_model(model: str | Path, *, progress: bool = True) -> Path:
    """The directory of a model, prepared or downloaded when it is not there yet.

    Arguments:
        model: a directory in Hugging Face layout; a ``.gguf`` file, any part of one that was split, or a directory of
            one model's; the name of a shipped model (``default``,
            ``tiny``); or a Hub id (``org/name``). A path that exists wins over the other meanings.
        progress: show progress bars.

    Raises:
        ValueError: for a name that is none of these, a directory without ``config.json``, or a Hub that cannot be
            reached; the message states what to do.
    """
    path = Path(model).expanduser()
    if path.is_dir() and not (str(model) in SHIPPED_MODELS and not (path / "config.json").exists()):
        described = (path / "config.json").is_file()
        if not (described and any((path / name).exists() for name in _WEIGHTS)) and (file := find_gguf(path)):
            return _import_once(file, progress)
        if not described:
            raise ValueError(f"{path} is not a model: it has no config.json and no {SUFFIX} file")
        return path
    if path.suffix == SUFFIX:
        return _import_once(path, progress)
    if str(model) in SHIPPED_MODELS:
        return SHIPPED_MODELS[str(model)](progress)
    if _HUB_ID.fullmatch(str(model)):
        return _download(str(model))
    raise ValueError(
        f"no model {str(model)!r}: neither a directory, nor a .gguf file, nor a Hub id (org/name), nor one of the"
        f" shipped models ({', '.join(SHIPPED_MODELS)})"
    )


def _default(progress: bool) -> Path:
    return prepare_once("default", default_recipe(), lambda target: prepare_default(target, progress=progress))


def _tiny(progress: bool) -> Path:
    return _PACKAGED / "tiny"


SHIPPED_MODELS: dict[str, Callable[[bool], Path]] = {"default": _default, "tiny": _tiny}


def prepare_once(name: str, recipe: dict[str, object], prepare: Callable[[Path], None]) -> Path:
    """The cached directory of something that is made from a recipe; made now when it is not there.

    Arguments:
        name: beginning of the directory's name.
        recipe: JSON-able; its hash is the rest of the name, so that a changed recipe never uses old files.
        prepare: fills an empty directory. Whatever it raises is passed on, and its directory is removed.
    """
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    root = cache_home() / "models"
    target = root / f"{name}-{digest}"
    if is_intact(target):
        return target
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root / f".{target.name}.lock"):
        # Another process may have made it while this one waited for the lock.
        if not is_intact(target):
            partial = root / f".{target.name}.partial"
            # Left over when a preparation was killed; holding the lock means that no other process uses it.
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                prepare(partial)
                seal(partial)
                shutil.rmtree(target, ignore_errors=True)  # damaged, or of a version that sealed nothing
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return target


def _locked(file: Path) -> FileLock:
    lock = FileLock(file)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"Waiting for another process that prepares the same model ({file})", flush=True)
        lock.acquire()
    return lock


def _import_once(file: Path, progress: bool) -> Path:
    parts = gguf_parts(file)
    stats = [(str(part.resolve()), part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    recipe = {"importer": importer_digest(), "files": stats}
    return prepare_once(
        parts[0].stem, recipe, lambda target: import_gguf(file, target, keep_codes=True, progress=progress)
    )


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"the Hub has no model {model!r}, or it is private (set HF_TOKEN) — and there is no such directory"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"cannot download {model!r}: no model hub can be reached and it is not in the local cache. Copy the model"
            f" to this machine and give its directory, set HF_ENDPOINT to a hub that can be reached, or use a shipped"
            f" model ({', '.join(SHIPPED_MODELS)})"
        ) from error
