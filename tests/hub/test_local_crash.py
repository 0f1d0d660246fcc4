"""What is left after a client, or the Hub itself, dies in the middle."""

import base64
import hashlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub.errors import HfHubHTTPError

from hf_zoo.hub.local import FolderHub
from hf_zoo.hub.local.store import Store

SERVER = """
import resource, sys
from pathlib import Path
from hf_zoo.hub.local import FolderHub
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
hub = FolderHub(Path(sys.argv[1]))
hub.open()
print(hub.url, flush=True)
hub.serve_forever()
"""


class Server:
    """A Hub in a process of its own, so that it can be killed."""

    def __init__(self, folder, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(folder), *map(str, arguments)], stdout=subprocess.PIPE, text=True
        )
        self.url = self.process.stdout.readline().strip()
        assert self.url, "the server did not start"

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.process.stdout.close()


def send(url, method, path, body=None):
    host = urlsplit(url)
    connection = http.client.HTTPConnection(host.hostname, host.port, timeout=20)
    try:
        connection.request(method, path, json.dumps(body) if isinstance(body, dict) else body)
        answer = connection.getresponse()
        content = answer.read()
        assert answer.status == 200, content
        return json.loads(content or b"{}")
    finally:
        connection.close()


def commit_body(*operations):
    return "\n".join(map(json.dumps, [{"key": "header", "value": {"summary": "x"}}, *operations]))


def push(url, number):
    """Push one large and one regular file as a client does, and return the acknowledged commit."""
    content = random.Random(number).randbytes(200_000)
    oid = hashlib.sha256(content).hexdigest()
    batch = {"operation": "upload", "objects": [{"oid": oid, "size": len(content)}]}
    actions = send(url, "POST", "/org/model.git/info/lfs/objects/batch", batch)["objects"][0].get("actions")
    if actions:
        send(url, "PUT", actions["upload"]["href"].removeprefix(url), content)
    text = base64.b64encode(b"%d" % number).decode()
    lines = commit_body(
        {"key": "lfsFile", "value": {"path": f"{number}.bin", "algo": "sha256", "oid": oid, "size": len(content)}},
        {"key": "file", "value": {"path": f"{number}.txt", "content": text, "encoding": "base64"}},
    )
    return send(url, "POST", "/api/models/org/model/commit/main", lines)["commitOid"]


def check_store(folder):
    """Every commit that a branch reaches is whole, and every object is what its name says."""
    store = Store(folder)
    try:
        objects = dict(store.objects.all())
        for sha256, path in objects.items():
            assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
        for kind in ("model", "dataset"):
            for repo in store.repos(kind):
                for head in repo.branches.values():
                    for commit in store.history(repo, head):
                        assert {entry.sha256 for entry in commit.entries.values()} <= set(objects)
        assert list((folder / "incoming").iterdir()) == []
        known = {path for path in (folder / "repos").rglob("*") if path.is_file() and path.parent.name != "lfs"}
        assert {path.suffix for path in known} == {".json"}  # and no remains of unfinished ones
    finally:
        store.close()


def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path):
    folder = tmp_path / "hub"
    acknowledged, number, generator = {}, 0, random.Random(0)
    for _ in range(5):
        server = Server(folder)
        try:
            if not acknowledged:
                send(server.url, "POST", "/api/repos/create", {"name": "model", "organization": "org"})
            for known, commit in acknowledged.items():
                info = send(server.url, "GET", f"/api/models/org/model/revision/{commit}")
                assert f"{known}.bin" in {file["rfilename"] for file in info["siblings"]}
            killer = threading.Timer(generator.uniform(0.05, 0.5), server.kill)
            killer.start()
            while True:
                number += 1
                try:
                    acknowledged[number] = push(server.url, number)
                except (OSError, http.client.HTTPException):
                    break
            killer.join()
        finally:
            server.kill()
    assert len(acknowledged) > 5  # measured: about 100 on an idle disk
    check_store(folder)
    with FolderHub(folder) as hub:
        history = {commit["id"] for commit in send(hub.url, "GET", "/api/models/org/model/commits/main")}
        assert set(acknowledged.values()) <= history
        files = {f["rfilename"] for f in send(hub.url, "GET", "/api/models/org/model")["siblings"]}
        assert {f"{known}.{end}" for known in acknowledged for end in ("bin", "txt")} <= files
        push(hub.url, number + 1)  # and it goes on


@pytest.fixture
def repo(local_hub):
    send(local_hub.url, "POST", "/api/repos/create", {"name": "model", "organization": "org"})
    return local_hub


def incoming(hub):
    return list((hub.folder / "incoming").iterdir())


def wait_for(condition):
    for _ in range(200):
        if condition():
            return
        threading.Event().wait(0.02)
    raise AssertionError("waited for four seconds")


def send_part(hub, method, path, length, part):
    """Announce `length` bytes, send some of them and go away."""
    host = urlsplit(hub.url)
    with socket.create_connection((host.hostname, host.port)) as connection:
        head = f"{method} {path} HTTP/1.1\r\nHost: {host.netloc}\r\nContent-Length: {length}\r\n\r\n"
        connection.sendall(head.encode() + part)


def test_an_interrupted_lfs_upload_leaves_nothing(repo):
    content = os.urandom(3 << 20)
    oid = hashlib.sha256(content).hexdigest()
    batch = {"operation": "upload", "objects": [{"oid": oid, "size": len(content)}]}
    asked = send(repo.url, "POST", "/org/model.git/info/lfs/objects/batch", batch)["objects"][0]
    href = asked["actions"]["upload"]["href"].removeprefix(repo.url)
    objects = {path for path in (repo.folder / "objects").rglob("*") if path.is_file()}
    send_part(repo, "PUT", href, len(content), content[: 2 << 20])
    wait_for(lambda: repo.requests[-1].method == "PUT")
    assert (repo.requests[-1].status, repo.requests[-1].bytes_in) == (499, 2 << 20)
    assert incoming(repo) == []
    assert {path for path in (repo.folder / "objects").rglob("*") if path.is_file()} == objects
    again = send(repo.url, "POST", "/org/model.git/info/lfs/objects/batch", batch)["objects"][0]
    assert "actions" in again  # still to be uploaded
    send(repo.url, "PUT", href, content)
    assert "actions" not in send(repo.url, "POST", "/org/model.git/info/lfs/objects/batch", batch)["objects"][0]


def test_an_interrupted_commit_leaves_nothing(repo):
    text = base64.b64encode(b"x" * 300_000).decode()
    operations = [
        {"key": "file", "value": {"path": f"{n}.txt", "content": text, "encoding": "base64"}} for n in range(5)
    ]
    lines = commit_body(*operations).encode()
    head = send(repo.url, "GET", "/api/models/org/model")["sha"]
    send_part(repo, "POST", "/api/models/org/model/commit/main", len(lines), lines[:-100])
    wait_for(lambda: repo.requests[-1].status == 499)
    info = send(repo.url, "GET", "/api/models/org/model")
    assert (info["sha"], [file["rfilename"] for file in info["siblings"]]) == (head, [".gitattributes"])
    assert incoming(repo) == []


def test_the_client_tries_again_after_the_hub_went_away_in_the_middle(local_hub, hub_api):
    api = hub_api(local_hub)
    api.create_repo("org/model")
    content = os.urandom(3 << 20)
    local_hub.fail_next(method="PUT", path="^/lfs/", cut_after=1 << 20)
    api.upload_file(path_or_fileobj=content, path_in_repo="w.bin", repo_id="org/model")
    puts = [request for request in local_hub.requests if request.method == "PUT"]
    assert [(request.status, request.bytes_in) for request in puts] == [(499, 1 << 20), (200, 3 << 20)]
    with open(api.hf_hub_download("org/model", "w.bin"), "rb") as file:
        assert file.read() == content


def test_a_full_disk_is_said_and_nothing_is_kept(tmp_path, hub_api):
    """Files of this server may have half a megabyte: the closest a test comes to a full disk."""
    server = Server(tmp_path / "hub", 1 << 19)
    try:
        api = hub_api(server)
        api.create_repo("org/model")
        for name, size in (("large.bin", 3 << 20), ("regular.txt", 1 << 20)):
            with pytest.raises((HfHubHTTPError, RuntimeError)) as caught:
                api.upload_file(path_or_fileobj=os.urandom(size), path_in_repo=name, repo_id="org/model")
            error = caught.value if isinstance(caught.value, HfHubHTTPError) else caught.value.__cause__
            assert error.response.status_code == 507
            assert "disk is full" in str(error)
        assert api.list_repo_files("org/model") == [".gitattributes"]
        api.upload_file(path_or_fileobj=b"small", path_in_repo="small.bin", repo_id="org/model")
    finally:
        server.kill()
    check_store(tmp_path / "hub")


def test_requests_are_logged_to_a_file_when_asked(tmp_path):
    with FolderHub(tmp_path / "hub", log_requests=True) as hub:
        send(hub.url, "POST", "/api/repos/create", {"name": "model", "organization": "org"})
        send(hub.url, "GET", "/api/models?author=org")
        wait_for(lambda: len(hub.requests) == 2)
        assert [str(request) for request in hub.requests] == Path(hub.folder / "requests.log").read_text().splitlines()
        assert hub.requests[1].path == "/api/models"
    with FolderHub(tmp_path / "quiet"):
        pass
    assert not (tmp_path / "quiet" / "requests.log").exists()


def test_closing_ends_the_connections_and_frees_the_folder(tmp_path):
    hub = FolderHub(tmp_path / "hub")
    for _ in range(3):
        hub.start()
        host = urlsplit(hub.url)
        idle = socket.create_connection((host.hostname, host.port), timeout=5)
        send(hub.url, "GET", "/api/models")
        hub.close()
        assert idle.recv(1) == b""
        idle.close()
    with pytest.raises(Exception, match="not open"):
        hub.fail_next()


def test_a_hub_that_serves_in_one_thread_is_closed_by_another(tmp_path):
    hub = FolderHub(tmp_path / "hub")
    hub.open()
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    send(hub.url, "GET", "/api/models")
    hub.close()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_a_damaged_store_answers_500_and_serves_on(repo, ask, caplog):
    content = base64.b64encode(b"content").decode()
    operation = {"key": "file", "value": {"path": "x.txt", "content": content, "encoding": "base64"}}
    send(repo.url, "POST", "/api/models/org/model/commit/main", commit_body(operation))
    oid = hashlib.sha256(b"content").hexdigest()
    (repo.folder / "objects" / oid[:2] / oid[2:]).unlink()
    status, _, body = ask(repo, "GET", "/org/model/resolve/main/x.txt")
    assert status == 500
    assert "Internal error" in json.loads(body)["error"]
    assert "FileNotFoundError" in caplog.text
    assert repo.requests[-1].status == 500
    assert ask(repo, "GET", "/api/models/org/model")[0] == 200
