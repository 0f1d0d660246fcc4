"""The candidates of a search, one after another: a grid's in order, or those Optuna draws.

Everything is a function of the space, the seed and the scores told so far, so a search that goes on is told its
former scores again and draws what it would have drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_zoo.errors import MergeError
from hf_zoo.recipe.search import DEFAULT_CANDIDATES, MAX_CANDIDATES, RangeSpec, SearchSpec, domain_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import Trial

# Yields candidates, and is sent the score of each; null for one that could not be made.
Sampling = Generator[dict[str, Any], float | None, None]


@dataclass(frozen=True)
class Space:
    """What is searched.

    Attributes:
        domains: Key of the recipe's `search.over` -> its choices, or its range.
        num_members: How many members there are.
    """

    domains: Mapping[str, RangeSpec | list[Any]]
    num_members: int

    @classmethod
    def of(cls, spec: SearchSpec, num_members: int) -> Space:
        """Return the space of a recipe's search."""
        return cls({key: domain_of(value) for key, value in spec.over.items()}, num_members)

    def count(self, key: str) -> int | None:
        """Return how many numbers a range gives a list of; null for one number that is no list."""
        domain = self.domains[key]
        if not isinstance(domain, RangeSpec) or domain.each is None:
            return None
        return self.num_members if domain.each == "member" else domain.each

    def ends(self) -> Iterator[dict[str, Any]]:
        """Yield few candidates that have every choice, and both ends of every range, among them.

        One key is moved at a time, the others having their first value: who is wrong, is wrong by that key.
        """
        first = {key: self._ends_of(key)[0] for key in self.domains}
        yield first
        for key in self.domains:
            yield from (first | {key: value} for value in self._ends_of(key)[1:])

    def grid(self) -> Iterator[dict[str, Any]]:
        """Yield every combination, the last key moving fastest.

        Raises:
            MergeError: If there are too many.
        """
        values = []
        size = 1
        for key, domain in self.domains.items():
            points = domain.points() if isinstance(domain, RangeSpec) else domain
            count = self.count(key)
            size *= len(points) ** (count or 1)
            if size > MAX_CANDIDATES:
                raise MergeError(
                    f"search.over: the grid has more than {MAX_CANDIDATES} candidates: take fewer points, or a "
                    "sampler that draws"
                )
            values.append(points if count is None else [list(one) for one in itertools.product(points, repeat=count)])
        return (dict(zip(self.domains, combination, strict=True)) for combination in itertools.product(*values))

    def _ends_of(self, key: str) -> list[Any]:
        domain, count = self.domains[key], self.count(key)
        if not isinstance(domain, RangeSpec):
            return domain
        low, high = (int(end) if domain.whole else end for end in (domain.low, domain.high))
        if count is None:
            return [high, low]
        # The upper end comes first, and no list has the lower one alone: weights that are all zero are no weights.
        return [[high] * count, [low] + [high] * (count - 1)][: 1 if count == 1 else 2]


def sample(space: Space, spec: SearchSpec, seed: int) -> Sampling:
    """Yield candidates, key of `over` -> value, and take the score of each before the next.

    Args:
        space: What is searched.
        spec: How.
        seed: Seed of what is drawn, unless the search has its own.

    Raises:
        MergeError: If a grid is too large, or Optuna is not installed for what draws.
    """
    if spec.sampler == "grid":
        yield from space.grid()
        return
    optuna = _optuna()
    distributions = _distributions(space)
    if spec.sampler == "cmaes" and len(distributions) < 2:
        raise MergeError("search.sampler: cmaes needs two numbers or more: take tpe or grid for one")
    sampler = _sampler(spec, seed if spec.seed is None else spec.seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for _ in range(spec.num_candidates or DEFAULT_CANDIDATES):
        trial = study.ask(distributions)
        score = yield _values(space, trial)
        if score is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, score)


def num_candidates(space: Space, spec: SearchSpec) -> int:
    """Return how many candidates will be tried."""
    return sum(1 for _ in space.grid()) if spec.sampler == "grid" else spec.num_candidates or DEFAULT_CANDIDATES


def _optuna() -> Any:
    try:
        optuna = import_module("optuna")
        import_module("cmaes")  # Optuna's CMA-ES needs it, and would say so only when it draws
    except ImportError as error:
        raise MergeError(
            f"search.sampler: {error.name} is missing, which draws the candidates: pip install 'hf_zoo[search]', or "
            "take the grid"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _sampler(spec: SearchSpec, seed: int) -> BaseSampler:
    from optuna import samplers

    if spec.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if spec.sampler == "tpe":
        return samplers.TPESampler(seed=seed)
    return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    """Return the distribution of every single number; choices are drawn by their place."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for key, domain in space.domains.items():
        own: BaseDistribution
        if not isinstance(domain, RangeSpec):
            own = CategoricalDistribution(tuple(range(len(domain))))
        elif domain.whole:
            own = IntDistribution(int(domain.low), int(domain.high), log=domain.log)
        else:
            own = FloatDistribution(domain.low, domain.high, log=domain.log)
        found |= dict.fromkeys(_names(space, key), own)
    return found


def _values(space: Space, trial: Trial) -> dict[str, Any]:
    values = {}
    for key, domain in space.domains.items():
        drawn = [trial.params[name] for name in _names(space, key)]
        if not isinstance(domain, RangeSpec):
            values[key] = domain[drawn[0]]
        else:
            values[key] = drawn[0] if space.count(key) is None else drawn
    return values


def _names(space: Space, key: str) -> list[str]:
    count = space.count(key)
    return [key] if count is None else [f"{key}[{place}]" for place in range(count)]
