"""Clients with their default settings upload through Xet."""

import hashlib
import json
import random
import struct

import pytest

from hf_zoo.hub.local import FolderHub, lz4
from hf_zoo.hub.local.refusal import Refusal
from hf_zoo.hub.local.xet import hash_text, parse_shard

PUSH = """
import random
from pathlib import Path
from huggingface_hub import HfApi, constants, snapshot_download
assert not constants.HF_HUB_DISABLE_XET
api, folder = HfApi(), Path("model")
folder.mkdir(exist_ok=True)
(folder / "README.md").write_text("---\\nlicense: mit\\n---\\n")
noise = random.Random(0).randbytes(3 << 20)
(folder / "noise.bin").write_bytes(noise)
(folder / "words.bin").write_bytes(b"the same words again and again, " * 60_000)
(folder / "floats.bin").write_bytes(bytes(b for i in range(250_000) for b in (i * 7 & 255, i >> 5 & 255, 12, 61)))
api.create_repo("zoo/xet", exist_ok=True)
api.upload_folder(repo_id="zoo/xet", folder_path=folder, commit_message="first")
print("first")
(folder / "noise.bin").write_bytes(noise[: 1 << 20] + b"inserted" + noise[1 << 20 :])
api.create_branch("zoo/xet", branch="step-2")
api.upload_folder(repo_id="zoo/xet", folder_path=folder, revision="step-2", commit_message="second")
api.upload_folder(repo_id="zoo/xet", folder_path=folder, revision="step-2", commit_message="third")
got = Path(snapshot_download("zoo/xet", revision="step-2"))
for path in folder.iterdir():
    assert (got / path.name).read_bytes() == path.read_bytes(), path
got = Path(snapshot_download("zoo/xet"))
assert (got / "noise.bin").read_bytes() == noise
"""


@pytest.mark.xet
def test_default_clients_push_through_xet_and_pull(local_hub, run_with_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
    assert "first" in run_with_hub(local_hub, PUSH, HF_HUB_DISABLE_XET="0")
    sent = [request.bytes_in for request in local_hub.requests if "/xorbs/" in request.path]
    assert 3 << 20 < sum(sent[:-1]) < 6 << 20  # compressed: 3 MiB of noise, 3 MB of words and floats
    assert sent[-1] < 1 << 20  # only the chunks around what was inserted
    commits = [request for request in local_hub.requests if "/commit/" in request.path]
    assert [request.status for request in commits] == [200, 200]  # the third push changed nothing
    assert not list(local_hub.folder.rglob("*.raw"))  # no content is kept twice
    assert not [request for request in local_hub.requests if request.status >= 500]


@pytest.mark.xet
def test_xet_uploads_survive_a_restart_and_serve_clients_without_xet(tmp_path, run_with_hub, hub_api, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with FolderHub(tmp_path / "hub") as hub:
        run_with_hub(hub, PUSH, HF_HUB_DISABLE_XET="0")
    with FolderHub(tmp_path / "hub") as hub:
        api = hub_api(hub)
        with open(api.hf_hub_download("zoo/xet", "noise.bin"), "rb") as file:
            assert file.read() == random.Random(0).randbytes(3 << 20)
        hub.requests.clear()
        api.upload_file(path_or_fileobj=random.Random(0).randbytes(3 << 20), path_in_repo="n.bin", repo_id="zoo/xet")
        assert not [request for request in hub.requests if request.method == "PUT"]  # LFS knows the object too


def xorb(*chunks):
    return b"".join(struct.pack("<I", len(c) << 8)[:4] + struct.pack("<I", len(c) << 8) + c for c in chunks)


def shard(xorb_hash, stop, sha256=b"\0" * 32, size=0):
    header = b"\0" * 48
    file = b"\1" * 32 + struct.pack("<IIQ", 1 << 30, 1, 0)
    term = xorb_hash + struct.pack("<IIII", 0, size, 0, stop)
    return header + file + term + sha256 + b"\0" * 16 + b"\xff" * 32 + b"\0" * 16


@pytest.fixture
def xet_token(local_hub, ask):
    ask(local_hub, "POST", "/api/repos/create", {"name": "model", "organization": "zoo"})
    status, headers, body = ask(local_hub, "GET", "/api/models/zoo/model/xet-write-token/main")
    assert status == 200
    content = json.loads(body)
    assert (content["casUrl"], content["accessToken"]) == (headers["X-Xet-Cas-Url"], headers["X-Xet-Access-Token"])
    return {"Authorization": f"Bearer {content['accessToken']}"}


def test_shards_that_lie_are_refused(local_hub, ask, xet_token):
    path, name = "/xet/models/zoo/model", bytes(range(32))
    digest = hashlib.sha256(b"firstsecond").digest()
    true = b"".join(digest[i : i + 8][::-1] for i in range(0, 32, 8))
    xorb_path = f"{path}/v1/xorbs/default/{hash_text(name)}"
    assert ask(local_hub, "POST", xorb_path, xorb(b"first", b"second"), {"Authorization": "Bearer 1.x"})[0] == 401
    assert ask(local_hub, "POST", f"{path}/v1/shards", shard(name, 2, true), xet_token)[0] == 400  # no such xorb yet
    for broken in (
        b"",
        b"\0\5",
        xorb(b"first")[:-1],
        b"\0\1\0\0\7\1\0\0x",
        b"\0\1\0\0\1\1\0\0x",
        b"\0\1\0\0\0\xff\xff\xffx",
    ):
        assert ask(local_hub, "POST", xorb_path, broken, xet_token)[0] == 400, broken
    assert ask(local_hub, "POST", f"{path}/v1/xorbs/default/..%2f..%2fx", xorb(b"x"), xet_token)[0] == 400
    assert ask(local_hub, "POST", xorb_path, xorb(b"first", b"second"), xet_token)[0] == 200
    for lie in (
        shard(name, 3, true),
        shard(name, 0, true),
        shard(name, 1, true),
        shard(name, 2),
        shard(name, 2, true)[:100],
        b"",
    ):
        assert ask(local_hub, "POST", f"{path}/v1/shards", lie, xet_token)[0] == 400
    assert ask(local_hub, "POST", f"{path}/v1/shards", shard(name, 2, true), xet_token)[0] == 200
    assert (local_hub.folder / "objects" / digest.hex()[:2] / digest.hex()[2:]).read_bytes() == b"firstsecond"
    assert not list(local_hub.folder.rglob("*.raw"))
    assert (
        ask(local_hub, "POST", f"{path}/v1/shards", shard(name, 2, true), xet_token)[0] == 200
    )  # now from the object
    ask(local_hub, "POST", "/api/repos/create", {"name": "other", "organization": "zoo"})
    other = "/xet/models/zoo/other"
    assert (
        ask(local_hub, "POST", f"{other}/v1/shards", shard(name, 2, true), xet_token)[0] == 401
    )  # another repo's token


def test_a_shard_is_read_as_documented():
    (file,) = parse_shard(shard(bytes(range(32)), 5, bytes(range(32, 64))))
    assert file.terms[0].xorb == "07060504030201000f0e0d0c0b0a090817161514131211101f1e1d1c1b1a1918"
    assert (file.terms[0].start, file.terms[0].stop) == (0, 5)
    with pytest.raises(Refusal, match="truncated"):
        list(parse_shard(b"\0" * 90))


def cases():
    generator = random.Random(1)
    yield from (b"", b"a", b"ab" * 5000, b"\0" * 100_000, generator.randbytes(70_000), bytes(range(256)) * 999)
    words = [generator.randbytes(generator.randint(1, 30)) for _ in range(200)]
    yield b"".join(generator.choice(words) for _ in range(20_000))


@pytest.mark.parametrize("content", cases(), ids=len)
def test_lz4_reads_what_another_implementation_wrote(content):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is the other implementation of LZ4")
    frame = pyarrow.compress(content, codec="lz4", asbytes=True)
    assert lz4.decompress(frame, len(content)) == content
    for size in {len(content) - 1, len(content) + 1} - {-1}:
        with pytest.raises(ValueError, match="LZ4"):
            lz4.decompress(frame, size)


def test_lz4_frames_that_are_none_raise():
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is the other implementation of LZ4")
    content = b"some words, and some words again, " * 50
    frame = pyarrow.compress(content, codec="lz4", asbytes=True)
    generator = random.Random(2)
    for length in range(len(frame) - 4):
        with pytest.raises(ValueError, match="LZ4"):
            lz4.decompress(frame[:length], len(content))
    for _ in range(2000):  # whatever comes, it is a ValueError or the right number of bytes
        broken = bytearray(frame)
        broken[generator.randrange(len(frame))] = generator.randrange(256)
        try:
            assert len(lz4.decompress(bytes(broken), len(content))) == len(content)
        except ValueError:
            pass
