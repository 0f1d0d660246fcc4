"""Requests no client should send: every field that could become a path, and every size that could fill memory."""

import base64
import hashlib
import json
import resource
import socket
import threading
from urllib.parse import quote, urlsplit

import pytest

from hf_zoo.errors import HubError
from hf_zoo.hub.local import FolderHub

BAD_PATHS = [
    *("../up", "a/../../up", "/abs", "a//b", "a/./b", "./a", ".", "..", "", "a/\t", "a\\..\\b", "a\0b", "a\nb"),
    *(".git/config", "a/.GIT/x", "x" * 1025, "\ud800", 7, None, ["a"]),
]
BAD_NAMES = [
    *("..", ".", "a..b", "a--b", "-a", ".a", "a.", "a/b", "a\\b", "a b", "ä", "a\0", "x" * 97, "", "a%2fb", "../a"),
    *(7, None),
]
BAD_REFS = [
    *("..", "a..b", "/a", "a/", "a//b", ".a", "a/.b", "a.lock", "a b", "a~1", "a^", "a:b", "a\0b", "@", "a@{0}"),
    *("refs/x", "f" * 40, "x" * 256, "\ud800", 7, ""),
]
TRICKS = [
    *("../../../../../outside.txt", "..%2f..%2f..%2foutside.txt", "%2e%2e/%2e%2e/outside.txt", "/etc/passwd", "%00"),
    *("%252e%252e%252foutside.txt", "%2fetc%2fpasswd", "..\\..\\outside.txt", "....//outside.txt"),
    "%c0%ae%c0%ae/outside.txt",
]
NONSENSE = [
    *(b"", b"[]", b"null", b"{", b"\xff", b'"x"', b"[" * 100_000, b'{"files": 7}', b'{"files": [7]}'),
    *(b'{"files": [{"path": "x", "size": -1}]}', b'{"files": [{"path": "x", "size": true}]}'),
    b'{"files": [{"path": "../x", "size": 1}]}',
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder in which the Hub's folder lies, with a file that no request may reach."""
    folder = tmp_path_factory.mktemp("around")
    (folder / "outside.txt").write_text("outside")
    return folder


@pytest.fixture(scope="module")
def hub(folder):
    """One Hub for the whole module: nothing that is refused changes it."""
    with FolderHub(folder / "hub") as hub:
        yield hub


@pytest.fixture(autouse=True)
def nothing_changes(folder, hub, ask):
    ask(hub, "POST", "/api/repos/create", {"name": "model", "organization": "org"})
    yield
    assert sorted(path.name for path in folder.iterdir()) == ["hub", "outside.txt"]
    assert (folder / "outside.txt").read_text() == "outside"
    assert list((folder / "hub" / "incoming").iterdir()) == []


def commit_lines(*operations):
    lines = [{"key": "header", "value": {"summary": "x"}}, *operations]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def files_of(hub, ask):
    return [entry["path"] for entry in json.loads(ask(hub, "GET", "/api/models/org/model/tree/main?recursive=1")[2])]


@pytest.mark.parametrize("path", BAD_PATHS)
@pytest.mark.parametrize("key", ["file", "lfsFile", "deletedFile", "deletedFolder"])
def test_paths_of_commits(hub, ask, key, path):
    value = {"path": path, "content": base64.b64encode(b"x").decode(), "encoding": "base64", "oid": "a" * 64}
    status, _, answer = ask(
        hub, "POST", "/api/models/org/model/commit/main", commit_lines({"key": key, "value": value})
    )
    assert status == 400, answer
    assert "error" in json.loads(answer)
    assert files_of(hub, ask) == [".gitattributes"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_of_repos(hub, ask, name):
    create = {"name": name, "organization": "org"}
    assert ask(hub, "POST", "/api/repos/create", create)[0] == 400
    if name not in {"", None}:  # no organisation: the caller's own
        assert ask(hub, "POST", "/api/repos/create", {"name": "x", "organization": name})[0] == 400
        assert ask(hub, "POST", "/api/collections", {"title": "x", "namespace": name})[0] == 400
    target = f"org/{name}" if isinstance(name, str) else name
    move = {"fromRepo": "org/model", "toRepo": target, "type": "model"}
    assert ask(hub, "POST", "/api/repos/move", move)[0] == 400


@pytest.mark.parametrize("kind", ["../model", "models", "kernel", 7, ["model"]])
def test_kinds_of_repos(hub, ask, kind):
    assert ask(hub, "POST", "/api/repos/create", {"name": "x", "organization": "org", "type": kind})[0] == 400


@pytest.mark.parametrize("name", BAD_REFS)
def test_names_of_branches_and_tags(hub, ask, name):
    assert ask(hub, "POST", "/api/models/org/model/tag/main", {"tag": name})[0] == 400
    if isinstance(name, str) and name and name != "\ud800":
        status = ask(hub, "POST", f"/api/models/org/model/branch/{quote(name, safe='')}", {})[0]
        assert status == 400
    refs = json.loads(ask(hub, "GET", "/api/models/org/model/refs")[2])
    assert [branch["name"] for branch in refs["branches"]] == ["main"]
    assert refs["tags"] == []


@pytest.mark.parametrize("trick", TRICKS)
def test_addresses_do_not_leave_the_folder(hub, ask, trick):
    for path in (
        f"/org/model/resolve/main/{trick}", f"/org/model/resolve/{trick}/x", f"/{trick}/model/resolve/main/x",
        f"/org/{trick}/resolve/main/x", f"/org/model/blob/main/{trick}", f"/org/model/tree/{trick}", f"/{trick}",
        f"/api/models/org/model/tree/main/{trick}", f"/api/models/org/model/tree/{trick}", f"/api/models/{trick}/m",
        f"/api/models/org/model/revision/{trick}", f"/collections/{trick}/x", f"/api/collections/org/{trick}",
        f"/api/models/org/model/commits/{trick}", f"/org/model/commit/{trick}",
    ):  # fmt: skip
        status, _, body = ask(hub, "GET", path)
        assert 400 <= status < 500, path
        assert body != b"outside", path
        assert b"root:" not in body, path
    for method, path in (
        ("PUT", f"/lfs/models/org/model/{trick}"), ("PUT", f"/lfs/models/{trick}/model/{'a' * 64}"),
        ("DELETE", f"/api/models/org/model/branch/{trick}"), ("DELETE", f"/api/models/org/model/tag/{trick}"),
        ("DELETE", f"/api/collections/{trick}/x"), ("POST", f"/api/models/org/model/commit/{trick}"),
    ):  # fmt: skip
        assert 400 <= ask(hub, method, path, b"")[0] < 500, path


@pytest.mark.parametrize("oid", ["../x", "A" * 64, "a" * 63, "a" * 65, "/" + "a" * 63, 7, None, "a" * 63 + "\n"])
def test_digests_of_objects(hub, ask, oid):
    batch = {"operation": "upload", "objects": [{"oid": oid, "size": 1}]}
    assert ask(hub, "POST", "/org/model.git/info/lfs/objects/batch", batch)[0] == 400
    assert ask(hub, "POST", "/lfs/models/org/model/verify", {"oid": oid, "size": 1})[0] == 400


@pytest.mark.parametrize("body", NONSENSE)
def test_bodies_that_make_no_sense(hub, ask, body):
    status, _, answer = ask(hub, "POST", "/api/models/org/model/preupload/main", body)
    assert status == 400
    assert json.loads(answer)["error"]


@pytest.mark.parametrize(
    "operation",
    [
        {"key": "file", "value": {"path": "x", "content": "***", "encoding": "base64"}},
        {"key": "file", "value": {"path": "x", "content": 7, "encoding": "base64"}},
        {"key": "file", "value": {"path": "x", "content": "", "encoding": "rot13"}},
        {"key": "file", "value": {"path": "x", "content": "A" * (14 << 20), "encoding": "base64"}},  # above 10 MiB
        {
            "key": "lfsFile",
            "value": {"path": "x", "oid": hashlib.sha256(b"").hexdigest(), "size": 0},
        },  # never uploaded
        {"key": "lfsFile", "value": {"path": "x", "oid": "a" * 64, "algo": "md5"}},
        {"key": "symlink", "value": {"path": "x"}},
        {"key": "header", "value": {"summary": ""}},
        {"key": "header", "value": {"summary": "x", "parentCommit": "../../x"}},
        {"key": 7, "value": {}},
    ],
)
def test_commits_that_make_no_sense(hub, ask, operation):
    status, _, answer = ask(hub, "POST", "/api/models/org/model/commit/main", commit_lines(operation))
    assert status == 400, answer
    assert files_of(hub, ask) == [".gitattributes"]


def test_a_broken_card_is_refused_with_its_commit(hub, ask):
    card = base64.b64encode(b"---\nlicense: [\n---\n").decode()
    lines = commit_lines({"key": "file", "value": {"path": "README.md", "content": card, "encoding": "base64"}})
    status, _, answer = ask(hub, "POST", "/api/models/org/model/commit/main", lines)
    assert status == 400
    assert "Invalid metadata in README.md" in json.loads(answer)["error"]


def test_ranges(hub, ask):
    content = base64.b64encode(b"0123456789").decode()
    lines = commit_lines({"key": "file", "value": {"path": "digits.txt", "content": content, "encoding": "base64"}})
    assert ask(hub, "POST", "/api/models/org/model/commit/main", lines)[0] == 200
    path = "/org/model/resolve/main/digits.txt"
    for wanted, status, expected, described in [
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=0-0", 206, b"0", "bytes 0-0/10"),
        ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=0-1,4-5", 200, b"0123456789", None),
        ("lines=1-2", 200, b"0123456789", None),
        ("bytes=10-", 416, None, "bytes */10"),
        ("bytes=5-2", 416, None, "bytes */10"),
        ("bytes=-0", 416, None, "bytes */10"),
    ]:
        answer = ask(hub, "GET", path, headers={"Range": wanted})
        assert (answer[0], answer[1].get("Content-Range")) == (status, described), wanted
        if expected is not None:
            assert answer[2] == expected
    status, headers, body = ask(hub, "HEAD", path)
    assert (status, headers["Content-Length"], body) == (200, "10", b"")
    assert headers["ETag"] == f'"{hashlib.sha1(b"blob 10" + bytes(1) + b"0123456789").hexdigest()}"'
    assert len(headers["X-Repo-Commit"]) == 40
    missing = ask(hub, "HEAD", "/org/model/resolve/main/none")
    assert (missing[0], missing[1]["X-Error-Code"]) == (404, "EntryNotFound")
    assert missing[1]["X-Repo-Commit"] == headers["X-Repo-Commit"]


def talk(hub, *pieces, timeout=10):
    """Send raw bytes and return the answer's first line."""
    host = urlsplit(hub.url)
    with socket.create_connection((host.hostname, host.port), timeout=timeout) as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except OSError:
                break  # refused before everything was sent
        return connection.makefile("rb").readline()


def test_protocol_abuse_is_refused(hub):
    host = f"Host: {urlsplit(hub.url).netloc}\r\n".encode()
    post = b"POST /api/repos/create HTTP/1.1\r\n" + host
    assert b" 414 " in talk(hub, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n" + host + b"\r\n")
    assert b" 431 " in talk(
        hub, b"GET / HTTP/1.1\r\n" + host + b"".join(b"X-%d: y\r\n" % i for i in range(200)) + b"\r\n"
    )
    assert b" 431 " in talk(hub, b"GET / HTTP/1.1\r\n" + host + b"X: " + b"y" * 70_000 + b"\r\n\r\n")
    assert b" 400 " in talk(hub, b"GET / HTTP/1.1\r\n\r\n")  # no Host
    assert b" 400 " in talk(hub, post + b"Content-Length: -1\r\n\r\n")
    assert b" 400 " in talk(hub, post + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}x")
    assert b" 400 " in talk(hub, post + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
    assert b" 400 " in talk(hub, post + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
    assert b" 413 " in talk(hub, post + b"Content-Length: 99999999999\r\n\r\n" + b"x" * 1000 + b"\r\n", timeout=20)
    assert b" 405 " in talk(hub, b"DELETE /api/whoami-v2 HTTP/1.1\r\n" + host + b"\r\n")
    chunked = b'12\r\n{"name": "chunked"\r\n1\r\n}\r\n0\r\n\r\n'
    assert b" 200 " in talk(hub, post + b"Transfer-Encoding: chunked\r\n\r\n" + chunked)


def test_endless_bodies_do_not_fill_the_memory(hub):
    """Half a gigabyte without a line break, to a route that reads lines: refused within a few lines' memory."""
    head = f"POST /api/models/org/model/commit/main HTTP/1.1\r\nHost: {urlsplit(hub.url).netloc}\r\n"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    piece = b"%x\r\n" % (1 << 20) + b"a" * (1 << 20) + b"\r\n"
    answer = talk(hub, head.encode() + b"Transfer-Encoding: chunked\r\n\r\n", *[piece] * 512, timeout=30)
    assert b" 413 " in answer
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 150, f"{grown:.0f} MiB more than before"


def test_a_crowd_of_idle_connections_does_not_stop_the_hub(hub, ask):
    host = urlsplit(hub.url)
    crowd = [socket.create_connection((host.hostname, host.port), timeout=10) for _ in range(300)]
    turned_away = [connection for connection in crowd[256:] if connection.recv(100).startswith(b"HTTP/1.1 503")]
    assert len(turned_away) >= 40
    for connection in crowd:
        connection.close()
    for _ in range(50):
        status = ask(hub, "GET", "/api/models")[0]
        if status == 200:
            break
        threading.Event().wait(0.05)
    assert status == 200


def test_one_folder_is_served_once(hub, folder, tmp_path):
    with pytest.raises(HubError, match="already served"):
        FolderHub(folder / "hub").open()
    with pytest.raises(HubError, match="cannot listen"):
        FolderHub(tmp_path / "another", port=urlsplit(hub.url).port).open()
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(HubError, match=r"no Hub's folder.*cat\.jpg"):
        FolderHub(foreign).open()
    assert [path.name for path in foreign.iterdir()] == ["cat.jpg"]
