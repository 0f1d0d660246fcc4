"""Members shown under another form before they are merged: blocks stacked anew, one vocabulary, one order of classes.

A member that needs no other form stays as it is, and nothing is imported for it. One that does becomes an ingredient
whose folder holds the new config and processor, and whose tensors are made from the old ones when they are read.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.files import json_text
from hf_zoo.ingredients import Ingredient, open_ingredient
from hf_zoo.population import Reference
from hf_zoo.recipe.forms import VocabularySpec
from hf_zoo.recipe.schema import MergeRecipe

if TYPE_CHECKING:
    from hf_zoo.axes import SavedModel


def present(
    recipe: MergeRecipe, members: Sequence[Ingredient], base: Ingredient | None, heads_apart: bool
) -> tuple[tuple[Ingredient, ...], Ingredient | None]:
    """Bring models to one form.

    Args:
        recipe: The recipe.
        members: The members as they were found.
        base: The model task vectors are taken against.
        heads_apart: Whether each task keeps its own head; else classes are brought into the first member's order.

    Returns:
        The members and the base to merge; with `slices`, one member a source of each slice.

    Raises:
        MergeError: If blocks, tokens or classes cannot be brought together; names the models.
    """
    if recipe.slices:
        members, base = _stack(recipe, members, base)
    members, base = _with_one_vocabulary(recipe.tokenizer, members, base)
    return (tuple(members) if heads_apart else _with_one_order_of_classes(members)), base


def _stack(
    recipe: MergeRecipe, members: Sequence[Ingredient], base: Ingredient | None
) -> tuple[tuple[Ingredient, ...], Ingredient | None]:
    from hf_zoo.stacking import stack_blocks

    known = {str(one.reference): one for one in [*members, *([] if base is None else [base])]}
    models = {name: _saved(one) for name, one in known.items()}
    slices = [json.loads(json_text(dataclasses.asdict(one))) for one in recipe.slices]
    stacked = stack_blocks(slices, models, None if base is None else str(base.reference), recipe.stack)
    lead = base if stacked.base is not None and base is not None else known[recipe.slices[0].sources[0].model]
    names = ["+".join(column) for column in zip(*_columns(recipe, base), strict=True)]
    made = [
        _changed(lead, reader, stacked.changes, reference=Reference(name))
        for name, reader in zip(names, stacked.members, strict=True)
    ]
    root = None if stacked.base is None or base is None else _changed(base, stacked.base, stacked.changes)
    return tuple(made), root


def _columns(recipe: MergeRecipe, base: Ingredient | None) -> list[list[str]]:
    """Return the sources' own names, slice by slice, the base's left out."""
    own = []
    for one in recipe.slices:
        root = one.base_model or (None if base is None else str(base.reference))
        names = [Reference.parse(source.model) for source in one.sources if source.model != root]
        own.append([f"{Path(name.where).name}" for name in names])
    return own


def _with_one_vocabulary(
    spec: VocabularySpec | None, members: Sequence[Ingredient], base: Ingredient | None
) -> tuple[tuple[Ingredient, ...], Ingredient | None]:
    if spec is None or (spec.source == "same" and not spec.tokens and spec.pad_to_multiple_of is None):
        return tuple(members), base
    from hf_zoo.vocabulary import align_vocabularies

    models = [_saved(one) for one in members]
    root, given = base, None
    if root is None and spec.base is not None:
        places = [i for i, one in enumerate(members) if str(one.reference) == spec.base]
        root = members[places[0]] if places else open_ingredient(spec.base)
        given = models[places[0]] if places else _saved(root)
    elif root is not None:
        given = _saved(root)
    aligned = align_vocabularies(
        models,
        given,
        spec.source,
        rows=spec.rows,
        tokens=spec.tokens or None,
        pad_to_multiple_of=spec.pad_to_multiple_of,
    )
    owner = root if aligned.owner is None else members[aligned.owner]
    assert owner is not None  # an owner that is no member is the base
    files: dict[str, Path | bytes] = {
        name: path for name, path in owner.processor_files().items() if name not in aligned.left_out
    }
    files |= aligned.files
    made = [
        _changed(one, reader, aligned.changes, files) for one, reader in zip(members, aligned.members, strict=True)
    ]
    shown = base if base is None or aligned.base is None else _changed(base, aligned.base, aligned.changes, files)
    return tuple(made), shown


def _with_one_order_of_classes(members: Sequence[Ingredient]) -> tuple[Ingredient, ...]:
    first, made = members[0], []
    for one in members:
        if one.labels == first.labels:
            made.append(one)
            continue
        from hf_zoo.labels import label_order, reordered_labels

        order = label_order(str(first.reference), first.labels, str(one.reference), one.labels)
        assert order is not None  # the labels differ
        changes = {key: first.config.get(key) for key in ("id2label", "label2id")}
        made.append(_changed(one, reordered_labels(_saved(one), order), {}, content=changes))
    return tuple(made)


def _saved(ingredient: Ingredient) -> SavedModel:
    from hf_zoo.axes import SavedModel
    from hf_zoo.structure import class_of

    return SavedModel(ingredient.reader, *class_of(ingredient.folder), ingredient.folder)


def _changed(
    ingredient: Ingredient,
    reader: CheckpointReader,
    changes: Mapping[str, Any],
    files: Mapping[str, Path | bytes] | None = None,
    content: Mapping[str, Any] | None = None,
    reference: Reference | None = None,
) -> Ingredient:
    """Return an ingredient with other tensors, config and processor files.

    Args:
        ingredient: The ingredient.
        reader: Its tensors.
        changes: Dotted path -> value: what differs in its config.
        files: Its processor's files; null keeps them.
        content: Keys of its `config.json` that are replaced as they are.
        reference: What it is called; null keeps its name.
    """
    from hf_zoo.configs import changed_content
    from hf_zoo.structure import class_of

    scratch = tempfile.TemporaryDirectory(prefix="hf_zoo-")
    folder = Path(scratch.name)
    written = changed_content(ingredient.config, changes, class_of(ingredient.folder)[1]) | dict(content or {})
    (folder / "config.json").write_text(json_text(written))
    _fill(folder, (files or ingredient.processor_files()).items())
    return dataclasses.replace(
        ingredient,
        reference=reference or ingredient.reference,
        folder=folder,
        tensors=reader,
        origin=ingredient.origin or ingredient.folder,
        scratch=scratch,
    )


def _fill(folder: Path, files: Iterable[tuple[str, Path | bytes]]) -> None:
    for name, content in files:
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_bytes(content)
