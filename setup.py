"""Package hf_zoo: the library, and beside it its recipes, cards and launcher configurations."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "hf_zoo/__init__.py").read_text())[1]

# Folders fixed beside the package; in a wheel they travel inside it, where `hf_zoo.resources` finds them as well.
BESIDE = ("recipes", "recipes/paper", "accelerate_configs", "hub_cards")

extras = {
    "ray": ["ray[tune]>=2.9"],
    "search": ["cmaes", "optuna>=4"],
    "trackio": ["trackio"],
    "bench": ["pandas", "tabulate"],
    "docs": ["mkdocs-material", "mkdocstrings[python]"],
    "quality": ["ruff", "mypy", "types-PyYAML"],
    "test": ["hypothesis", "pytest", "pytest-xdist"],
}
extras["dev"] = [*extras["quality"], *extras["search"], *extras["test"], "tensorboard"]

PACKAGES_BESIDE = {f"hf_zoo.{name.replace('/', '.')}": name for name in BESIDE}

setup(
    name="hf_zoo",
    version=VERSION,
    description="Train, publish, merge and understand populations of neural networks with the Hugging Face libraries",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["hf_zoo", "hf_zoo.*"]), *PACKAGES_BESIDE],
    package_dir=PACKAGES_BESIDE,
    package_data={"": ["*.yaml", "*.md", "*.jinja", "py.typed"]},
    install_requires=[
        "accelerate>=1.10",
        "datasets>=4.0",
        "evaluate>=0.4.5",
        "huggingface_hub>=1.0",
        "jinja2",
        "matplotlib",
        "numpy",
        "pandas",
        "peft>=0.18",
        "pyyaml",
        "safetensors>=0.5",
        "scikit-learn",
        "timm>=1.0.20",
        "torch>=2.6",
        "torchvision",
        "transformers>=5.0",
    ],
    extras_require=extras,
    entry_points={"console_scripts": ["hf-zoo = hf_zoo.cli:main"]},
)
