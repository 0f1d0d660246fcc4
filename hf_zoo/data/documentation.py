"""Real English that ships with every CPython: its language reference and the docstrings of its library.

The texts are those of `pydoc_data.topics` (what `help("with")` prints) and of every docstring in the standard
library's source files, which are parsed and never imported. What is not prose is dropped: code, grammars, tables,
headings, markup. Nothing is downloaded and nothing is written.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hf_zoo.errors import DataError

# Tests and tools, packages not of every CPython from 3.10 on, and tables of characters.
SKIPPED = frozenset(
    "test tests idlelib lib2to3 distutils ensurepip turtledemo site-packages dist-packages encodings pydoc_data "
    "__pycache__ __phello__ _pyrepl msilib".split()
)
MIN_WORDS, MAX_WORDS = 5, 60
_FUNCTION_WORDS = frozenset(
    "a an the this that these those is are was be been being has have can may must should will would does do not no "
    "if when which who whose where while as at by for from in into of on or to with and but it its they their you "
    "your than then there any all each every only also such same other".split()
)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]?\s+(?=[A-Z])")
_HYPHEN_AT_LINE_END = re.compile(r"(?<=\w-)\n\s*(?=\w)")
_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})
_MARKUP = re.compile(r"[\"`*]|:(?:\w+:)+(?=`)|(?<=\W)_(?=\w)")
_NOT_PROSE = re.compile(r"::=|>>>|\.\.\.|->|[=<>{}\\|@#$%^&~]|__|https?:|\w\(\w|\[\d")
_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")


@dataclass(frozen=True)
class Passage:
    """Prose that belongs together: one docstring, or one topic of the language reference.

    Attributes:
        document: Where it stands: `reference/with` or `library/email/message`.
        paragraphs: Its paragraphs, each a tuple of sentences.
    """

    document: str
    paragraphs: tuple[tuple[str, ...], ...]

    @property
    def package(self) -> str:
        """The topic or the top-level package it belongs to: `reference/with`, `library/email`."""
        return "/".join(self.document.split("/")[:2])

    @property
    def sentences(self) -> tuple[str, ...]:
        """Its sentences in order."""
        return tuple(sentence for paragraph in self.paragraphs for sentence in paragraph)


@lru_cache(maxsize=1)
def read_documentation() -> tuple[Passage, ...]:
    """Return the prose of this CPython's documentation, the same in every process.

    Sentences that occurred before are left out, so that no two splits share one. The texts differ a little between
    versions of Python.

    Raises:
        DataError: If this Python ships without the sources of its library.
    """
    seen: set[str] = set()
    passages = []
    for document, text in (*_topics(), *_docstrings()):
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", text):
            fresh = []
            for sentence in _sentences(paragraph):
                key = sentence.casefold()
                if key not in seen:
                    seen.add(key)
                    fresh.append(sentence)
            if fresh:
                paragraphs.append(tuple(fresh))
        if paragraphs:
            passages.append(Passage(document, tuple(paragraphs)))
    if len(passages) < 1000:
        raise DataError(
            f"the embedded text is made from the standard library's source files, and {sys.executable} ships with "
            "hardly any: use a Python with its sources, or another data.path"
        )
    return tuple(passages)


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            f"{sys.executable} ships without pydoc_data, which the embedded text is made from: use a complete Python, "
            "or another data.path"
        ) from None
    for name in sorted(topics):
        yield f"reference/{name}", topics[name]


def _docstrings() -> Iterator[tuple[str, str]]:
    """Yield every docstring of the standard library with its module, files in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _source_files(root):
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source) if '"""' in source or "'''" in source else None
        except (SyntaxError, ValueError, OSError):  # a few files are in another encoding or not for this version
            continue
        if tree is not None:
            parts = path.relative_to(root).with_suffix("").parts
            document = "library/" + "/".join(part for part in parts if part != "__init__")
            yield from ((document, docstring) for docstring in _docstrings_of(tree))


def _source_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name for name in folders if name not in SKIPPED and not name.startswith(("config-", "lib-"))
        )
        names = (name for name in sorted(files) if name.endswith(".py") and not name.startswith("_sysconfigdata"))
        yield from (Path(folder, name) for name in names)


def _docstrings_of(node: ast.AST) -> Iterator[str]:
    """Yield the docstrings of a module in their order, looking at statements only: most nodes are expressions."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for field in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, field, ()) if not isinstance(node, ast.expr) else ():
            yield from _docstrings_of(child)


def _sentences(paragraph: str) -> Iterator[str]:
    """Yield the sentences of a paragraph that are prose."""
    lines = paragraph.strip("\n").split("\n")
    if any(len(set(line.strip())) == 1 and len(line.strip()) > 3 for line in lines):
        return  # a heading with its underline, or a table
    text = " ".join(_HYPHEN_AT_LINE_END.sub("", paragraph).split()).translate(_PLAIN)
    for sentence in _SENTENCE_END.split(text):
        if not _NOT_PROSE.search(sentence):
            clean = _MARKUP.sub("", sentence).replace("::", ":").strip(" -*•")
            if "  " not in clean and " ()" not in clean and _is_prose(clean):  # else the markup was all there was
                yield clean


def _is_prose(sentence: str) -> bool:
    words = _WORD.findall(sentence)
    if not MIN_WORDS <= len(words) <= MAX_WORDS or not sentence[0].isupper() or sentence[-1] not in ".!?:":
        return False
    letters = sum(character.isalpha() or character.isspace() for character in sentence)
    return letters >= 0.9 * len(sentence) and sum(word.lower() in _FUNCTION_WORDS for word in words) >= 2
