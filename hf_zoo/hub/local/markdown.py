"""A card's Markdown as HTML: headings, lists, tables, code, quotes, links and the repo's own pictures.

A card is whatever somebody pushed, so every character of it is escaped, raw HTML is shown as text, and an address is
only used if it can do no harm. Patterns are bounded: the time to render grows linearly with the text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

MAX_CHARACTERS = 200_000
MAX_DEPTH = 8

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})\s*([\w+.-]{0,40})")
_HEADING = re.compile(r" {0,3}(#{1,6})\s+(.*?)\s*#*\s*$")
_RULE = re.compile(r" {0,3}([-*_])(?:\s*\1){2,}\s*$")
_ITEM = re.compile(r"( {0,8})([-*+]|[0-9]{1,9}[.)])(?:\s+(.*)|\s*)$")
_DELIMITERS = re.compile(r"\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$")
_INLINE = re.compile(
    r"(?P<escaped>\\[!-/:-@\[-`{-~])"
    r"|(?P<code>(?P<ticks>`{1,3})(?P<inside>[^`]{1,500}?)(?P=ticks)(?!`))"
    r"|(?P<image>!\[(?P<alt>[^\]\n]{0,500})\]\(\s*<?(?P<source>[^)\s>]{1,500})>?(?:\s+\"[^\"\n]{0,300}\")?\s*\))"
    r"|(?P<link>\[(?P<text>(?:!\[[^\]\n]{0,300}\]\([^)\n]{1,500}\)|[^\[\]\n]){1,500})\]"
    r"\(\s*<?(?P<target>[^)\s>]{1,500})>?(?:\s+\"[^\"\n]{0,300}\")?\s*\))"
    r"|(?P<address><(?P<bracketed>https?://[^\s<>]{1,500})>|(?P<bare>https?://[^\s<>()\[\]\"'`*]{1,500}))"
    r"|(?P<strong>(?P<stars>\*\*|(?<!\w)__)(?=\S)(?P<bold>.{1,600}?)(?<=\S)(?P=stars))"
    r"|(?P<emphasis>(?P<star>\*|(?<!\w)_)(?=[^\s*_])(?P<italic>[^*_\n]{1,600}?)(?<=\S)(?P=star)(?!\w))"
    r"|(?P<deleted>~~(?=\S)(?P<struck>[^~\n]{1,600}?)~~)"
    r"|(?P<line>(?: {2,}|\\)\n)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Addresses:
    """Where a card's relative addresses lead.

    Attributes:
        link: Turns a path in the repo into the address of its page.
        image: Turns a path in the repo into the address of its content.
    """

    link: Callable[[str], str]
    image: Callable[[str], str]


def render(text: str, addresses: Addresses, depth: int = 0) -> str:
    """Render Markdown.

    Args:
        text: The card without its metadata.
        addresses: Where relative addresses lead.
        depth: How many quotes and lists this text lies in; from `MAX_DEPTH` on it stays as it is.

    Returns:
        HTML that can be put into a page.
    """
    if depth >= MAX_DEPTH:
        return f"<p>{escape(text)}</p>"
    lines = _without_comments(text[:MAX_CHARACTERS]).expandtabs(4).split("\n")
    blocks, position = [], 0
    while position < len(lines):
        line = lines[position]
        if not line.strip():
            position += 1
            continue
        for block in (_fence, _heading, _rule, _quote, _list, _table, _paragraph):
            found = block(lines, position, addresses, depth)
            if found is not None:
                html, position = found
                blocks.append(html)
                break
    return "\n".join(blocks)


def inline(text: str, addresses: Addresses, depth: int = 0) -> str:
    """Render what stands inside a line: code, emphasis, links, pictures.

    Args:
        text: Markdown without blocks.
        addresses: Where relative addresses lead.
        depth: How deep emphasis and links are nested already.

    Returns:
        HTML.
    """
    if depth >= MAX_DEPTH:
        return escape(text)
    html, last = [], 0
    for match in _INLINE.finditer(text):
        html.append(escape(text[last : match.start()]))
        html.append(_INLINE_RENDERERS[str(match.lastgroup)](match, addresses, depth + 1))
        last = match.end()
    html.append(escape(text[last:]))
    return "".join(html)


def safe_address(address: str, relative: Callable[[str], str]) -> str | None:
    """Return an address a page may link to.

    Args:
        address: As written in the card.
        relative: Turns a path in the repo into an address.

    Returns:
        The address, or None if following it could do harm.
    """
    if any(ord(letter) <= 32 or ord(letter) == 127 for letter in address) or "\\" in address:
        return None
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", address)
    if scheme is not None:
        return address if scheme[1].lower() in {"http", "https", "mailto"} else None
    if address.startswith("#"):
        return address
    if address.startswith("//") or ":" in address.partition("/")[0]:
        return None
    if address.startswith("/"):
        return address
    path, _, fragment = address.partition("#")
    path = re.sub(r"^(\./)+", "", path.partition("?")[0])
    if not path or any(segment in {"", ".", ".."} for segment in path.split("/")):
        return None
    return relative(path) + (f"#{fragment}" if fragment else "")


def _without_comments(text: str) -> str:
    """Leave out what stands between `<!--` and `-->`."""
    kept, start = [], 0
    while (opening := text.find("<!--", start)) >= 0 and (closing := text.find("-->", opening + 4)) >= 0:
        kept.append(text[start:opening])
        start = closing + 3
    return "".join([*kept, text[start:]])


Found = tuple[str, int] | None


def _fence(lines: list[str], start: int, addresses: Addresses, depth: int) -> Found:
    """Code between fences; without a closing one it goes to the end."""
    match = _FENCE.match(lines[start])
    if match is None:
        return None
    stop = start + 1
    while stop < len(lines) and not re.match(
        rf" {{0,3}}{re.escape(match[1][0])}{{{len(match[1])},}}\s*$", lines[stop]
    ):
        stop += 1
    code = escape("\n".join(lines[start + 1 : stop]))
    return f"<pre><code>{code}</code></pre>", stop + 1


def _heading(lines: list[str], start: int, addresses: Addresses, depth: int) -> Found:
    match = _HEADING.match(lines[start])
    if match is None:
        return None
    level = len(match[1])
    anchor = re.sub(r"[^\w-]+", "-", match[2].lower()).strip("-")
    return f'<h{level} id="{escape(anchor)}">{inline(match[2], addresses)}</h{level}>', start + 1


def _rule(lines: list[str], start: int, addresses: Addresses, depth: int) -> Found:
    return ("<hr>", start + 1) if _RULE.match(lines[start]) else None


def _quote(lines: list[str], start: int, addresses: Addresses, depth: int) -> Found:
    stop = start
    while stop < len(lines) and lines[stop].lstrip().startswith(">"):
        stop += 1
    if stop == start:
        return None
    inner = "\n".join(re.sub(r"^\s*> ?", "", line) for line in lines[start:stop])
    return f"<blockquote>{render(inner, addresses, depth + 1)}</blockquote>", stop


def _list(lines: list[str], start: int, addresses: Addresses, depth: int) -> Found:
    """A list; what is indented below an item belongs to it."""
    first = _ITEM.match(lines[start])
    if first is None:
        return None
    ordered, indent = first[2][0].isdigit(), len(first[1])
    items: list[list[str]] = []
    position = start
    while position < len(lines):
        line = lines[position]
        match = _ITEM.match(line)
        if match is not None and len(match[1]) <= indent:
            if len(match[1]) < indent or match[2][0].isdigit() != ordered:
                break
            items.append([match[3] or ""])
        elif not line.strip():
            following = lines[position + 1] if position + 1 < len(lines) else ""
            if len(following) - len(following.lstrip()) <= indent and not _ITEM.match(following):
                break
            items[-1].append("")
        elif len(line) - len(line.lstrip()) > indent or items[-1][-1].strip():
            if _HEADING.match(line) or (_FENCE.match(line) and len(line) - len(line.lstrip()) <= indent):
                break
            items[-1].append(line[min(indent + 2, len(line) - len(line.lstrip())) :])
        else:
            break
        position += 1
    tag = "ol" if ordered else "ul"
    return f"<{tag}>{''.join(_item(item, addresses, depth) for item in items)}</{tag}>", position


def _item(lines: list[str], addresses: Addresses, depth: int) -> str:
    """One item: bare text, unless it holds blocks of its own."""
    checked = re.match(r"\[([ xX])\]\s+", lines[0])
    mark = "" if checked is None else "&#9745; " if checked[1] in "xX" else "&#9744; "
    lines = [lines[0][checked.end() :] if checked else lines[0], *lines[1:]]
    html = render("\n".join(lines), addresses, depth + 1)
    if html.startswith("<p>") and html.count("<p>") == 1:
        html = html.replace("<p>", "", 1).replace("</p>", "", 1)
    return f"<li>{mark}{html}</li>"


def _table(lines: list[str], start: int, addresses: Addresses, depth: int) -> Found:
    if "|" not in lines[start] or start + 1 == len(lines) or "|" not in lines[start + 1]:
        return None
    if len(lines[start + 1]) > 2000 or not _DELIMITERS.match(lines[start + 1]):
        return None
    head, marks = _cells(lines[start]), _cells(lines[start + 1])
    right = [mark.endswith(":") for mark in marks] + [False] * len(head)
    stop = start + 2
    while stop < len(lines) and "|" in lines[stop] and lines[stop].strip():
        stop += 1

    def row(cells: list[str], tag: str) -> str:
        styled = zip(cells[: len(head)], right, strict=False)
        return "".join(f"<{tag}{' class=number' if r else ''}>{inline(c, addresses)}</{tag}>" for c, r in styled)

    body = "".join(f"<tr>{row(_cells(line), 'td')}</tr>" for line in lines[start + 2 : stop])
    return f"<div class=wide><table><thead><tr>{row(head, 'th')}</tr></thead><tbody>{body}</tbody></table></div>", stop


def _cells(line: str) -> list[str]:
    """Cut a table's line into its cells; an escaped bar is part of one."""
    line = line.strip().removeprefix("|")
    line = line[:-1] if line.endswith("|") and not line.endswith("\\|") else line
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)]


def _paragraph(lines: list[str], start: int, addresses: Addresses, depth: int) -> Found:
    """Lines up to the next block."""
    stop = start + 1
    while stop < len(lines) and lines[stop].strip():
        line = lines[stop]
        if _FENCE.match(line) or _HEADING.match(line) or _RULE.match(line) or line.lstrip().startswith(">"):
            break
        if _ITEM.match(line):
            break
        stop += 1
    text = "\n".join(line.lstrip() for line in lines[start:stop]).rstrip()
    return f"<p>{inline(text, addresses)}</p>", stop


def _link(match: re.Match[str], addresses: Addresses, depth: int) -> str:
    label = inline(match["text"], addresses, depth)
    address = safe_address(match["target"], addresses.link)
    return label if address is None else f'<a href="{escape(address)}" rel="nofollow noreferrer">{label}</a>'


def _image(match: re.Match[str], addresses: Addresses, depth: int) -> str:
    """A picture of the repo is shown; one from elsewhere is a link, since a page loads nothing from other places."""
    address = safe_address(match["source"], addresses.image)
    alt = escape(match["alt"])
    if address is None:
        return alt
    if re.match(r"(https?|mailto):", address):
        return f'<a href="{escape(address)}" rel="nofollow noreferrer">{alt or escape(address)}</a>'
    return f'<img src="{escape(address)}" alt="{alt}" loading="lazy">'


def _address(match: re.Match[str], addresses: Addresses, depth: int) -> str:
    address = match["bracketed"] or match["bare"]
    trailing = "" if match["bracketed"] else address[len(address.rstrip(".,;:!?")) :]
    address = address.removesuffix(trailing)
    return f'<a href="{escape(address)}" rel="nofollow noreferrer">{escape(address)}</a>{escape(trailing)}'


_INLINE_RENDERERS: dict[str, Callable[[re.Match[str], Addresses, int], str]] = {
    "escaped": lambda match, addresses, depth: escape(match["escaped"][1]),
    "code": lambda match, addresses, depth: f"<code>{escape(match['inside'].strip())}</code>",
    "image": _image,
    "link": _link,
    "address": _address,
    "strong": lambda match, addresses, depth: f"<strong>{inline(match['bold'], addresses, depth)}</strong>",
    "emphasis": lambda match, addresses, depth: f"<em>{inline(match['italic'], addresses, depth)}</em>",
    "deleted": lambda match, addresses, depth: f"<del>{inline(match['struck'], addresses, depth)}</del>",
    "line": lambda match, addresses, depth: "<br>",
}
