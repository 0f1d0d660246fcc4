"""Tasks made from CPython's documentation: one for language modelling, three with labels.

Every sample says in `source` where it stands. No two splits of a set share a sentence, nor a package (`docs-topics`:
nor a module), so that no split can be solved from memory. Splits hold about 80, 10 and 10 % of the text.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hf_zoo.data.documentation import Passage, read_documentation

SPLITS = ("train", "validation", "test")
HELD_OUT = 0.1
LARGEST_HELD_OUT = 0.06  # of the text; what is larger is always trained on, or it would be most of a split
AREAS = {
    "concurrency": (
        "_threading_local _weakrefset asyncio concurrent contextlib contextvars multiprocessing queue sched "
        "selectors signal subprocess threading weakref"
    ),
    "data": (
        "_collections_abc _pydecimal _strptime array bisect calendar collections colorsys copy dataclasses "
        "datetime decimal difflib enum fractions functools graphlib hashlib heapq hmac numbers operator "
        "random re secrets sre_parse statistics string struct textwrap uuid zoneinfo"
    ),
    "development": (
        "abc argparse ast bdb cProfile cmd code codeop compileall dis doctest getopt importlib inspect "
        "logging modulefinder optparse pdb pkgutil profile pstats py_compile pyclbr pydoc runpy symtable "
        "timeit tokenize trace traceback tracemalloc types typing unittest warnings zipimport"
    ),
    "files": (
        "_compression _pyio bz2 codecs configparser copyreg csv dbm filecmp fileinput fnmatch genericpath "
        "glob gzip html io json linecache lzma mimetypes netrc ntpath os pathlib pickle pickletools plistlib "
        "posixpath shelve shutil sqlite3 tarfile tempfile tomllib xml zipapp zipfile"
    ),
    "interface": ("curses getpass gettext locale platform rlcompleter sysconfig tkinter turtle"),
    "network": (
        "asynchat asyncore base64 cgi cgitb email ftplib http imaplib ipaddress mailbox mailcap nntplib "
        "poplib quopri smtpd smtplib socket socketserver ssl telnetlib urllib uu webbrowser wsgiref xmlrpc"
    ),
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Rows of a set, dealt to its splits.

    Attributes:
        rows: Split -> samples: texts by column, and `label` as the index of a class.
        labels: Names of the classes; empty for a set without labels.
    """

    rows: dict[str, list[Row]]
    labels: tuple[str, ...] = ()


def documents() -> Task:
    """Make `docs`: about 1 MB of English prose for masked language modelling.

    A sample is one document, all docstrings of a module or a topic of the language reference, in column `text`.
    """
    texts: dict[str, list[str]] = defaultdict(list)
    for passage in read_documentation():
        texts[passage.document] += [" ".join(paragraph) for paragraph in passage.paragraphs]
    rows = [{"text": "\n".join(lines), "source": document} for document, lines in texts.items()]
    return Task(_by_split(rows, _split_of_packages()))


def sentences() -> Task:
    """Make `docs-sentences`: does a sentence open its docstring (`summary`) or stand further down (`detail`)?

    Of every docstring of two sentences or more, its first and one other, so classes are equally frequent and speak of
    the same things: what tells them apart is how they speak. Chance is 0.50.
    """
    rows = []
    for passage in _docstrings():
        first, *others = passage.sentences
        if others:
            detail = min(others, key=_hash)
            rows += [
                {"text": text, "label": label, "source": passage.document}
                for label, text in enumerate((first, detail))
            ]
    return Task(_by_split(rows, _split_of_packages()), ("summary", "detail"))


def pairs() -> Task:
    """Make `docs-pairs`: how does the second of two sentences stand to the first?

    The first two sentences of a docstring are `next` in their order and `previous` the other way round; `unrelated`
    are the first sentences, or the second ones, of two docstrings of different modules. Every docstring of two
    sentences or more is in each class once. Chance is 0.33. Opening and later sentences are told apart by their words,
    so that one sentence alone tells something: logistic regression on words reaches 0.51 of the test split from
    `sentence1`, 0.52 from `sentence2` and 0.57 from both (MNLI: 0.54 from the hypothesis, Gururangan et al. 2018,
    arXiv:1803.02324).
    """
    split_of = _split_of_packages()
    openings = [passage for passage in _docstrings() if len(passage.sentences) > 1]
    by_split: dict[str, list[Passage]] = defaultdict(list)
    for passage in openings:
        by_split[split_of[passage.package]].append(passage)
    rows = []
    for passage in openings:
        first, second = passage.sentences[:2]
        choice = int.from_bytes(_hash(f"other/{first}")[:8], "big")
        others = by_split[split_of[passage.package]]
        shifted = (others[(choice + step) % len(others)] for step in range(len(others)))
        other = next(candidate for candidate in shifted if candidate.document != passage.document)
        rank = choice % 2
        for label, (one, two) in enumerate((
            (first, second),
            (second, first),
            (passage.sentences[rank], other.sentences[rank]),
        )):
            rows.append({"sentence1": one, "sentence2": two, "label": label, "source": passage.document})
    return Task(_by_split(rows, split_of), ("next", "previous", "unrelated"))


def topics() -> Task:
    """Make `docs-topics`: which area of the standard library does a sentence of a docstring document?

    The areas are `concurrency`, `data`, `development`, `files`, `interface` and `network`, at most 900 sentences each.
    Sentences are short and mostly say nothing of their area outright, so the task is hard. Chance is 0.17.
    """
    areas = {module: area for area, modules in AREAS.items() for module in modules.split()}
    found: dict[str, list[Row]] = {area: [] for area in AREAS}
    for passage in _docstrings():
        area = areas.get(passage.package.partition("/")[2])
        if area is not None:
            label = list(AREAS).index(area)
            found[area] += [{"text": text, "label": label, "source": passage.document} for text in passage.sentences]
    parts: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for rows in found.values():
        chosen = sorted(rows, key=lambda row: _hash(row["text"]))[:900]
        sizes: dict[str, int] = defaultdict(int)
        for row in chosen:
            sizes[row["source"]] += 1
        for name, part in _by_split(chosen, _deal(sizes), key=lambda row: row["source"]).items():
            parts[name] += part
    shuffled = {name: sorted(part, key=lambda row: _hash(row["text"])) for name, part in parts.items()}
    return Task(shuffled, tuple(AREAS))


def _docstrings() -> list[Passage]:
    return [passage for passage in read_documentation() if passage.document.startswith("library/")]


def _split_of_packages() -> dict[str, str]:
    sizes: dict[str, int] = defaultdict(int)
    for passage in read_documentation():
        sizes[passage.package] += sum(map(len, passage.sentences))
    return _deal(sizes)


def _deal(sizes: dict[str, int]) -> dict[str, str]:
    """Return the split of every group: groups in the order of a hash fill one held-out split after the other."""
    total = sum(sizes.values())
    filled = dict.fromkeys(("test", "validation"), 0)
    split_of = {}
    for group in sorted(sizes, key=_hash):
        open_splits = [name for name, size in filled.items() if size < HELD_OUT * total]
        if open_splits and sizes[group] <= LARGEST_HELD_OUT * total:
            split_of[group] = open_splits[0]
            filled[open_splits[0]] += sizes[group]
        else:
            split_of[group] = "train"
    return split_of


def _package_of(row: Row) -> str:
    return "/".join(row["source"].split("/")[:2])


def _by_split(
    rows: Iterable[Row], split_of: dict[str, str], key: Callable[[Row], str] = _package_of
) -> dict[str, list[Row]]:
    parts: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for row in rows:
        parts[split_of[key(row)]].append(row)
    return parts


def _hash(text: str) -> bytes:
    """Return what decides for a text wherever chance would: the same on every machine."""
    return hashlib.sha256(text.encode()).digest()
