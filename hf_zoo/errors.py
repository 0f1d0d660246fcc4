"""The errors a user can act on.

Every verb prints a `ZooError` as one message without a traceback and exits with status 2. Anything else is a bug of
hf_zoo and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class ZooError(Exception):
    """Say what was expected, what came, whose it is and what to do."""


class RecipeError(ZooError):
    """Report every mistake of a recipe at once.

    Args:
        source: The recipe's file, or a word for where it came from.
        mistakes: One line a mistake, each opening with its dotted path.
    """

    def __init__(self, source: str, mistakes: Sequence[str]) -> None:
        self.source = source
        self.mistakes = tuple(mistakes)
        count = f"{len(self.mistakes)} mistake" + ("s" if len(self.mistakes) != 1 else "")
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {mistake}" for mistake in self.mistakes))


class DataError(ZooError):
    """Report data that is not what the recipe says it is."""


class ModelError(ZooError):
    """Report a model that cannot be built, or a parent that does not fit it."""


class CheckpointError(ZooError):
    """Report weights that are truncated, not finite, or not those of the model they are loaded into."""


class TrainingError(ZooError):
    """Report a member whose training cannot go on: a diverged loss, too little memory."""


class DiskFullError(ZooError):
    """Report that there is no room for a checkpoint; everything up to the last one is kept.

    Args:
        folder: Where it was to lie.
    """

    def __init__(self, folder: object) -> None:
        super().__init__(
            f"{folder}: the disk is full. Everything up to the last checkpoint is kept: make room, or keep fewer "
            "snapshots (snapshots.every_epochs, snapshots.keep_last), and run the same command again"
        )


class PopulationError(ZooError):
    """Report a population folder or repo that is missing, foreign or made from another recipe."""


class MergeError(ZooError):
    """Report members that cannot be merged, or a method used against its terms."""


class HubError(ZooError):
    """Report what a Hub refused, with its status and what can be done."""


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ` (did you mean 'x'?)` for the closest known name, or an empty string when none is close."""
    from difflib import get_close_matches

    matches = get_close_matches(str(name), [str(candidate) for candidate in known], n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
