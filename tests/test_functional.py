"""Stock models called with mixed weights: the same as loading the mixture, whatever the library does to names."""

from dataclasses import replace

import pytest
import torch
import transformers

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import MergeError
from hf_zoo.ingredients import open_ingredient
from hf_zoo.inputs import MergeInputs
from hf_zoo.joining import task_reader
from hf_zoo.learning import Mixture, draw_batches
from hf_zoo.methods.base import make_method
from hf_zoo.recipe.schema import ObjectiveSpec
from hf_zoo.trials import Trial

BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
VISION = {"image_size": 8, "patch_size": 4, "num_channels": 1}
DECODER = BODY | {"num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 24}


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **BODY))


def masked_bert():  # an output layer tied to the embedding
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=40, **BODY))


def vit():  # other names on disk than in modules
    return transformers.ViTForImageClassification(transformers.ViTConfig(num_labels=3, **VISION, **BODY))


def vit_with_perceptron():  # a class that wraps a stock one
    from hf_zoo.models import mlp_head

    classifier = {"model_type": "vit", **VISION, **BODY}
    return mlp_head.MlpHeadForImageClassification(
        mlp_head.MlpHeadConfig(classifier=classifier, hidden=[6], num_labels=3)
    )


def resnet():  # running statistics and integer counters
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_channels=1
    )
    return transformers.ResNetForImageClassification(config)


def timm():  # trunk and head in one module
    return transformers.TimmWrapperForImageClassification(
        transformers.TimmWrapperConfig(architecture="resnet10t", num_labels=3)
    )


def gpt2():
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def mixtral():  # experts that are many tensors on disk and two in modules
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(num_local_experts=3, num_experts_per_tok=2, tie_word_embeddings=False, **DECODER)
    )


CLASSES = [bert, masked_bert, vit, vit_with_perceptron, resnet, timm, gpt2, mixtral]
K = 3


def inputs_of(model):
    draw = torch.Generator().manual_seed(9)
    if model.main_input_name == "pixel_values":
        channels, side = (3, 64) if "Timm" in type(model).__name__ else (1, 8)
        return {"pixel_values": torch.randn(2, channels, side, side, generator=draw)}
    return {"input_ids": torch.randint(40, (2, 6), generator=draw), "attention_mask": torch.ones(2, 6).long()}


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Return a function: how a model is made -> opened members of it, the last of which is to be the base."""
    opened = {}

    def made(make):
        if make not in opened:
            opened[make] = []
            for seed in range(K + 1):
                torch.manual_seed(seed)
                model = make().eval()
                with torch.no_grad():
                    for name, tensor in model.state_dict().items():
                        if tensor.is_floating_point():
                            tensor.add_(0.1 * (torch.rand if "var" in name else torch.randn)(tensor.shape))
                folder = tmp_path_factory.mktemp(f"{make.__name__}-{seed}")
                model.save_pretrained(folder)
                opened[make].append(open_ingredient(str(folder)))
        return opened[make]

    return made


def trial_of(ingredients, task="task"):
    draw = torch.Generator().manual_seed(3)
    # no 0: an embedding sends no gradient to its row for padding
    samples = [
        {"input_ids": torch.randint(1, 40, (6,), generator=draw), "labels": torch.randint(2, (), generator=draw)}
        for _ in range(5)
    ]
    return Trial(
        task=task,
        members=tuple(ingredients),
        objective=ObjectiveSpec(name="sequence_classification"),
        description={},
        tables={"validation": samples},
        collators={"validation": torch.utils.data.default_collate},
        batch_size=4,
        device="cpu",
    )


@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("trunk_alone", [False, True])
@pytest.mark.parametrize("make", CLASSES)
def test_a_mixture_computes_what_the_merged_checkpoint_computes(make, trunk_alone, with_base, members):
    *ingredients, root = members(make)
    readers = [one.trunk if trunk_alone else one.reader for one in ingredients]
    base = root.trunk if trunk_alone else root.reader
    trial = trial_of(ingredients)
    inputs = MergeInputs.of(readers, trials=(trial,), base=base if with_base else None)
    if with_base:
        mixture = Mixture.of_task_vectors(inputs, lambda tensors: list(tensors.task_vectors()))
    else:
        mixture = Mixture.of_members(inputs)
    draw = torch.Generator().manual_seed(1)
    coefficients = torch.rand(len(mixture.names), K, generator=draw) / K
    by_name = mixture.by_name(coefficients)
    merged = {}
    for name, info in inputs.layout.items():
        own = [reader[name] for reader in readers]
        if name in by_name and with_base:
            merged[name] = base[name] + sum(c * (t - base[name]) for c, t in zip(by_name[name], own, strict=True))
        elif name in by_name:
            merged[name] = sum(c * t for c, t in zip(by_name[name], own, strict=True))
        else:  # buffers
            assert not info.dtype.is_floating_point or "running" in name, name
            merged[name] = torch.stack(own).mean(0) if info.dtype.is_floating_point else own[0]
    reader = CheckpointReader.of(merged, "merged")
    model = trial.model(task_reader(ingredients, reader) if trunk_alone else reader)
    batch = inputs_of(model)
    with torch.no_grad():
        wanted = model(**batch).logits
        found = mixture.networks[0](mixture.tensors(coefficients), batch)
    # float32: a sum of four tensors in another order
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert float(wanted.std()) > 0


@pytest.mark.parametrize("make", CLASSES)
def test_every_trained_tensor_has_coefficients(make, members):
    *ingredients, _ = members(make)
    inputs = MergeInputs.of([one.reader for one in ingredients], trials=(trial_of(ingredients),))
    mixture = Mixture.of_members(inputs)
    floating = {name for name, info in inputs.layout.items() if info.dtype.is_floating_point and "running" not in name}
    assert set(mixture.by_name(torch.zeros(1, K))) == floating


def test_experts_of_one_module_are_mixed_alike(members):
    *ingredients, _ = members(mixtral)
    anatomy = trial_of(ingredients).anatomy(set(ingredients[0].reader))
    joined = [group for group in anatomy.groups if len(group.on_disk) > 1]
    assert {len(group.on_disk) for group in joined} == {3, 6}  # down; gate and up, of three experts
    assert all(len({name.split(".")[2] for name in group.on_disk}) == 1 for group in joined)  # of one block


def test_gradients_are_those_of_finite_differences(members):
    *ingredients, _ = members(bert)
    first = trial_of(ingredients)
    second = replace(first, task="other", tables={"validation": first.tables["validation"][:2]})
    readers = [one.reader for one in ingredients]
    mixture = Mixture.of_members(MergeInputs.of(readers, trials=(first, second)))

    def loss(trial, logits, batch):
        return trial.loss(logits, batch["labels"])

    coefficients = torch.full((len(mixture.names), K), 1 / K, requires_grad=True)
    mixture.backward(coefficients, [next(trial.batches(5)) for trial in (first, second)], loss)
    draw = torch.Generator().manual_seed(2)
    direction = torch.randn(coefficients.shape, generator=draw)
    step = 3e-3
    ends = [mixture.evaluate(coefficients + sign * step * direction, 5, loss).sum() for sign in (1, -1)]
    slope = float(ends[0] - ends[1]) / (2 * step)
    # central differences in float32: errors of step^2 and of 1e-7 / step
    assert abs(slope) > 0.02
    assert float((coefficients.grad * direction).sum()) == pytest.approx(slope, rel=0.01)


def test_tensors_a_rule_has_merged_otherwise_are_the_mean_meanwhile(members):
    *ingredients, _ = members(bert)
    trial = trial_of(ingredients)
    inputs = MergeInputs.of([one.reader for one in ingredients], trials=(trial,))
    part = inputs.only(["classifier.weight"])
    mixture = Mixture.of_members(part)
    assert set(mixture.by_name(torch.zeros(1, K))) == {"classifier.weight"}
    coefficients = torch.full((len(mixture.names), K), 1 / K)
    mean = dict(make_method("average").merge(inputs))
    for name, tensor in mixture.tensors(coefficients).items():
        torch.testing.assert_close(tensor, mean[name])
    learned = make_method("learned_soup", {"num_epochs": 1}).merge(part)
    assert [name for name, _ in learned] == ["classifier.weight"]


def test_every_task_brings_its_batches_again_and_again():
    trials = []
    for task, count in (("short", 2), ("long", 5)):
        samples = [{"x": torch.tensor(i)} for i in range(count)]
        trials.append(
            Trial(
                task=task,
                members=(),
                objective=ObjectiveSpec(name="sequence_classification"),
                description={},
                tables={"validation": samples},
                collators={"validation": torch.utils.data.default_collate},
                batch_size=4,
                device="cpu",
            )
        )
    inputs = MergeInputs(members=(), layout={}, trials=tuple(trials))
    batches = draw_batches(inputs, 2, "test")
    drawn = [next(batches) for _ in range(6)]
    long = torch.cat([batch["x"] for _, batch in drawn]).tolist()
    assert sorted(long[:5]) == sorted(long[5:]) == [0, 1, 2, 3, 4]
    assert long[:5] != long[5:]
    assert all(sorted(batch["x"].tolist()) == [0, 1] for batch, _ in drawn)


def test_a_task_without_validation_data_is_refused(members):
    *ingredients, _ = members(bert)
    trial = trial_of(ingredients)
    trial.tables["test"] = trial.tables.pop("validation")
    inputs = MergeInputs.of([one.reader for one in ingredients], trials=(trial,), base=ingredients[0].reader)
    for method in ("learned_soup", "adamerging"):
        with pytest.raises(MergeError, match="task: its data has no validation split"):
            make_method(method).check(inputs)
