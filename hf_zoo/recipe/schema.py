"""What a recipe may say: one strict, frozen dataclass a verb, and the parts they share.

A key of the YAML file is a field here, a default here is the default there, and the type here is what the loader
coerces to. A section with a `SHORTHAND` may be written as that key's value alone: `objective: masked_lm`. Nothing in
this module reads a file or imports a library.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from hf_zoo.recipe.diagnostics import DiagnosticsSpec
from hf_zoo.recipe.forms import SliceSpec, VocabularySpec
from hf_zoo.recipe.search import SearchSpec
from hf_zoo.recipe.statistics import StatisticsSpec

Init = Literal["default", "xavier_uniform", "xavier_normal", "uniform", "normal", "kaiming_normal", "kaiming_uniform"]


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """The part of a model outside its trunk.

    Attributes:
        type: `linear` is the library's own head; `mlp` puts hidden layers before it and ships its code with the repo.
        hidden: Widths of the hidden layers, for `mlp` only.
        dropout: Dropout probability before each layer of an `mlp` head, in [0, 1).
        reuse: Keep the parent's head where its shapes fit, instead of a fresh one.
    """

    SHORTHAND: ClassVar[str] = "type"

    type: Literal["linear", "mlp"] = "linear"
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    reuse: bool = False


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """A low-rank adapter trained instead of the whole model (Hu et al. 2021, arXiv:2106.09685).

    Attributes:
        type: Only `lora`.
        rank: Rank of the update.
        alpha: The update is scaled by alpha / rank.
        dropout: Dropout probability on the adapter's input, in [0, 1).
        target_modules: Names of the linear layers to adapt, or `all-linear`.
    """

    SHORTHAND: ClassVar[str] = "type"

    type: Literal["lora"] = "lora"
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = "all-linear"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The network.

    Attributes:
        type: A transformers model type (`bert`, `vit`, `resnet`, ...) or `timm`; null takes the parent's.
        config: Fields of that type's config; for `timm`: `architecture` and, optionally, `model_args`.
        init: Scheme for every linear and convolution weight, their biases set to 0.01; `default` is the library's own.
        head: The head.
        freeze_encoder: Train the head alone.
        adapter: Train a low-rank adapter instead of the weights.
    """

    type: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    init: Init = "default"
    head: HeadSpec = field(default_factory=HeadSpec)
    freeze_encoder: bool = False
    adapter: AdapterSpec | None = None


@dataclass(frozen=True, kw_only=True)
class TokenizerSpec:
    """Where the tokens come from.

    Attributes:
        path: Folder or repo of a tokenizer; null takes the parent's, or trains WordPiece on the training text.
        vocab_size: Tokens of a vocabulary trained here.
        lowercase: Whether a vocabulary trained here folds case.
    """

    path: str | None = None
    vocab_size: int = 4096
    lowercase: bool = True


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The data of a recipe.

    Attributes:
        path: An embedded set (`digits`, `docs`, `docs-sentences`, `docs-pairs`, `docs-topics`), a folder or file
            (parquet, csv, json, text, image folder), or a Hub dataset id.
        name: Configuration of a Hub dataset.
        revision: Revision of a Hub dataset.
        train_split: Split to train on.
        validation_split: Split used for every choice; null carves `validation_fraction` off the training split.
        validation_fraction: Share of the training split held out where there is no validation split, in [0, 1).
        test_split: Split reported at the end and never used for a choice; null when there is none.
        text: Column of the text or of a pair's first text; null finds it.
        text_pair: Column of a pair's second text; null finds it.
        image: Column of the image; null finds it.
        label: Column of the label; null finds it.
        num_train: Use at most this many training samples (a seeded choice).
        num_eval: Use at most this many samples of each evaluation split (a seeded choice).
        max_length: Longest sequence in tokens.
        image_size: Height and width in pixels the images are brought to; null keeps theirs.
        split_seed: Seed of every choice made here.
    """

    SHORTHAND: ClassVar[str] = "path"

    path: str = "digits"
    name: str | None = None
    revision: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    validation_fraction: float = 0.1
    test_split: str | None = "test"
    text: str | None = None
    text_pair: str | None = None
    image: str | None = None
    label: str | None = None
    num_train: int | None = None
    num_eval: int | None = None
    max_length: int = 128
    image_size: int | None = None
    split_seed: int = 42


@dataclass(frozen=True, kw_only=True)
class AugmentationSpec:
    """Random changes of training images; each sample's draws depend on seed, epoch and index alone.

    Attributes:
        crop: `none`, `pad` (pad by an eighth, random crop) or `resized` (random area and aspect, then resized).
        flip: Probability of a horizontal flip.
        rotation: Largest rotation in degrees, either way.
        color_jitter: Strength of brightness, contrast, saturation (hue a fifth of it), applied with probability 0.8.
        grayscale: Probability of dropping colour.
        blur: Kernel size of a Gaussian blur in pixels, 0 for none.
        mixup: Alpha of mixup (Zhang et al. 2017, arXiv:1710.09412), 0 for none.
        cutmix: Alpha of CutMix (Yun et al. 2019, arXiv:1905.04899), 0 for none.
        label_smoothing: Share of the target spread over all classes, in [0, 1).
        random_erasing: Probability of erasing a rectangle (Zhong et al. 2017, arXiv:1708.04896).
    """

    crop: Literal["none", "pad", "resized"] = "none"
    flip: float = 0.0
    rotation: float = 0.0
    color_jitter: float = 0.0
    grayscale: float = 0.0
    blur: int = 0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    random_erasing: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """What is learned.

    Attributes:
        name: `image_classification`, `contrastive` (SimCLR, arXiv:2002.05709), `masked_lm` or
            `sequence_classification`.
        temperature: Temperature of NT-Xent, for `contrastive`.
        projection_dim: Outputs of the head, for `contrastive`.
        mlm_probability: Share of tokens masked, for `masked_lm`.
        mode: `scratch` starts from a fresh model, `continued` from the parent; for `masked_lm`.
    """

    SHORTHAND: ClassVar[str] = "name"

    name: Literal["image_classification", "contrastive", "masked_lm", "sequence_classification"]
    temperature: float = 0.07
    projection_dim: int = 128
    mlm_probability: float = 0.15
    mode: Literal["scratch", "continued"] = "scratch"


@dataclass(frozen=True, kw_only=True)
class SeedSpec:
    """Seeds of the separate sources of chance; null follows the recipe's `seed`.

    Each is spread over 31 bits by a hash with its own name, so that neighbouring seeds share nothing.

    Attributes:
        init: Initial weights of the trunk.
        head: Initial weights of the head.
        order: Order of the training samples.
        augmentation: Augmentation and masking draws.
        dropout: Dropout draws.
    """

    init: int | None = None
    head: int | None = None
    order: int | None = None
    augmentation: int | None = None
    dropout: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """How the weights move.

    Attributes:
        epochs: Passes over the training split.
        max_steps: Stop after this many optimizer steps instead; null for whole epochs.
        batch_size: Samples a device and forward pass.
        eval_batch_size: Samples a device and evaluation pass; null takes `batch_size`.
        accumulation: Batches summed before an optimizer step.
        optimizer: `adamw`, `adam` (decay added to the gradient) or `sgd`.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay.
        decay_all: Decay biases and normalisation weights too, as the published zoos do.
        betas: Decay rates of Adam's moments.
        momentum: Momentum of SGD.
        nesterov: Nesterov momentum for SGD.
        schedule: Course of the learning rate after the warm-up.
        warmup: Warm-up in steps, or as a share of all steps when below 1.
        max_grad_norm: Gradients are clipped to this norm; 0 for no clipping.
        precision: `fp32`, `bf16` or `fp16` mixed precision; null takes what `accelerate launch` was given.
        evaluate_train: Measure loss and metrics on the clean training samples after each epoch too.
        report_to: Trackers, passed to the Trainer.
        arguments: Further `transformers.TrainingArguments`, passed through.
    """

    epochs: int = 1
    max_steps: int | None = None
    batch_size: int = 32
    eval_batch_size: int | None = None
    accumulation: int = 1
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    decay_all: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.0
    nesterov: bool = False
    schedule: Literal["constant", "linear", "cosine", "one_cycle"] = "constant"
    warmup: float = 0.0
    max_grad_norm: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    evaluate_train: bool = True
    report_to: tuple[str, ...] | str = "none"
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SnapshotSpec:
    """Which moments of the training are kept, each a revision of the member's repo.

    The untrained network (step 0) and the last step are kept whenever anything is.

    Attributes:
        every_epochs: Keep every k-th epoch; null for none.
        every_steps: Keep every k-th optimizer step; null for none.
        log_spaced: Keep this many steps at equal distances on a logarithmic scale; null for none.
        keep_last: Keep only the last n of those above; null keeps all.
        best: Also keep the best epoch by this validation metric, under the revision `best`; null for none.
        initial: Keep the untrained network too.
    """

    every_epochs: int | None = 1
    every_steps: int | None = None
    log_spaced: int | None = None
    keep_last: int | None = None
    best: str | None = None
    initial: bool = True


@dataclass(frozen=True, kw_only=True)
class PublishSpec:
    """How a population or a merge appears on a Hub.

    Attributes:
        namespace: User or organisation; null publishes nothing during training.
        private: Whether new repos and the collection are private.
        snapshots: Push every snapshot as a branch.
        collection: Title of the collection; null takes the population's name.
        license: Licence on the cards, as the Hub spells it.
        language: Language codes on the cards.
        workers: Members pushed at the same time.
    """

    namespace: str | None = None
    private: bool = True
    snapshots: bool = True
    collection: str | None = None
    license: str | None = None
    language: tuple[str, ...] = ()
    workers: int = 4


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """A population trained by `hf_zoo.pretrain` or `hf_zoo.finetune`.

    Attributes:
        name: Name of the population; member i is `NAME-i` with three digits or more.
        output: Folder the population lies in: `OUTPUT/NAME`.
        description: One sentence for the cards.
        objective: What is learned.
        task: Short name of what the members can do (`sst`, `mnli`); null takes the data's name.
        parent: The model to start from: a member's folder, `org/name`, or either with `@revision`.
        model: The network.
        tokenizer: The tokenizer, for text.
        data: The data.
        augmentation: Random changes of training images.
        training: How the weights move.
        snapshots: Which moments are kept.
        seed: The seed that every unset entry of `seeds` follows.
        seeds: Seeds of the separate sources of chance.
        vary: Generating factors: dotted path -> list of values; a list of mappings moves several paths together.
        members: Train only these: `3`, `0:8` or `0,4,7`; null for all.
        publish: How the population appears on a Hub.
        statistics: What is measured at the end of training and kept beside the weights; null for nothing.
    """

    name: str
    output: str = "runs"
    description: str = ""
    objective: ObjectiveSpec
    task: str | None = None
    parent: str | None = None
    model: ModelSpec = field(default_factory=ModelSpec)
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)
    data: DataSpec = field(default_factory=DataSpec)
    augmentation: AugmentationSpec = field(default_factory=AugmentationSpec)
    training: TrainingSpec = field(default_factory=TrainingSpec)
    snapshots: SnapshotSpec = field(default_factory=SnapshotSpec)
    seed: int = 0
    seeds: SeedSpec = field(default_factory=SeedSpec)
    vary: dict[str, Any] = field(default_factory=dict)
    members: str | None = None
    publish: PublishSpec = field(default_factory=PublishSpec)
    statistics: StatisticsSpec | None = None


@dataclass(frozen=True, kw_only=True)
class PretrainRecipe(TrainRecipe):
    """A recipe of `hf_zoo.pretrain`: `model.type` is required unless there is a parent to continue."""


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(TrainRecipe):
    """A recipe of `hf_zoo.finetune`: every member has a `parent`."""


@dataclass(frozen=True, kw_only=True)
class MergeRule:
    """Tensors that are merged otherwise than the rest.

    Attributes:
        tensors: Which: `embeddings` (all before the first block), `heads`, `blocks`, `block 3`, `blocks 0-3`, or a
            regular expression, searched in the tensors' names.
        method: Merge them by this method; null for the recipe's.
        parameters: Its hyper-parameters; with the recipe's method, those that differ.
        keep: Do not merge them: `base`, or the place of the member they are taken from, the first being 0.
    """

    tensors: str
    method: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    keep: int | Literal["base"] | None = None


@dataclass(frozen=True, kw_only=True)
class MergeRecipe:
    """A merge made by `hf_zoo.merge`.

    Attributes:
        name: Name of the merged model and of its repo; null makes one of method and tasks.
        output: Folder the merge lies in: `OUTPUT/NAME`.
        description: One sentence for the card.
        members: The models to merge: folders or `org/name`, each also with `@revision` and `#subfolder`.
        population: Where to look for members when `tasks` are given: a population's folder or `org/name`.
        tasks: Merge the best member of each of these tasks.
        where: Factors the members found for `tasks` must have.
        method: A file name of `hf_zoo/methods`; `all` tries every one that can be, and makes the best.
        parameters: The method's hyper-parameters: a number, a list with one value a member, or a mapping that makes it
            vary over the network (`blocks: [0.1, 0.9]`, `embeddings`, `heads`, a regular expression, `otherwise`).
        rules: Tensors that are merged otherwise; the first rule that fits a tensor counts.
        extras: Tensors only some members have: `refuse` them, `keep` their mean over those that have them, or `drop`.
        lineage: When members do not seem to come from one model: `warn` with numbers, `refuse`, or `ignore` it.
        base: The model all members were trained from; null takes it from their manifests.
        slices: Blocks the model is stacked of, from the first to the last; empty merges the members block by block.
        stack: Which blocks `slices` speaks of, by the config's number that counts them; null where there is one kind.
        tokenizer: Which tokens the merge knows where the members' differ: `same`, `base`, `union` or a member.
        heads: `per_task` keeps each in a sub-folder, `merge` averages those of one label space; null decides by tasks.
        dtype: Type of the written weights; null keeps the members'.
        compute_dtype: Type to compute in.
        device: Where to compute: `cpu`, `cuda`, `cuda:1`.
        num_threads: Threads on the CPU; null for one a core. The result does not depend on it.
        max_shard_size: Largest weights file, in gigabytes.
        data: Task -> the data to evaluate it on; tasks not named are evaluated on their members' own data.
        evaluate: Evaluate the merge and its parents on every task.
        ensembles: With `evaluate`, also measure the ensembles of each task's members, at one more pass of them.
        eval_batch_size: Samples an evaluation pass.
        num_eval: Use only this many samples of each split.
        seed: Seed of methods that draw.
        search: Hyper-parameters to find by the validation splits before the merge is made; null for none.
        joint: With `method: all`, a model trained on all tasks, to compare with.
        diagnostics: What is measured of the merge beside its scores.
        publish: How the merge appears on a Hub.
    """

    name: str | None = None
    output: str = "runs/merges"
    description: str = ""
    members: tuple[str, ...] = ()
    population: str | None = None
    tasks: tuple[str, ...] = ()
    where: dict[str, Any] = field(default_factory=dict)
    method: str = "average"
    parameters: dict[str, Any] = field(default_factory=dict)
    rules: tuple[MergeRule, ...] = ()
    extras: Literal["refuse", "keep", "drop"] = "refuse"
    lineage: Literal["warn", "refuse", "ignore"] = "warn"
    base: str | None = None
    slices: tuple[SliceSpec, ...] = ()
    stack: str | None = None
    tokenizer: VocabularySpec | None = None
    heads: Literal["per_task", "merge"] | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    compute_dtype: Literal["float32", "float64"] = "float32"
    device: str = "cpu"
    num_threads: int | None = None
    max_shard_size: float = 50.0
    data: dict[str, DataSpec] = field(default_factory=dict)
    evaluate: bool = True
    ensembles: bool = False
    eval_batch_size: int = 64
    num_eval: int | None = None
    seed: int = 0
    search: SearchSpec | None = None
    joint: str | None = None
    diagnostics: DiagnosticsSpec = field(default_factory=DiagnosticsSpec)
    publish: PublishSpec = field(default_factory=PublishSpec)
