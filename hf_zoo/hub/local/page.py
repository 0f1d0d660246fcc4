"""The frame of the web pages: style, header, small pieces of HTML. No script, nothing from other places."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from urllib.parse import quote

from hf_zoo.hub.local.wire import Answer

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#5c6673;--line:#d9dee5;--ground:#fff;--panel:#f6f7f9;--link:#0b5cad;
--tag:#eef1f5}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#9aa5b3;--line:#333b46;--ground:#14171c;--panel:#1c2128;
--link:#7ab7f5;--tag:#262d37}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
a{color:var(--link);text-decoration:none}a:hover{text-decoration:underline}
header{border-bottom:1px solid var(--line);background:var(--panel)}
header>div,main{max-width:72rem;margin:0 auto;padding:.8rem 1.2rem}
header>div{display:flex;gap:1.2rem;align-items:center;flex-wrap:wrap}
header a.home{font-weight:650;color:var(--ink)}header form{margin-left:auto}
input,button{font:inherit;color:inherit;background:var(--ground);border:1px solid var(--line);border-radius:6px;
padding:.25rem .6rem}
input{width:16rem}button{cursor:pointer}
h1{font-size:1.6rem;line-height:1.25;margin:1.2rem 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:1.8rem 0 .5rem}h3{font-size:1.05rem;margin:1.3rem 0 .3rem}
table{border-collapse:collapse;width:100%;font-size:.93rem}
th,td{text-align:left;padding:.35rem .7rem .35rem 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:550}.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;padding-right:1.4rem}
td.when{white-space:nowrap;color:var(--soft)}.wide{overflow-x:auto}
.soft{color:var(--soft)}.small{font-size:.88rem}
.tag{display:inline-block;background:var(--tag);border-radius:5px;padding:0 .45rem;margin:.1rem .25rem .1rem 0;
font-size:.82rem;color:var(--ink);overflow-wrap:anywhere}
.columns{display:grid;grid-template-columns:minmax(0,1fr) 20rem;gap:2.2rem;align-items:start}
@media(max-width:56rem){.columns{grid-template-columns:minmax(0,1fr)}}
aside{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:.2rem 1rem 1rem}
aside h2{font-size:1rem;margin:1rem 0 .3rem}aside table{font-size:.86rem}aside ul{padding-left:1.1rem;margin:.2rem 0}
.scroll{max-height:22rem;overflow:auto}
dl{display:grid;grid-template-columns:auto 1fr;gap:.15rem .8rem;margin:.4rem 0;font-size:.9rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
pre{background:var(--panel);border:1px solid var(--line);border-radius:6px;padding:.7rem .9rem;overflow:auto;
font-size:.86rem;line-height:1.45}
code{font-family:ui-monospace,SFMono-Regular,Menlo,monospace;font-size:.92em}
:not(pre)>code{background:var(--tag);border-radius:4px;padding:.05rem .3rem;overflow-wrap:anywhere}
blockquote{margin:.8rem 0;padding:.1rem 1rem;border-left:3px solid var(--line);color:var(--soft)}
img{max-width:100%}hr{border:0;border-top:1px solid var(--line);margin:1.5rem 0}
"""
_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
_POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


def page(
    title: str, body: str, *, query: str = "", status: int = 200, headers: dict[str, str] | None = None
) -> Answer:
    """Return a whole page.

    Args:
        title: Plain text, for the window.
        body: HTML.
        query: What was searched for.
        status: The HTTP status.
        headers: More headers.

    Returns:
        The answer.
    """
    html = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body>'
        '<header><div><a class="home" href="/">hf_zoo Hub</a><a href="/#models">Models</a>'
        '<a href="/#datasets">Datasets</a><a href="/#collections">Collections</a>'
        '<form action="/" role="search"><input type="search" name="q" aria-label="Search by name" '
        f'placeholder="Search by name" value="{escape(query)}"> <button>Search</button></form></div></header>'
        f"<main>{body}</main></body></html>"
    )
    safe = {"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
    return Answer(status, html.encode("utf-8", "replace"), "text/html; charset=utf-8", {**safe, **(headers or {})})


def link(address: str, text: str, kind: str = "") -> str:
    """Return a link; both arguments are plain text."""
    return f'<a href="{escape(address)}"{f" class={kind}" if kind else ""}>{escape(text)}</a>'


def address(*parts: str) -> str:
    """Return an address of this Hub from its unquoted parts; slashes inside a part stay slashes."""
    return "/" + "/".join(quote(part, safe="/") for part in parts if part)


def revision_address(url_path: str, view: str, revision: str, path: str = "") -> str:
    """Return the address of a revision's page; a revision's own slashes are quoted."""
    start = f"/{url_path}/{view}/{quote(revision, safe='')}"
    return f"{start}/{quote(path, safe='/')}" if path else start


def size_text(size: int) -> str:
    """Return a number of bytes for people."""
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def count_text(count: int) -> str:
    """Return a number of weights for people."""
    amount = float(count)
    for unit in ("", "K", "M"):
        if amount < 1000:
            return f"{amount:.3g}{unit}"
        amount /= 1000
    return f"{amount:.3g}B"


def when(date: str) -> str:
    """Return a moment for people, to the minute."""
    return f"{date[:10]} {date[11:16]}"
