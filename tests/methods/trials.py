"""Held-out data, of a few random samples, for the tiny members of `conftest.py`."""

import tempfile
from functools import cache
from pathlib import Path

import torch
from conftest import FAMILIES, make_model

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.ingredients import open_ingredient
from hf_zoo.recipe.schema import ObjectiveSpec
from hf_zoo.trials import Trial

NUM_SAMPLES = 6
_FOLDERS = tempfile.TemporaryDirectory(prefix="trials-")


def trial_of(ingredients, objective, samples, task="task", split="validation"):
    """Return a trial of opened members on samples: a list of mappings name -> tensor."""
    return Trial(
        task=task,
        members=tuple(ingredients),
        objective=ObjectiveSpec(name=objective),
        description={},
        tables={split: samples},
        collators={split: torch.utils.data.default_collate},
        batch_size=4,
        device="cpu",
    )


@cache
def family_trial(family):
    """Return a trial on which every member of a family can be measured."""
    folder = Path(_FOLDERS.name) / family
    make_model(family, 1).save_pretrained(folder)
    draw = torch.Generator().manual_seed(0)
    fields = FAMILIES[family][1]

    def sample():
        if "vocab_size" in fields:
            tokens = torch.randint(fields["vocab_size"], (5,), generator=draw)
            if family == "gpt2":
                return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
            return {"input_ids": tokens, "labels": torch.randint(2, (), generator=draw)}
        return {"pixel_values": torch.randn(1, 8, 8, generator=draw), "labels": torch.randint(2, (), generator=draw)}

    objective = {"gpt2": "masked_lm", "bert": "sequence_classification"}.get(family, "image_classification")
    return trial_of([open_ingredient(str(folder))], objective, [sample() for _ in range(NUM_SAMPLES)])


def trial_for(member):
    """Return the trial of the family a reader's tensors are of."""
    return next(
        trial
        for trial in map(family_trial, FAMILIES)
        if set(CheckpointReader.open(trial.members[0].folder)) == set(member)
    )
