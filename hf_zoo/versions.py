"""Which versions of the libraries made a model."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution

LIBRARIES = ("accelerate", "datasets", "hf_zoo", "peft", "safetensors", "timm", "tokenizers", "torch", "transformers")


def installed_versions() -> dict[str, str]:
    """Return the version of every library here whose code a model may come from."""
    found = {}
    for name in LIBRARIES:
        try:
            metadata = distribution(name).read_text("METADATA") or distribution(name).read_text("PKG-INFO") or ""
        except PackageNotFoundError:
            continue
        # As `version(name)` would say, which parses the whole text, descriptions of some tens of kilobytes and all.
        stated = re.search(r"^Version: *(\S+)", metadata, re.MULTILINE)
        if stated is not None:
            found[name] = stated[1]
    return found
