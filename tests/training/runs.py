"""Tiny recipes of every kind, and ways to run and to kill them."""

import os
import signal

import torch

from hf_zoo.recipe.loader import build_recipe
from hf_zoo.recipe.schema import PretrainRecipe
from hf_zoo.training.engine import train_population
from hf_zoo.training.preparing import known_tables

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
VIT = {"type": "vit", "config": {**SMALL, "patch_size": 4, "hidden_dropout_prob": 0.1}}
BERT = {"type": "bert", "config": SMALL}
TIMM = {"type": "timm", "config": {"architecture": "resnet10t"}}
DIGITS = {"path": "digits", "num_train": 96, "num_eval": 32}
DOCS = {"path": "docs", "num_train": 24, "num_eval": 16, "max_length": 32}
SENTENCES = {"path": "docs-sentences", "num_train": 96, "num_eval": 32, "max_length": 32}
TRAINING = {"epochs": 2, "batch_size": 16}
TOKENIZER = {"vocab_size": 300}

KINDS = {
    "vit": {"model": VIT, "data": DIGITS, "objective": "image_classification", "augmentation": {"mixup": 0.5, "crop": "pad"}},
    "timm": {"model": TIMM, "data": {**DIGITS, "image_size": 32}, "objective": "image_classification"},
    "contrastive": {"model": VIT, "data": DIGITS, "objective": "contrastive", "augmentation": {"crop": "resized", "flip": 0.5}},
    "bert": {"model": BERT, "data": DOCS, "objective": "masked_lm", "tokenizer": TOKENIZER},
    "mlp": {"model": {**VIT, "head": {"type": "mlp", "hidden": [8], "dropout": 0.2}}, "data": DIGITS,
            "objective": "image_classification"},
}  # fmt: skip


class Quiet:
    """Hear of a population's progress, and on request do something at a step."""

    def __init__(self, at_step=None, act=None):
        self.at_step, self.act = at_step, act
        self.failures = {}
        self.trained = []

    def begin(self, folder, plans, finished):
        pass

    def member(self, plan):
        self.trained.append(plan.name)

    def step(self, done, total):
        if done == self.at_step:
            self.act()

    def finished(self, manifest):
        pass

    def failed(self, plan, reason):
        self.failures[plan.name] = reason


def make_recipe(kind, output, recipe_class=PretrainRecipe, **keys):
    content = {"name": "zoo", "output": str(output), "training": TRAINING, **KINDS[kind]} | keys
    return build_recipe(content, recipe_class, "test")


def kill_at(recipe, step):
    """Run a recipe in a process of its own that is killed when it has done a number of steps."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        known_tables.clear()  # what it has in memory must not reach the run that goes on
        try:
            train_population(recipe, Quiet(step, lambda: os.kill(os.getpid(), signal.SIGKILL)))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def bytes_of(folder):
    """Return the content of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
