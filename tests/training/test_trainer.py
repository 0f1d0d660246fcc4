"""ZooTrainer against loops written by hand and torch's own schedules."""

import copy
import itertools
import json

import pytest
import torch

from hf_zoo.errors import CheckpointError
from hf_zoo.losses import compute_loss
from hf_zoo.recipe.grid import expand, seeds_of, spread_seed
from hf_zoo.recipe.schema import SnapshotSpec
from hf_zoo.training.arguments import training_arguments
from hf_zoo.training.engine import train_population
from hf_zoo.training.preparing import prepare
from hf_zoo.training.snapshots import latest_checkpoint, log_spaced, snapshot_steps
from hf_zoo.training.trainer import ZooTrainer, load_strictly
from runs import DIGITS, Quiet, make_recipe

SGD = {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01, "decay_all": True}


def make_trainer(tmp_path, kind="vit", **training):
    recipe = make_recipe(kind, tmp_path, training={"epochs": 1, "batch_size": 16, **training})
    recipe = expand(recipe)[0].recipe
    prepared = prepare(recipe)
    trainer = ZooTrainer(
        prepared.model,
        training_arguments(recipe, tmp_path / "run"),
        objective=recipe.objective,
        training=recipe.training,
        freeze_encoder=recipe.model.freeze_encoder,
        train_dataset=prepared.tables.train,
        data_collator=prepared.tables.train_collator,
    )
    return trainer, recipe, prepared


def test_training_is_the_loop_written_by_hand(tmp_path):
    # A net with batch statistics and without dropout, whose draws a loop by hand would take from another state.
    trainer, recipe, prepared = make_trainer(tmp_path, "timm", max_steps=4, **SGD)
    model = copy.deepcopy(prepared.model)
    trainer.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    order = torch.Generator().manual_seed(seeds_of(recipe)["order"])
    indices = torch.randperm(len(prepared.tables.train), generator=order).tolist()
    prepared.tables.train.set_epoch(0)
    model.train()
    for step in range(4):
        samples = [prepared.tables.train[index] for index in indices[16 * step : 16 * (step + 1)]]
        batch = prepared.tables.train_collator(samples)
        logits = model(pixel_values=batch["pixel_values"]).logits
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # The same operations on the same numbers but for the fused optimizer: a few roundings of float32.
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), parameter, rtol=1e-4, atol=1e-6, msg=name)


def test_accumulated_halves_are_the_whole_batch(tmp_path):
    keys = {"max_steps": 3, **SGD}
    whole, _, _ = make_trainer(tmp_path / "whole", "timm", batch_size=32, **keys)
    halves, _, _ = make_trainer(tmp_path / "halves", "timm", batch_size=16, accumulation=2, **keys)
    # Batch statistics would differ between halves and whole; frozen they are the network's own.
    for trainer in (whole, halves):
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train = lambda mode, module=module: module
                module.training = False
        trainer.train()
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(halves.model.get_parameter(name), parameter, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "one_cycle"])
def test_schedules_are_their_closed_forms(tmp_path, schedule):
    trainer, _, _ = make_trainer(tmp_path, schedule=schedule, learning_rate=0.5, max_steps=6)
    rates = []
    trainer.add_callback(RateSpy(rates))
    trainer.train()
    steps = torch.arange(6, dtype=torch.float64)
    if schedule == "one_cycle":
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
        own = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=6)
        expected = []
        for _ in range(6):
            expected.append(own.get_last_lr()[0])
            optimizer.step()
            if len(expected) < 6:
                own.step()
        expected = torch.tensor(expected, dtype=torch.float64)
    else:
        expected = {
            "constant": torch.full((6,), 0.5, dtype=torch.float64),
            "linear": 0.5 * (1 - steps / 6),
            "cosine": 0.5 * 0.5 * (1 + torch.cos(torch.pi * steps / 6)),
        }[schedule]
    torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12)


def RateSpy(rates):
    from transformers import TrainerCallback

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    return Spy()


@pytest.mark.parametrize("decay_all", [True, False])
def test_which_parameters_decay(tmp_path, decay_all):
    trainer, _, _ = make_trainer(tmp_path, weight_decay=0.1, decay_all=decay_all, max_steps=1)
    trainer.train()
    sizes = {
        group["weight_decay"]: sum(p.numel() for p in group["params"]) for group in trainer.optimizer.param_groups
    }
    total = sum(p.numel() for p in trainer.model.parameters())
    norms = sum(p.numel() for name, p in trainer.model.named_parameters() if p.ndim < 2)
    assert sizes.get(0.1) == (total if decay_all else total - norms)


def test_a_frozen_trunk_stands_still_with_its_statistics(tmp_path):
    recipe = make_recipe(
        "timm", tmp_path, model={"type": "timm", "config": {"architecture": "resnet10t"}, "freeze_encoder": True}
    )
    population = train_population(recipe, Quiet()).population
    before, after = population[0].load("epoch-000").state_dict(), population[0].load().state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"timm_model.fc.weight", "timm_model.fc.bias"}


def test_a_token_never_reaches_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_this_is_a_secret")
    train_population(make_recipe("vit", tmp_path), Quiet())
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"hf_this_is_a_secret" not in path.read_bytes(), path


def test_loading_is_strict(tmp_path):
    _, _, prepared = make_trainer(tmp_path)
    prepared.model.save_pretrained(tmp_path / "saved")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "saved" / "model.safetensors")
    tensors.pop("classifier.bias")
    save_file(tensors, tmp_path / "saved" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing_keys"):
        load_strictly(prepared.model, tmp_path / "saved")


def test_soft_targets_and_hard_ones_have_one_loss(tmp_path):
    _, recipe, _ = make_trainer(tmp_path)
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 3, 1, 1, 2])
    soft = torch.nn.functional.one_hot(labels, 4).double()
    hard_loss = compute_loss(recipe.objective, logits, labels).loss
    torch.testing.assert_close(compute_loss(recipe.objective, logits, soft).loss, hard_loss)


def test_neighbouring_seeds_share_nothing():
    # accelerate orders epoch e by seed + e: spread seeds must not meet within any number of epochs anybody trains.
    seeds = sorted(spread_seed("order", seed) for seed in range(1000))
    gaps = [right - left for left, right in itertools.pairwise(seeds)]
    assert min(gaps) > 300
    assert spread_seed("order", 1) != spread_seed("init", 1)


def test_names_and_steps_of_snapshots():
    spec = SnapshotSpec(every_epochs=2, every_steps=5)
    assert snapshot_steps(spec, max_steps=12, steps_per_epoch=3) == {
        0: "epoch-000", 5: "step-000005", 6: "epoch-002", 10: "step-000010", 12: "epoch-004",
    }  # fmt: skip
    partial = snapshot_steps(SnapshotSpec(every_epochs=1), max_steps=7, steps_per_epoch=3)
    assert partial == {0: "epoch-000", 3: "epoch-001", 6: "epoch-002", 7: "step-000007"}
    assert snapshot_steps(SnapshotSpec(every_epochs=None, initial=False), 6, 3) == {6: "epoch-002"}
    assert log_spaced(1000, 4) == [1, 10, 100, 1000]
    assert log_spaced(3, 10) == [1, 2, 3]


def test_half_written_checkpoints_are_not_resumed_from(tmp_path):
    (tmp_path / "partial" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-12").mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
    assert latest_checkpoint(tmp_path / "partial" / "nothing") is None


def test_trackers_are_passed_through(tmp_path):
    pytest.importorskip("tensorboard")
    recipe = make_recipe(
        "vit", tmp_path, data=DIGITS, training={"epochs": 1, "batch_size": 16, "report_to": "tensorboard"}
    )
    population = train_population(recipe, Quiet()).population
    assert list((tmp_path / "zoo" / "tensorboard" / "zoo-000").glob("events.out.tfevents*"))
    assert json.loads((population.folder / "zoo-000" / "zoo.json").read_text())["status"] == "finished"
