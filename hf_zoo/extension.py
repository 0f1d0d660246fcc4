"""`hf-zoo register`: make `hf zoo VERB ...` work beside `hf-zoo VERB ...`, as an extension of the Hugging Face CLI."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from hf_zoo.cli import guarded
from hf_zoo.errors import ZooError
from hf_zoo.files import write_json

HELP = """usage: hf-zoo register

Register this hf-zoo with the Hugging Face CLI, so that `hf zoo VERB ...` works.
`hf extensions remove zoo` undoes it."""
EXTENSIONS = Path("~/.local/share/hf/extensions")  # where the CLI looks


def main(arguments: Sequence[str] | None = None) -> int:
    """Register the command and return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments:
        print(HELP)
        return 0 if arguments[0] in ("-h", "--help") else 2
    return guarded(_register)


def _register() -> int:
    command = Path(sys.executable).with_name("hf-zoo")
    found = command if command.is_file() else Path(shutil.which("hf-zoo") or "")
    if not found.is_file():
        raise ZooError("register: the command hf-zoo is not installed here: run `pip install hf_zoo` first")
    folder = EXTENSIONS.expanduser() / "hf-zoo"
    executable = folder / "hf-zoo"
    folder.mkdir(parents=True, exist_ok=True)
    executable.unlink(missing_ok=True)
    os.symlink(found.absolute(), executable)
    content = {
        "owner": "hf-zoo",
        "repo": "hf-zoo",
        "repo_id": "hf-zoo/hf-zoo",
        "short_name": "zoo",
        "executable_path": str(executable),
        "type": "binary",
        "installed_at": datetime.now(timezone.utc).isoformat(),
        "description": "Train, publish, merge and understand populations of neural networks",
    }
    write_json(folder / "manifest.json", content)
    print("`hf zoo` now runs hf-zoo")
    return 0


if __name__ == "__main__":
    sys.exit(main())
