"""Configs of models, nested ones too: looked into and changed by dotted paths (`text_config.vocab_size`)."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig


def config_numbers(config: PreTrainedConfig) -> dict[str, int]:
    """Return dotted path -> value of every positive whole number of a config and of those nested in it."""
    return {
        key: value
        for key, value in config_fields(config)
        if type(value) is int and value > 0 and not last_name(key)[0] == "_"
    }


def config_fields(config: PreTrainedConfig, owner: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted path and value of every field of a config and of those nested in it.

    Args:
        config: The config.
        owner: What the paths begin with.
    """
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from config_fields(value, f"{owner}{name}.")
        else:
            yield owner + name, value


def config_value(config: Any, path: str) -> Any:
    """Return the value at a dotted path; the config itself for an empty one."""
    for name in path.split(".") if path else ():
        config = getattr(config, name)
    return config


def last_name(path: str) -> str:
    """Return the last name of a dotted path."""
    return path.rpartition(".")[2]


def text_config(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """Return the part of a config that is about text; null where there are several."""
    try:
        return config.get_text_config()
    except ValueError:  # several text models under one roof
        return None


def changed_config(config: PreTrainedConfig, changes: Mapping[str, Any]) -> PreTrainedConfig:
    """Return a copy of a config with other values.

    Args:
        config: The config.
        changes: Dotted path -> value.
    """
    config = copy.deepcopy(config)
    for key, value in changes.items():
        owner, _, name = key.rpartition(".")
        setattr(config_value(config, owner), name, value)
    return config


def changed_content(
    content: Mapping[str, Any], changes: Mapping[str, Any], config: PreTrainedConfig
) -> dict[str, Any]:
    """Return the content of a `config.json` with other values.

    Args:
        content: The content, as it was written.
        changes: Dotted path -> value; a section that is missing is made.
        config: The config it loads as, which knows under which further names a value may be written.
    """
    changed: dict[str, Any] = json.loads(json.dumps(content))
    for key, value in changes.items():
        owner, _, name = key.rpartition(".")
        section = changed
        for part in owner.split(".") if owner else ():
            section = section.setdefault(part, {})
        section[name] = value
        for alias, meant in config_value(config, owner).attribute_map.items():
            if meant == name and alias in section:
                section[alias] = value
    return changed


def validate_config(config: PreTrainedConfig) -> None:
    """Run a config's own checks, as loading it does.

    Raises:
        StrictDataclassError: If two of its fields contradict each other.
    """
    validate = getattr(config, "validate", None)
    if validate is not None:
        validate()
