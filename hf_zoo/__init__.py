"""Train, publish, merge and understand populations of neural networks with the Hugging Face libraries."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_zoo.auto import AutoMergedModel
    from hf_zoo.hub.local import FolderHub
    from hf_zoo.methods.base import Method
    from hf_zoo.population import Manifest, Member, Population
    from hf_zoo.recipe.grid import expand
    from hf_zoo.recipe.loader import load_recipe
    from hf_zoo.training.trainer import ZooTrainer

__version__ = "0.1.0"

_HOMES = {
    "AutoMergedModel": "hf_zoo.auto",
    "FolderHub": "hf_zoo.hub.local",
    "Manifest": "hf_zoo.population",
    "Member": "hf_zoo.population",
    "Method": "hf_zoo.methods.base",
    "Population": "hf_zoo.population",
    "ZooTrainer": "hf_zoo.training.trainer",
    "expand": "hf_zoo.recipe.grid",
    "load_recipe": "hf_zoo.recipe.loader",
}

__all__ = [
    "AutoMergedModel",
    "FolderHub",
    "Manifest",
    "Member",
    "Method",
    "Population",
    "ZooTrainer",
    "expand",
    "load_recipe",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import hf_zoo` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_zoo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
