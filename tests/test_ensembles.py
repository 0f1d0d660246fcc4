"""Ensembles of members: against hand-computed cases and dense arithmetic on real tiny models."""

import pytest
import torch
import transformers

from hf_zoo.ensembles import combine, measure_ensembles
from hf_zoo.ingredients import open_ingredient
from hf_zoo.recipe.schema import ObjectiveSpec
from hf_zoo.trials import Trial

CONFIG = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3, "hidden_size": 16}
CONFIG |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three saved classifiers: their folders, and the models."""
    made = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**CONFIG)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        folder = tmp_path_factory.mktemp(f"member-{seed}")
        model.save_pretrained(folder)
        made.append((folder, model))
    return made


def make_trial(folders, objective="image_classification"):
    draw = torch.Generator().manual_seed(5)
    tables = {
        split: [
            {"pixel_values": torch.randn(1, 8, 8, generator=draw), "labels": torch.randint(3, (), generator=draw)}
            for _ in range(count)
        ]
        for split, count in (("validation", 7), ("test", 10))
    }
    return Trial(
        task="shapes",
        members=tuple(open_ingredient(str(folder)) for folder in folders),
        objective=ObjectiveSpec(name=objective),
        description={},
        tables=tables,
        collators=dict.fromkeys(tables, torch.utils.data.default_collate),
        batch_size=4,
        device="cpu",
    )


def test_the_three_ways_can_disagree():
    # Two members lean to class 0, the third is sure of class 1; on the second sample all differ and votes are equal.
    logits = torch.tensor([
        [[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]],
        [[1.0, 0.0, 0.0], [0.0, 3.0, 0.0]],
        [[0.0, 9.0, 0.0], [0.0, 0.0, 1.0]],
    ])
    found = combine(logits)
    torch.testing.assert_close(found["mean logits"][0], torch.tensor([2 / 3, 3.0, 0.0]))
    torch.testing.assert_close(found["mean probabilities"].exp(), logits.softmax(-1).mean(0))
    assert found["mean logits"].argmax(-1).tolist() == [1, 1]
    assert found["majority vote"].argmax(-1).tolist() == [0, 1]  # the tie goes to the larger mean probability


def test_metrics_are_those_of_dense_arithmetic(models):
    trial = make_trial([folder for folder, _ in models])
    records = measure_ensembles(trial)
    assert [record["model"] for record in records] == [
        "ensemble (mean logits)",
        "ensemble (mean probabilities)",
        "ensemble (majority vote)",
    ]
    for split, table in trial.tables.items():
        batch = torch.utils.data.default_collate(table)
        with torch.no_grad():
            logits = torch.stack([model(batch["pixel_values"]).logits for _, model in models]).double()
        means = {"mean logits": logits.mean(0).softmax(-1), "mean probabilities": logits.softmax(-1).mean(0)}
        votes = torch.stack([(logits.argmax(-1) == k).sum(0) for k in range(3)], 1)
        means["majority vote"] = votes + 0.01 * means["mean probabilities"]
        for record, (name, scores) in zip(records, means.items(), strict=True):
            assert record["task"] == "shapes"
            hits = (scores.argmax(-1) == batch["labels"]).double().mean()
            assert record[f"{split}_accuracy"] == pytest.approx(float(hits)), name
            if name == "majority vote":
                assert f"{split}_loss" not in record
            else:
                loss = -scores.log().gather(1, batch["labels"][:, None]).mean()
                assert record[f"{split}_loss"] == pytest.approx(float(loss), abs=1e-5)  # float32 forward passes


def test_one_member_makes_no_ensemble_and_embeddings_cannot_vote(models):
    folders = [folder for folder, _ in models]
    assert measure_ensembles(make_trial(folders[:1])) == []
    assert measure_ensembles(make_trial(folders, "contrastive")) == []
