"""The Hub as one object: open a folder, serve it, close it."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TextIO

from hf_zoo.errors import HubError
from hf_zoo.hub.local.access import Access
from hf_zoo.hub.local.application import application
from hf_zoo.hub.local.call import Hub
from hf_zoo.hub.local.collection_store import CollectionStore
from hf_zoo.hub.local.listener import MAX_LOGGED, Fault, Listener, is_loopback
from hf_zoo.hub.local.metadata import Catalogue
from hf_zoo.hub.local.store import Store
from hf_zoo.hub.local.wire import Request

_POLL_SECONDS = 0.05


class FolderHub:
    """A Hub server for one machine that keeps everything in one folder.

    Args:
        folder: Where repos and collections lie; created when the Hub is opened. One process at a time serves it.
        host: Address to listen on. Everything but loopback opens the Hub to the network, so it then needs tokens.
        port: Port to listen on; 0 takes a free one.
        tokens: Token -> its user and, after commas, the user's organisations. None lets everybody on this machine read
            and write everything.
        user: Who commits when there are no tokens.
        log_requests: Also append every request as a line to `requests.log` in the folder.

    Attributes:
        requests: What was asked so far, oldest first; the oldest of very many are forgotten.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tokens: Mapping[str, str] | None = None,
        user: str = "local",
        log_requests: bool = False,
    ) -> None:
        if tokens is None and not is_loopback(host):
            raise HubError(f"On {host} the Hub can be reached from other machines: give it tokens, or use 127.0.0.1.")
        self.folder = Path(folder)
        self.requests: list[Request] = []
        self._address = (host, port)
        self._access = Access(tokens, user)
        self._log_requests = log_requests
        self._log_file: TextIO | None = None
        self._log_lock = threading.Lock()
        self._store: Store | None = None
        self._listener: Listener | None = None
        self._thread: threading.Thread | None = None
        self._serving = False

    @property
    def url(self) -> str:
        """The address for `HF_ENDPOINT`, known once the Hub is open.

        Raises:
            HubError: If it is not.
        """
        host, port = self._require_open().server_address[:2]
        return f"http://[{host!s}]:{port}" if ":" in str(host) else f"http://{host!s}:{port}"

    def open(self) -> None:
        """Take hold of the folder and the port; requests wait until the Hub serves.

        Raises:
            HubError: If the folder is served by another process or is no Hub's, or the port is taken.
        """
        if self._listener is not None:
            return
        self._store = Store(self.folder)
        try:
            store = self._store
            hub = Hub(
                store,
                Catalogue(store.objects),
                CollectionStore(store.folder / "collections", store.incoming),
                self._access,
            )
            if self._log_requests:
                self._log_file = (store.folder / "requests.log").open("a", encoding="utf-8", buffering=1)
            try:
                self._listener = Listener(self._address, application(hub), self._log)
            except OSError as error:
                host, port = self._address
                raise HubError(
                    f"The Hub cannot listen on {host}:{port}: {error.strerror}. Choose another port."
                ) from error
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Serve in a background thread until the Hub is closed."""
        self.open()
        if self._thread is None:
            self._thread = threading.Thread(target=self.serve_forever, name="hf-zoo-hub", daemon=True)
            self._thread.start()

    def serve_forever(self) -> None:
        """Serve until the Hub is closed by another thread, or interrupted."""
        self.open()
        self._serving = True
        try:
            self._require_open().serve_forever(poll_interval=_POLL_SECONDS)
        finally:
            self._serving = False

    def close(self) -> None:
        """Stop serving, end open connections and let go of port and folder."""
        if self._listener is not None:
            if self._serving or self._thread is not None:
                self._listener.shutdown()
            if self._thread is not None:
                self._thread.join()
            self._listener.close_connections()
            self._listener.server_close()
        if self._log_file is not None:
            self._log_file.close()
        if self._store is not None:
            self._store.close()
        self._listener = self._thread = self._log_file = self._store = None

    def fail_next(
        self,
        status: int | None = 500,
        *,
        times: int = 1,
        method: str | None = None,
        path: str = "",
        cut_after: int | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        """Let the next requests fail, to see what a client makes of it.

        Args:
            status: What they are answered with; None lets them through (until they are cut).
            times: How many of them.
            method: Only those of this method.
            path: Only those in whose path this regular expression is found.
            cut_after: Break the connection after this many bytes of the body, without an answer and before its end.
            retry_after_seconds: Sent along as `Retry-After`.
        """
        headers = {} if retry_after_seconds is None else {"Retry-After": str(retry_after_seconds)}
        fault = Fault(None if cut_after is not None else status, times, method, re.compile(path), cut_after, headers)
        self._require_open().faults.add(fault)

    def __enter__(self) -> FolderHub:
        """Start serving."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the Hub."""
        self.close()

    def _require_open(self) -> Listener:
        if self._listener is None:
            raise HubError(f"The Hub of {self.folder} is not open: call start(), or use it in a with statement.")
        return self._listener

    def _log(self, request: Request) -> None:
        """Note a request."""
        with self._log_lock:
            self.requests.append(request)
            if len(self.requests) > MAX_LOGGED:
                del self.requests[: MAX_LOGGED // 2]
            if self._log_file is not None and not self._log_file.closed:
                self._log_file.write(f"{request}\n")
