"""The part of a merge recipe that says what is measured of the merge beside its scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

Kind = Literal["cosines", "conflicts", "effective_weights", "mismatch", "alpha_sweep"]

WITHOUT_DATA: tuple[Kind, ...] = ("cosines", "conflicts", "effective_weights")


@dataclass(frozen=True, kw_only=True)
class DiagnosticsSpec:
    """What is measured of a merge, and shown on its card.

    Attributes:
        kinds: `cosines` of the members' task vectors; `conflicts` of their signs; `effective_weights`, how much each
            entry of a member counts; `mismatch`, the gradients a merge leaves unmatched; `alpha_sweep`, the score
            against the method's `scale`. Null is the first three, which need no data, where the method has a base and
            `evaluate` is on: they read all members once more, which a merge of weights alone is not asked to wait for.
        scales: Where the sweep merges anew, ascending. A single `scale` of the recipe is replaced by them; one that
            is negative or varies over members or layers is multiplied by them.
        alphas: Weight of every task's loss in the mismatch; null takes what the method multiplies task vectors by.
        max_examples: Training samples of each task whose gradients are taken (a seeded choice); null for all.
        batch_size: Samples a pass of these.
    """

    SHORTHAND: ClassVar[str] = "kinds"

    kinds: tuple[Kind, ...] | None = None
    scales: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5)
    alphas: tuple[float, ...] | None = None
    max_examples: int | None = 512
    batch_size: int = 32

    def wanted(self, evaluated: bool, has_base: bool) -> tuple[Kind, ...]:
        """Return what is to be measured.

        Args:
            evaluated: Whether the merge is evaluated.
            has_base: Whether task vectors are taken against a base.
        """
        if self.kinds is not None:
            return tuple(dict.fromkeys(self.kinds))
        return WITHOUT_DATA if evaluated and has_base else ()
