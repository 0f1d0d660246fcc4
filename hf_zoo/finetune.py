"""`python -m hf_zoo.finetune RECIPE [key.path=value ...] [--dry-run]`: train a population from parents."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hf_zoo.recipe.schema import FinetuneRecipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the population of a fine-tuning recipe, or with `--dry-run` list it, and return the exit status."""
    from hf_zoo.display import run_training

    return run_training("finetune", FinetuneRecipe, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
