"""Plain text out of HTML and text files of documentation: paragraphs only, no navigation, no markup."""

from __future__ import annotations

import gzip
import html.parser
import re
import unicodedata
from pathlib import Path

_SKIPPED = {"script", "style", "head", "nav", "footer", "header", "form", "button", "svg", "select", "math"}
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
_BLOCKS = {"p", "div", "li", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "dd", "ul", "ol", "dl", "section", "article",
           "blockquote", "body", "main"}  # fmt: skip
_NAVIGATION = {
    "toc", "nav", "navbar", "navigation", "navheader", "navfooter", "sphinxsidebar", "related", "breadcrumb", "footer",
    "breadcrumbs", "header", "headerlink", "sidebar", "indextable", "menu", "docnav", "previous", "next", "lang",
    "edit-message", "legalnotice", "wy-nav-side", "wy-nav-top", "rst-versions", "wy-breadcrumbs", "downloads",
    "rst-footer-buttons", "langmenu",
}  # fmt: skip
_PLAIN = {
    0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2026: "...", 0xA0: " "
}  # fmt: skip
_COMMON_WORDS = {
    "the", "of", "and", "to", "a", "in", "is", "that", "for", "it", "as", "with", "be", "on", "by", "this", "are", "or",
    "an", "if", "not", "can",
}  # fmt: skip
MIN_CHARACTERS = 400
_MIN_COMMON_SHARE = 0.2


class _Paragraphs(html.parser.HTMLParser):
    """Collects text block by block; preformatted blocks keep their lines."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self.current: list[str] = []
        self.hidden: list[str] = []  # open tags inside a skipped element, that element first
        self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            if tag == "br":
                self.current.append("\n" if self.preformatted else " ")
            return
        marks = {
            mark.lower() for name, value in attrs if name in ("class", "id", "role") for mark in (value or "").split()
        }
        # A table without a class lays out a page (old HTML); the others hold data.
        skipped = tag in _SKIPPED or (tag == "table" and any(name == "class" for name, _ in attrs))
        if self.hidden or skipped or (tag != "body" and marks & _NAVIGATION):
            self.hidden.append(tag)
            return
        if tag == "pre":
            self._end_block()
            self.preformatted += 1
        elif tag in _BLOCKS:
            self._end_block()

    def handle_endtag(self, tag: str) -> None:
        if self.hidden:
            # Unclosed inner tags (<p>, <li>) close with the element around them.
            if tag in self.hidden:
                del self.hidden[len(self.hidden) - 1 - self.hidden[::-1].index(tag) :]
            return
        if tag == "pre" and self.preformatted:
            self._end_block()
            self.preformatted -= 1
        elif tag in _BLOCKS:
            self._end_block()

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.current.append(data)

    def _end_block(self) -> None:
        text = "".join(self.current)
        self.current = []
        text = text.strip("\n") if self.preformatted else " ".join(text.split())
        if text.strip():
            self.blocks.append(text)


def clean(text: str) -> str:
    """ASCII where that loses nothing, no trailing spaces, no runs of blank lines, no very long lines of symbols."""
    text = re.sub(r" *\u2014 *", " - ", text)
    text = unicodedata.normalize("NFKC", text.translate(_PLAIN)).replace("\r", "").replace("\t", "    ")
    text = "".join(c for c in text if ord(c) < 0x250)  # Latin only: a small vocabulary has no room for more
    lines = [line.rstrip() for line in text.split("\n")]
    lines = [line for line in lines if not re.fullmatch(r"[^\w\s]{4,}", line.strip())]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def html_to_text(markup: str) -> str:
    """The paragraphs of an HTML page, separated by blank lines."""
    parser = _Paragraphs()
    parser.feed(markup)
    parser.close()
    parser._end_block()
    return clean("\n\n".join(parser.blocks).replace("¶", ""))


def unwrap(text: str) -> str:
    """Join the hard-wrapped lines of flush-left paragraphs; indented blocks keep their lines."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.split("\n")
        wrapped = all(line and not line[0].isspace() for line in lines)
        blocks.append(" ".join(line.strip() for line in lines) if wrapped else block)
    return "\n\n".join(blocks)


def read_document(path: Path) -> str:
    """The clean text of a ``.html``, ``.txt`` or other text file, gzipped or not. Bytes that are not UTF-8 are lost."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = data.decode("utf-8", "ignore")
    name = path.name.removesuffix(".gz")
    return html_to_text(text) if name.endswith((".html", ".htm")) else clean(unwrap(text))


def is_english_prose(text: str) -> bool:
    """Whether a document is long enough and has the share of common English words that running text has."""
    words = re.findall(r"[a-z]+", text.lower())
    return len(text) >= MIN_CHARACTERS and sum(w in _COMMON_WORDS for w in words) >= _MIN_COMMON_SHARE * max(
        1, len(words)
    )
