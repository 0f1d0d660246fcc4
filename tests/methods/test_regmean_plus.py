"""RegMean++ against the same done by hand on stock models, in float64, with whole forward passes."""

import copy
import dataclasses

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D
from trials import trial_of

from hf_zoo.errors import MergeError, RecipeError
from hf_zoo.ingredients import open_ingredient
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import make_method
from hf_zoo.methods.regmean_plus import trials_of

BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
WORDS, LENGTH = 40, 6


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=WORDS, **BODY))


def gpt2():  # weights stored as (inputs, outputs), an output layer tied to the embeddings
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def vit():  # other names on disk than in modules
    config = transformers.ViTConfig(num_labels=3, image_size=8, patch_size=4, num_channels=1, **BODY)
    return transformers.ViTForImageClassification(config)


def albert():  # one block, called twice
    config = transformers.AlbertConfig(vocab_size=WORDS, embedding_size=8, **BODY)
    return transformers.AlbertForSequenceClassification(config)


BLOCKS = {
    bert: ["bert.encoder.layer.0", "bert.encoder.layer.1", "bert.pooler.dense", "classifier"],
    gpt2: ["transformer.h.0", "transformer.h.1"],
    vit: ["vit.layers.0", "vit.layers.1", "classifier"],
    albert: [
        "albert.encoder.embedding_hidden_mapping_in",
        *(
            f"albert.encoder.albert_layer_groups.0.albert_layers.0.{part}"
            for part in ("attention.query", "attention.key", "attention.value", "attention.dense", "ffn", "ffn_output")
        ),
        "albert.pooler",
        "classifier",
    ],
}
OBJECTIVES = {vit: "image_classification", gpt2: "masked_lm"}


def samples_of(make, seed, count=40):
    draw = torch.Generator().manual_seed(seed)
    if make is vit:
        return [{"pixel_values": torch.randn(1, 8, 8, generator=draw) * seed} for _ in range(count)]
    found = []
    for index in range(count):
        mask = torch.ones(LENGTH, dtype=torch.int64)
        mask[LENGTH - index % 3 :] = 0
        # each task has words of its own
        tokens = torch.randint(1 + 10 * seed, 15 + 10 * seed, (LENGTH,), generator=draw)
        found.append({"input_ids": tokens, "attention_mask": mask})
    return found


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Return a function: how a model is made -> two models in float64 and inputs of them, each with a task."""
    made = {}

    def of(make):
        if make not in made:
            models, trials, readers = [], [], []
            for seed in (1, 2):
                torch.manual_seed(seed)
                model = make().eval()
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(0.2 * torch.randn(parameter.shape))
                folder = tmp_path_factory.mktemp(f"{make.__name__}-{seed}")
                model.save_pretrained(folder)
                ingredient = open_ingredient(str(folder))
                objective = OBJECTIVES.get(make, "sequence_classification")
                trials.append(trial_of([ingredient], objective, samples_of(make, seed), task=f"task{seed}"))
                models.append(model.double())
                readers.append(ingredient.reader)
            made[make] = models, MergeInputs.of(readers, trials=tuple(trials))
        models, inputs = made[make]
        return models, dataclasses.replace(inputs, report={})

    return of


def run(inputs, **parameters):
    return dict(make_method("regmean_plus", parameters).merge(inputs))


def by_hand(models, samples, blocks, off_diagonal=0.95):
    """Return the merged model: block by block, with whole forward passes, systems inverted."""
    merged = copy.deepcopy(models[0])
    with torch.no_grad():
        for own, *others in zip(merged.parameters(), *(model.parameters() for model in models), strict=True):
            own.copy_(torch.stack(others).mean(0))
        for block in blocks:
            layers = {
                name: module
                for name, module in merged.get_submodule(block).named_modules(prefix=block)
                if isinstance(module, torch.nn.Linear | Conv1D)
            }
            grams, answers = {}, {}
            for model, own_samples in zip(models, samples, strict=True):
                mixed = copy.deepcopy(merged)
                mixed.set_submodule(block, copy.deepcopy(model.get_submodule(block)))
                seen = {name: [] for name in layers}
                for name in layers:
                    mixed.get_submodule(name).register_forward_hook(
                        lambda module, args, output, rows=seen[name]: rows.append(args[0])
                    )
                batch = torch.utils.data.default_collate(own_samples)
                shown = batch.get("attention_mask")
                mixed(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
                for name in layers:
                    x = torch.cat([x[shown.bool()] if shown is not None and x.ndim == 3 else x for x in seen[name]])
                    x = x.reshape(-1, x.shape[-1])
                    gram = x.T @ x / len(x)
                    gram = off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())
                    weight = model.get_submodule(name).weight
                    weight = weight if isinstance(layers[name], Conv1D) else weight.T
                    grams[name] = grams.get(name, 0) + gram
                    answers[name] = answers.get(name, 0) + gram @ weight
            for name, layer in layers.items():
                solution = torch.linalg.solve(grams[name], answers[name])
                layer.weight.copy_(solution if isinstance(layer, Conv1D) else solution.T)
    return merged


@pytest.mark.parametrize("make", BLOCKS)
def test_it_is_what_is_done_by_hand(make, family, tmp_path):
    models, inputs = family(make)
    merged = run(inputs)
    oracle = by_hand(models, [trial.tables["validation"] for trial in inputs.trials], BLOCKS[make])
    oracle.float().save_pretrained(tmp_path)
    wanted = open_ingredient(str(tmp_path)).reader
    mean = dict(make_method("average").merge(inputs))
    assert set(merged) == set(wanted)
    for name, tensor in merged.items():
        # features in float32, systems of up to 64 unknowns
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    moved = [name for name, tensor in merged.items() if not torch.allclose(tensor, mean[name], atol=1e-3)]
    assert inputs.report["regression"]["solved"] == len(moved)
    assert inputs.report["regression"]["blocks"] == len(BLOCKS[make])
    assert inputs.report["regression"]["samples"] == {"task1": 40, "task2": 40}


def test_later_blocks_read_what_merged_ones_hand_on(family):
    """The first block has the Gram matrices that RegMean would have of the mean's embeddings; later ones do not."""
    models, inputs = family(bert)
    samples = [trial.tables["validation"] for trial in inputs.trials]
    merged = run(inputs)
    at_once = by_hand(models, samples, ["bert.encoder"]).state_dict()
    first, second = (f"bert.encoder.layer.{block}.attention.self.query.weight" for block in (0, 1))
    torch.testing.assert_close(merged[first].double(), at_once[first], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(merged[second].double(), at_once[second], atol=1e-2)


def test_one_member_is_itself_and_members_count_by_their_weights(family):
    _, inputs = family(bert)
    alone = MergeInputs.of(inputs.members[:1], trials=inputs.trials)
    for merged in (run(alone), run(inputs, weights=(1.0, 0.0))):
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor, inputs.members[0][name], rtol=1e-4, atol=1e-5)


def test_tensors_that_are_not_asked_for_are_left_alone(family):
    _, inputs = family(bert)
    name = "bert.encoder.layer.1.output.dense.weight"
    merged = run(inputs.only([name, "bert.encoder.layer.1.output.dense.bias"]))
    assert set(merged) == {name, "bert.encoder.layer.1.output.dense.bias"}
    assert inputs.report["regression"]["solved"] == inputs.report["regression"]["blocks"] == 1
    assert not torch.allclose(merged[name], dict(make_method("average").merge(inputs))[name], atol=1e-2)


def test_so_many_samples_are_read_as_asked_for(family):
    _, inputs = family(vit)
    first = run(inputs, num_examples=20, batch_size=8)
    assert inputs.report["regression"]["samples"] == {"task1": 20, "task2": 20}
    again, other = (run(dataclasses.replace(inputs, seed=seed), num_examples=20, batch_size=8) for seed in (0, 1))
    name = "vit.encoder.layer.0.attention.attention.query.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.allclose(first[name], other[name], atol=1e-4)


def test_a_member_reads_the_samples_of_its_own_task(family):
    _, inputs = family(bert)
    first, second = inputs.trials
    assert [trials_of(index, inputs) for index in (0, 1)] == [[0], [1]]
    # both can do both tasks; the manifests say what each was trained for
    both = tuple(dataclasses.replace(one.members[0], manifest=Known(one.task)) for one in (first, second))
    shared = tuple(dataclasses.replace(trial, members=both) for trial in (first, second))
    assert [trials_of(index, dataclasses.replace(inputs, trials=shared)) for index in (0, 1)] == [[0], [1]]
    unknown = tuple(dataclasses.replace(trial, members=()) for trial in (first, second))
    assert trials_of(0, dataclasses.replace(inputs, trials=unknown)) == [0, 1]


@dataclasses.dataclass
class Known:
    """As much of a manifest as is asked for."""

    task: str


def test_samples_it_cannot_read_are_told(family):
    _, inputs = family(vit)
    first, second = inputs.trials
    spoilt = [{"pixel_values": torch.full((1, 8, 8), float("nan"))}, *second.tables["validation"]]
    second = dataclasses.replace(second, tables={"validation": spoilt})
    with pytest.raises(MergeError, match=r"what .*vit-2.* hands on to .* is not finite"):
        run(dataclasses.replace(inputs, trials=(first, second)))


def test_mistakes_are_refused(family):
    _, inputs = family(bert)
    for wrong in ({"off_diagonal": 1.5}, {"weights": [-1.0, 2.0]}, {"num_examples": 0}, {"batch_size": 0}):
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            make_method("regmean_plus", wrong)
    with pytest.raises(MergeError, match="regmean_plus: weights needs one value a member: got 3 for 2"):
        run(inputs, weights=(1.0, 1.0, 1.0))
    trial = dataclasses.replace(inputs.trials[0], tables={"test": []})
    with pytest.raises(MergeError, match="task1: its data has no validation split"):
        run(dataclasses.replace(inputs, trials=(trial,)))
