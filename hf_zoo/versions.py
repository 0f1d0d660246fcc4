"""Which versions of the libraries made a model."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("accelerate", "datasets", "hf_zoo", "peft", "safetensors", "timm", "tokenizers", "torch", "transformers")


def installed_versions() -> dict[str, str]:
    """Return the version of every library here whose code a model may come from."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
