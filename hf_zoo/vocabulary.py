"""Members with different tokens presented with the same: one row a token, wherever a model has a row a token.

Readers stay lazy: a tensor's rows are put in order when it is asked for, and everything else is passed on as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hf_zoo.axes import IndexedAxis, SavedModel, VocabularyAxes, vocabulary_axes
from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.configs import config_fields
from hf_zoo.errors import MergeError, nearest
from hf_zoo.shards import TensorInfo
from hf_zoo.tokenizer_files import (
    TokenizerContent,
    describe_difference,
    hold_same_tokens,
    joined_tokenizer,
    older_files,
    read_tokenizer,
    tokenizer_files,
)

POLICIES = ("same", "base", "union")
ROWS_AT_ONCE = 4096  # of an embedding, when a mean goes over all of it
ROW_POLICIES = ("base", "average", "mean", "zero")


@dataclass(frozen=True)
class AlignedVocabulary:
    """Models that have the same tokens, and what a merge of them writes.

    Attributes:
        members: The members, alike in tokens.
        base: The base, alike as well; null where none was given.
        owner: Place of the member whose tokenizer's settings and special tokens hold; null for the base's.
        size: Rows of the new vocabulary.
        changes: Dotted path -> value, for the merge's config.
        files: Files of the tokenizer to write; none where the owner's are copied as they are.
        left_out: Names of files of the owner that must not be copied beside them.
    """

    members: tuple[CheckpointReader, ...]
    base: CheckpointReader | None
    owner: int | None
    size: int
    changes: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowPlan:
    """Where the rows of a new vocabulary come from.

    M = models, the base last where it is none of the members; T = numbers up to the last token's; F = rows to fill.

    Attributes:
        size: Rows of the new vocabulary, padding included.
        kept: For each model, the row it has for each number, -1 for none, (M, T).
        filled: Numbers whose row some model lacks, in order, (F,).
        donors: For each of them, the row of each model whose average it gets; -1 for models left out, (F, M).
        own_mean: Which of them get the mean of the model's own rows instead, (F,).
        tokens: For each model, the rows that stand for a token of its own.
        unused: Numbers without a token and padding, which get the mean of all other rows.
    """

    size: int
    kept: Tensor
    filled: Tensor
    donors: Tensor
    own_mean: Tensor
    tokens: tuple[Tensor, ...]
    unused: Tensor


def align_vocabularies(
    members: Sequence[SavedModel],
    base: SavedModel | None = None,
    policy: str | int = "same",
    *,
    rows: str = "base",
    tokens: Mapping[str, Any] | None = None,
    pad_to_multiple_of: int | None = None,
) -> AlignedVocabulary:
    """Give models one vocabulary.

    Each model keeps its own row of every token it has. A row it lacks is filled by `rows`: `base` takes the base's
    row, or where the base has none either the average over the models that have the token, as mergekit does; `average`
    averages over all that have it; `mean` is the mean of the model's own rows; `zero` is zero. A token no model has
    gets zero.

    Args:
        members: The members.
        base: The model task vectors are taken against, where there is one.
        policy: `same` refuses different tokenizers; `base` takes the base's, or the first member's without a base;
            `union` knows all tokens, the base's first; a member's place or source takes that member's.
        rows: Where rows a model lacks come from.
        tokens: Token -> `{"source": ..., "force": ...}`, as in mergekit: the source is null, a model's source,
            `{"kind": "zero"}` or `{"kind": "model_token", "model": ..., "token": ... | "token_id": ...}`. `force`
            gives that row also to models that have the token. Tokens that do not exist are put on top.
        pad_to_multiple_of: Round the number of rows up; the rows added get the mean of the others.

    Raises:
        MergeError: If a policy or source is unknown, tokenizers differ under `same`, or cannot be joined.
    """
    if rows not in ROW_POLICIES:
        raise MergeError(f"rows {rows!r}{nearest(rows, ROW_POLICIES)}: expected one of {', '.join(ROW_POLICIES)}")
    models = [*members, *([] if base is None else [base])]
    owner = _owner(members, base, policy)
    if policy == "same" and not tokens and not pad_to_multiple_of:
        return _same(members, base)
    known = [_required(_tokenizer_of(one), one) for one in models]
    tokenizer = known[len(members) if owner is None else owner]
    more = list(tokens or ())
    others = [one for one in known if one is not tokenizer] if policy == "union" else []
    if policy == "same":
        for other in known:
            _check_same(tokenizer, other)
    content = tokenizer.content
    if others or any(token not in tokenizer.tokens for token in more):
        content = joined_tokenizer([tokenizer, *others], more)
    target = TokenizerContent(tokenizer.source, content, {}).tokens
    changed = target != tokenizer.tokens or len(content.get("added_tokens") or ()) != len(
        tokenizer.content.get("added_tokens") or ()
    )
    axes = [vocabulary_axes(one.model_class, one.config) for one in models]
    plan = _plan_rows(models, base, known, axes, target, rows, tokens or {}, pad_to_multiple_of)
    readers = _rerowed(models, axes, plan)
    leader = models[len(members) if owner is None else owner]
    return AlignedVocabulary(
        members=tuple(readers[: len(members)]),
        base=None if base is None else readers[-1],
        owner=owner,
        size=plan.size,
        changes=dict.fromkeys(axes[0].keys, plan.size) | _special_tokens(members[0], leader),
        files=tokenizer_files(tokenizer, content) if changed else {},
        left_out=older_files(tokenizer) if changed else (),
    )


def _same(members: Sequence[SavedModel], base: SavedModel | None) -> AlignedVocabulary:
    models = [*members, *([] if base is None else [base])]
    for one, two in pairwise(models):
        if one.folder is not None and two.folder is not None and hold_same_tokens(one.folder, two.folder):
            continue
        first, other = _tokenizer_of(one), _tokenizer_of(two)
        if (first is None) != (other is None):
            without, having = (one, two) if first is None else (two, one)
            raise MergeError(
                f"{without.source} has no tokenizer and {having.source} has one, so nobody knows whether a row of "
                "their embeddings stands for the same token: put its tokenizer into its folder"
            )
        if first is not None and other is not None:
            _check_same(first, other)
    axes = [vocabulary_axes(one.model_class, one.config) for one in models]
    smallest = min(one.size for one in axes)
    readers = [one.reader for one in models]
    if any(one.size != smallest for one in axes):  # the same tokens, padded differently
        tokenizer = _tokenizer_of(models[0])
        last = -1 if tokenizer is None else max(tokenizer.tokens.values(), default=-1)
        if last >= smallest:
            raise MergeError(f"{members[0].source}: token {last} has no row: the smallest model has {smallest} rows")
        kept = torch.arange(smallest).expand(len(models), -1)
        none = torch.zeros(0, dtype=torch.int64)
        donors = torch.zeros(0, len(models), dtype=torch.int64)
        plan = RowPlan(smallest, kept, none, donors, none.bool(), (none,) * len(models), none)
        readers = _rerowed(models, axes, plan)
    return AlignedVocabulary(
        members=tuple(readers[: len(members)]),
        base=None if base is None else readers[-1],
        owner=0,
        size=smallest,
        changes=dict.fromkeys(axes[0].keys, smallest) if axes[0].size != smallest else {},
    )


def _check_same(first: TokenizerContent, other: TokenizerContent) -> None:
    difference = describe_difference(first, other)
    if difference is not None:
        raise MergeError(
            f"{first.source} and {other.source} have different vocabularies: {difference}. One row of their "
            "embeddings stands for two different tokens: say whose tokens to keep (`tokenizer: union` or `base`)"
        )


def _owner(members: Sequence[SavedModel], base: SavedModel | None, policy: str | int) -> int | None:
    """Return the place of the member whose tokenizer leads; null for the base."""
    if isinstance(policy, int):
        return policy
    if policy in POLICIES:
        return None if base is not None else 0
    sources = [one.source for one in members]
    if policy in sources:
        return sources.index(policy)
    if base is not None and policy == base.source:
        return None
    known = [*POLICIES, *sources]
    raise MergeError(f"tokenizer {policy!r}{nearest(policy, known)}: expected one of {', '.join(known)}")


def _tokenizer_of(model: SavedModel) -> TokenizerContent | None:
    return None if model.folder is None else read_tokenizer(model.folder, model.source)


def _required(tokenizer: TokenizerContent | None, model: SavedModel) -> TokenizerContent:
    if tokenizer is None:
        raise MergeError(
            f"{model.source} has no tokenizer, so its rows cannot be matched with tokens: put its tokenizer into its "
            "folder"
        )
    return tokenizer


def _special_tokens(first: SavedModel, leader: SavedModel) -> dict[str, Any]:
    """Return the numbers of special tokens where those of the tokenizer's owner are others than the first member's."""
    own = dict(config_fields(first.config))
    return {
        key: value
        for key, value in config_fields(leader.config)
        if key.endswith(("_token_id", "_token_index")) and key in own and own[key] != value
    }


def _plan_rows(
    models: Sequence[SavedModel],
    base: SavedModel | None,
    tokenizers: Sequence[TokenizerContent],
    axes: Sequence[VocabularyAxes],
    target: Mapping[str, int],
    rows: str,
    overrides: Mapping[str, Any],
    multiple: int | None,
) -> RowPlan:
    length = max(target.values(), default=-1) + 1
    size = -(-length // multiple) * multiple if multiple else length
    lengths = [min((axis.size for axis in one.axes), default=0) for one in axes]
    kept = torch.full((len(models), length), -1, dtype=torch.int64)
    for place, tokenizer in enumerate(tokenizers):
        pairs = [(new, tokenizer.tokens[token]) for token, new in target.items() if token in tokenizer.tokens]
        there = torch.tensor([pair for pair in pairs if pair[1] < lengths[place]], dtype=torch.int64).reshape(-1, 2)
        kept[place, there[:, 0]] = there[:, 1]
    sources = kept.T.clone()
    own_mean = torch.full((length,), rows == "mean")
    if base is not None:
        twins = [i for i, one in enumerate(models[:-1]) if one.folder is not None and one.folder == base.folder]
        sources[:, twins] = -1  # the base among the members counts once
        if rows == "base":
            has = sources[:, -1] >= 0
            sources[has, :-1] = -1
    if rows == "zero":
        sources[:] = -1
    forced = torch.zeros(length, dtype=torch.bool)
    for token, override in overrides.items():
        number = target[token]
        row = _override(token, override, models, tokenizers, kept[:, number], lengths)
        if row is not None:
            sources[number], own_mean[number] = row, False
        forced[number] = bool(override.get("force", False))
    kept[:, forced] = -1
    used = torch.zeros(size, dtype=torch.bool)
    used[list(target.values())] = True
    own = tuple(
        torch.tensor(sorted({row for row in one.tokens.values() if row < lengths[place]}), dtype=torch.int64)
        for place, one in enumerate(tokenizers)
    )
    filled = ((kept < 0).any(0) & used[:length]).nonzero().flatten()
    unused = (~used).nonzero().flatten()
    return RowPlan(size, kept, filled, sources[filled], own_mean[filled], own, unused)


def _override(
    token: str,
    override: Mapping[str, Any],
    models: Sequence[SavedModel],
    tokenizers: Sequence[TokenizerContent],
    own: Tensor,
    lengths: Sequence[int],
) -> Tensor | None:
    """Return the row of each model a token is averaged from, (M,); null to leave it to the policy."""
    unknown = [key for key in override if key not in ("source", "force")]
    if unknown:
        raise MergeError(f"tokens.{token}: unknown {unknown[0]!r}{nearest(unknown[0], ('source', 'force'))}")
    source = override.get("source")
    chosen = torch.full((len(models),), -1, dtype=torch.int64)
    if source is None:
        return None
    if source == "zero" or (isinstance(source, Mapping) and source.get("kind") == "zero"):
        return chosen
    name = source.get("model") if isinstance(source, Mapping) else source
    sources = [one.source for one in models]
    if name not in sources or (isinstance(source, Mapping) and source.get("kind") != "model_token"):
        raise MergeError(
            f"tokens.{token}: source {source!r}{nearest(str(name), sources)}: expected one of {', '.join(sources)}, "
            "or `kind: zero`, or `kind: model_token` with `model` and `token` or `token_id`"
        )
    place = sources.index(name)
    row = int(own[place])
    if isinstance(source, Mapping):
        given = source.get("token_id")
        row = int(given) if given is not None else tokenizers[place].tokens.get(str(source.get("token")), -1)
    if not 0 <= row < lengths[place]:
        what = f"{source.get('token', source.get('token_id'))!r}" if isinstance(source, Mapping) else repr(token)
        raise MergeError(f"tokens.{token}: {name} has no row for {what}")
    chosen[place] = row
    return chosen


def _rerowed(models: Sequence[SavedModel], axes: Sequence[VocabularyAxes], plan: RowPlan) -> list[CheckpointReader]:
    places = [
        {axis.tensor: axis for axis in one.axes if axis.tensor in model.reader}
        for one, model in zip(axes, models, strict=True)
    ]
    for model, own, place in zip(models, axes, places, strict=True):
        if own.axes and not place:
            raise MergeError(f"{model.source}: none of its tensors has a row a token under the name expected")
        _check_axes(model, own.axes, place)
    return [_rerowed_reader(models, places, plan, index) for index in range(len(models))]


def _check_axes(model: SavedModel, axes: Sequence[IndexedAxis], places: Mapping[str, IndexedAxis]) -> None:
    for axis in axes:
        if axis.tensor in places and model.reader.shape(axis.tensor)[axis.dim] != axis.size:
            raise MergeError(
                f"{model.reader.place(axis.tensor)} has {model.reader.shape(axis.tensor)[axis.dim]} rows where its "
                f"config says {axis.size}"
            )
        if axis.tensor in places and places[axis.tensor] != axis:
            raise MergeError(f"{model.source}: tensor {axis.tensor!r} has tokens along two axes")


def _rerowed_reader(
    models: Sequence[SavedModel], places: Sequence[Mapping[str, IndexedAxis]], plan: RowPlan, index: int
) -> CheckpointReader:
    reader, own = models[index].reader, places[index]
    layout = dict(reader.layout)
    for name, axis in own.items():
        shape = list(layout[name].shape)
        shape[axis.dim] = plan.size
        layout[name] = TensorInfo(tuple(shape), layout[name].dtype)
    rows = _Rows(models, places, plan, index)

    def read(name: str) -> Tensor:
        if name not in own:
            return reader[name]
        return rows.between(name, 0, plan.size).movedim(0, own[name].dim).contiguous()

    def read_piece(name: str, start: int, stop: int) -> Tensor:
        if name not in own:
            return reader.piece(name, start, stop)
        if own[name].dim != 0:
            return read(name).reshape(-1)[start:stop]
        width = max(math.prod(layout[name].shape[1:]), 1)
        first, last = start // width, -(-stop // width)
        return rows.between(name, first, last).reshape(-1)[start - first * width : stop - first * width]

    return CheckpointReader(reader.source, layout, read, {}, read_piece)


class _Rows:
    """The rows of one model's tensors in the order of the new vocabulary, any stretch of them at a time."""

    def __init__(
        self, models: Sequence[SavedModel], places: Sequence[Mapping[str, IndexedAxis]], plan: RowPlan, index: int
    ) -> None:
        self.models, self.places, self.plan, self.index = models, places, plan, index
        length = plan.kept.shape[1]
        self.kept = torch.full((plan.size,), -1, dtype=torch.int64)
        self.kept[:length] = plan.kept[index]
        self.filled = torch.full((plan.size,), -1, dtype=torch.int64)  # place in the plan's list of rows to fill
        self.filled[plan.filled] = torch.arange(len(plan.filled))
        self.filled[self.kept >= 0] = -1
        self.used = torch.ones(plan.size, dtype=torch.bool)
        self.used[plan.unused] = False
        self.own_means: dict[str, Any] = {}
        self.new_means: dict[str, Any] = {}

    def between(self, name: str, start: int, stop: int, with_unused: bool = True) -> Tensor:
        """Return rows start to stop, tokens first, (stop - start, *rest)."""
        old = self._of(self.index, name)
        kept, filled, used = self.kept[start:stop], self.filled[start:stop], self.used[start:stop]
        if bool((kept >= 0).all()):
            first = int(kept[0]) if len(kept) else 0
            run = torch.arange(first, first + len(kept))
            # The first tokenizer's rows stay in order: nothing is copied.
            return old[first : first + len(kept)] if torch.equal(kept, run) else old.index_select(0, kept)
        new = old.new_zeros((stop - start, *old.shape[1:]))
        new[kept >= 0] = old.index_select(0, kept[kept >= 0])
        if bool((filled >= 0).any()):
            new[filled >= 0] = self._filled(name, filled[filled >= 0]).to(new.dtype)
        if with_unused and not bool(used.all()):
            new[~used] = self._mean_of_new(name).to(new.dtype)
        return new

    def _of(self, place: int, name: str) -> Tensor:
        if name not in self.places[place]:
            raise MergeError(
                f"{self.models[place].source} has no tensor {name!r}, which {self.models[self.index].source} would "
                "take rows from: merge models that are alike in their embeddings' names"
            )
        return self.models[place].reader[name].movedim(self.places[place][name].dim, 0)

    def _filled(self, name: str, which: Tensor) -> Tensor:
        """Return rows the model has not: averages over their donors, or the model's own mean."""
        donors, mean = self.plan.donors[which], self.plan.own_mean[which]
        own = self._of(self.index, name)
        wide = torch.promote_types(own.dtype, torch.float32)
        total = torch.zeros((len(which), *own.shape[1:]), dtype=wide)
        for place in range(donors.shape[1]):
            has = donors[:, place] >= 0
            if bool(has.any()):
                total[has] += self._of(place, name).index_select(0, donors[has, place]).to(wide)
        count = (donors >= 0).sum(1).clamp(min=1).reshape(-1, *[1] * (total.ndim - 1))
        total /= count
        if bool(mean.any()):
            total[mean] = self._own_mean(name).to(wide)
        return total

    def _own_mean(self, name: str) -> Tensor:
        """Return the mean of the rows of all tokens the model has."""
        if name not in self.own_means:
            own, kept = self._of(self.index, name), self.plan.tokens[self.index]
            total = sum(own[some].double().sum(0) for some in kept.split(ROWS_AT_ONCE))
            self.own_means[name] = total / len(kept)
        return self.own_means[name]

    def _mean_of_new(self, name: str) -> Tensor:
        """Return the mean of the rows all tokens will have."""
        if name not in self.new_means:
            stretches = [(start, start + ROWS_AT_ONCE) for start in range(0, self.plan.size, ROWS_AT_ONCE)]
            total = sum(
                self
                .between(name, start, min(stop, self.plan.size), with_unused=False)[self.used[start:stop]]
                .double()
                .sum(0)
                for start, stop in stretches
            )
            self.new_means[name] = total / int(self.used.sum())
        return self.new_means[name]
