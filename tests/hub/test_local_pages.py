"""The web pages, and the Markdown they show."""

import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest

from hf_zoo.hub.local.markdown import Addresses, render

ADDRESSES = Addresses(link=lambda path: f"/blob/{path}", image=lambda path: f"/resolve/{path}")

CARD = """---
license: mit
tags: [model-zoo, "<b>tag</b>"]
pipeline_tag: fill-mask
---
# A *small* `BERT`

First line,
second line with **bold words**, a [file](config.json#L1), <https://example.org/a?b=c&d=e>.

| factor | value |
|---|---:|
| seed | **1** |
| a \\| b | 2 |

1. one
2. two
   - inner
   - [x] done

- plain
- [link](https://example.org)

```python
if a < b: # <script>
```

> a quote

![learning curve](figures/curve.png)
![elsewhere](https://example.org/track.gif)

---
The end.  
Really.
"""  # ruff: ignore[trailing-whitespace]

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[a](javascript:alert(1))",
    "[a](JaVaScRiPt:alert(1))",
    "[a](java\tscript:alert(1))",
    "[a](data:text/html;base64,PHNjcmlwdD4=)",
    "[a](vbscript:x)",
    "![a](javascript:alert(1))",
    '![a" onerror="alert(1)](x.png)',
    '[a](https://x" onclick="alert(1))',
    "<https://x'onclick='alert(1)'>",
    '# h" onclick="alert(1)',
    "```html onmouseover=alert(1)\n</code></pre><script>alert(1)</script>\n```",
    "`</code><script>alert(1)</script>`",
    "| <script>alert(1)</script> | b |\n|---|---|\n| <svg/onload=alert(1)> | c |",
    "[a](//evil.example/x)",
    "[a](../../../../api/repos/delete)",
    "![a](../../x)",
    "[<img src=x onerror=alert(1)>](x)",
    "**<script>alert(1)</script>**",
    "<!-- --><script>alert(1)</script><!-- -->",
    "&lt;script&gt;",
]


class Elements(HTMLParser):
    """Collect every element with its attributes."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def check_harmless(html):
    allowed = {
        *("html", "head", "meta", "title", "style", "body", "header", "div", "main", "article", "aside", "form"),
        *("input", "button", "a", "h1", "h2", "h3", "h4", "p", "pre", "code", "em", "strong", "del", "ul", "ol", "li"),
        *("table", "thead", "tbody", "tr", "th", "td", "blockquote", "hr", "br", "img", "span", "dl", "dt", "dd"),
    }
    for tag, attributes in Elements(html).found:
        assert tag in allowed, (tag, attributes)
        assert not [name for name in attributes if name.startswith("on") or name in {"style", "srcset", "formaction"}]
        for name in ("href", "src", "action"):
            value = attributes.get(name, "")
            assert re.match(r"(https?://|mailto:|/(?!/)|#|$)", value), value
            assert ".." not in value.split("/")
            if name == "src":
                assert value == "" or value.startswith("/")


def test_markdown():
    html = render(CARD.split("---\n", 2)[2], ADDRESSES)
    for expected in [
        '<h1 id="a-small-bert">A <em>small</em> <code>BERT</code></h1>',
        '<strong>bold words</strong>, a <a href="/blob/config.json#L1"',
        '<a href="https://example.org/a?b=c&amp;d=e" rel="nofollow noreferrer">',
        "<th>factor</th><th class=number>value</th>",
        "<td>seed</td><td class=number><strong>1</strong></td>",
        "<td>a | b</td>",
        "<ol><li>one</li><li>two\n<ul><li>inner</li><li>&#9745; done</li></ul></li></ol>",
        "<ul><li>plain</li>",
        "<pre><code>if a &lt; b: # &lt;script&gt;</code></pre>",
        "<blockquote><p>a quote</p></blockquote>",
        '<img src="/resolve/figures/curve.png" alt="learning curve" loading="lazy">',
        '<a href="https://example.org/track.gif" rel="nofollow noreferrer">elsewhere</a>',
        "<hr>",
        "The end.<br>Really.",
    ]:
        assert expected in html, html
    assert html.count("<table>") == 1


@pytest.mark.parametrize("attack", ATTACKS)
def test_markdown_is_harmless(attack):
    for text in (
        attack,
        f"> {attack}",
        f"- {attack}",
        f"# {attack}",
        f"**{attack}**",
        f"| {attack} |\n|---|\n| {attack} |",
    ):
        check_harmless(render(text, ADDRESSES))


@pytest.mark.parametrize(
    "text",
    [
        *("*" * 60_000, "[" * 60_000, "`" * 60_000, "![" * 30_000, "> " * 30_000, "- " * 30_000, "|" * 60_000),
        *("**a " * 20_000, "| a |\n| " + "-" * 1900 + "x |\n", "<!--" * 20_000, "_a" * 30_000, "[a](" * 20_000),
        *("\n- a\n  " * 8000, "#" * 60_000, "~~a" * 20_000, "1. " * 20_000, "\\" * 60_000, "http://" * 10_000),
        *("  \n" * 20_000, "*a*" * 20_000 + "**", "> - " * 15_000, "```\n" * 15_000),
    ],
)
@pytest.mark.usefixtures("no_hang")
def test_markdown_does_not_explode(text):
    check_harmless(render(text, ADDRESSES))


@pytest.fixture
def filled_hub(local_hub, hub_api):
    api = hub_api(local_hub)
    for repo_id in ("zoo/bert-000", "zoo/vit-001"):
        api.create_repo(repo_id)
        api.upload_file(path_or_fileobj=CARD.encode(), path_in_repo="README.md", repo_id=repo_id)
    api.upload_file(
        path_or_fileobj=b"\x89PNG\r\n\x1a\n",
        path_in_repo="figures/curve.png",
        repo_id="zoo/bert-000",
        commit_message="<script>alert(1)</script>",
        commit_description="</pre><script>",
    )
    api.upload_file(path_or_fileobj=b"<script>alert(1)</script>", path_in_repo="evil.html", repo_id="zoo/bert-000")
    api.create_branch("zoo/bert-000", branch="epoch/010")
    api.create_tag("zoo/bert-000", tag="v1")
    api.create_repo("zoo/data", repo_type="dataset")
    slug = api.create_collection("A <i>zoo</i>", namespace="zoo", description="all & everything").slug
    api.add_collection_item(slug, "zoo/bert-000", "model", note="seed: <1>")
    return local_hub, slug


def text_of(html):
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", html)))


def test_pages_show_what_is_there(filled_hub, ask):
    hub, slug = filled_hub
    shown = {}
    for page in (
        *(
            "/",
            "/?q=vit",
            "/?tag=model-zoo",
            "/models?other=model-zoo",
            "/zoo/bert-000",
            "/zoo/bert-000/tree/main",
            "/datasets/zoo/data",
        ),
        *("/zoo/bert-000/tree/epoch%2F010/figures", "/zoo/bert-000/blob/v1/evil.html", f"/collections/{slug}"),
        *(
            "/zoo/bert-000/commits/main",
            "/zoo/bert-000/blob/main/figures/curve.png",
            "/zoo/bert-000/blob/main/README.md",
        ),
    ):
        status, headers, body = ask(hub, "GET", page)
        assert status == 200, page
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        check_harmless(body.decode())
        shown[page] = text_of(body.decode())
    assert "zoo/bert-000" in shown["/"]
    assert "zoo/data" in shown["/"]
    assert "A <i>zoo</i>" in shown["/"]
    assert shown["/models?other=model-zoo"] == shown["/?tag=model-zoo"]  # as the links on cards spell it
    assert "zoo/bert-000" not in shown["/?q=vit"]
    assert "zoo/vit-001" in shown["/?q=vit"]
    assert "from_pretrained" in shown["/zoo/bert-000"] or "snapshot_download" in shown["/zoo/bert-000"]
    for word in ("A small BERT", "epoch/010", "v1", "evil.html", "figures/", "<b>tag</b>", "mit", "fill-mask"):
        assert word in shown["/zoo/bert-000"], word
    assert "curve.png" in shown["/zoo/bert-000/tree/epoch%2F010/figures"]
    assert "<script>alert(1)</script>" in shown["/zoo/bert-000/blob/v1/evil.html"]
    assert "<script>alert(1)</script>" in shown["/zoo/bert-000/commits/main"]
    assert "seed: <1>" in shown[f"/collections/{slug}"]
    commit = re.search(
        r'href="(/zoo/bert-000/commit/[0-9a-f]{40})"', ask(hub, "GET", "/zoo/bert-000/commits/main")[2].decode()
    )
    status, _, body = ask(hub, "GET", commit[1])
    assert status == 200
    assert "evil.html added" in text_of(body.decode())
    check_harmless(body.decode())


def test_what_is_missing_is_said_to_browsers_in_html(local_hub, ask):
    for page in ("/zoo/none", "/zoo/none/tree/main", "/nothing/at/all/here", "/collections/a/b", "/<script>"):
        status, headers, body = ask(local_hub, "GET", page.replace("<", "%3C"), headers={"Accept": "text/html"})
        assert (status, headers["Content-Type"]) == (404, "text/html; charset=utf-8")
        check_harmless(body.decode())
    assert ask(local_hub, "GET", "/zoo/none")[1]["Content-Type"].startswith("application/json")


def test_files_run_nothing_in_a_browser(filled_hub, ask):
    hub, _ = filled_hub
    _, headers, body = ask(hub, "GET", "/zoo/bert-000/resolve/main/evil.html")
    assert headers["Content-Type"] == "text/plain; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in headers["Content-Security-Policy"]
    assert body == b"<script>alert(1)</script>"
    assert ask(hub, "GET", "/zoo/bert-000/resolve/main/figures/curve.png")[1]["Content-Type"] == "image/png"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_shows_the_pages(filled_hub, tmp_path):
    hub, _ = filled_hub

    def dump(path):
        done = subprocess.run(
            [
                *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
                *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
                *(f"--user-data-dir={tmp_path}/chrome", "--virtual-time-budget=2000", "--dump-dom", hub.url + path),
            ],
            capture_output=True, text=True, timeout=90,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    dom, log = dump("/")
    assert "zoo/bert-000" in text_of(dom)
    dom, log = dump("/zoo/bert-000")
    assert "A small BERT" in text_of(dom)
    assert "Content Security Policy" not in log  # the style is applied, nothing is blocked
    asked = {request.path: request.status for request in hub.requests}
    picture = next(path for path in asked if path.endswith("/figures/curve.png"))
    assert asked[picture] == 200  # the card's own picture was fetched
