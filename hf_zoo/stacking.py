"""New models stacked of other models' blocks, presented as members without reading a weight.

A slice takes a range of blocks from each of its sources. The slices' blocks follow one another under new numbers. What
comes before the blocks (embeddings) is the first slice's, what comes after them (norms, heads) the last one's. Slices
of k sources make k such models, which a method then merges tensor by tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_zoo.axes import (
    UNFIT,
    BlockStack,
    SavedModel,
    block_stacks,
    resized_stack,
    shapes_on_disk,
)
from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.configs import changed_config, validate_config
from hf_zoo.errors import MergeError, nearest
from hf_zoo.structure import disk_name_of, names_on_disk, saved_names, skeleton


@dataclass(frozen=True)
class BlockRange:
    """Blocks of one model.

    Attributes:
        model: The model, by the name it is given under.
        start: Its first block.
        stop: The block behind its last one.
    """

    model: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class StackedModels:
    """Models stacked of others' blocks.

    Attributes:
        members: One a source of each slice, in the sources' order, the base's left out.
        base: The base's blocks, stacked alike; null where none was asked for.
        config: The config they load with.
        changes: Dotted path -> value: what differs from the config they are made from.
        positions: Name of a tensor -> its slice, and how deep it lies in it: block i of n at i / (n - 1), the only one
            at 1, what is outside the blocks at 0. So deep mergekit takes values that change from layer to layer.
    """

    members: tuple[CheckpointReader, ...]
    base: CheckpointReader | None
    config: PreTrainedConfig
    changes: dict[str, Any]
    positions: dict[str, tuple[int, float]]


def stack_blocks(
    slices: Sequence[Mapping[str, Any]],
    models: Mapping[str, SavedModel],
    base: str | None = None,
    stack: str | None = None,
) -> StackedModels:
    """Stack blocks of several models into new ones.

    Args:
        slices: Each `{"sources": [{"model": name, "layer_range": [start, stop]}, ...]}`; with `base_model` where a
            slice has another base than the rest; further keys are left alone.
        models: Name -> model.
        base: The source of each slice that goes into the base; null for methods without one.
        stack: Which blocks, by the config's number that counts them (`decoder_layers`); null where there is one stack,
            or one that `num_hidden_layers` counts.

    Raises:
        MergeError: If a model or stack is unknown, a range leaves the blocks there are, the sources of a slice are of
            different depths, or the config cannot describe what would come out.
    """
    ranges = [_read_slice(content, models, f"slices[{place}]") for place, content in enumerate(slices)]
    if not ranges:
        raise MergeError("slices: there is none: name at least one source with its `layer_range`")
    stacks = {name: _stack_of(models[name], stack) for name in dict.fromkeys(r.model for own in ranges for r in own)}
    for place, own in enumerate(ranges):
        for source in own:
            _check_range(source, stacks[source.model], models, f"slices[{place}]")
    columns, of_base = _columns(ranges, [content.get("base_model") or base for content in slices])
    lead = of_base or columns[0]
    first = models[lead[0].model]
    blocks = [(models[source.model].config, number) for source in lead for number in range(source.start, source.stop)]
    changes = resized_stack(first.config, stacks[lead[0].model], blocks)
    config = changed_config(first.config, changes)
    own_stack = stacks[lead[0].model]
    readers = [_stacked(column, models, stacks) for column in [*columns, *([of_base] if of_base else [])]]
    for reader, column in zip(readers, [*columns, *([of_base] if of_base else [])], strict=True):
        _check_fits(reader, first.model_class, config, models[column[0].model], own_stack)
    return StackedModels(
        members=tuple(readers[: len(columns)]),
        base=readers[-1] if of_base else None,
        config=config,
        changes=changes,
        positions=_positions(readers[0], own_stack, lead, _names_after(first, own_stack)),
    )


def names_after_blocks(model: SavedModel, stack: BlockStack) -> frozenset[str]:
    """Return the names on disk of what a sample meets after the first block, the blocks left out.

    A skeleton is run on inputs without content, and the order in which its modules are called decides. Where that is
    not possible, the order in which they were defined does.

    Args:
        model: The model.
        stack: The blocks.
    """
    return _names_after(model, stack)


def _read_slice(content: Mapping[str, Any], models: Mapping[str, SavedModel], path: str) -> list[BlockRange]:
    sources = content.get("sources") if isinstance(content, Mapping) else None
    if not isinstance(sources, Sequence) or not sources:
        raise MergeError(f"{path}: expected `sources`, a list of `model` and `layer_range`, got {content!r}")
    ranges = []
    for place, source in enumerate(sources):
        name, span = source.get("model"), source.get("layer_range")
        if name not in models:
            raise MergeError(f"{path}.sources[{place}]: no model {name!r}{nearest(str(name), list(models))}")
        if not (isinstance(span, Sequence) and len(span) == 2 and all(type(number) is int for number in span)):
            raise MergeError(f"{path}.sources[{place}].layer_range: expected [first, behind the last], got {span!r}")
        ranges.append(BlockRange(str(name), *span))
    if len({len(source) for source in ranges}) > 1:
        listed = ", ".join(f"{source.model} {len(source)}" for source in ranges)
        raise MergeError(f"{path}: its sources have different numbers of blocks ({listed}): they are merged in pairs")
    return ranges


def _stack_of(model: SavedModel, key: str | None) -> BlockStack:
    stacks = block_stacks(model.model_class, model.config)
    named = {stack.key: stack for stack in stacks}
    if key is not None:
        real = model.config.attribute_map.get(key, key)
        if real in named:
            return named[real]
        raise MergeError(
            f"{model.source}: no stack of blocks is counted by {key!r}{nearest(key, list(named))}: there is "
            f"{', '.join(named) or 'none'}"
        )
    main = model.config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if len(stacks) == 1:
        return stacks[0]
    if main in named and not model.config.is_encoder_decoder:
        return named[main]
    if not stacks:
        raise MergeError(f"{model.source}: its config has no number that counts its blocks: they cannot be moved")
    raise MergeError(f"{model.source} has several stacks of blocks: say which with one of {', '.join(named)}")


def _check_range(source: BlockRange, stack: BlockStack, models: Mapping[str, SavedModel], path: str) -> None:
    if not 0 <= source.start < source.stop <= stack.size:
        raise MergeError(
            f"{path}: layer_range [{source.start}, {source.stop}] of {models[source.model].source}, which has blocks "
            f"0 to {stack.size - 1}: a range is [first, behind the last]"
        )


def _columns(
    ranges: Sequence[Sequence[BlockRange]], bases: Sequence[str | None]
) -> tuple[list[list[BlockRange]], list[BlockRange] | None]:
    """Return the sources of each stacked member, and those of the base."""
    of_base = None
    rest = [list(own) for own in ranges]
    if any(base is not None for base in bases):
        of_base = []
        for place, (own, base) in enumerate(zip(rest, bases, strict=True)):
            found = next((source for source in own if source.model == base), None)
            if found is None:
                raise MergeError(f"slices[{place}]: the base {base} is none of its sources: name its layer_range too")
            own.remove(found)
            of_base.append(found)
    counts = {len(own) for own in rest}
    if len(counts) != 1 or counts == {0}:
        listed = ", ".join(str(len(own)) for own in rest)
        raise MergeError(f"slices: each needs as many sources to merge as the others, got {listed}")
    return [[own[place] for own in rest] for place in range(counts.pop())], of_base


def _stacked(
    column: Sequence[BlockRange], models: Mapping[str, SavedModel], stacks: Mapping[str, BlockStack]
) -> CheckpointReader:
    """Present the blocks of one column, and what is around them, as one model."""
    origins: dict[str, tuple[CheckpointReader, str]] = {}
    head, tail = models[column[0].model], models[column[-1].model]
    after = _names_after(tail, stacks[column[-1].model]) if tail is not head else frozenset()
    for name in head.reader:
        if stacks[column[0].model].place(name) is None and name not in after:
            origins[name] = (head.reader, name)
    number = 0
    for source in column:
        model, stack = models[source.model], stacks[source.model]
        by_block: dict[int, list[tuple[str, str, str]]] = {}
        for name in model.reader:
            place = stack.place(name)
            if place is not None:
                by_block.setdefault(place[1], []).append((name, place[0], place[2]))
        for old in range(source.start, source.stop):
            for name, prefix, rest in by_block.get(old, ()):
                origins[f"{prefix}{number}.{rest}"] = (model.reader, name)
            number += 1
    for name in tail.reader if after else ():
        if name in after:
            origins[name] = (tail.reader, name)
    sources = " + ".join(f"{models[s.model].source}[{s.start}:{s.stop}]" for s in column)
    layout = {new: reader.layout[old] for new, (reader, old) in origins.items()}

    def read(new: str) -> Tensor:
        reader, old = origins[new]
        return reader[old]

    def read_piece(new: str, start: int, stop: int) -> Tensor:
        reader, old = origins[new]
        return reader.piece(old, start, stop)

    return CheckpointReader(sources, layout, read, {}, read_piece)


def _check_fits(
    reader: CheckpointReader,
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    like: SavedModel,
    stack: BlockStack,
) -> None:
    """Refuse a stack the config cannot describe: where the kind of a block follows from its number."""
    try:
        validate_config(config)
        expected = shapes_on_disk(model_class, config)
        built = skeleton(model_class, config)
    except UNFIT as error:
        reason = " ".join(str(error).split())
        raise MergeError(
            f"{reader.source}: no config of {model_class.__name__} describes this stack: {reason}"
        ) from error
    saved = names_on_disk(built, saved_names(built))
    missing = [name for name in saved if name not in reader and (stack.place(name) or name in like.reader)]
    extra = [name for name in reader if name not in expected]
    shapes = [name for name in reader if name in expected and reader.shape(name) != expected[name]]
    parts = [
        f"{len(names)} {what} (first {names[0]!r})"
        for what, names in (("missing", missing), ("left over", extra), ("of another shape", shapes))
        if names
    ]
    if parts:
        raise MergeError(
            f"{reader.source}: no config of {model_class.__name__} describes this stack, tensors would be "
            f"{', '.join(parts)}: the models differ in width, or the kind of a block follows from its number"
        )


def _positions(
    reader: CheckpointReader, stack: BlockStack, column: Sequence[BlockRange], after: frozenset[str]
) -> dict[str, tuple[int, float]]:
    places = [
        (number, offset / (len(source) - 1) if len(source) > 1 else 1.0)
        for number, source in enumerate(column)
        for offset in range(len(source))
    ]
    last = len(column) - 1
    positions = {}
    for name in reader:
        place = stack.place(name)
        positions[name] = places[place[1]] if place is not None else (last if name in after else 0, 0.0)
    return positions


def _names_after(model: SavedModel, stack: BlockStack) -> frozenset[str]:
    built = skeleton(model.model_class, model.config)
    on_disk = disk_name_of(built)
    order = _order_of_calls(built) or {name: place for place, name in enumerate(built.state_dict())}
    inside = [order[name] for name, disk in on_disk.items() if disk is not None and stack.place(disk) is not None]
    begin = min(inside, default=len(order))
    outside = [(name, disk) for name, disk in on_disk.items() if disk is not None and stack.place(disk) is None]
    return frozenset(disk for name, disk in outside if order[name] > begin)


def _order_of_calls(model: PreTrainedModel) -> dict[str, int] | None:
    """Return name of a tensor -> when the module it belongs to is first called; null where the model cannot be run.

    A tensor of a module that is never called itself counts with the nearest one around it that is.
    """
    inputs = _empty_inputs(model)
    called: dict[str, int] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any) -> None:
            called.setdefault(name, len(called))

        return hook

    handles = [module.register_forward_pre_hook(note(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model.eval()(**inputs)
    except UNFIT:
        return None
    finally:
        for handle in handles:
            handle.remove()
    order = {}
    for name in model.state_dict():
        owner = name.rpartition(".")[0]
        while owner not in called and owner:
            owner = owner.rpartition(".")[0]
        order[name] = called.get(owner, 0)
    return order


def _empty_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return inputs without storage for what a model's forward takes: tokens, pictures, sounds."""
    takes = inspect.signature(model.forward).parameters
    inputs: dict[str, Tensor] = {}
    tokens = torch.zeros((1, 4), dtype=torch.int64, device="meta")
    if "input_ids" in takes:
        inputs["input_ids"] = tokens
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = tokens
    vision = getattr(model.config, "vision_config", model.config)
    if "pixel_values" in takes and getattr(vision, "image_size", None):
        height, width = [vision.image_size] * 2 if isinstance(vision.image_size, int) else vision.image_size
        frames = [vision.num_frames] if getattr(vision, "num_frames", None) else []
        inputs["pixel_values"] = torch.zeros((1, *frames, vision.num_channels, height, width), device="meta")
    if "input_values" in takes:
        inputs["input_values"] = torch.zeros((1, 16000), device="meta")
    return inputs
