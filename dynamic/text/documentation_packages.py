"""Text out of documentation packages of Debian: fetched with apt into a cache, unpacked without installing anything."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from .documents import is_english_prose, read_document

_NO_APT = (
    "the recipe reads documentation packages with apt-get and dpkg-deb, which this system lacks ({missing});"
    " give it a folder of text files instead (text_folder=PATH: .txt and .html files, one subfolder per genre)"
)

_FURNITURE_SHARE = 0.2  # a paragraph on more than this share of a package's pages is page furniture
_SHORT = 40


@dataclass(frozen=True, kw_only=True)
class Source:
    """A package whose documentation becomes text.

    Arguments:
        package: regular expression of the whole name; the last match in apt's order is taken (names carry versions).
        genre: label under which held-out text is reported.
        files: regular expression of the wanted files' paths inside the package.
        licence: of the text, as the package's copyright file states it.
        held_out: never trained on.
        max_characters: text taken at most, so that no single package dominates.
    """

    package: str
    genre: str
    files: str
    licence: str
    held_out: bool = False
    max_characters: int = 12_000_000


SOURCES = (
    Source(package="python3\\.[0-9]+-doc", genre="manual", files=r"/html/.*\.html$", licence="PSF-2.0"),
    Source(package="postgresql-doc-[0-9]+", genre="manual", files=r"/html/.*\.html$", licence="PostgreSQL"),
    Source(package="python-django-doc", genre="manual", files=r"/html/.*\.html$", licence="BSD-3-Clause"),
    Source(package="git-doc", genre="manual", files=r"/git-doc/.*\.html$|/git/.*\.html$", licence="GPL-2.0"),
    Source(package="zsh-doc", genre="manual", files=r"/html/.*\.html$", licence="MIT-like (zsh)"),
    Source(package="exim4-doc-html", genre="manual", files=r"\.html$", licence="GPL-2.0+"),
    Source(package="libreoffice-help-en-us", genre="help", files=r"/en-US/text/.*\.html$", licence="MPL-2.0"),
    Source(package="debian-handbook", genre="handbook", files=r"/en-US/.*\.html$", licence="GPL-2.0+ or CC-BY-SA-3.0"),
    Source(package="debian-reference-en", genre="handbook", files=r"\.en\.html$", licence="GPL-2.0+"),
    Source(package="developers-reference", genre="handbook", files=r"/[^/]*\.html$", licence="GPL-2.0+"),
    Source(package="harden-doc", genre="handbook", files=r"/en-US/.*\.html$", licence="GPL-2.0"),
    Source(package="debmake-doc", genre="handbook", files=r"\.en\.html$", licence="MIT"),
    Source(package="c\\+\\+-annotations-txt", genre="handbook", files=r"cplusplus\.txt\.gz$", licence="GPL-3.0+"),
    Source(package="linux-doc-[0-9.]+", genre="kernel", files=r"/html/.*\.html$", licence="GPL-2.0"),
    Source(package="cfi-en", genre="essay", files=r"/html/.*\.htm$", licence="free to copy (cfi-en's own terms)"),
    Source(package="apache2-doc", genre="manual", files=r"\.html(\.en)?$", licence="Apache-2.0", held_out=True),
    Source(package="sqlite3-doc", genre="manual", files=r"\.html$", licence="public domain", held_out=True),
    Source(package="debian-policy", genre="handbook", files=r"/[^/]*\.html$", licence="GPL-2.0+", held_out=True),
    Source(package="debian-faq", genre="handbook", files=r"\.en\.html$", licence="GPL-2.0+", held_out=True),
    Source(package="jargon-text", genre="essay", files=r"jargon\.txt\.gz$", licence="public domain", held_out=True),
)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The documents of one source, and exactly which file they came from."""

    name: str
    genre: str
    licence: str
    held_out: bool
    version: str
    sha256: str
    documents: tuple[str, ...]


def collect(source: Source, cache: Path) -> Collected:
    """Fetch a package (once), unpack it, and take its English prose, without repeated paragraphs.

    Arguments:
        cache: keeps the downloaded packages.

    Raises:
        ValueError: without apt, without a package of that name, or when nothing usable is in it.
    """
    archive = _archive(source, cache)
    name, version, _ = archive.name.removesuffix(".deb").split("_")
    unpacked = cache / "unpacked" / archive.stem
    if not unpacked.is_dir():
        partial = unpacked.with_name(unpacked.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _run(["dpkg-deb", "-x", str(archive), str(partial)])
        partial.rename(unpacked)
    wanted = re.compile(source.files)
    paths = sorted(p for p in unpacked.rglob("*") if p.is_file() and wanted.search(str(p.relative_to(unpacked.parent))))
    documents = _documents(paths, source.max_characters)
    if not documents:
        raise ValueError(f"package {name} {version} holds no English text in files matching {source.files!r}")
    return Collected(
        name=name,
        genre=source.genre,
        licence=source.licence,
        held_out=source.held_out,
        version=version.replace("%3a", ":"),
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(),
        documents=documents,
    )


def collect_folder(folder: Path, held_out_share: float = 0.1) -> list[Collected]:
    """Documents of a folder of ``.txt`` and ``.html`` files: a genre per subfolder, some files of each held out.

    Raises:
        ValueError: when the folder does not exist or holds no English text.
    """
    if not folder.is_dir():
        raise ValueError(f"text_folder={str(folder)!r} is not a folder")
    genres: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name.removesuffix(".gz").endswith((".txt", ".html", ".htm")):
            parts = path.relative_to(folder).parts
            genres.setdefault(parts[0] if len(parts) > 1 else "text", []).append(path)
    found = []
    for genre, paths in genres.items():
        ordered = sorted(paths, key=lambda p: hashlib.sha256(p.name.encode()).digest())
        cut = round(len(ordered) * held_out_share)
        for held_out, part in ((True, ordered[:cut]), (False, ordered[cut:])):
            documents = _documents(part, 1 << 40)
            if documents:
                digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
                name = f"{genre}-held-out" if held_out else genre
                found.append(
                    Collected(name=name, genre=genre, licence="the user's own", held_out=held_out, version="",
                              sha256=digest, documents=documents)
                )  # fmt: skip
    if not any(not c.held_out for c in found):
        raise ValueError(f"text_folder={str(folder)!r} holds no English text in .txt or .html files")
    return found


def _documents(paths: list[Path], max_characters: int) -> tuple[str, ...]:
    # An order that is unrelated to the names, so that a cut at max_characters takes from everywhere.
    pages, total = [], 0
    for path in sorted(paths, key=lambda p: hashlib.sha256(p.name.encode()).digest()):
        text = read_document(path)
        if is_english_prose(text):
            pages.append(text.split("\n\n"))
            total += len(text)
            if total >= max_characters:
                break
    pages_with = Counter(block for page in pages for block in set(page))
    furniture = {block for block, count in pages_with.items() if count > max(3, _FURNITURE_SHARE * len(pages))}
    seen: set[str] = set()
    documents = []
    for page in pages:
        # Long repeated paragraphs are licence notes and boilerplate; short ones are headings and may repeat.
        kept = [b for b in page if b not in furniture and (len(b) < _SHORT or b not in seen)]
        seen.update(page)
        text = "\n\n".join(kept)
        if is_english_prose(text):
            documents.append(text)
    return tuple(documents)


def _archive(source: Source, cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    pattern = re.compile(source.package)
    cached = [p for p in sorted(cache.glob("*.deb")) if pattern.fullmatch(p.name.split("_")[0])]
    if cached:
        return cached[-1]
    missing = [tool for tool in ("apt-get", "apt-cache", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise ValueError(_NO_APT.format(missing=", ".join(missing)))
    names = [n for n in _run(["apt-cache", "pkgnames"]).split() if pattern.fullmatch(n)]
    # Some names in apt's list have no package; newest version number first.
    for name in sorted(names, key=lambda n: [int(x) for x in re.findall(r"\d+", n)], reverse=True):
        if subprocess.run(["apt-get", "download", name], cwd=cache, capture_output=True, check=False).returncode == 0:
            return next(p for p in cache.glob("*.deb") if p.name.split("_")[0] == name)
    raise ValueError(
        f"apt has no package that matches {source.package!r} (tried: {', '.join(names) or 'no such name'}); run"
        " apt-get update, or give the recipe a folder of text files (text_folder=PATH)"
    )


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout
