"""Values as Markdown that cannot break out of their place: cells, code spans, fences and sentences of cards."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f\x7f\u0085\u2028\u2029]+")
_BACKTICKS = re.compile(r"`+")
_SPECIAL = re.compile(r"([\\`*\[\]<>|~]|(?<!\w)_|_(?!\w)|&(?=#?\w+;)|^[#+-])")


def one_line(value: Any) -> str:
    """Return text on one line: every run of line breaks and control characters becomes one space."""
    return _CONTROL.sub(" ", str(value)).strip()


def number(value: Any) -> str:
    """Return a number as a reader wants it: integers whole, others with four significant digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:.3e}"


def code(value: Any) -> str:
    """Return a code span that shows a value as it is, also with backticks or `|` in it."""
    text = one_line(value)
    if not text:
        return "(empty)"
    longest = max((len(run) for run in _BACKTICKS.findall(text)), default=0)
    fence = "`" * (longest + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def sentence(text: Any) -> str:
    """Return running text with Markdown's and HTML's own characters taken literally."""
    return _SPECIAL.sub(r"\\\1", one_line(text))


def link(text: str, address: str) -> str:
    """Return a link; the address keeps only what an address may hold."""
    return f"[{text}]({re.sub(r'[^A-Za-z0-9/:._~%?=&#@+,-]', '', one_line(address))})"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """Return a Markdown table.

    Args:
        header: Its column titles.
        rows: Its cells, already Markdown; `|` inside them is escaped here.
        numeric: Columns set to the right.
    """
    right = set(numeric)
    rule = ["---:" if column in right else "---" for column in range(len(header))]
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def fence(text: str, language: str = "") -> str:
    """Return a fenced block that its content cannot close."""
    longest = max((len(run) for run in _BACKTICKS.findall(text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def _cell(text: str) -> str:
    return one_line(text).replace("\\|", "|").replace("|", "\\|") or " "
