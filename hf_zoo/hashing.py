"""The hash of a file, taken while others are still writing it."""

from __future__ import annotations

import hashlib
import heapq
import os
from pathlib import Path
from threading import Condition, Thread

CHUNK_BYTES = 1 << 20


class FollowingHash:
    """The SHA-256 of a file that is filled from several places at once.

    A thread of its own reads what has been written without a gap from the beginning, soon after it was written, while
    the system still holds it in memory. The file is hashed when it is finished, and not read once more.

    Args:
        path: The file; it exists.
        size: Its final size in bytes.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._size = size
        self._handle = os.open(path, os.O_RDONLY)
        self._spans: list[tuple[int, int]] = []
        self._frontier = 0
        self._given_up = False
        self._changed = Condition()
        self._digest = hashlib.sha256()
        self._thread = Thread(target=self._follow, name="hash", daemon=True)
        self._thread.start()

    def written(self, start: int, stop: int) -> None:
        """Say that these bytes are in the file.

        Args:
            start: The first byte.
            stop: The end.
        """
        with self._changed:
            heapq.heappush(self._spans, (start, stop))
            while self._spans and self._spans[0][0] <= self._frontier:
                self._frontier = max(self._frontier, heapq.heappop(self._spans)[1])
            self._changed.notify()

    def finish(self) -> str | None:
        """Return the hash as 64 hexadecimal digits; null where not everything was written."""
        with self._changed:
            self._given_up = self._frontier < self._size
            self._changed.notify()
        self._thread.join()
        os.close(self._handle)
        return None if self._given_up else self._digest.hexdigest()

    def _follow(self) -> None:
        position = 0
        while position < self._size:
            with self._changed:
                while not self._given_up and self._frontier < min(position + CHUNK_BYTES, self._size):
                    self._changed.wait()
                if self._given_up:
                    return
                frontier = self._frontier
            while position < frontier:
                content = os.pread(self._handle, min(CHUNK_BYTES, frontier - position), position)
                if not content:  # cut off by somebody else: the caller hashes what there is
                    self._given_up = True
                    return
                self._digest.update(content)
                position += len(content)
