"""Models from recipes: fresh ones, parents with another head, adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_zoo.errors import ModelError, nearest
from hf_zoo.heads import head_names, prefix_of, trunk_module
from hf_zoo.parents import load_trunk
from hf_zoo.recipe.grid import seeds_of
from hf_zoo.recipe.schema import AdapterSpec, ModelSpec, TrainRecipe
from hf_zoo.seeding import seeded

AUTO_CLASSES = {
    "image_classification": "AutoModelForImageClassification",
    "contrastive": "AutoModelForImageClassification",
    "masked_lm": "AutoModelForMaskedLM",
    "sequence_classification": "AutoModelForSequenceClassification",
}
BIAS_INIT = 0.01
# What libraries raise at a config whose fields do not go together.
REFUSALS = (
    ArithmeticError,
    AssertionError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Demands:
    """What data and objective ask of a model.

    Attributes:
        labels: Names of the classes, in the order of the logits; empty for a language model.
        num_outputs: Width of the head.
        image_size: Height and width in pixels; null for text.
        num_channels: Channels of an image; null for text.
        mean: Mean a channel the images are normalised with.
        std: Standard deviation a channel.
        vocab_size: Size of the vocabulary; null for images.
        pad_token_id: The padding token; null for images.
        max_length: Longest sequence in tokens; null for images.
    """

    labels: tuple[str, ...] = ()
    num_outputs: int = 0
    image_size: tuple[int, int] | None = None
    num_channels: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    vocab_size: int | None = None
    pad_token_id: int | None = None
    max_length: int | None = None


@dataclass(frozen=True)
class BuiltModel:
    """A model ready to train.

    Attributes:
        model: The model, on the CPU, in training mode.
        loading: What came from where, for the manifest: `loaded`, `fresh`, `dropped` (numbers of tensors and the
            names of the modules), or `init` of a fresh model.
    """

    model: PreTrainedModel
    loading: dict[str, Any]


def build_model(recipe: TrainRecipe, demands: Demands, parent: Path | None) -> BuiltModel:
    """Build the model of one member.

    The trunk's initial weights depend on the `init` seed alone, the head's on the `head` seed alone.

    Args:
        recipe: The member's own recipe.
        demands: What data and objective ask of the model.
        parent: Folder with the parent's weights; null for a fresh model.

    Raises:
        ModelError: If the model type or a config key is unknown, or the parent does not fit.
        CheckpointError: If the parent's weights are damaged.
    """
    seeds = seeds_of(recipe)
    config = _config(recipe, demands, parent)
    try:
        with seeded(seeds["init"]):
            model = _instantiate(recipe, config)
            _initialise(model, recipe.model.init, list(model.named_modules()))
        with seeded(seeds["head"]):
            _draw_head(model, recipe)
    except REFUSALS as error:
        raise ModelError(
            f"model: {_type_name(config)} cannot be built for {recipe.objective.name}: {first_line(error)}"
        ) from error
    loading: dict[str, Any] = {"init": recipe.model.init}
    if parent is not None:
        loading = load_trunk(model, parent, recipe)
    if recipe.model.adapter is not None:
        with seeded(seeds["head"]):
            model = _adapt(model, recipe.model.adapter, loading.get("fresh", []))
    elif recipe.model.freeze_encoder:
        head = set(head_names(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head)
    return BuiltModel(model, loading)


def _config(recipe: TrainRecipe, demands: Demands, parent: Path | None) -> PreTrainedConfig:
    spec = recipe.model
    if parent is not None:
        config = _trunk_config(AutoConfig.from_pretrained(parent, trust_remote_code=False))
        if spec.type is not None and spec.type != _type_name(config):
            raise ModelError(
                f"model.type is {spec.type!r}, but the parent {recipe.parent} is a {_type_name(config)!r}: "
                "leave model.type out, or choose a parent of that architecture"
            )
    else:
        config = _fresh_config(spec, demands)
    for key, value in spec.config.items():
        _check_config_key(config, key)
        # What decides every shape is not set over a parent or a tokenizer, only compared with them.
        if key == "vocab_size" and demands.vocab_size not in (None, value):
            raise ModelError(f"model.config.vocab_size is {value}, but the tokenizer has {demands.vocab_size} tokens")
        if key in ("architecture", "model_args"):
            if parent is not None and getattr(config, key) != value:
                theirs = f"the parent {recipe.parent} has {getattr(config, key)!r}"
                raise ModelError(f"model.config.{key} is {value!r}, but {theirs}: leave it out")
            continue
        _set_config_key(config, key, value)
    if demands.labels:
        config.id2label = dict(enumerate(demands.labels))
        config.label2id = {label: index for index, label in enumerate(demands.labels)}
    elif demands.num_outputs:
        config.num_labels = demands.num_outputs
    if demands.vocab_size is not None and parent is None:
        config.vocab_size, config.pad_token_id = demands.vocab_size, demands.pad_token_id
    longest = getattr(config, "max_position_embeddings", None)
    if demands.max_length and longest and demands.max_length > longest:
        raise ModelError(
            f"data.max_length is {demands.max_length}, but {_type_name(config)} has positions for {longest}: "
            "lower it, or raise model.config.max_position_embeddings"
        )
    return config


def _type_name(config: PreTrainedConfig) -> str:
    return "timm" if config.model_type == "timm_wrapper" else config.model_type


def _trunk_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the stock config behind a multi-layer head, or the config itself."""
    return config.stock_config() if config.model_type == "zoo_mlp_head" else config


def _fresh_config(spec: ModelSpec, demands: Demands) -> PreTrainedConfig:
    assert spec.type is not None
    if spec.type == "timm":
        return _timm_config(spec, demands)
    if spec.type not in CONFIG_MAPPING:
        known = [*CONFIG_MAPPING.keys(), "timm"]
        raise ModelError(f"model.type: unknown model {spec.type!r}{nearest(spec.type, known)}")
    default = AutoConfig.for_model(spec.type)
    for key in spec.config:
        _check_config_key(default, key)
    values = dict(spec.config)
    if demands.image_size is not None:
        height, width = demands.image_size
        for key, value in (
            ("image_size", height if height == width else [height, width]),
            ("num_channels", demands.num_channels),
        ):
            if hasattr(default, key):
                values.setdefault(key, value)
    try:
        return AutoConfig.for_model(spec.type, **values)
    except REFUSALS as error:
        raise ModelError(f"model.config: {spec.type} refuses it: {first_line(error)}") from error


def _check_config_key(config: PreTrainedConfig, key: str) -> None:
    if not hasattr(config, key):
        known = [name for name in config.to_dict() if not name.startswith("_")]
        raise ModelError(f"model.config.{key}: {_type_name(config)} has no such field{nearest(key, known)}")


def _set_config_key(config: PreTrainedConfig, key: str, value: Any) -> None:
    try:
        setattr(config, key, value)
    except REFUSALS as error:
        raise ModelError(f"model.config.{key}: {_type_name(config)} refuses it: {first_line(error)}") from error


def _timm_config(spec: ModelSpec, demands: Demands) -> PreTrainedConfig:
    import timm

    unknown = sorted(set(spec.config) - {"architecture", "model_args"})
    if unknown:
        raise ModelError(f"model.config.{unknown[0]}: timm takes `architecture` and `model_args` only")
    name = spec.config.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        raise ModelError(
            f"model.config.architecture: unknown timm model {name!r}{nearest(str(name), timm.list_models())}"
        )
    assert demands.image_size is not None
    arguments = dict(spec.config.get("model_args", {}))
    if demands.num_channels != 3:
        arguments.setdefault("in_chans", demands.num_channels)
    pretrained = {
        "input_size": [demands.num_channels, *demands.image_size],
        "mean": list(demands.mean),
        "std": list(demands.std),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "num_classes": demands.num_outputs,
    }
    return AutoConfig.for_model("timm_wrapper", architecture=name, model_args=arguments, pretrained_cfg=pretrained)


def _instantiate(recipe: TrainRecipe, config: PreTrainedConfig) -> PreTrainedModel:
    head = recipe.model.head
    if head.type == "mlp":
        config = _mlp_head_config(recipe, config)
    auto_class = getattr(transformers, AUTO_CLASSES[recipe.objective.name])
    model = auto_class.from_config(config)
    _restore_timm_init(model)
    return model


def first_line(error: Exception) -> str:
    """Return what a library's error says, on one line; of a failed look-up also that it is one."""
    if isinstance(error, StrictDataclassError):
        return " ".join(str(error).split())
    said = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else ""
    return f"{type(error).__name__} {said}".rstrip() if isinstance(error, LookupError) or not said else said


def _mlp_head_config(recipe: TrainRecipe, config: PreTrainedConfig) -> PreTrainedConfig:
    from hf_zoo.models.mlp_head import MlpHeadConfig

    if recipe.objective.name == "masked_lm":
        raise ModelError("model.head.type: `mlp` goes with a classification or contrastive objective, not masked_lm")
    return MlpHeadConfig(
        classifier=config.to_dict(),
        hidden=recipe.model.head.hidden,
        head_dropout=recipe.model.head.dropout,
        id2label=config.id2label,
        label2id=config.label2id,
    )


def _restore_timm_init(model: PreTrainedModel) -> None:
    """Give timm networks timm's own initial weights, which the wrapper overwrites with its generic scheme."""
    net = getattr(model, "timm_model", None)
    if net is None:
        return
    import timm

    config = model.config
    arguments = config.model_args or {}
    own = timm.create_model(config.architecture, num_classes=config.num_labels, **arguments)
    net.load_state_dict(own.state_dict())


def _initialise(model: nn.Module, scheme: str, modules: list[tuple[str, nn.Module]]) -> None:
    """Draw every linear and convolution weight by a scheme of `torch.nn.init`, and set their biases to 0.01."""
    if scheme == "default":
        return
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    draw = getattr(nn.init, f"{scheme}_")
    for _, module in modules:
        # A decoder tied to the token embedding is that embedding: it keeps the library's own scheme.
        if isinstance(module, nn.Linear | nn.Conv2d) and id(module.weight) not in embeddings:
            draw(module.weight)
            if module.bias is not None:
                nn.init.constant_(module.bias, BIAS_INIT)


def _draw_head(model: PreTrainedModel, recipe: TrainRecipe) -> None:
    """Draw the head again, so that it depends on its own seed alone."""
    head = set(head_names(model))
    modules = [(name, m) for name, m in model.named_modules() if any(_owns(name, key) for key in head)]
    modules = [(name, module) for name, module in modules if not _holds_trunk(name, model, head)]
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for _, module in modules:
        own = list(module.parameters(recurse=False))
        if any(id(parameter) in tied for parameter in own):
            continue
        if hasattr(model, "timm_model") and hasattr(module, "reset_parameters"):
            _draw_as_linear(module)
            continue
        # transformers skips what it has marked as initialised.
        for marked in (module, *own):
            if hasattr(marked, "_is_hf_initialized"):
                del marked._is_hf_initialized
        model._init_weights(module)
    _initialise(model, recipe.model.init, modules)


def _draw_as_linear(module: nn.Module) -> None:
    """Draw a timm classifier as timm's own models do: N(0, 0.02) truncated at two deviations, zero bias."""
    for name, parameter in module.named_parameters(recurse=False):
        if name == "bias":
            nn.init.zeros_(parameter)
        else:
            nn.init.trunc_normal_(parameter, std=0.02)


def _owns(module_name: str, key: str) -> bool:
    return key.rpartition(".")[0] == module_name


def _holds_trunk(name: str, model: nn.Module, head: set[str]) -> bool:
    """Whether a module's own tensors are not all of the head."""
    own = [f"{name}.{key}" if name else key for key, _ in model.get_submodule(name).named_parameters(recurse=False)]
    return not all(key in head for key in own)


def _adapt(model: PreTrainedModel, spec: AdapterSpec, fresh: list[str]) -> PreTrainedModel:
    """Put an adapter around a model; whatever the parent does not have is trained and saved whole beside it."""
    from peft import LoraConfig, get_peft_model

    whole = sorted({_child_of(model, name) for name in fresh})
    targets: Any = spec.target_modules
    if isinstance(targets, tuple):
        linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        unknown = [name for name in targets if name.rpartition(".")[2] not in linear]
        if unknown:
            hint = nearest(unknown[0], sorted(linear)) or f": known are {', '.join(sorted(linear))}"
            raise ModelError(f"model.adapter.target_modules: no linear layer is called {unknown[0]!r}{hint}")
        targets = list(targets)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        modules_to_save=whole,
        exclude_modules=whole,
    )
    return cast(PreTrainedModel, get_peft_model(model, config))  # it answers like one


def _child_of(model: PreTrainedModel, name: str) -> str:
    """Return the last part of the outermost module name that peft finds modules by: `classifier`, `pooler`."""
    prefix = prefix_of(model, trunk_module(model))
    return name.removeprefix(prefix).partition(".")[0]


def num_parameters(model: nn.Module) -> int:
    """Return the number of parameters, tied ones once."""
    return sum(math.prod(parameter.shape) for parameter in model.parameters())
