"""HTTP as the Hub's clients speak it: bodies read within bounds, answers, and the log of what was asked.

Knows nothing of repos: an application turns an `Incoming` into an `Answer` or raises a `Refusal`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs

from hf_zoo.hub.local.refusal import Refusal

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 8 << 20
CHUNK_BYTES = 1 << 20
MAX_DISCARDED_BYTES = 4 << 20
_MAX_CHUNK_HEADER = 1024


@dataclass(frozen=True)
class Request:
    """One line of the log: what was asked, what came of it, and how much the client sent and got.

    Status 499 stands for a client that went away, or was cut off, before it had sent everything.
    """

    method: str
    path: str
    status: int
    bytes_in: int
    bytes_out: int

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.status} {self.bytes_in} {self.bytes_out}"


class ClientGone(Exception):
    """The connection ended before the whole body had come."""


class Body:
    """The body of a request, read in bounded pieces.

    Args:
        stream: The connection.
        headers: The request's headers, for its length or chunked coding.

    Raises:
        Refusal: 400, if the headers contradict themselves.
    """

    def __init__(self, stream: BinaryIO, headers: Message) -> None:
        self._stream = stream
        self.received = 0
        self.cut_after: int | None = None  # fault injection: behave as if the client went away after so many bytes
        coding = headers.get("Transfer-Encoding", "").lower()
        lengths = headers.get_all("Content-Length") or []
        if coding and (coding != "chunked" or lengths):
            raise Refusal(400, "Send either Content-Length or Transfer-Encoding: chunked.")
        if len(lengths) > 1 or any(not re.fullmatch(r"[0-9]{1,18}", length) for length in lengths):
            raise Refusal(400, f"Invalid Content-Length: {', '.join(lengths)!r:.80}.")
        self.length: int | None = None if coding else int(lengths[0]) if lengths else 0
        self._chunk_left = 0
        self.finished = self.length == 0

    def pieces(self, size: int = CHUNK_BYTES) -> Iterator[bytes]:
        """Yield the rest of the body, at most `size` bytes at a time."""
        while not self.finished:
            piece = self._next(size)
            if piece:
                yield piece

    def read(self, limit: int = MAX_JSON_BYTES) -> bytes:
        """Return the whole body, or refuse it with 413 if it is larger than `limit` bytes."""
        if self.length is not None and self.length > limit:
            raise Refusal(413, f"The body has {self.length} bytes; this route takes at most {limit}.")
        pieces, total = [], 0
        for piece in self.pieces():
            total += len(piece)
            if total > limit:
                raise Refusal(413, f"The body has more than the {limit} bytes that this route takes.")
            pieces.append(piece)
        return b"".join(pieces)

    def lines(self, limit: int) -> Iterator[bytes]:
        """Yield the body's lines, or refuse it with 413 once a line is longer than `limit` bytes."""
        pending: list[bytes] = []
        held = 0
        for piece in self.pieces():
            *complete, rest = piece.split(b"\n")
            for line in complete:
                yield b"".join([*pending, line])
                pending, held = [], 0
            pending.append(rest)
            held += len(rest)
            if held > limit:
                raise Refusal(413, f"A line of the body has more than {limit} bytes; larger files go through LFS.")
        if held:
            yield b"".join(pending)

    def json(self) -> dict[str, Any]:
        """Return the body as a JSON object; an empty body is an empty object."""
        return parse_object(self.read() or b"{}", "The body")

    def form(self) -> dict[str, list[str]]:
        """Return the body as a form's fields."""
        return parse_fields(self.read().decode("utf-8", "replace"))

    @property
    def nearly_finished(self) -> bool:
        """Whether so little of the body is left that it is worth reading to keep the connection."""
        return self.finished or (self.length is not None and self.length - self.received <= MAX_DISCARDED_BYTES)

    def discard(self) -> None:
        """Read what a refused request has still to send, so that the next request can follow."""
        for _ in self.pieces():
            pass

    def _next(self, size: int) -> bytes:
        """Read the next piece, of which there is at least one byte left."""
        if self.cut_after is not None and self.received >= self.cut_after:
            raise ClientGone
        if self.length is None and self._chunk_left == 0:
            self._chunk_left = self._read_chunk_header()
            if self._chunk_left == 0:
                while self._line() not in {b"\r\n", b"\n"}:  # trailers
                    pass
                self.finished = True
                return b""
        left = self._chunk_left if self.length is None else self.length - self.received
        if self.cut_after is not None:
            left = min(left, max(self.cut_after - self.received, 1))
        try:
            piece = self._stream.read1(min(size, left))  # type: ignore[attr-defined]
        except (OSError, ValueError) as error:
            raise ClientGone from error
        if not piece:
            raise ClientGone
        self.received += len(piece)
        if self.length is None:
            self._chunk_left -= len(piece)
            if self._chunk_left == 0:
                self._line()
        elif self.received == self.length:
            self.finished = True
        return piece

    def _read_chunk_header(self) -> int:
        """Read the size of the next chunk."""
        text = self._line().split(b";")[0].strip()
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", text):
            raise Refusal(400, "Invalid chunk size in the body.")
        return int(text, 16)

    def _line(self) -> bytes:
        """Read one line of the chunked coding."""
        try:
            line = self._stream.readline(_MAX_CHUNK_HEADER)
        except OSError as error:
            raise ClientGone from error
        if not line.endswith(b"\n"):
            raise ClientGone
        return line


@dataclass
class Incoming:
    """One request.

    Attributes:
        method: In capitals.
        path: Still quoted, without the query.
        query: Decoded fields.
        headers: As sent.
        body: Not read yet.
        base: The Hub's own address as this client knows it, without a slash at the end.
    """

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: Body
    base: str

    def first(self, name: str, default: str | None = None) -> str | None:
        """Return a query field's first value."""
        return self.query.get(name, [default])[0]

    def flag(self, name: str) -> bool:
        """Whether a query field says yes, in any of the ways the clients say it."""
        return (self.first(name) or "").lower() in {"1", "true", "yes"}

    def number(self, name: str, default: int, most: int) -> int:
        """Return a query field as a number between 0 and `most`."""
        text = self.first(name)
        if text is None:
            return default
        if not re.fullmatch(r"[0-9]{1,18}", text):
            raise Refusal(400, f"Invalid {name}: expected a number, got {text!r:.80}.")
        return min(int(text), most)


@dataclass(frozen=True)
class FilePart:
    """Bytes of a file, sent without reading them into memory."""

    path: Path
    start: int
    length: int


@dataclass
class Answer:
    """One answer; `body` is sent unless the method is HEAD."""

    status: int = 200
    body: bytes | FilePart = b""
    content_type: str = "application/json; charset=utf-8"
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Bytes of the body."""
        return self.body.length if isinstance(self.body, FilePart) else len(self.body)


def json_answer(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    """Return a JSON answer."""
    return Answer(status, json.dumps(content, ensure_ascii=False).encode("utf-8", "replace"), headers=headers or {})


def refusal_answer(refusal: Refusal) -> Answer:
    """Return a refusal as the clients expect it: headers for the machine, a sentence for the person."""
    headers = dict(refusal.headers)
    # The sentence travels in a header too: one line of printable Latin-1.
    headers["X-Error-Message"] = re.sub(r"[^\x20-\x7e\xa0-\xff]+", " ", refusal.message)[:1000]
    if refusal.code is not None:
        headers["X-Error-Code"] = refusal.code
    return json_answer({"error": refusal.message, **refusal.extra}, refusal.status, headers)


def parse_object(text: bytes, what: str) -> dict[str, Any]:
    """Return a JSON object.

    Args:
        text: What the client sent.
        what: Its name, for the message.

    Returns:
        The object.

    Raises:
        Refusal: 400, if it is not JSON, or not an object.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"{what} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise Refusal(400, f"{what} must be a JSON object, not {type(content).__name__}.")
    return content


def parse_fields(text: str) -> dict[str, list[str]]:
    """Return the fields of a query or form.

    Args:
        text: Still quoted.

    Returns:
        Name -> its values, in order.

    Raises:
        Refusal: 400, if there are too many.
    """
    try:
        return parse_qs(text, keep_blank_values=True, max_num_fields=10_000)
    except ValueError as error:
        raise Refusal(400, f"Invalid query or form: {error}") from error
