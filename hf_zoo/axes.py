"""Which axes of a saved model's tensors stand for tokens or classes, and which names stand for blocks.

Nothing is known of any architecture here. Two skeletons whose configs differ in one number are compared: an axis that
has grown with the vocabulary has a row per token, names that are gone with a block less belong to that block.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.configs import (
    changed_config,
    config_fields,
    config_numbers,
    config_value,
    last_name,
    text_config,
    validate_config,
)
from hf_zoo.errors import ModelError
from hf_zoo.structure import class_of, skeleton

Shapes = dict[str, tuple[int, ...]]

# Some models round their vocabulary up to a multiple of 64 or 128: steps of a multiple of these show the true rate.
VOCABULARY_STEP = 256
LABEL_STEP = 5
# What building a skeleton raises for a number that fits no other: each class checks its own fields in its own way.
UNFIT = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    NotImplementedError,
    RuntimeError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class SavedModel:
    """Weights, and the class and config they load as.

    Attributes:
        reader: The weights, under the names the class saves.
        model_class: The class.
        config: The config.
        folder: Where its other files lie, the tokenizer's among them.
    """

    reader: CheckpointReader
    model_class: type[PreTrainedModel]
    config: PreTrainedConfig
    folder: Path | None = None

    @classmethod
    def open(cls, folder: str | Path, source: str | None = None) -> SavedModel:
        """Open a model's folder without reading its weights.

        Args:
            folder: The folder.
            source: Whose it is, for messages; null for the folder.

        Raises:
            ZooError: If there are no weights, or the class is not known here.
        """
        model_class, config = class_of(folder)
        return cls(CheckpointReader.open(folder, source), model_class, config, Path(folder))

    @property
    def source(self) -> str:
        """Whose they are, for messages."""
        return self.reader.source


@dataclass(frozen=True)
class IndexedAxis:
    """An axis of a tensor whose entry i belongs to token i, or to class i.

    Attributes:
        tensor: The tensor's name on disk.
        dim: The axis.
        size: Its length; larger than the count where a model pads it or adds an entry at the end (no object).
    """

    tensor: str
    dim: int
    size: int


@dataclass(frozen=True)
class VocabularyAxes:
    """Where a model has a row per token.

    Attributes:
        keys: Dotted paths of the config's numbers that say how many (`vocab_size`, `text_config.vocab_size`).
        size: How many the config says.
        axes: The axes, tied tensors under each of their names; none for a model without vocabulary.
    """

    keys: tuple[str, ...]
    size: int
    axes: tuple[IndexedAxis, ...]


@dataclass(frozen=True)
class BlockStack:
    """Blocks one after another, each under its number.

    Attributes:
        key: Dotted path of the config's number that says how many (`num_hidden_layers`, `decoder_layers`).
        size: How many there are.
        prefixes: What names of a block's tensors begin with, its number left out (`model.layers.`).
        lists: Dotted paths of the config's lists with one entry a block (`layer_types`).
    """

    key: str
    size: int
    prefixes: tuple[str, ...]
    lists: tuple[str, ...] = ()

    def place(self, name: str) -> tuple[str, int, str] | None:
        """Return a tensor's prefix, block number and the rest of its name; null for one outside the blocks."""
        for prefix in self.prefixes:
            number, dot, rest = name.removeprefix(prefix).partition(".")
            if name.startswith(prefix) and dot and number.isdecimal():
                return prefix, int(number), rest
        return None


def vocabulary_axes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> VocabularyAxes:
    """Find the axes indexed by tokens: embeddings, their tied or untied heads, biases.

    Args:
        model_class: The model's class.
        config: Its config; nested ones (`text_config`) are looked into.

    Raises:
        ModelError: If parts of the model have vocabularies of different sizes, or an axis grows at another rate than
            one entry a token.
    """
    found = {key: value for key, value in config_numbers(config).items() if last_name(key) == "vocab_size"}
    text = next((part for part in (text_config(config), config) if getattr(part, "vocab_size", None)), None)
    if text is None and len(set(found.values())) > 1:
        listed = ", ".join(f"{key}: {size}" for key, size in found.items())
        raise ModelError(f"{model_class.__name__} has several vocabularies ({listed}): they cannot be changed as one")
    if not found:
        return VocabularyAxes((), 0, ())
    size = int(text.vocab_size) if text is not None else next(iter(found.values()))
    keys = tuple(
        key for key, value in config_numbers(config).items() if last_name(key).endswith("vocab_size") and value == size
    )
    larger = changed_config(config, dict.fromkeys(keys, size + VOCABULARY_STEP))
    axes = _grown_axes(model_class, config, larger, VOCABULARY_STEP, "token")
    return VocabularyAxes(keys, size, axes)


def label_axes(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> tuple[IndexedAxis, ...]:
    """Find the axes indexed by classes: the last layer of a classifier, weights and biases.

    Args:
        model_class: The model's class.
        config: Its config.

    Raises:
        ModelError: If an axis grows at another rate than one entry a class.
    """
    larger = copy.deepcopy(config)
    larger.num_labels = (config.num_labels or 0) + LABEL_STEP
    return _grown_axes(model_class, config, larger, LABEL_STEP, "class")


def block_stacks(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> tuple[BlockStack, ...]:
    """Find the stacks of blocks whose depth is a number of the config.

    A model whose stages have depths of their own in a list (Swin, ResNet) has none: its blocks cannot be moved freely.

    Args:
        model_class: The model's class.
        config: Its config.
    """
    before = shapes_on_disk(model_class, config)
    depths = {len(indices) for indices in _outer_indices(before).values()}
    numbers = {key: value for key, value in config_numbers(config).items() if value in depths}
    stacks = []
    for key, size in numbers.items():
        lists = _lists_beside(config, key, size)
        named = tuple(path for path in lists if "layer" in last_name(path))
        for chosen in dict.fromkeys([named, (), lists]):
            prefixes = _prefixes_of_depth(model_class, config, BlockStack(key, size, (), chosen), before)
            if prefixes:
                stacks.append(BlockStack(key, size, prefixes, chosen))
                break
    return tuple(stacks)


def depth_fractions(stacks: Iterable[BlockStack], names: Iterable[str]) -> dict[str, float]:
    """Say how deep each tensor lies, for values that change from layer to layer.

    Block i of n lies at i / (n - 1), the only block of a stack at 1; embeddings, norms and heads outside the blocks at
    0. These are the places mergekit gives them. Without a stack (Swin, ResNet), the blocks of all stages count on.

    Args:
        stacks: The model's stacks.
        names: Names of tensors on disk.

    Returns:
        Name -> place in [0, 1].
    """
    names, stacks = list(names), list(stacks)
    if not stacks:
        return _fractions_of_stages(names)
    fractions = {}
    for name in names:
        fractions[name] = 0.0
        for stack in stacks:
            place = stack.place(name)
            if place is not None:
                fractions[name] = place[1] / (stack.size - 1) if stack.size > 1 else 1.0
    return fractions


def shapes_on_disk(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Shapes:
    """Return name -> shape of what `save_pretrained` would save, tied tensors under each of their names."""
    model = skeleton(model_class, config)
    tensors = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, tensors).items()}


def resized_stack(
    config: PreTrainedConfig, stack: BlockStack, blocks: Sequence[tuple[PreTrainedConfig, int]]
) -> dict[str, Any]:
    """Return the changes of a config that make a stack consist of other blocks.

    Args:
        config: The config to change.
        stack: The stack.
        blocks: For each block of the new stack, the config it comes from and its number there.

    Returns:
        Dotted path -> value: the depth, lists with an entry a block, and lists of block numbers.
    """
    changes: dict[str, Any] = {stack.key: len(blocks)}
    for path in stack.lists:
        changes[path] = [config_value(source, path)[number] for source, number in blocks]
    owner = stack.key.rpartition(".")[0]
    for path, value in config_fields(config):
        if path.rpartition(".")[0] != owner or path in stack.lists:
            continue
        if _are_block_numbers(path, value, stack.size):
            listed = [set(config_value(source, path) or ()) for source, _ in blocks]
            changes[path] = [new for new, (_, old) in enumerate(blocks) if old in listed[new]]
        elif _is_patterned(value, stack.size):  # [[["global", "local"], 12]]: a pattern and how often it comes
            changes[path] = [[[_unrolled(config_value(source, path))[old] for source, old in blocks], 1]]
    return changes


def _grown_axes(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, larger: PreTrainedConfig, step: int, what: str
) -> tuple[IndexedAxis, ...]:
    before, after = shapes_on_disk(model_class, config), shapes_on_disk(model_class, larger)
    axes = []
    for name, shape in before.items():
        for dim, (length, grown) in enumerate(zip(shape, after.get(name, shape), strict=True)):
            if grown != length and grown - length != step:
                raise ModelError(
                    f"{model_class.__name__}: {name!r} has {length} entries along axis {dim} and {grown} with {step} "
                    f"more: not one a {what}, so they cannot be matched"
                )
            if grown != length:
                axes.append(IndexedAxis(name, dim, length))
    return tuple(axes)


def _prefixes_of_depth(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, stack: BlockStack, before: Shapes
) -> tuple[str, ...]:
    """Return the prefixes of the blocks a number counts; nothing where it counts something else."""
    size = stack.size
    numbers = list(range(size - 1)) if size > 1 else [0, 0]
    changes = resized_stack(config, stack, [(config, number) for number in numbers])
    try:
        changed = changed_config(config, changes)
        validate_config(changed)
        after = shapes_on_disk(model_class, changed)
    except UNFIT:
        return ()
    fewer, more = (after, before) if size > 1 else (before, after)
    gone = [name for name in more if name not in fewer]
    if not gone or any(more.get(name) != shape for name, shape in fewer.items()):
        return ()
    last = max(size - 1, 1)
    prefixes = {_outer_place(name) for name in gone}
    if None in prefixes or any(place is not None and place[1] != last for place in prefixes):
        return ()
    found = tuple(dict.fromkeys(place[0] for place in map(_outer_place, gone) if place is not None))
    # Every tensor of a block that is gone must be gone.
    left = [name for name in fewer if (place := _outer_place(name)) and place[0] in found and place[1] >= last]
    return () if left else found


def _outer_place(name: str) -> tuple[str, int] | None:
    """Return what stands before the first number among a name's parts, and that number."""
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return "".join(f"{before}." for before in parts[:position]), int(part)
    return None


def _outer_indices(names: Iterable[str]) -> dict[str, set[int]]:
    indices: dict[str, set[int]] = defaultdict(set)
    for name in names:
        place = _outer_place(name)
        if place is not None:
            indices[place[0]].add(place[1])
    return indices


def _fractions_of_stages(names: Sequence[str]) -> dict[str, float]:
    """Order the numbered parts of the longest list of stages or blocks, whatever belongs to a whole stage last."""
    indices = _outer_indices(names)
    places = {name: _outer_place(name) for name in names}
    sizes = {
        prefix: sum(place is not None and place[0] == prefix for place in places.values())
        for prefix, numbers in indices.items()
        if len(numbers) > 1
    }
    if not sizes:
        return dict.fromkeys(names, 0.0)
    main = max(sizes, key=lambda prefix: sizes[prefix])
    keys: dict[str, tuple[int, float]] = {}
    for name, place in places.items():
        if place is not None and place[0] == main:
            inner = _outer_place(name.removeprefix(f"{main}{place[1]}."))
            keys[name] = (place[1], inner[1] if inner is not None else float("inf"))
    ranks = {key: rank for rank, key in enumerate(sorted(set(keys.values())))}
    return {name: ranks[keys[name]] / (len(ranks) - 1) if name in keys else 0.0 for name in names}


def _lists_beside(config: PreTrainedConfig, key: str, size: int) -> tuple[str, ...]:
    owner = key.rpartition(".")[0]
    return tuple(
        path
        for path, value in config_fields(config)
        if path.rpartition(".")[0] == owner and isinstance(value, list | tuple) and len(value) == size
        if not _is_patterned(value, size)
    )


def _are_block_numbers(path: str, value: Any, size: int) -> bool:
    if not (isinstance(value, list | tuple) and value and "layer" in last_name(path)):
        return False
    return all(type(entry) is int and 0 <= entry < size for entry in value) and len(set(value)) == len(value)


def _is_patterned(value: Any, size: int) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(entry, list | tuple)
            and len(entry) == 2
            and isinstance(entry[0], list | tuple)
            and type(entry[1]) is int
            for entry in value
        )
        and len(_unrolled(value)) == size
    )


def _unrolled(value: Sequence[Any]) -> list[Any]:
    return [entry for pattern, times in value for _ in range(times) for entry in pattern]
