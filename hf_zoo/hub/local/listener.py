"""The socket side of the server: connections, threads, keep-alive, guards against browsers, injected faults."""

from __future__ import annotations

import errno
import logging
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from typing import Any, BinaryIO, cast

from hf_zoo.hub.local.refusal import Refusal
from hf_zoo.hub.local.wire import Answer, Body, ClientGone, FilePart, Incoming, Request, parse_fields, refusal_answer

logger = logging.getLogger(__name__)

IDLE_SECONDS = 60
MAX_CONNECTIONS = 256
MAX_LOGGED = 100_000
_LINGER_SECONDS = 2.0
_CLIENT_GONE = 499


@dataclass
class Fault:
    """An answer that the next matching requests get instead of the true one."""

    status: int | None
    times: int
    method: str | None
    path: re.Pattern[str]
    cut_after: int | None
    headers: dict[str, str]


@dataclass
class Faults:
    """The faults waiting for their requests."""

    waiting: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, fault: Fault) -> None:
        """Let a fault wait."""
        with self.lock:
            self.waiting.append(fault)

    def take(self, method: str, path: str) -> Fault | None:
        """Return the first fault meant for this request, once less."""
        with self.lock:
            for fault in self.waiting:
                if fault.method in {None, method} and fault.path.search(path):
                    fault.times -= 1
                    if fault.times == 0:
                        self.waiting.remove(fault)
                    return fault
        return None


class Listener(ThreadingHTTPServer):
    """Accept connections and hand their requests to the application.

    Args:
        address: Host and port to listen on; port 0 takes a free one.
        application: Turns a request into an answer.
        log: Called after every request.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], application: Callable[[Incoming], Answer], log: Callable[[Request], None]
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.application = application
        self.log = log
        self.faults = Faults()
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()
        super().__init__(address, Connection)
        self.loopback = is_loopback(str(self.server_address[0]))

    def server_bind(self) -> None:
        """Bind without looking up the machine's name, which may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own, or turn it away when there are too many."""
        with self._open_lock:
            crowded = len(self._open) >= MAX_CONNECTIONS
            if not crowded:
                self._open.add(request)
        if crowded:
            try:
                request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            except OSError:
                logger.debug("a client left before it could be told that there are too many connections")
            super().shutdown_request(request)
            return
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Forget a connection and close it."""
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """End the connections that are still open; their threads end with them."""
        with self._open_lock:
            connections = list(self._open)
        for connection in connections:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                logger.debug("a connection was closed already")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what ended a connection without an answer; a client that left is no news."""
        logger.debug("connection from %s ended", client_address, exc_info=True)


class Connection(BaseHTTPRequestHandler):
    """One client's connection, kept alive over many requests."""

    protocol_version = "HTTP/1.1"
    server_version = "hf_zoo"
    sys_version = ""
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: Listener
    _linger = False

    def do_GET(self) -> None:
        """Serve any method: the application tells them apart."""
        path, _, query = self.path.partition("?")
        body: Body | None = None
        try:
            body = Body(cast("BinaryIO", self.rfile), self.headers)
            answer = self._answer(path, query, body)
        except Refusal as refusal:
            answer = refusal_answer(refusal)
        except ClientGone:
            self.close_connection = True
            self.server.log(Request(self.command, path, _CLIENT_GONE, body.received if body else 0, 0))
            return
        # Logged first: who has the answer finds its line in the log.
        sent = 0 if self.command == "HEAD" else answer.length
        self.server.log(Request(self.command, path, answer.status, body.received if body else 0, sent))
        try:
            self._send(answer, body)
        except (OSError, ClientGone):
            self.close_connection = True
            logger.debug("%s %s: the client left before it had its answer", self.command, path, exc_info=True)

    def _answer(self, path: str, query: str, body: Body) -> Answer:
        """Return what the application, or an injected fault, has to say."""
        try:
            self._guard()
            self._inject(body, path)
            incoming = Incoming(self.command, path, parse_fields(query), self.headers, body, self._base())
            return self.server.application(incoming)
        except (Refusal, ClientGone):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                raise Refusal(507, f"The Hub's disk is full ({error.strerror}); nothing was kept.") from error
            # A bug of ours: the client gets a 500 and the server lives on.
            logger.exception("%s %s failed", self.command, path)
            raise Refusal(500, f"Internal error of the Hub: {error!r}") from error

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def _guard(self) -> None:
        """Keep web pages from other places away: a browser runs their scripts on this machine."""
        host = self.headers.get("Host", "")
        if not re.fullmatch(r"[A-Za-z0-9.\-]+(:[0-9]+)?|\[[0-9A-Fa-f:.]+\](:[0-9]+)?", host):
            raise Refusal(400, "Invalid or missing Host header.")
        name = re.sub(r":[0-9]+$", "", host).strip("[]").lower()
        if self.server.loopback and not (name == "localhost" or name.endswith(".localhost") or is_loopback(name)):
            raise Refusal(421, f"This Hub serves this machine only, not {name!r}.")
        origin = self.headers.get("Origin")
        if origin is not None and self.command not in {"GET", "HEAD"} and origin != f"http://{host}":
            raise Refusal(403, f"Requests from pages of {origin!r:.80} may not change anything here.")

    def _inject(self, body: Body, path: str) -> None:
        """Let a waiting fault happen."""
        fault = self.server.faults.take(self.command, path)
        if fault is None:
            return
        if fault.cut_after is not None:
            body.cut_after = fault.cut_after
            if body.length is not None:  # always before the end
                body.cut_after = min(fault.cut_after, max(body.length - 1, 0))
            if body.finished:
                raise ClientGone
        if fault.status is not None:
            raise Refusal(fault.status, f"Injected fault: {fault.status}", headers=fault.headers)

    def _base(self) -> str:
        return f"http://{self.headers['Host']}"

    def _send(self, answer: Answer, body: Body | None) -> None:
        """Send an answer; the connection then takes the next request, or ends."""
        if body is None or not body.nearly_finished:
            self.close_connection = self._linger = True
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(answer.length))
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(answer.body)
        self.wfile.flush()
        if body is not None and not self.close_connection:
            body.discard()

    def _send_body(self, body: bytes | FilePart) -> None:
        """Send an answer's body; a file goes from the disk to the network without passing through here."""
        if not isinstance(body, FilePart):
            self.wfile.write(body)
        elif body.length:
            self.wfile.flush()
            with body.path.open("rb") as file:
                self.connection.sendfile(file, body.start, body.length)

    def finish(self) -> None:
        """Close in order: a client that still sends reads its answer before the connection breaks."""
        super().finish()
        if not self._linger:
            return
        deadline = time.monotonic() + _LINGER_SECONDS
        try:
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(_LINGER_SECONDS)
            while time.monotonic() < deadline and self.connection.recv(1 << 16):
                pass
        except OSError:
            logger.debug("a client left before it had sent everything")

    def log_message(self, format: str, *args: Any) -> None:
        """Send the base class's lines to the logger: protocol errors only, requests have their own log."""
        logger.debug(format, *args)


def is_loopback(host: str) -> bool:
    """Whether an address, or the name `localhost`, means this machine."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
