"""Trunk and head of a model, read off the model itself, and what their tensors are called on disk.

The trunk is what `model.base_model` holds and `AutoModel` loads; the head is the rest. transformers saves some
families under older names than their modules have, leaves out tied tensors and splits or joins others. No table of
architectures is kept here: a skeleton without storage goes through the library's own way of saving.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.models.auto import modeling_auto

from hf_zoo.errors import ModelError, nearest
from hf_zoo.heads import skeleton, trunk_names, trunk_prefix, trunk_skeleton


@dataclass(frozen=True)
class Structure:
    """Which tensors of a saved model are trunk and which are head; names are names on disk.

    Attributes:
        architecture: The model's class.
        auto_class: The Auto class that loads it; null for a class no Auto class knows.
        trunk: Name of a trunk tensor -> its name where the trunk is saved alone.
        head: Names of the head's tensors, tied ones left out.
        absent: Tensors a trunk alone would have and this model has not, such as a pooler it does not use, as the
            trunk's modules have them.
        trunk_architecture: The trunk's class.
        trunk_config: The trunk's config, without labels.
    """

    architecture: str
    auto_class: str | None
    trunk: dict[str, str]
    head: tuple[str, ...]
    absent: tuple[str, ...]
    trunk_architecture: str
    trunk_config: PreTrainedConfig

    @classmethod
    def read(cls, folder: str | Path) -> Structure:
        """Read the structure of a saved model off its config; no weights are touched.

        Raises:
            ModelError: If the folder has no config, or its class is not known here.
        """
        model_class, config = class_of(folder)
        return cls.of(model_class, config)

    @classmethod
    def of(cls, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Structure:
        """Read the structure of a class with a config."""
        model = skeleton(model_class, config)
        trunk_model = trunk_skeleton(model)
        names, inside = saved_names(model), set(trunk_names(model, trunk_model))
        in_trunk = [name for name in names if name in inside]
        prefix = trunk_prefix(model)
        alone = _saved_under(trunk_model)
        have = {alone.get(name.removeprefix(prefix), name) for name in in_trunk}
        return cls(
            architecture=model_class.__name__,
            auto_class=auto_class_of(model_class, config),
            trunk=_names_alone(names_on_disk(model, in_trunk), prefix, trunk_model),
            head=tuple(names_on_disk(model, [name for name in names if name not in inside])),
            absent=tuple(name for name in saved_names(trunk_model) if name not in have),
            trunk_architecture=type(trunk_model).__name__,
            trunk_config=_without_labels(trunk_model.config, type(trunk_model)),
        )


def class_of(folder: str | Path) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Return the class and config a saved model loads as.

    Code that lies in a repo is never executed: a class from outside transformers must be one of `hf_zoo.models`.

    Raises:
        ModelError: If there is no config, or the class is not known here.
    """
    path = Path(folder) / "config.json"
    if not path.is_file() and (Path(folder) / "adapter_config.json").is_file():
        from hf_zoo.adapters import class_of_adapter

        return class_of_adapter(Path(folder))
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{folder}: no config.json: this is not a saved model") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from error
    architectures = content.get("architectures") or []
    if not architectures:
        raise ModelError(f"{path}: `architectures` is missing: save the model again with `save_pretrained`")
    model_class = find_class(architectures[0], str(path), _import_home(folder, content.get("auto_map") or {}))
    try:
        return model_class, AutoConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError, OSError, StrictDataclassError) as error:
        raise ModelError(f"{path}: not a config of {model_class.__name__}: {' '.join(str(error).split())}") from error


def find_class(name: str | None, source: str, home: Any = transformers) -> type[PreTrainedModel]:
    """Return a model's class by its name.

    Args:
        name: The class's name.
        source: Who names it, for the error.
        home: The module it is in.

    Raises:
        ModelError: If it is not there; names the nearest.
    """
    model_class = getattr(home, str(name), None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise ModelError(f"{source}: class {name!r} is not in {home.__name__}{nearest(str(name), dir(home))}")
    return model_class


def saved_names(model: PreTrainedModel) -> list[str]:
    """Return the names, as modules have them, of the tensors `save_pretrained` would save: tied ones once."""
    tensors = dict(model.state_dict())
    for name in model._keys_to_ignore_on_save or ():
        tensors.pop(name, None)
    return list(remove_tied_weights_from_state_dict(tensors, model))


def names_on_disk(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return what `save_pretrained` would call some of a model's tensors, in order.

    Args:
        model: A model, which may be a skeleton.
        names: Names as its modules have them. A tensor that is split or joined on disk needs its whole module here.
    """
    tensors: dict[str, Tensor] = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    return list(revert_weight_conversion(model, {name: tensors[name] for name in names}))


def disk_name_of(model: PreTrainedModel) -> dict[str, str | None]:
    """Return name as modules have it -> name on disk; null for a tensor that is split or joined on disk."""
    tensors: dict[str, Tensor] = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    names: dict[str, str | None] = {}
    for name in saved_names(model):
        converted = revert_weight_conversion(model, {name: tensors[name]})
        (only, *others) = converted
        whole = not others and converted[only].shape == tensors[name].shape
        names[name] = only if whole else None
    return names


def auto_class_of(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> str | None:
    """Return the name of the Auto class that loads a class, `AutoModel` for a trunk."""
    # Not dir(transformers): it takes as long as a small merge.
    auto_classes = [name for name in vars(modeling_auto) if name.startswith("AutoModel")]
    for name in sorted(auto_classes, key=lambda name: (name != "AutoModel", name)):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        if mapping is None or type(config) not in mapping:
            continue
        classes = mapping[type(config)]
        if model_class in (classes if isinstance(classes, tuple) else (classes,)):
            return name
    return None


def _names_alone(on_disk: list[str], prefix: str, trunk_model: PreTrainedModel) -> dict[str, str]:
    """Pair the names of trunk tensors inside a model with those of the trunk saved alone."""
    # A trunk alone may tie what is one tensor inside, such as a decoder's own and the shared embedding.
    inside = {prefix + name: saved for name, saved in _saved_under(trunk_model).items() if name != saved}
    inside |= {prefix + name: name for name in names_on_disk(trunk_model, saved_names(trunk_model))}
    trunk = {name: inside.get(name) for name in on_disk}
    if None in trunk.values() or len(set(trunk.values())) < len(trunk):
        # Another naming inside than alone: transformers itself loads a trunk from a whole model's names.
        return {name: name for name in on_disk}
    return {name: str(alone) for name, alone in trunk.items()}


def _saved_under(model: PreTrainedModel) -> dict[str, str]:
    """Return name -> the name, both as modules have them, its tensor is saved under: another one where it is tied."""
    tensors = model.state_dict(keep_vars=True)
    saved = {id(tensors[name]): name for name in saved_names(model)}
    return {name: saved[id(tensor)] for name, tensor in tensors.items() if id(tensor) in saved}


def _without_labels(config: PreTrainedConfig, model_class: type[nn.Module]) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    config.id2label = {0: "LABEL_0", 1: "LABEL_1"}  # the default, which is not written
    config.label2id = {"LABEL_0": 0, "LABEL_1": 1}
    config.problem_type = None
    config.architectures = [model_class.__name__]
    return config


def _import_home(folder: str | Path, auto_map: dict[str, Any]) -> Any:
    """Return the module a saved model's class is defined in."""
    if not auto_map:
        return transformers
    reference = next(iter(auto_map.values()))
    reference = reference[0] if isinstance(reference, list) else reference
    module = str(reference).rpartition("--")[2].split(".")[0]
    if not module.isidentifier() or find_spec(f"hf_zoo.models.{module}") is None:
        raise ModelError(
            f"{folder}: its class comes with code of its own ({reference}), which is not executed here: load it with "
            "`trust_remote_code=True` and save it as a stock class"
        )
    return import_module(f"hf_zoo.models.{module}")
