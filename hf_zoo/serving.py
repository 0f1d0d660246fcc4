"""`hf-zoo hub serve FOLDER [--host HOST] [--port PORT] [--tokens FILE]`: a Hub on this machine."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_zoo.cli import guarded
from hf_zoo.errors import HubError

HELP = """usage: hf-zoo hub serve FOLDER [--host HOST] [--port PORT] [--tokens FILE]

Serve a folder as a Hub. Every Hugging Face library talks to it once HF_ENDPOINT is set to its address; a page at that
address shows its repos.

  FOLDER            where repos are kept; made if it does not exist
  --host HOST       address to listen on, 127.0.0.1 by default: this machine alone
  --port PORT       port, 8642 by default; 0 for any free one
  --tokens FILE     a YAML mapping from each token to its user and, after commas, the user's organisations; without it,
                    anybody on this machine may read and write"""
DEFAULT_PORT = 8642


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted, and return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _serve(arguments))


def _serve(arguments: list[str]) -> int:
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(HELP)
        return 0
    verb, *rest = arguments
    if verb != "serve":
        raise HubError(f"hub: expected `serve FOLDER`, got {verb!r}")
    folder, options = _options(rest)
    from hf_zoo.hub.local import FolderHub

    tokens = _read_tokens(Path(options["--tokens"])) if "--tokens" in options else None
    hub = FolderHub(
        Path(folder), host=options.get("--host", "127.0.0.1"), port=_port(options.get("--port")), tokens=tokens
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends it as Ctrl-C does
    hub.open()
    try:
        print(f"Hub of {folder} at {hub.url}\nUse it with: export HF_ENDPOINT={hub.url}", flush=True)
        hub.serve_forever()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        hub.close()
    return 0


def _options(arguments: list[str]) -> tuple[str, dict[str, str]]:
    folders, options = [], {}
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            folders.append(word)
            continue
        name, _, value = word.partition("=")
        if name not in ("--host", "--port", "--tokens"):
            raise HubError(f"hub serve: unknown option {name}: --host, --port, --tokens")
        if not value and not waiting:
            raise HubError(f"hub serve: {name} needs a value")
        options[name] = value or waiting.pop(0)
    if len(folders) != 1:
        raise HubError(f"hub serve: expected one FOLDER, got {len(folders)}")
    return folders[0], options


def _port(text: str | None) -> int:
    if text is None:
        return DEFAULT_PORT
    if not text.isdigit() or int(text) > 65535:
        raise HubError(f"hub serve: --port is a number up to 65535, got {text!r}")
    return int(text)


def _read_tokens(path: Path) -> dict[str, str]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise HubError(f"hub serve: --tokens {path} cannot be read: {error}") from error
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content.values()):
        raise HubError(f"hub serve: --tokens {path}: expected a YAML mapping from token to names")
    return {str(token): names for token, names in content.items()}


if __name__ == "__main__":
    sys.exit(main())
