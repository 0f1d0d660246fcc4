"""Tiny real models as members, saved by transformers."""

import pytest
import torch
import transformers

from hf_zoo.checkpoint import CheckpointReader

BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
VISION = {"image_size": 8, "patch_size": 4, "num_channels": 1}
FAMILIES = {
    "bert": ("BertForSequenceClassification", BODY | {"vocab_size": 40, "max_position_embeddings": 24}),
    "vit": ("ViTForImageClassification", BODY | VISION | {"num_labels": 3}),
    # BatchNorm: integer counters, and buffers
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_channels": 1},
    ),
    # a tied output layer
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
        | {"bos_token_id": 1, "eos_token_id": 1},
    ),
}


def make_model(family, seed):
    """Return a model whose every tensor was drawn: fresh biases and counters would make all members alike there."""
    architecture, fields = FAMILIES[family]
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(transformers.AutoConfig.for_model(family, **fields))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(
                    torch.rand(tensor.shape) if name.endswith("running_var") else 0.1 * torch.randn(tensor.shape)
                )
            else:
                tensor.fill_(100 + seed)
    return model.eval()


@pytest.fixture(scope="session")
def member_folder(tmp_path_factory):
    """Return a function (family, seed) -> the folder of a saved member; made once a session."""
    made = {}

    def folder(family, seed, **options):
        key = (family, seed, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}-{seed}")
            options = dict(options)
            model = make_model(family, seed).to(options.pop("dtype", torch.float32))
            model.save_pretrained(made[key], **options)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def reader(member_folder):
    """Return a function (family, seed) -> a reader of that member's weights."""

    def opened(family, seed, **options):
        return CheckpointReader.open(member_folder(family, seed, **options), f"org/{family}-{seed}")

    return opened
