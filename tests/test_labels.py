"""Classes of the same names in another order, against what a model says of its inputs."""

import pytest
import torch
import transformers

from hf_zoo.axes import SavedModel
from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError
from hf_zoo.labels import align_labels, class_names, label_order, reordered_labels

BODY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
TEXT = {**BODY, "vocab_size": 40, "max_position_embeddings": 24, "pad_token_id": 0}
VISION = {**BODY, "image_size": 8, "patch_size": 4, "num_channels": 1}


def save(folder, name, fields, labels):
    model_class = getattr(transformers, name)
    id2label = dict(enumerate(labels))
    config = model_class.config_class(**fields, id2label=id2label, label2id={v: k for k, v in id2label.items()})
    torch.manual_seed(0)
    model = model_class(config).eval()
    model.save_pretrained(folder)
    return model, SavedModel(CheckpointReader.open(folder, folder.name), model_class, config, folder)


@pytest.mark.parametrize(
    ("name", "fields", "inputs"),
    [
        ("BertForSequenceClassification", TEXT, {"input_ids": torch.arange(6)[None]}),
        ("RobertaForSequenceClassification", TEXT, {"input_ids": torch.arange(2, 8)[None]}),
        ("ViTForImageClassification", VISION, {"pixel_values": torch.ones(1, 1, 8, 8)}),
    ],
)
def test_a_reordered_member_says_the_same_of_every_class(tmp_path, name, fields, inputs):
    _, first = save(tmp_path / "first", name, fields, ["no", "maybe", "yes"])
    model, other = save(tmp_path / "other", name, fields, ["yes", "no", "maybe"])
    _, reader = align_labels([first, other])
    loaded = type(model).from_pretrained(None, config=first.config, state_dict=dict(reader)).eval()
    with torch.no_grad():
        before, after = model(**inputs).logits[0], loaded(**inputs).logits[0]
    assert dict(zip(["no", "maybe", "yes"], after.tolist(), strict=True)) == pytest.approx(
        dict(zip(["yes", "no", "maybe"], before.tolist(), strict=True)), rel=1e-6
    )


def test_pieces_of_a_reordered_member_are_those_of_its_tensors(tmp_path):
    _, member = save(tmp_path, "BertForSequenceClassification", TEXT, ["b", "a", "c"])
    reader = reordered_labels(member, (1, 0, 2))
    torch.testing.assert_close(
        reader["classifier.weight"], member.reader["classifier.weight"][[1, 0, 2]], rtol=0, atol=0
    )
    for name in reader:
        whole = reader[name].reshape(-1)
        torch.testing.assert_close(reader.piece(name, 3, 9), whole[3:9], rtol=0, atol=0)
    assert reader.layout == member.reader.layout


def test_members_in_one_order_are_passed_on_as_they_are(tmp_path):
    _, first = save(tmp_path / "first", "BertForSequenceClassification", TEXT, ["a", "b"])
    _, other = save(tmp_path / "other", "BertForSequenceClassification", TEXT, ["a", "b"])
    assert align_labels([first, other]) == (first.reader, other.reader)
    assert align_labels([]) == ()
    assert class_names(first) == ("a", "b")


def test_an_entry_behind_the_classes_stays_in_its_place():
    """Detectors have one more row, for no object."""
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
        ),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=3,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
    )
    weight = torch.arange(3.0)[:, None].expand(3, 16).contiguous()
    reader = CheckpointReader.of({"class_labels_classifier.weight": weight}, "detector")
    member = SavedModel(reader, transformers.DetrForObjectDetection, config)
    turned = reordered_labels(member, (1, 0))["class_labels_classifier.weight"]
    assert turned[:, 0].tolist() == [1.0, 0.0, 2.0]


def test_the_order_of_classes():
    assert label_order("a", ["x", "y", "z"], "b", ["z", "x", "y"]) == (1, 2, 0)
    assert label_order("a", ["x", "y"], "b", ["x", "y"]) is None
    assert label_order("a", ["LABEL_0", "LABEL_1"], "b", ["LABEL_0", "LABEL_1"]) is None


@pytest.mark.parametrize(
    ("wanted", "given", "message"),
    [
        (
            ["x", "y"],
            ["x", "z"],
            r"org/a and org/b have different classes \(x, y; x, z\), so their heads cannot be merged",
        ),
        (["x", "y"], ["x", "y", "z"], "have different classes"),
        (["LABEL_0", "LABEL_1"], ["x", "y"], "those of org/a have no names.*id2label"),
        (["x", "y"], ["LABEL_0", "LABEL_1"], "those of org/b have no names"),
        (["LABEL_0"], ["LABEL_0", "LABEL_1"], "have different classes"),
        (["Yes", "No"], ["no", "yes"], "differ in spelling alone"),
        (["x", "x", "y"], ["x", "y", "x"], "have different classes"),  # which x is which?
    ],
)
def test_other_classes_are_refused(wanted, given, message):
    with pytest.raises(MergeError, match=message):
        label_order("org/a", wanted, "org/b", given)


def test_a_head_of_another_size_than_its_config_is_refused(tmp_path):
    _, member = save(tmp_path, "BertForSequenceClassification", TEXT, ["b", "a"])
    tensors = dict(member.reader) | {"classifier.bias": torch.zeros(3)}
    wrong = SavedModel(CheckpointReader.of(tensors, "org/wrong"), member.model_class, member.config)
    with pytest.raises(MergeError, match="org/wrong: tensor 'classifier.bias' has 3 entries where its config says 2"):
        reordered_labels(wrong, (1, 0))
