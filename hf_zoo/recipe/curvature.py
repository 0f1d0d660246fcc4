"""What a recipe of `hf_zoo.curvature` may say."""

from __future__ import annotations

from dataclasses import dataclass

from hf_zoo.recipe.schema import DataSpec
from hf_zoo.recipe.statistics import StatisticsSpec


@dataclass(frozen=True, kw_only=True)
class CurvatureRecipe(StatisticsSpec):
    """Statistics measured by `hf_zoo.curvature`.

    Attributes:
        members: Members: folders or `org/name`, each also with `@revision`; of a population's folder every member.
        output: Folder that gets `NAME/statistics` of each member; null puts them beside the weights.
        data: What to measure on; null is each member's own training split.
        device: `cpu`, `cuda`, `cuda:1`; null takes a GPU where there is one.
    """

    members: tuple[str, ...] = ()
    output: str | None = None
    data: DataSpec | None = None
    device: str | None = None
