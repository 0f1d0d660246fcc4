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
from hf_zoo.ingredients import Ingredient, check_one_label_space, check_one_trunk, open_ingredient
from hf_zoo.inputs import MergeInputs, common_layout
from hf_zoo.methods.base import Method, make_method, mean_of
from hf_zoo.population import MANIFEST_FILE, Manifest, Parent, Reference
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
        ingredients = [open_ingredient(member) for member in members]
        if not ingredients:
            raise MergeError("there is no member to merge: give a list of folders or org/name")
        made = make_method(method, hyperparameters, f"AutoMergedModel, method {method!r}")
        root = None if base is None else open_ingredient(base)
        trunk_alone = _wants_trunk(ingredients, auto_class)
        return merged_model(ingredients, made, trunk_alone, base=root, dtype=kind, seed=seed, score=score)


def merged_model(
    ingredients: Sequence[Ingredient],
    method: Method,
    trunk_alone: bool,
    base: Ingredient | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    score: Score | None = None,
) -> PreTrainedModel:
    """Merge models in memory.

    Args:
        ingredients: The members.
        method: The method.
        trunk_alone: Merge the trunks and leave the heads out.
        base: The model all members were trained from.
        dtype: Type of the merged weights; null keeps the members'.
        seed: Seed of methods that draw.
        score: For methods that choose.

    Returns:
        A stock model in evaluation mode.
    """
    inputs = merge_inputs(ingredients, trunk_alone, base, dtype, seed=seed, score=score)
    tensors = dict(method.merge(inputs))
    first = ingredients[0]
    model_class, config = class_of(first.folder)
    absent: tuple[str, ...] = ()
    if trunk_alone:
        config, absent = first.structure.trunk_config, first.structure.absent
        model_class = trunk_class(first)
    return model_of(model_class, config, tensors, absent)


def merge_inputs(
    ingredients: Sequence[Ingredient],
    trunk_alone: bool,
    base: Ingredient | None = None,
    dtype: torch.dtype | None = None,
    **others: Any,
) -> MergeInputs:
    """Check that models fit together and make a method's inputs of them.

    Args:
        ingredients: The members.
        trunk_alone: Take the trunks, under the names of trunks saved alone; else whole models, under their own names.
        base: The model all members were trained from.
        dtype: Type of floating tensors to make; null keeps the members'.
        **others: Further fields of `MergeInputs`.

    Raises:
        MergeError: If they do not fit together; names the models and what differs.
    """
    check_one_trunk(ingredients)
    if trunk_alone:
        readers = [one.trunk for one in ingredients]
        return MergeInputs.of(
            readers, dtype, base=None if base is None else _trunk_of_base(base, readers[0]), **others
        )
    check_one_label_space(ingredients)
    return MergeInputs.of(
        [one.reader for one in ingredients], dtype, base=None if base is None else base.reader, **others
    )


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
    named = [(parent, _pinned(text, parent)) for parent in manifest.parents]
    members = [ingredient for parent, ingredient in named if parent.role == "member"]
    base = next((ingredient for parent, ingredient in named if parent.role == "base"), None)
    name, parameters = str(manifest.method.get("name")), dict(manifest.method.get("parameters") or {})
    chosen = (manifest.method.get("report") or {}).get("places")
    if chosen is not None:  # the choice was made on data; what was chosen is known
        members = [members[place] for place in chosen]
        name, parameters = "average", {}
    method = make_method(name, parameters, f"{text}: {MANIFEST_FILE}")
    if dtype is None and manifest.recipe.get("dtype"):
        dtype = _dtype(manifest.recipe["dtype"])
    seed = int(manifest.recipe.get("seed", 0))
    heads_apart = manifest.auto_class == "AutoModel" and bool(manifest.tasks)
    if subfolder is None:
        return merged_model(members, method, heads_apart or auto_class == "AutoModel", base, dtype, seed)
    own = [member for member in members if member.task == subfolder]
    if not heads_apart or not own:
        raise MergeError(f"{text}: no task {subfolder!r}{nearest(subfolder, manifest.tasks)}: it has {manifest.tasks}")
    trunk = CheckpointReader.of(dict(method.merge(merge_inputs(members, True, base, dtype, seed=seed))), text)
    model_class, config = class_of(own[0].folder)
    return model_of(model_class, config, dict(task_reader(own, trunk).items()))


def task_reader(members: Sequence[Ingredient], trunk: CheckpointReader) -> CheckpointReader:
    """Return a task's model, tensor by tensor: a merged trunk under the members' names, and their own head.

    Args:
        members: The members of the task; the heads of several are averaged.
        trunk: The merged trunk, under the names of a trunk saved alone.

    Raises:
        MergeError: If their heads differ in shapes or classes.
    """
    check_one_label_space(members)
    structure = members[0].structure
    head_layout = common_layout([member.head for member in members])
    head = mean_of([member.head for member in members], members[0].name, head_layout)
    layout = {own: trunk.layout[alone] for own, alone in structure.trunk.items()} | head.layout

    def read(name: str) -> Tensor:
        return trunk[structure.trunk[name]] if name in structure.trunk else head[name]

    return CheckpointReader(trunk.source, layout, read, {})


def _pinned(text: str, parent: Parent) -> Ingredient:
    if "/" not in parent.repo:
        raise PopulationError(
            f"{text}: made from {parent.repo}, which was never on a Hub: it can be loaded only with its weights"
        )
    ingredient = open_ingredient(f"{parent.repo}@{parent.revision}" if parent.revision else parent.repo)
    if parent.sha256 is not None and ingredient.sha256 != parent.sha256:
        raise MergeError(f"{text}: the weights of {ingredient.reference} are not those it was made from")
    return ingredient


def _trunk_of_base(base: Ingredient, like: CheckpointReader) -> CheckpointReader:
    """Return the base's trunk; it may have parts the members lack."""
    names = {name: name for name in like if name in base.trunk}
    return base.trunk.select(names)


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
