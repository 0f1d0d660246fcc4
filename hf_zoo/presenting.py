"""Members shown under another form before they are merged: blocks stacked anew, one vocabulary, one order of classes.

A member that needs no other form stays as it is, and nothing is imported for it. One that does becomes an ingredient
whose folder holds the new config and processor, and whose tensors are made from the old ones when they are read.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError
from hf_zoo.files import json_text
from hf_zoo.ingredients import Ingredient, check_one_trunk, open_ingredient
from hf_zoo.population import Reference
from hf_zoo.recipe.forms import VocabularySpec
from hf_zoo.recipe.schema import MergeRecipe

if TYPE_CHECKING:
    from hf_zoo.axes import SavedModel

SETTINGS_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"


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
    members, base = _with_one_vocabulary(recipe, members, base)
    if heads_apart:
        firsts = {one.task: one for one in reversed(members)}
        return tuple(_with_classes_of(firsts[one.task], one) for one in members), base
    members, base = in_one_order(members, base, heads_of(recipe, members)[0])
    return _stack(recipe, members, base) if recipe.slices else (members, base)


def in_one_order(
    members: Sequence[Ingredient], base: Ingredient | None, first: Ingredient | None = None
) -> tuple[tuple[Ingredient, ...], Ingredient | None]:
    """Bring the classes of models that have the same ones into one order; leave models with others as they are.

    Args:
        members: The members.
        base: The model task vectors are taken against.
        first: Whose order; null for the first member's.
    """
    first = first or members[0]
    shown = [
        None if one is None else _with_classes_of(first, one) if _same_classes(first, one) else one
        for one in (*members, base)
    ]
    return tuple(one for one in shown[:-1] if one is not None), shown[-1]


def heads_of(recipe: MergeRecipe, members: Sequence[Ingredient]) -> tuple[Ingredient, ...]:
    """Return the members whose heads the merge gets: all of them, or the last slice's sources.

    Args:
        recipe: The recipe.
        members: The members as they were found.
    """
    if not recipe.slices:
        return tuple(members)
    last = [source.model for source in recipe.slices[-1].sources]
    return tuple(one for one in members if str(one.reference) in last) or tuple(members)


def owner_of_tokens(recipe: MergeRecipe, members: Sequence[Ingredient], base: Ingredient | None) -> Ingredient | None:
    """Return the model that is no member and yet gives tokens and rows; null where there is none.

    Args:
        recipe: The recipe.
        members: The members as they were found.
        base: The model task vectors are taken against, or would be if the method took any.

    Raises:
        PopulationError: If it cannot be opened.
    """
    spec = recipe.tokenizer
    if spec is None or keeps_tokens(spec):
        return None
    if base is None and spec.base is not None:
        base = next((one for one in members if str(one.reference) == spec.base), None) or open_ingredient(spec.base)
    return None if base is None or any(one.reference == base.reference for one in members) else base


def keeps_tokens(spec: VocabularySpec) -> bool:
    """Whether every member's rows stay as they are."""
    return spec.source == "same" and not spec.tokens and spec.pad_to_multiple_of is None


def _with_one_vocabulary(
    recipe: MergeRecipe, members: Sequence[Ingredient], base: Ingredient | None
) -> tuple[Sequence[Ingredient], Ingredient | None]:
    spec = recipe.tokenizer
    if spec is None:
        return members, base
    template = None if spec.chat_template is None else _template(spec.chat_template, members, base)
    if not keeps_tokens(spec):
        members, base = _aligned(spec, members, base, owner_of_tokens(recipe, members, base))
    return members if template is None else [_with_template(one, template) for one in members], base


def _aligned(
    spec: VocabularySpec, members: Sequence[Ingredient], base: Ingredient | None, root: Ingredient | None
) -> tuple[list[Ingredient], Ingredient | None]:
    """Give models one vocabulary.

    Args:
        spec: Which tokens.
        members: The members.
        base: The base.
        root: The model that leads in tokens though it is no member, the base among others.
    """
    from hf_zoo.vocabulary import POLICIES, align_vocabularies

    root = root or base or next((one for one in members if str(one.reference) == spec.base), None)
    every = [*members, *([] if root is None else [root])]
    models = {id(one): _saved(one) for one in every}
    own, given = [models[id(one)] for one in members], None if root is None else models[id(root)]
    size = spec.pad_to_multiple_of
    aligned = align_vocabularies(
        own, given, spec.source, rows=spec.rows, tokens=spec.tokens or None, pad_to_multiple_of=size
    )
    fishers = {id(one): one.statistics("fisher") for one in every}
    rows: Sequence[CheckpointReader | None] = [None] * len(every)
    if any(fishers.values()):  # of a token it never knew, a model has no information
        policy = spec.source if spec.source in POLICIES else "base" if aligned.owner is None else aligned.owner
        tokens = {name: {"source": "zero", "force": entry.get("force", False)} for name, entry in spec.tokens.items()}
        shown = [dataclasses.replace(models[key], reader=one or models[key].reader) for key, one in fishers.items()]
        lead = shown[list(fishers).index(id(root))] if root is not None else None
        seen = align_vocabularies(
            shown[: len(members)], lead, policy, rows="zero", tokens=tokens or None, pad_to_multiple_of=size
        )
        rows = [*seen.members, *([] if seen.base is None else [seen.base])]
    owner = root if aligned.owner is None else members[aligned.owner]
    assert owner is not None  # an owner that is no member is the base
    files: dict[str, Path | bytes] = {
        name: path for name, path in owner.processor_files().items() if name not in aligned.left_out
    }
    files |= aligned.files
    readers = [*aligned.members, *([] if aligned.base is None else [aligned.base])]
    made = [
        _changed(one, reader, aligned.changes, files, measured=_measured(one, row))
        for one, reader, row in zip(every, readers, rows, strict=True)
    ]
    return made[: len(members)], None if base is None else made[-1]


def _with_classes_of(first: Ingredient, one: Ingredient) -> Ingredient:
    """Bring a model's classes into another one's order."""
    if one.labels == first.labels:
        return one
    from hf_zoo.labels import label_order, reordered_labels

    order = label_order(str(first.reference), first.labels, str(one.reference), one.labels)
    assert order is not None  # the labels differ
    saved, fisher = _saved(one), one.statistics("fisher")
    names = dict(enumerate(first.labels))
    content = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    row = None if fisher is None else reordered_labels(dataclasses.replace(saved, reader=fisher), order)
    return _changed(one, reordered_labels(saved, order), {}, content=content, measured=_measured(one, row))


def _same_classes(first: Ingredient, one: Ingredient) -> bool:
    """Whether a model's classes are those of another, in whatever order."""
    return sorted(one.labels) == sorted(first.labels) and len(set(one.labels)) == len(one.labels)


def _stack(
    recipe: MergeRecipe, members: Sequence[Ingredient], base: Ingredient | None
) -> tuple[tuple[Ingredient, ...], Ingredient | None]:
    from hf_zoo.stacking import stack_blocks

    known = {str(one.reference): one for one in [*members, *([] if base is None else [base])]}
    check_one_trunk(list(known.values()))  # a stack shows one tokenizer alone
    root = None if base is None else str(base.reference)
    slices = [dataclasses.asdict(one) for one in recipe.slices]
    stacked = stack_blocks(slices, {name: _saved(one) for name, one in known.items()}, root, recipe.stack)
    used = {source.model for one in recipe.slices for source in one.sources}
    idle = [name for name in known if name not in used]
    if idle:
        raise MergeError(f"{idle[0]}: no slice takes blocks of it: leave it out of `members`")
    own = [
        [known[source.model] for source in one.sources if source.model != (one.base_model or root)]
        for one in recipe.slices
    ]
    roots = None if stacked.base is None else [known[one.base_model or str(root)] for one in recipe.slices]
    lead = own[0][0] if roots is None else roots[0]
    made = [
        _stacked(lead, list(column), reader, stacked.changes)
        for column, reader in zip(zip(*own, strict=True), stacked.members, strict=True)
    ]
    if stacked.base is None or roots is None:
        return tuple(made), None
    shown = _stacked(lead, roots, stacked.base, stacked.changes)
    return tuple(made), shown if len(set(map(id, roots))) > 1 else dataclasses.replace(shown, reference=lead.reference)


def _stacked(
    lead: Ingredient, column: Sequence[Ingredient], reader: CheckpointReader, changes: Mapping[str, Any]
) -> Ingredient:
    """Return the model stacked of others' blocks: config and processor are the first's, its task the head's."""
    name, last = "+".join(one.name.rpartition("/")[2] for one in column), column[-1]
    made = _changed(
        lead,
        reader,
        changes,
        content={key: last.config[key] for key in ("id2label", "label2id") if key in last.config},
        measured={},
    )
    manifest = None if last.manifest is None else last.manifest.replace(name=name, num_parameters=None)
    return dataclasses.replace(made, reference=Reference(name), manifest=manifest, commit=None)


def _template(wanted: str, members: Sequence[Ingredient], base: Ingredient | None) -> str | None:
    """Return the template of chats; null where `auto` finds none."""
    if wanted != "auto":
        if "{" not in wanted:
            raise MergeError(
                f"chat_template {wanted!r} is no template: give its Jinja text itself, or `auto` for the one most "
                "models have"
            )
        return wanted
    models = [*members, *([base] if base is not None and base.reference not in {m.reference for m in members} else [])]
    found = Counter(template for template in map(_own_template, models) if template)
    return found.most_common(1)[0][0] if found else None


def _own_template(model: Ingredient) -> str | None:
    files = model.processor_files()
    if TEMPLATE_FILE in files:
        return files[TEMPLATE_FILE].read_text(encoding="utf-8").strip()
    content = json.loads(files[SETTINGS_FILE].read_text(encoding="utf-8")) if SETTINGS_FILE in files else {}
    template = content.get("chat_template")
    if isinstance(template, list):  # several with names
        template = {one["name"]: one["template"] for one in template}.get("default")
    return None if template is None else template.strip()


def _with_template(one: Ingredient, template: str) -> Ingredient:
    files: dict[str, Path | bytes] = dict(one.processor_files())
    settings = files.get(SETTINGS_FILE)
    if not isinstance(settings, Path):
        raise MergeError(f"{one.reference}: has no tokenizer that a chat template could go with: leave it out")
    content = json.loads(settings.read_text(encoding="utf-8"))
    content.pop("chat_template", None)  # it would stand there twice
    files |= {SETTINGS_FILE: json_text(content).encode(), TEMPLATE_FILE: template.encode()}
    return _changed(one, one.reader, {}, files, measured=one.measured)


def _measured(one: Ingredient, fisher: CheckpointReader | None) -> Mapping[str, CheckpointReader] | None:
    """Return statistics for rows in another order: Gram matrices are of a layer's inputs and stay."""
    gram = one.statistics("gram")
    found = {kind: reader for kind, reader in (("fisher", fisher), ("gram", gram)) if reader is not None}
    return found or None


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
    measured: Mapping[str, CheckpointReader] | None = None,
) -> Ingredient:
    """Return an ingredient with other tensors, config and processor files.

    Args:
        ingredient: The ingredient.
        reader: Its tensors.
        changes: Dotted path -> value: what differs in its config.
        files: Its processor's files; null keeps them.
        content: Keys of its `config.json` that are replaced as they are.
        measured: Its statistics under that form; none at all for an empty mapping.
    """
    from hf_zoo.configs import changed_content
    from hf_zoo.structure import class_of

    scratch = tempfile.TemporaryDirectory(prefix="hf_zoo-")
    folder = Path(scratch.name)
    written = changed_content(ingredient.config, changes, class_of(ingredient.folder)[1]) | dict(content or {})
    (folder / "config.json").write_text(json_text(written))
    _fill(folder, (ingredient.processor_files() if files is None else files).items())
    manifest = ingredient.manifest
    return dataclasses.replace(
        ingredient,
        manifest=None if manifest is None else manifest.replace(num_parameters=None),
        folder=folder,
        tensors=reader,
        origin=ingredient.origin or ingredient.folder,
        scratch=scratch,
        measured=measured,
    )


def _fill(folder: Path, files: Iterable[tuple[str, Path | bytes]]) -> None:
    for name, content in files:
        if isinstance(content, Path):
            shutil.copyfile(content, folder / name)
        else:
            (folder / name).write_bytes(content)
