"""A table of candidates that grows line by line and survives a kill: what is in it need not be measured again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_zoo.errors import MergeError
from hf_zoo.recipe.grid import differences


class CandidateTable:
    """A file of JSON lines: the first says what all of them are candidates for, each further one is a candidate.

    A line counts once its line break is on the disk; what a kill left of a line is removed. Equal runs write equal
    bytes, however often they were killed.

    Args:
        path: The file; it is made with its folder by the first candidate.
        purpose: What the candidates are for, as plain data.

    Attributes:
        path: The file.
        records: The candidates so far, in order.

    Raises:
        MergeError: If the file is for something else, says what differs, or is no such table.
    """

    def __init__(self, path: Path, purpose: Mapping[str, Any]) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self._purpose: dict[str, Any] = json.loads(json.dumps(purpose))
        before = self._read()
        if before is not None and before != self._purpose:
            changes = "\n  ".join(differences(before, self._purpose))
            raise MergeError(
                f"{path}: holds candidates for something else; set `name` or `output`, or remove it. What differs "
                f"(then -> now):\n  {changes}"
            )

    def append(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Add a candidate; it is on the disk when this returns.

        Numbers that are not finite become null, as JSON has none: a merge that collapsed may have such a loss.

        Returns:
            The record as it will be read back.
        """
        record = _finite(record)
        lines = [record] if self.records else [self._purpose, record]
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab" if self.records else "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self.records.append(json.loads(json.dumps(record)))
        return self.records[-1]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def _read(self) -> dict[str, Any] | None:
        """Return the purpose and fill the records; null where there is nothing whole."""
        if not self.path.is_file():
            return None
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
        try:
            lines = [json.loads(line) for line in content[:whole].splitlines()]
            if not all(isinstance(line, dict) for line in lines):
                raise TypeError("a line is no mapping")
        except (ValueError, TypeError) as error:
            raise MergeError(f"{self.path}: not a table of candidates: {error}; remove it") from error
        self.records = lines[1:]
        return lines[0] if lines else None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(content) for content in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
