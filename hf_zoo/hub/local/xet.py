"""The Xet side of the Hub: what a client with `hf_xet` uploads becomes ordinary objects at once.

Such a client cuts files into chunks, packs chunks into xorbs and says in a shard how its files are made of them. A
shard is answered once its files are assembled, checked against their SHA-256 and kept like any other; downloads then
go over plain HTTP. The xorbs themselves do not stay: for each chunk it is noted where its bytes lie, so that a later
shard of the same repo may refer to it. Every repo has a store of its own, since a client proves nothing about a xorb.

The formats are those of hf_xet 1.8; https://huggingface.co/docs/xet describes them. LFS is the primary way in.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_zoo.hub.local import lz4, names
from hf_zoo.hub.local.call import Call
from hf_zoo.hub.local.disk import make_folder, read_json, sync_folder, write_json
from hf_zoo.hub.local.records import Repo
from hf_zoo.hub.local.refusal import Refusal
from hf_zoo.hub.local.wire import Answer, json_answer

TOKEN_SECONDS = 6 * 3600
MAX_XORB_BYTES = 70 << 20
MAX_SHARD_BYTES = 80 << 20
MAX_CHUNK_BYTES = 1 << 20  # hf_xet cuts at 128 KiB; 24 bits could announce 16 MiB of zeros a few bytes long
MAX_UNPACKED_BYTES = 256 << 20

_RECORD = 48
_NO_FILE = b"\xff" * 32
_HASH = re.compile(r"[0-9a-f]{64}")
_WITH_VERIFICATION, _WITH_METADATA = 1 << 31, 1 << 30
_PLAIN, _LZ4, _GROUPED_LZ4 = range(3)


@dataclass(frozen=True)
class Term:
    """A stretch of a file: some chunks of one xorb, one after the other."""

    xorb: str
    start: int
    stop: int


@dataclass(frozen=True)
class ShardFile:
    """A file as a shard describes it."""

    terms: tuple[Term, ...]
    sha256: str | None


class XorbStore:
    """Where the chunks of a repo's xorbs lie: `xet/HASH.json` has one [source, offset, length] a chunk.

    A source is the SHA-256 of an object, or empty for `xet/HASH.raw`, which goes once no chunk is only there.

    Args:
        folder: The repo's `xet` folder.
        incoming: Where a file lies until it is complete.
    """

    def __init__(self, folder: Path, incoming: Path) -> None:
        self._folder = folder
        self._incoming = incoming

    def has(self, xorb: str) -> bool:
        """Whether the xorb's chunks are all here."""
        return (self._folder / f"{xorb}.json").is_file()

    def add(self, xorb: str, chunks: list[bytes]) -> None:
        """Keep a xorb's chunks durably."""
        make_folder(self._folder)
        temporary = self._incoming / f"{xorb}.{os.urandom(8).hex()}"
        try:
            with temporary.open("xb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._folder / f"{xorb}.raw")
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(self._folder)
        table, offset = [], 0
        for chunk in chunks:
            table.append(["", offset, len(chunk)])
            offset += len(chunk)
        self._save(xorb, table)

    def chunks(self, term: Term) -> list[tuple[str, int, int]]:
        """Return where a term's chunks lie.

        Args:
            term: Part of a file.

        Returns:
            Source, offset and length of each chunk.

        Raises:
            Refusal: 400, if the xorb is not here or has no such chunks.
        """
        if not self.has(term.xorb):
            raise Refusal(400, f"The shard refers to xorb {term.xorb}, which was not uploaded to this repo.")
        table = read_json(self._folder / f"{term.xorb}.json")
        if not 0 <= term.start < term.stop <= len(table):
            raise Refusal(400, f"The shard refers to chunks {term.start} to {term.stop} of xorb {term.xorb}.")
        return [(source, offset, length) for source, offset, length in table[term.start : term.stop]]

    def raw(self, xorb: str) -> Path:
        """Return the file that holds the chunks no object holds yet."""
        return self._folder / f"{xorb}.raw"

    def moved_to(self, sha256: str, terms: tuple[Term, ...]) -> None:
        """Note that an object now holds the chunks it was made of, and let go of xorbs that nothing needs."""
        offset = 0
        for term in terms:
            table = read_json(self._folder / f"{term.xorb}.json")
            for index in range(term.start, term.stop):
                length = table[index][2]
                if table[index][0] == "":
                    table[index] = [sha256, offset, length]
                offset += length
            self._save(term.xorb, table)
            if all(source for source, _, _ in table):
                self.raw(term.xorb).unlink(missing_ok=True)

    def _save(self, xorb: str, table: list[Any]) -> None:
        write_json(self._folder / f"{xorb}.json", table, self._incoming)


def write_token(call: Call) -> Answer:
    """Give an address and a token for uploads to one repo."""
    repo = call.repo_to_write()
    expires = int(time.time()) + TOKEN_SECONDS
    token = f"{expires}.{_signature(call, repo, expires)}"
    url = f"{call.request.base}/xet/{names.KINDS[repo.kind]}/{repo.id}"
    headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(expires)}
    return json_answer({"casUrl": url, "accessToken": token, "exp": expires}, headers=headers)


def add_xorb(call: Call) -> Answer:
    """Take a xorb in."""
    repo = _authorised(call)
    xorb = call.parts["hash"]
    if not _HASH.fullmatch(xorb):
        raise Refusal(400, f"Invalid xorb hash: {xorb!r:.80}.")
    content = call.request.body.read(MAX_XORB_BYTES)
    store = _store(call, repo)
    with repo.lock:
        known = store.has(xorb)
        if not known:
            store.add(xorb, _unpacked(content))
    return json_answer({"was_inserted": not known})


def add_shard(call: Call) -> Answer:
    """Take a shard in: assemble its files, and answer once they are durable."""
    repo = _authorised(call)
    files = list(parse_shard(call.request.body.read(MAX_SHARD_BYTES)))
    store, objects = _store(call, repo), call.hub.store.objects
    with repo.lock:
        for file in files:
            sha256 = objects.receive(_assembled(call, store, file), file.sha256).sha256
            call.hub.store.mark_uploaded(repo, sha256)
            store.moved_to(sha256, file.terms)
    return json_answer({"result": 1})


def parse_shard(content: bytes) -> Iterator[ShardFile]:
    """Read the files off a shard.

    Args:
        content: The whole shard.

    Yields:
        Its files, in order.

    Raises:
        Refusal: 400, if it is truncated or no shard.
    """
    position = _RECORD  # the header's tag and version are not looked at: what follows is checked by its SHA-256
    while True:
        record = _record(content, position)
        if record[:32] == _NO_FILE:
            return
        flags, count = int.from_bytes(record[32:36], "little"), int.from_bytes(record[36:40], "little")
        position += _RECORD
        terms = []
        for _ in range(count):
            entry = _record(content, position)
            start, stop = int.from_bytes(entry[40:44], "little"), int.from_bytes(entry[44:48], "little")
            terms.append(Term(hash_text(entry[:32]), start, stop))
            position += _RECORD
        if flags & _WITH_VERIFICATION:
            position += _RECORD * count
        sha256 = None
        if flags & _WITH_METADATA:
            sha256 = hash_text(_record(content, position)[:32])
            position += _RECORD
        yield ShardFile(tuple(terms), sha256)


def hash_text(digest: bytes) -> str:
    """Return a hash as Xet prints it: four little-endian 64-bit numbers."""
    return "".join(digest[index : index + 8][::-1].hex() for index in range(0, 32, 8))


def _record(content: bytes, position: int) -> bytes:
    record = content[position : position + _RECORD]
    if len(record) != _RECORD:
        raise Refusal(400, "The shard is truncated.")
    return record


def _unpacked(xorb: bytes) -> list[bytes]:
    """Return the chunks of a xorb; a footer may follow them."""
    chunks, position, total = [], 0, 0
    while position < len(xorb) and xorb[position : position + 7] != b"XETBLOB":
        header = xorb[position : position + 8]
        packed, size = int.from_bytes(header[1:4], "little"), int.from_bytes(header[5:8], "little")
        content = xorb[position + 8 : position + 8 + packed]
        total += size
        if len(header) != 8 or header[0] != 0 or len(content) != packed or size > MAX_CHUNK_BYTES:
            raise Refusal(400, f"The xorb is truncated or malformed at byte {position}.")
        if total > MAX_UNPACKED_BYTES:
            raise Refusal(413, f"The xorb unpacks to more than {MAX_UNPACKED_BYTES} bytes.")
        chunks.append(_chunk(content, header[4], size))
        position += 8 + packed
    if not chunks:
        raise Refusal(400, "The xorb is empty.")
    return chunks


def _chunk(content: bytes, scheme: int, size: int) -> bytes:
    """Unpack one chunk."""
    if scheme not in {_PLAIN, _LZ4, _GROUPED_LZ4}:
        raise Refusal(
            400, f"The xorb uses compression {scheme}, which this Hub does not know: set HF_HUB_DISABLE_XET=1."
        )
    try:
        chunk = content if scheme == _PLAIN else lz4.decompress(content, size)
    except ValueError as error:
        raise Refusal(400, f"A chunk of the xorb cannot be unpacked: {error}.") from error
    if len(chunk) != size:
        raise Refusal(400, f"A chunk of the xorb has {len(chunk)} bytes instead of {size}.")
    return _ungrouped(chunk) if scheme == _GROUPED_LZ4 else chunk


def _ungrouped(grouped: bytes) -> bytes:
    """Undo byte grouping: first all first bytes of four-byte words, then all second ones, and so on."""
    out, start = bytearray(len(grouped)), 0
    for lane in range(4):
        length = (len(grouped) - lane + 3) // 4
        out[lane::4] = grouped[start : start + length]
        start += length
    return bytes(out)


def _assembled(call: Call, store: XorbStore, file: ShardFile) -> Iterator[bytes]:
    """Yield a file's chunks in order.

    Yields:
        The content of each chunk.
    """
    for term in file.terms:
        for source, offset, length in store.chunks(term):
            path = call.hub.store.objects.path(source) if source else store.raw(term.xorb)
            with path.open("rb") as holder:
                holder.seek(offset)
                yield holder.read(length)


def _store(call: Call, repo: Repo) -> XorbStore:
    return XorbStore(repo.folder / "xet", call.hub.store.incoming)


def _authorised(call: Call) -> Repo:
    """Return the route's repo if the request has a token that `write_token` gave for it."""
    repo = call.hub.store.repo(call.kind, f"{call.parts['namespace']}/{call.parts['name']}")
    token = call.request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
    match = re.fullmatch(r"([0-9]{1,12})\.([0-9a-f]{64})", token)
    if match is None or not hmac.compare_digest(_signature(call, repo, int(match[1])), match[2]):
        raise Refusal(401, "This needs the token that xet-write-token gives.")
    if int(match[1]) < time.time():
        raise Refusal(401, "The Xet token has expired.")
    return repo


def _signature(call: Call, repo: Repo, expires: int) -> str:
    return hmac.new(call.hub.store.secret, f"xet {repo.key} {expires}".encode(), hashlib.sha256).hexdigest()
