"""Text for training: HTML to prose, packages, folders, and the corpus made of them."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from dynamoe.dynamic.text.corpus import CorpusConfig, build_corpus, load_corpus
from dynamoe.dynamic.text.documentation_packages import SOURCES, Source, collect, collect_folder
from dynamoe.dynamic.text.documents import clean, html_to_text, is_english_prose, read_document, unwrap
from dynamoe.dynamic.train.served import blocks_from

SENTENCES = [
    "The scheduler decides in every step which of the waiting requests are to run with the others.",
    "If there is no page left in the cache, it takes one back from the request that came last.",
    "It is an error to free a page that is not in use, and the pool says so by name.",
    "A prompt that is too long for one step is cut into parts, and each of them is run on its own.",
]


def prose(topic: str, paragraphs: int = 8) -> str:
    return "\n\n".join(f"{topic} {i}. " + " ".join(SENTENCES[(i + j) % 4] for j in range(3)) for i in range(paragraphs))


PAGE = """<html><head><title>T</title><style>p {}</style></head><body>
<nav><a href="x">Up</a></nav><div class="sphinxsidebar"><ul><li>Contents</li></ul></div>
<h1>Pages &amp; blocks<a class="headerlink">¶</a></h1>
<p>A <em>page</em> holds
sixteen “tokens” — no more.<p>An unclosed paragraph.
<ul><li>first</li><li>second</li></ul>
<pre>def f():
    return 1</pre>
<table class="data"><tr><td>42</td></tr></table><table><tr><td>Layout text.</td></tr></table>
<script>var x = "<p>";</script><footer>Copyright</footer></body></html>"""


def test_html_keeps_paragraphs_and_code_and_drops_everything_else() -> None:
    assert html_to_text(PAGE).split("\n\n") == [
        "Pages & blocks",
        'A page holds sixteen "tokens" - no more.',
        "An unclosed paragraph.",
        "first",
        "second",
        "def f():\n    return 1",
        "Layout text.",
    ]


def test_text_is_unwrapped_where_it_was_wrapped_and_nowhere_else(tmp_path: Path) -> None:
    assert unwrap("one\ntwo\n\n  code\n  more") == "one two\n\n  code\n  more"
    assert clean("a\t\r\nb   \n\n\n\nc\n-----\nd") == "a\nb\n\nc\nd"
    file = tmp_path / "note.txt.gz"
    file.write_bytes(gzip.compress("wrapped\nline \xff".encode("latin-1")))
    assert read_document(file) == "wrapped line"


def test_only_english_prose_counts() -> None:
    assert is_english_prose(prose("Paging"))
    assert not is_english_prose("short")
    assert not is_english_prose("int x = 5; return x * y + z; struct foo bar baz; " * 20)
    assert not is_english_prose("Der Planer entscheidet, welche Anfragen laufen und welche warten. " * 20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    for genre in ("manual", "story"):
        (root / genre).mkdir(parents=True)
        for number in range(20):
            (root / genre / f"{number}.txt").write_text(prose(f"{genre} {number}"))
    return root


def test_a_folder_gives_genres_with_files_held_out(folder: Path, tmp_path: Path) -> None:
    parts = collect_folder(folder)
    assert {(p.genre, p.held_out, len(p.documents)) for p in parts} == {
        (genre, held_out, 2 if held_out else 18) for genre in ("manual", "story") for held_out in (True, False)
    }
    with pytest.raises(ValueError, match="is not a folder"):
        collect_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no English text"):
        collect_folder(tmp_path / "empty")


def test_a_corpus_is_built_once_and_held_out_text_is_not_in_training(folder: Path, tmp_path: Path) -> None:
    config = CorpusConfig(vocab_size=400, text_folder=str(folder))
    directory = build_corpus(config, tmp_path / "cache", say=lambda _: None)
    stamp = (directory / "tokens.safetensors").stat().st_mtime_ns
    assert build_corpus(config, tmp_path / "cache", say=lambda _: None) == directory
    assert (directory / "tokens.safetensors").stat().st_mtime_ns == stamp
    corpus = load_corpus(directory)
    assert corpus.known == {
        "manual/manual": True, "manual/manual-held-out": False, "story/story": True, "story/story-held-out": False,
    }  # fmt: skip
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(corpus.tokenizer_file))
    assert tokenizer.get_vocab_size() <= 400
    assert tokenizer.token_to_id("<|endoftext|>") == 0
    training = tokenizer.decode(corpus.train.tolist())
    headings = {line[:12] for line in training.split("\n\n")}
    for name, stream in corpus.held_out.items():
        document = tokenizer.decode(stream.tolist()).split("\n\n")[0]
        assert document[:12] not in headings, name
    assert tokenizer.decode(tokenizer.encode("naïve café ⊕ 123").ids) == "naïve café ⊕ 123"
    assert int((corpus.train == 0).sum()) == 34  # one end per document: 2 * (18 - 1 for validation)
    assert corpus.train.dtype == torch.int16
    record = json.loads((directory / "corpus.json").read_text())
    assert sum(s["tokens"] for s in record["sources"]) == corpus.train.numel()
    with pytest.raises(ValueError, match="between 257 and 4096, not 9000"):
        CorpusConfig(vocab_size=9000)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb to build a package")
def test_a_package_is_unpacked_and_read(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    pages = tree / "usr/share/doc/thing/html"
    pages.mkdir(parents=True)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        "Package: thing-doc\nVersion: 1:2.5-1\nArchitecture: all\nMaintainer: A <a@example.org>\nDescription: text\n"
    )
    boilerplate = "<p>This notice is printed at the end of every page of this manual and in no other place.</p>"
    for number in range(6):
        paragraphs = "".join(f"<p>{p}</p>" for p in prose(f"Page {number}").split("\n\n"))
        (pages / f"{number}.html").write_text(f"<html><body>{paragraphs}{boilerplate}</body></html>")
    (tree / "usr/share/doc/thing/other.html").write_text(f"<p>{prose('Other')}</p>")
    cache = tmp_path / "cache"
    cache.mkdir()
    archive = cache / "thing-doc_1%3a2.5-1_all.deb"
    subprocess.run(["dpkg-deb", "--build", str(tree), str(archive)], check=True, capture_output=True)
    source = Source(package="thing-[a-z]+", genre="manual", files=r"/html/.*\.html$", licence="MIT")
    found = collect(source, cache)
    assert (found.name, found.version, found.licence, len(found.documents)) == ("thing-doc", "1:2.5-1", "MIT", 6)
    assert not any("This notice" in document or "Other" in document for document in found.documents)
    assert all("Page" in document for document in found.documents)


def test_without_apt_the_error_names_the_alternative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"apt-get, apt-cache, dpkg-deb\); give it a folder.*text_folder="):
        collect(SOURCES[0], tmp_path)


def test_blocks_of_held_out_text_do_not_overlap_and_come_from_every_stream() -> None:
    streams = {"a/x": torch.arange(1000, dtype=torch.int16), "b/y": torch.arange(2000, 2500, dtype=torch.int16)}
    streams["c/short"] = torch.zeros(5, dtype=torch.int16)
    blocks = blocks_from(streams, 40, 50, seed=0)
    tokens = [token for block in blocks for token in block]
    assert len(blocks) == 30  # 20 of the one and 10 of the other are all there are
    assert len(set(tokens)) == len(tokens)
    assert sum(block[0] >= 2000 for block in blocks[:10]) == 5
    assert blocks_from(streams, 4, 50, seed=0) == blocks[:4]
    with pytest.raises(ValueError, match="as long as 5000"):
        blocks_from(streams, 4, 5000, seed=0)


def test_some_packages_are_never_trained_on_and_every_licence_is_named() -> None:
    held_out = [s for s in SOURCES if s.held_out]
    assert len(held_out) >= 3
    assert {s.genre for s in held_out} >= {"manual", "handbook", "essay"}
    assert all(s.licence for s in SOURCES)
