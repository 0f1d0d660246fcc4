"""Evaluation against explicit loops, for every objective, and of members on disk."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from transformers import (
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    ViTConfig,
)

from hf_zoo.data.images import ImageCollator, ImageTable, Normalisation
from hf_zoo.data.sources import load_splits
from hf_zoo.data.tables import build_tables
from hf_zoo.data.texts import MaskedCollator, TextTable, tokenize_documents, train_tokenizer
from hf_zoo.errors import DataError
from hf_zoo.evaluation import evaluate_member, evaluate_model, match_labels, predict
from hf_zoo.losses import nt_xent
from hf_zoo.population import Manifest
from hf_zoo.recipe.schema import AugmentationSpec, DataSpec, ObjectiveSpec, TokenizerSpec, TrainRecipe

HALF = Normalisation((0.5,), (0.5,))
IMAGES, CONTRASTIVE, MASKED = (
    ObjectiveSpec(name=name) for name in ("image_classification", "contrastive", "masked_lm")
)


def vit(outputs=12, seed=0):
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.5,
        num_labels=outputs,
    )
    return AutoModelForImageClassification.from_config(config)


@pytest.fixture
def table():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (23, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageTable(images, torch.randint(0, 12, (23,), generator=generator))


def test_classification_equals_a_loop_over_single_samples(table):
    model = vit().train()
    collator = ImageCollator(table, AugmentationSpec(), HALF, 12, 0, train=False)
    found = evaluate_model(model, table, collator, IMAGES, batch_size=8)
    assert model.training, "evaluation must put the training mode back"
    model.eval()
    losses, scores = [], []
    with torch.no_grad():
        for i in range(23):
            batch = collator([table[i]])
            scores.append(model(batch["pixel_values"]).logits[0].double())
            losses.append(-float(scores[-1].log_softmax(-1)[table.labels[i]]))
    scores, labels = torch.stack(scores).numpy(), table.labels.numpy()
    # float32 kernels differ between batch sizes by rounding alone
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, scores.argmax(1)))
    assert found["f1"] == pytest.approx(
        sklearn_metrics.f1_score(labels, scores.argmax(1), average="macro", zero_division=0)
    )
    expected = sklearn_metrics.top_k_accuracy_score(labels, scores, k=5, labels=range(12))
    assert found["top5"] == pytest.approx(expected)
    assert found["matthews_correlation"] == pytest.approx(sklearn_metrics.matthews_corrcoef(labels, scores.argmax(1)))


def test_results_do_not_depend_on_the_batch_size(table):
    model = vit()
    collator = ImageCollator(table, AugmentationSpec(), HALF, 12, 0, train=False)
    one, other = (evaluate_model(model, table, collator, IMAGES, batch_size=size) for size in (23, 4))
    assert one == pytest.approx(other, rel=1e-5)


def test_top5_is_reported_from_ten_classes_on(table):
    few = ImageTable(table.images, table.labels % 3)
    collator = ImageCollator(few, AugmentationSpec(), HALF, 3, 0, train=False)
    assert "top5" not in evaluate_model(vit(3), few, collator, IMAGES, batch_size=8)


def test_modes_of_frozen_parts_are_put_back(table):
    model = vit().train()
    model.vit.eval()
    collator = ImageCollator(table, AugmentationSpec(), HALF, 12, 0, train=False)
    evaluate_model(model, table, collator, IMAGES, batch_size=8)
    assert model.training
    assert not any(module.training for module in model.vit.modules())


def test_contrastive_averages_over_all_batches_of_equal_size(table):
    model = vit().eval()
    spec = AugmentationSpec(crop="resized", flip=0.5)
    collator = ImageCollator(table, spec, HALF, 0, 5, train=False, views=2)
    found = evaluate_model(model, table, collator, CONTRASTIVE, batch_size=10)
    losses, ranks = [], []
    with torch.no_grad():
        for part in ((0, 8), (8, 16), (16, 23)):  # three batches of at most ten, as equal as can be
            batch = collator([table[i] for i in range(*part)])
            loss, rank = nt_xent(model(**batch).logits, CONTRASTIVE.temperature)
            losses += [float(loss)] * len(rank)
            ranks += rank.tolist()
    assert found == pytest.approx(
        {
            "loss": np.mean(losses),
            "top1": np.mean(np.array(ranks) == 1),
            "top5": np.mean(np.array(ranks) <= 5),
            "mean_rank": np.mean(ranks),
        },
        rel=1e-5,
    )


WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu".split()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(WORDS * 3, TokenizerSpec(vocab_size=100), max_length=32)


@pytest.fixture(scope="module")
def documents(tokenizer) -> TextTable:
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(WORDS, generator.integers(8, 24))) for _ in range(21)]
    return tokenize_documents(texts, tokenizer, 32)


def bert_config(tokenizer, **options):
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        **options,
    )


def test_masked_lm_is_weighted_by_masked_positions(tokenizer, documents):
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(bert_config(tokenizer)).eval()
    collator = MaskedCollator(tokenizer, 0.3, seed=1, train=False)
    found = evaluate_model(model, documents, collator, MASKED, batch_size=4)
    losses, hits = [], []
    with torch.no_grad():
        for i in range(len(documents)):
            batch = collator([documents[i]])
            labels = batch.pop("labels")
            logits = model(**batch).logits.double()
            for place in torch.nonzero(labels[0] != -100)[:, 0]:
                losses.append(-float(logits[0, place].log_softmax(-1)[labels[0, place]]))
                hits.append(int(logits[0, place].argmax()) == int(labels[0, place]))
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["accuracy"] == pytest.approx(np.mean(hits))
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))


def test_predictions_are_in_order(table):
    model = vit().eval()
    collator = ImageCollator(table, AugmentationSpec(), HALF, 12, 0, train=False)
    logits = predict(model, table, collator, batch_size=5)
    with torch.no_grad():
        expected = model(collator([table[i] for i in range(23)])["pixel_values"]).logits
    torch.testing.assert_close(logits, expected)


def write_member(folder, model, processor, **manifest):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    Manifest(name=folder.name, status="finished", **manifest).write(folder)
    return folder


def test_a_member_is_measured_with_its_own_processor(tmp_path):
    recipe = TrainRecipe(
        name="x", objective=IMAGES, data=DataSpec(path="digits", num_eval=50, validation_split="validation")
    )
    splits = load_splits(recipe.data)
    tables = build_tables(recipe, splits)
    model = vit(10)
    model.config.id2label = dict(enumerate(tables.labels))
    folder = write_member(
        tmp_path / "member",
        model,
        tables.processor,
        objective="image_classification",
        auto_class="AutoModelForImageClassification",
    )
    found = evaluate_member(folder, recipe.data, batch_size=16)
    assert list(found) == ["validation", "test"]
    for split, table in (("validation", tables.validation), ("test", tables.test)):
        assert found[split] == evaluate_model(model.eval(), table, tables.eval_collators[split], IMAGES, 16)


def test_a_member_s_outputs_are_matched_to_the_data_s_classes_by_name(tokenizer, tmp_path):
    import datasets

    generator = np.random.default_rng(1)
    texts = [" ".join(generator.choice(WORDS, 9)) for _ in range(30)]
    rows = {"text": texts, "label": [("good", "bad")[i % 2] for i in range(30)]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    data = DataSpec(path=str(tmp_path), test_split=None, validation_fraction=0.5, max_length=32)
    accuracies = []
    for names in ({0: "good", 1: "bad"}, {0: "bad", 1: "good"}):
        torch.manual_seed(0)
        config = bert_config(tokenizer, id2label=names, label2id={name: i for i, name in names.items()})
        folder = write_member(
            tmp_path / "-".join(names.values()),
            AutoModelForSequenceClassification.from_config(config),
            tokenizer,
            objective="sequence_classification",
            auto_class="AutoModelForSequenceClassification",
        )
        accuracies.append(evaluate_member(folder, data)["validation"]["accuracy"])
    assert sum(accuracies) == pytest.approx(1)  # the same weights with their outputs called the other way round


def test_other_classes_are_refused():
    model = vit(2)
    model.config.id2label = {0: "cat", 1: "dog"}
    with pytest.raises(DataError, match=r"mine tells 2 classes apart \(cat, dog\), the data has 2 \(no, yes\)"):
        match_labels(model, ("no", "yes"), "mine")
    model.config.id2label = {0: "LABEL_0", 1: "LABEL_1"}
    assert match_labels(model, ("no", "yes"), "mine") == ("no", "yes")
    with pytest.raises(DataError, match="the data has 3"):
        match_labels(model, ("a", "b", "c"), "mine")


def test_a_member_without_processor_or_objective_is_named(tmp_path):
    folder = tmp_path / "bare"
    vit().save_pretrained(folder)
    Manifest(name="bare", auto_class="AutoModelForImageClassification").write(folder)
    with pytest.raises(DataError, match="names no objective"):
        evaluate_member(folder, DataSpec(path="digits"))
    Manifest(name="bare", auto_class="AutoModelForImageClassification", objective="image_classification").write(folder)
    with pytest.raises(DataError, match="no ImageProcessor can be loaded"):
        evaluate_member(folder, DataSpec(path="digits"))


def test_an_empty_table_is_refused(table):
    empty = ImageTable(table.images[:0], table.labels[:0])
    collator = ImageCollator(empty, AugmentationSpec(), HALF, 12, 0, train=False)
    with pytest.raises(DataError, match="no samples"):
        evaluate_model(vit(), empty, collator, IMAGES, 4)


SHARED_PROGRAM = """
import json, sys
sys.path.insert(0, sys.argv[1])
from accelerate import Accelerator
from tests.test_evaluation import HALF, IMAGES, vit
import torch
from hf_zoo.data.images import ImageCollator, ImageTable
from hf_zoo.evaluation import evaluate_model
from hf_zoo.recipe.schema import AugmentationSpec
generator = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (23, 1, 8, 8), generator=generator, dtype=torch.uint8)
table = ImageTable(images, torch.randint(0, 12, (23,), generator=generator))
collator = ImageCollator(table, AugmentationSpec(), HALF, 12, 0, train=False)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
found = evaluate_model(vit(), table, collator, IMAGES, 4, accelerator=accelerator)
# A file each: lines of two processes on one screen run into one another.
with open(sys.argv[2] + f"/answer-{accelerator.process_index}.json", "w") as file:
    json.dump(found, file)
accelerator.end_training()
"""


@pytest.mark.slow
def test_two_processes_share_the_samples_and_agree_with_one(table, tmp_path):
    import json
    from pathlib import Path

    program = tmp_path / "program.py"
    program.write_text(SHARED_PROGRAM)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"),
            *(str(program), str(Path(__file__).resolve().parent.parent), str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("answer-*.json"))]
    collator = ImageCollator(table, AugmentationSpec(), HALF, 12, 0, train=False)
    expected = evaluate_model(vit(), table, collator, IMAGES, 4)
    assert len(answers) == 2
    for answer in answers:
        assert answer == pytest.approx(expected, rel=1e-6)
