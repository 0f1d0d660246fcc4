"""`AutoMergedModel`: merge on the fly, or load a merge, and get a stock model of transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError, ModelError, PopulationError, nearest
from hf_zoo.ingredients import Ingredient, open_ingredient
from hf_zoo.joining import join, statistics_for, task_reader
from hf_zoo.lineage import check_lineage
from hf_zoo.population import MANIFEST_FILE, Manifest, Parent, Reference
from hf_zoo.presenting import in_one_order, keeps_tokens, present
from hf_zoo.recipe.binding import bind
from hf_zoo.recipe.schema import MergeRecipe
from hf_zoo.streaming import merge_in_memory
from hf_zoo.structure import class_of

Score = Callable[[Mapping[str, Tensor]], float]


class AutoMergedModel:
    """Make stock models out of several, or out of a merge's repo."""

    def __init__(self) -> None:
        raise TypeError("use AutoMergedModel.from_pretrained(members, method=...)")

    @classmethod
    def from_pretrained(
        cls,
        members: str | Path | Sequence[str | Path],
        method: str = "average",
        *,
        base: str | Path | None = None,
        auto_class: str | None = None,
        dtype: torch.dtype | str | None = None,
        seed: int = 0,
        score: Score | None = None,
        subfolder: str | None = None,
        **hyperparameters: Any,
    ) -> PreTrainedModel:
        """Merge models and return the result, or load a merge that was published.

        Members that are alike in all tensors and classes are merged with their heads. Members with different heads
        need `auto_class="AutoModel"`: then their trunks are merged.

        Args:
            members: Folders or `org/name`, each also with `@revision` and `#subfolder`. One text, not in a list, loads
                that repo as it is; if it holds a merge's recipe and no weights, the merge is made again from the very
                commits it names.
            method: A file name of `hf_zoo/methods`; not for one text.
            base: The model all members were trained from, for methods that need one.
            auto_class: `AutoModel` merges trunks alone; null keeps the members' class.
            dtype: Type of the merged weights; null keeps the members'.
            seed: Seed of methods that draw.
            score: For methods that choose: returns how good a model with these tensors is, larger is better.
            subfolder: For one text: a task of a merge that keeps its heads apart.
            **hyperparameters: The method's hyper-parameters by name.

        Returns:
            A stock model in evaluation mode; `push_to_hub` publishes it.

        Raises:
            ZooError: If a member cannot be opened, members do not fit together, or the method lacks something.
        """
        kind = _dtype(dtype)
        if isinstance(members, str | Path):
            if base is not None or score is not None or hyperparameters or method != "average":
                raise MergeError(f"{members!s} is one model: put the members into a list to merge them")
            return _load(str(members), auto_class, kind, subfolder)
        if subfolder is not None:
            raise MergeError("`subfolder` is for one repo: write `repo#subfolder` for a member of a list")
        ingredients = tuple(open_ingredient(member) for member in members)
        if not ingredients:
            raise MergeError("there is no member to merge: give a list of folders or org/name")
        root = None if base is None else open_ingredient(base)
        trunk_alone = _wants_trunk(ingredients, auto_class)
        if not trunk_alone:
            ingredients, root = in_one_order(ingredients, root)
        joined = join(ingredients, trunk_alone, root, kind)
        merger = joined.merger(method, hyperparameters, source=f"AutoMergedModel, method {method!r}")
        needed = statistics_for(merger.needs, ingredients, trunk_alone, root)
        inputs = joined.inputs(seed=seed, score=score, **needed)
        check_lineage("warn", ingredients, inputs, root if merger.uses_base else None)
        tensors = merge_in_memory(merger, inputs)
        return _stock(ingredients[0], trunk_alone, tensors)


def _stock(like: Ingredient, trunk_alone: bool, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """Return merged tensors as a model of a member's class, or of its trunk's."""
    if trunk_alone:
        return model_of(trunk_class(like), like.structure.trunk_config, tensors, like.structure.absent)
    return model_of(*class_of(like.folder), tensors)


def model_of(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    absent: Iterable[str] = (),
) -> PreTrainedModel:
    """Build a model of tensors under their names on disk, strictly.

    Args:
        model_class: Its class.
        config: Its config.
        tensors: Its tensors.
        absent: Names that may be missing: parts the members did not have.

    Raises:
        ModelError: If a tensor is missing, left over or of another shape.
    """
    dtype = next((tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()), torch.float32)
    loaded: Any = model_class.from_pretrained(
        None, config=config, state_dict=dict(tensors), dtype=dtype, output_loading_info=True
    )
    model, info = loaded
    wrong = {
        "missing": sorted(set(info["missing_keys"]) - set(absent)),
        "left over": sorted(info["unexpected_keys"]),
        "of another shape": sorted(str(key) for key in info["mismatched_keys"]),
    }
    problems = [f"{what}: {', '.join(names[:3])}" for what, names in wrong.items() if names]
    if problems:
        raise ModelError(f"{model_class.__name__} does not fit the merged weights; {'; '.join(problems)}")
    return model.eval()


def trunk_class(ingredient: Ingredient) -> type[PreTrainedModel]:
    """Return the class of a model's trunk."""
    import transformers

    return getattr(transformers, ingredient.structure.trunk_architecture)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights, whole or as an adapter."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def _load(text: str, auto_class: str | None, dtype: torch.dtype | None, subfolder: str | None) -> PreTrainedModel:
    reference = Reference.parse(text)
    if subfolder is not None:
        reference = dataclasses.replace(reference, subfolder=subfolder)
    root = open_ingredient(str(dataclasses.replace(reference, subfolder=None)))
    manifest = root.manifest
    folder = root.folder / (reference.subfolder or "")
    if not has_weights(folder):
        if manifest is None or manifest.kind != "merge":
            raise PopulationError(f"{text}: holds neither weights nor the recipe of a merge ({MANIFEST_FILE})")
        return _remake(text, manifest, reference.subfolder, auto_class, dtype)
    ingredient = dataclasses.replace(root, folder=folder, reference=reference)
    model_class, config = class_of(folder)
    absent = ingredient.structure.absent
    tensors: Mapping[str, Tensor] = ingredient.reader
    if _wants_trunk([ingredient], auto_class):
        model_class, config, tensors = trunk_class(ingredient), ingredient.structure.trunk_config, ingredient.trunk
    if dtype is not None:
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
        }
    return model_of(model_class, config, tensors, absent)


def _remake(
    text: str, manifest: Manifest, subfolder: str | None, auto_class: str | None, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Make a merge again from the commits its manifest names."""
    recipe = bind({key: value for key, value in manifest.recipe.items() if key != "data"}, MergeRecipe, text, "recipe")
    if recipe.slices or (recipe.tokenizer is not None and not keeps_tokens(recipe.tokenizer)):
        raise PopulationError(
            f"{text}: made of blocks or tokens of several models: it can be loaded only with its weights"
        )
    named = [(parent, _pinned(text, parent)) for parent in manifest.parents]
    members = tuple(ingredient for parent, ingredient in named if parent.role == "member")
    base = next((ingredient for parent, ingredient in named if parent.role == "base"), None)
    heads_apart = manifest.auto_class == "AutoModel" and bool(manifest.tasks)
    members, base = present(dataclasses.replace(recipe, tokenizer=None), members, base, heads_apart)
    joined = join(members, heads_apart, base, dtype or _dtype(recipe.dtype), recipe.extras)
    merger = joined.merger(recipe.method, recipe.parameters, recipe.rules, f"{text}: {MANIFEST_FILE}")
    needed = statistics_for(merger.needs, members, heads_apart, base)
    kind = getattr(torch, recipe.compute_dtype)
    recalled = manifest.method.get("choices") or {}
    inputs = joined.inputs(seed=recipe.seed, dtype=kind, recalled=recalled, **needed)
    try:
        merger.check(inputs)
    except MergeError as error:
        raise PopulationError(f"{text}: it can be loaded only with its weights, not made again: {error}") from error
    tensors = merge_in_memory(merger, inputs)
    if subfolder is None:
        if auto_class == "AutoModel" and not heads_apart:
            tensors = {alone: tensors[own] for own, alone in members[0].structure.trunk.items()}
        return _stock(members[0], heads_apart or auto_class == "AutoModel", tensors)
    own = [member for member in members if member.task == subfolder]
    if not heads_apart or not own:
        raise MergeError(f"{text}: no task {subfolder!r}{nearest(subfolder, manifest.tasks)}: it has {manifest.tasks}")
    reader = task_reader(own, CheckpointReader.of(tensors, text))
    return model_of(*class_of(own[0].folder), dict(reader.items()))


def _pinned(text: str, parent: Parent) -> Ingredient:
    if "/" not in parent.repo:
        raise PopulationError(
            f"{text}: made from {parent.repo}, which was never on a Hub: it can be loaded only with its weights"
        )
    ingredient = open_ingredient(f"{parent.repo}@{parent.revision}" if parent.revision else parent.repo)
    if parent.sha256 is not None and ingredient.sha256 != parent.sha256:
        raise MergeError(f"{text}: the weights of {ingredient.reference} are not those it was made from")
    return ingredient


def _wants_trunk(ingredients: Sequence[Ingredient], auto_class: str | None) -> bool:
    if auto_class is None:
        return False
    if auto_class == "AutoModel":
        return True
    own = ingredients[0].structure
    if auto_class not in {own.auto_class, own.architecture}:
        raise MergeError(
            f"{ingredients[0].reference} is a {own.architecture} ({own.auto_class}), not of {auto_class}: leave "
            "`auto_class` out, or give AutoModel for the trunk"
        )
    return False


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if dtype not in known:
        raise MergeError(f"dtype {dtype!r}{nearest(dtype, list(known))}: expected one of {', '.join(known)}")
    return known[dtype]
