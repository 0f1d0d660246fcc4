"""Stacks, vocabularies and orders of classes through the whole merge job: every tensor and row against its source."""

import json
from dataclasses import replace

import pytest
import test_merging
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from test_vocabulary import bpe, save, word_piece

from hf_zoo.auto import AutoMergedModel
from hf_zoo.errors import MergeError, PopulationError
from hf_zoo.evaluation import evaluate_member
from hf_zoo.files import weights_digest
from hf_zoo.merge import main
from hf_zoo.merging import run_merge
from hf_zoo.population import MANIFEST_FILE, Manifest, Member
from hf_zoo.recipe.loader import build_recipe
from hf_zoo.recipe.schema import DataSpec, MergeRecipe

population, texts, tokenizer = test_merging.population, test_merging.texts, test_merging.tokenizer

WORDS = {"one": ["cat", "bird", "fish", "dog"], "two": ["fish", "cat", "horse", "bird"], "base": ["cat", "dog", "egg"]}
PAIRS = {
    "one": [("a", "b"), ("c", "d"), ("ab", "cd")],
    "two": [("b", "c"), ("a", "b"), ("d", "e")],
    "base": [("a", "b"), ("d", "e")],
}
EXACT = {"rtol": 0, "atol": 0}
LLAMA = {"num_hidden_layers": 4, "num_key_value_heads": 1}


@pytest.fixture
def llamas(tmp_path):
    """Three Llamas of four blocks with one tokenizer; returns their folders by name."""
    for seed, name in enumerate(("one", "two", "base")):
        save(tmp_path / name, bpe(PAIRS["one"]), seed, **LLAMA)
    return {name: tmp_path / name for name in ("one", "two", "base")}


@pytest.fixture
def berts(tmp_path):
    """Three BERTs, each with words of its own; returns their folders by name."""
    for seed, (name, words) in enumerate(WORDS.items()):
        save(tmp_path / name, word_piece(words), seed, name="BertForMaskedLM", num_attention_heads=2)
    return {name: tmp_path / name for name in WORDS}


def classifier(folder, seed, labels, words="one", task=None, name="BertForSequenceClassification"):
    """Save a classifier whose tensors are all different."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    save(folder, word_piece(WORDS[words]), seed, name=name, **names)
    if task is not None:
        objective = "sequence_classification"
        Manifest(name=folder.name, status="finished", objective=objective, task=task, num_parameters=7).write(folder)
    return str(folder)


def merged(folder, **content):
    """Run the merge a recipe's plain content asks for, without evaluation."""
    content = {"name": "made", "output": str(folder / "merges"), "evaluate": False, "lineage": "ignore"} | content
    return run_merge(build_recipe(content, MergeRecipe, "test", []))


def tensors(folder):
    return load_file(folder / "model.safetensors")


def vocabulary(folder):
    return transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


def loaded(folder, auto_class):
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def part(model, start, stop):
    return {"model": str(model), "layer_range": [start, stop]}


def slerp(one, other, t):
    """Walk along the arc between two tensors taken whole, in float64."""
    a, b = one.double().flatten(), other.double().flatten()
    angle = torch.arccos(torch.clamp(a @ b / (a.norm() * b.norm()), -1, 1))
    weights = [torch.sin((1 - t) * angle) / torch.sin(angle), torch.sin(t * angle) / torch.sin(angle)]
    return (weights[0] * a + weights[1] * b).reshape(one.shape).float()


def test_a_stack_has_the_blocks_it_names_and_computes_what_the_stock_class_does(tmp_path, llamas):
    slices = [{"sources": [part(llamas["one"], 0, 3)]}, {"sources": [part(llamas["two"], 1, 4)]}]
    outcome = merged(tmp_path, method="passthrough", slices=slices)
    model = loaded(outcome.folder, transformers.AutoModelForCausalLM)
    assert type(model) is transformers.LlamaForCausalLM
    assert model.config.num_hidden_layers == len(model.model.layers) == 6
    one, two, made = (tensors(folder) for folder in (llamas["one"], llamas["two"], outcome.folder))
    blocks = [(one, 0), (one, 1), (one, 2), (two, 1), (two, 2), (two, 3)]
    expected = {
        name.replace(".layers.0.", f".layers.{new}."): source[name.replace(".layers.0.", f".layers.{old}.")]
        for new, (source, old) in enumerate(blocks)
        for name in one
        if ".layers.0." in name
    }
    expected["model.embed_tokens.weight"] = one["model.embed_tokens.weight"]
    expected |= {name: two[name] for name in ("model.norm.weight", "lm_head.weight")}
    assert made.keys() == expected.keys()
    torch.testing.assert_close(made, expected, **EXACT)
    assert vocabulary(outcome.folder) == vocabulary(llamas["one"])
    manifest = Manifest.read(outcome.folder)
    assert manifest.num_parameters == model.num_parameters()
    assert [(parent.repo, parent.sha256, parent.role) for parent in manifest.parents] == [
        (name, weights_digest(llamas[name]), "member") for name in ("one", "two")
    ]
    assert str(tmp_path) not in (outcome.folder / MANIFEST_FILE).read_text()
    assert str(tmp_path) not in (outcome.folder / "README.md").read_text()
    assert "hf_zoo-" not in (outcome.folder / "README.md").read_text()


def test_sources_of_a_slice_are_merged_and_every_one_is_named(tmp_path, llamas):
    slices = [
        {"sources": [part(llamas["one"], 0, 2), part(llamas["two"], 0, 2)]},
        {"sources": [part(llamas["base"], 1, 4), part(llamas["one"], 1, 4)]},
    ]
    content = {"method": "slerp", "parameters": {"t": 0.3}, "slices": slices}
    outcome = merged(tmp_path, **content)
    assert loaded(outcome.folder, transformers.AutoModelForCausalLM).config.num_hidden_layers == 5
    models = {name: tensors(folder) for name, folder in llamas.items()}
    made = tensors(outcome.folder)
    blocks = [("one", "two", 0), ("one", "two", 1), *(("base", "one", old) for old in (1, 2, 3))]
    for new, (left, right, old) in enumerate(blocks):
        for name in [name for name in models["one"] if f".layers.{old}." in name]:
            expected = slerp(models[left][name], models[right][name], 0.3)
            # float32 against float64: the angle is an arc cosine, which loses half the digits near 0.
            torch.testing.assert_close(
                made[name.replace(f".layers.{old}.", f".layers.{new}.")], expected, rtol=1e-4, atol=1e-5
            )
    for name, left, right in (("model.embed_tokens.weight", "one", "two"), ("lm_head.weight", "base", "one")):
        torch.testing.assert_close(
            made[name], slerp(models[left][name], models[right][name], 0.3), rtol=1e-4, atol=1e-5
        )
    assert {parent.repo: parent.sha256 for parent in outcome.manifest.parents} == {
        name: weights_digest(folder) for name, folder in llamas.items()
    }
    again = merged(tmp_path, **content)
    assert not again.made
    assert again.manifest == outcome.manifest
    changed = tensors(llamas["base"])
    changed["lm_head.weight"] += 1
    save_file(changed, llamas["base"] / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MergeError, match="member base: its weights are others than then"):
        merged(tmp_path, **content)


def test_a_base_is_stacked_like_the_members(tmp_path, llamas):
    slices = [{"sources": [part(llamas[name], *span) for name in ("one", "two", "base")]} for span in ((0, 1), (2, 4))]
    content = {"method": "task_arithmetic", "parameters": {"scale": 0.5}, "slices": slices}
    outcome = merged(tmp_path, base=str(llamas["base"]), **content)
    models = {name: tensors(folder) for name, folder in llamas.items()}
    made = tensors(outcome.folder)
    for new, old in enumerate((0, 2, 3)):
        for name in [name for name in models["one"] if f".layers.{old}." in name]:
            root = models["base"][name]
            expected = root + 0.5 * (models["one"][name] - root) + 0.5 * (models["two"][name] - root)
            torch.testing.assert_close(made[name.replace(f".layers.{old}.", f".layers.{new}.")], expected)
    assert [(parent.repo, parent.role) for parent in outcome.manifest.parents] == [
        ("one", "member"), ("two", "member"), ("base", "base"),
    ]  # fmt: skip
    named = [one | {"base_model": str(llamas["base"])} for one in slices]
    own = merged(tmp_path, name="own", **(content | {"slices": named}))
    torch.testing.assert_close(tensors(own.folder), made, **EXACT)


def test_what_cannot_be_stacked_is_refused(tmp_path, llamas):
    whole = [{"sources": [part(llamas["one"], 0, 4)]}]
    with pytest.raises(MergeError, match=r"layer_range \[2, 5\] of .*two, which has blocks 0 to 3"):
        merged(tmp_path, method="passthrough", slices=[*whole, {"sources": [part(llamas["two"], 2, 5)]}])
    members = [str(llamas["one"]), str(llamas["two"])]
    with pytest.raises(MergeError, match=r"two: no slice takes blocks of it: leave it out of `members`"):
        merged(tmp_path, method="passthrough", members=members, slices=whole)
    with pytest.raises(MergeError, match="has the head of its last slice: set `merge`"):
        merged(tmp_path, method="passthrough", slices=whole, heads="per_task")
    save(tmp_path / "three", bpe(PAIRS["two"]), 3, **LLAMA)
    with pytest.raises(MergeError, match=r"have different vocabularies.*`tokenizer: union` or `base`"):
        merged(tmp_path, method="passthrough", slices=[*whole, {"sources": [part(tmp_path / "three", 0, 1)]}])
    assert not (tmp_path / "merges").exists() or not list((tmp_path / "merges").iterdir())


def test_statistics_of_a_stack_are_not_made_up(tmp_path, llamas):
    for name in ("one", "two"):
        (llamas[name] / "statistics").mkdir()
        save_file(tensors(llamas[name]), llamas[name] / "statistics" / "fisher.safetensors")
    slices = [{"sources": [part(llamas[name], 0, 2) for name in ("one", "two")]}] * 2
    with pytest.raises(MergeError, match="fisher statistics were taken of other networks than this one"):
        merged(tmp_path, method="fisher", slices=slices)


def test_tokens_are_joined_before_blocks_are_stacked(tmp_path):
    for seed, name in enumerate(("one", "two")):
        save(tmp_path / name, bpe(PAIRS[name]), seed, **LLAMA)
    slices = [{"sources": [part(tmp_path / "one", 0, 2)]}, {"sources": [part(tmp_path / "two", 2, 4)]}]
    outcome = merged(tmp_path, method="passthrough", slices=slices, tokenizer="union")
    loaded(outcome.folder, transformers.AutoModelForCausalLM)
    made, tokens = tensors(outcome.folder), vocabulary(outcome.folder)
    own = {name: vocabulary(tmp_path / name) for name in ("one", "two")}
    assert set(tokens) == {*own["one"], *own["two"]}
    # The embeddings are the first slice's, the head is the last one's; each has the other's row of what it lacks.
    for key, owners in (("model.embed_tokens.weight", ("one", "two")), ("lm_head.weight", ("two", "one"))):
        assert len(made[key]) == len(tokens)
        for token, number in tokens.items():
            owner = next(name for name in owners if token in own[name])
            torch.testing.assert_close(made[key][number], tensors(tmp_path / owner)[key][own[owner][token]], **EXACT)


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_union_has_every_row_right(tmp_path, architecture):
    own, folders = {}, {}
    for seed, name in enumerate(WORDS):
        tokenizer = word_piece(WORDS[name]) if architecture.startswith("Bert") else bpe(PAIRS[name])
        more = {"tie_word_embeddings": True} if architecture.startswith("GPT2") else {}
        save(tmp_path / name, tokenizer, seed, name=architecture, **more)
        folders[name], own[name] = tmp_path / name, vocabulary(tmp_path / name)
    members = [str(folders[name]) for name in ("one", "two")]
    parameters = {"weights": [0.25, 0.5], "scale": 1.0}
    outcome = merged(
        tmp_path,
        method="task_arithmetic",
        parameters=parameters,
        members=members,
        base=str(folders["base"]),
        tokenizer="union",
    )
    auto_class = transformers.AutoModelForMaskedLM if "Masked" in architecture else transformers.AutoModelForCausalLM
    model = loaded(outcome.folder, auto_class)
    assert type(model).__name__ == architecture
    tokens = vocabulary(outcome.folder)
    assert set(tokens) == {token for known in own.values() for token in known}
    assert sorted(tokens.values()) == list(range(len(tokens)))
    assert own["base"].items() <= tokens.items()  # they keep their numbers
    states = {name: tensors(folder) for name, folder in folders.items()}
    made = tensors(outcome.folder)
    assert made.keys() == states["one"].keys()
    by_token = [
        name for name in made if len(made[name]) == len(tokens) and len(states["one"][name]) == len(own["one"])
    ]
    assert by_token
    for name in made:
        root, one, two = (states[model][name] for model in ("base", "one", "two"))
        if name not in by_token:
            torch.testing.assert_close(made[name], root + 0.25 * (one - root) + 0.5 * (two - root))
            continue
        for token, number in tokens.items():
            rows = {model: states[model][name][own[model][token]] for model in own if token in own[model]}
            having = [rows[model] for model in ("one", "two") if model in rows]
            lacking = rows["base"] if "base" in rows else sum(having) / len(having)
            root, one, two = (rows.get(model, lacking) for model in ("base", "one", "two"))
            torch.testing.assert_close(made[name][number], root + 0.25 * (one - root) + 0.5 * (two - root))
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == len(tokens)
    assert outcome.manifest.num_parameters == sum(tensor.numel() for tensor in made.values())


def test_a_text_reads_as_before_with_the_merged_tokenizer(tmp_path, berts):
    members = [str(berts["one"]), str(berts["two"])]
    outcome = merged(tmp_path, members=members, tokenizer="union")
    made = transformers.AutoTokenizer.from_pretrained(outcome.folder)
    for name in ("one", "two"):
        own = transformers.AutoTokenizer.from_pretrained(berts[name])
        text = " ".join(WORDS[name])
        assert made.convert_ids_to_tokens(made(text).input_ids) == own.convert_ids_to_tokens(own(text).input_ids)


def test_the_bases_tokens_alone(tmp_path, berts):
    members = [str(berts["one"]), str(berts["two"])]
    outcome = merged(tmp_path, members=members, base=str(berts["base"]), tokenizer="base")
    tokens, name = vocabulary(outcome.folder), "bert.embeddings.word_embeddings.weight"
    assert tokens == vocabulary(berts["base"])
    assert (outcome.folder / "tokenizer.json").read_bytes() == (berts["base"] / "tokenizer.json").read_bytes()
    states = {model: tensors(folder)[name] for model, folder in berts.items()}
    own = {model: vocabulary(folder) for model, folder in berts.items()}
    made = tensors(outcome.folder)[name]
    for token, number in tokens.items():
        rows = [
            states[model][own[model][token]] if token in own[model] else states["base"][number]
            for model in ("one", "two")
        ]
        torch.testing.assert_close(made[number], sum(rows) / 2)
    # The average takes no base, and yet its rows are in the merge.
    assert [(parent.repo, parent.role, parent.sha256) for parent in outcome.manifest.parents] == [
        ("one", "member", weights_digest(berts["one"])),
        ("two", "member", weights_digest(berts["two"])),
        ("base", "base", weights_digest(berts["base"])),
    ]


def test_a_model_named_for_its_tokens_alone_is_a_parent(tmp_path, berts):
    members = [str(berts["one"]), str(berts["two"])]
    content = {"members": members, "tokenizer": {"source": "base", "base": str(berts["base"])}}
    outcome = merged(tmp_path, **content)
    assert vocabulary(outcome.folder) == vocabulary(berts["base"])
    assert [parent.repo for parent in outcome.manifest.parents] == ["one", "two", "base"]
    assert str(tmp_path) not in (outcome.folder / MANIFEST_FILE).read_text()
    assert not merged(tmp_path, **content).made


def test_different_tokens_without_a_word_about_them_are_refused(tmp_path, berts):
    members = [str(berts["one"]), str(berts["two"])]
    for content in ({}, {"tokenizer": "same"}):
        with pytest.raises(MergeError, match=r"different vocabularies(.|\n)*`tokenizer: union` or `base`"):
            merged(tmp_path, members=members, **content)
    with pytest.raises(MergeError, match=r"tokenizer 'unoin' \(did you mean 'union'\?\)"):
        merged(tmp_path, members=members, tokenizer="unoin")


def test_tokens_with_rows_of_their_own(tmp_path, berts):
    members = [str(berts["one"]), str(berts["two"])]
    tokens = {
        "horse": {"source": {"kind": "zero"}},
        "cat": {"source": members[1], "force": True},
        "<new>": {"source": {"kind": "model_token", "model": members[0], "token": "dog"}},
    }
    spec = {"source": "union", "tokens": tokens, "pad_to_multiple_of": 8}
    outcome = merged(tmp_path, members=members, tokenizer=spec)
    made, numbers = tensors(outcome.folder)["bert.embeddings.word_embeddings.weight"], vocabulary(outcome.folder)
    one, two = (tensors(berts[name])["bert.embeddings.word_embeddings.weight"] for name in ("one", "two"))
    own = [vocabulary(berts[name]) for name in ("one", "two")]
    assert len(made) == 16
    assert loaded(outcome.folder, transformers.AutoModelForMaskedLM).config.vocab_size == 16
    torch.testing.assert_close(made[numbers["cat"]], two[own[1]["cat"]])
    torch.testing.assert_close(made[numbers["horse"]], two[own[1]["horse"]] / 2)  # zero in the first
    torch.testing.assert_close(made[numbers["<new>"]], one[own[0]["dog"]])
    torch.testing.assert_close(made[numbers["fish"]], (one[own[0]["fish"]] + two[own[1]["fish"]]) / 2)
    plain = json.loads((outcome.folder / MANIFEST_FILE).read_text())
    assert plain["recipe"]["tokenizer"]["tokens"]["<new>"]["source"]["model"] == "one"
    assert str(tmp_path) not in json.dumps(plain)


def test_a_token_a_member_never_saw_counts_for_nothing_in_a_fisher_mean(tmp_path, berts):
    for seed, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(seed)
        fisher = {key: torch.rand(tensor.shape, generator=generator) for key, tensor in tensors(berts[name]).items()}
        (berts[name] / "statistics").mkdir()
        save_file(fisher, berts[name] / "statistics" / "fisher.safetensors")
    outcome = merged(
        tmp_path, method="fisher", members=[str(berts["one"]), str(berts["two"])], tokenizer="union", dtype="float32"
    )
    name = "bert.embeddings.word_embeddings.weight"
    made, numbers = tensors(outcome.folder)[name], vocabulary(outcome.folder)
    for alone, owner in (("dog", "one"), ("horse", "two")):
        own = tensors(berts[owner])[name][vocabulary(berts[owner])[alone]]
        torch.testing.assert_close(made[numbers[alone]], own, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["average", "fisher"])
def test_classes_in_another_order_are_brought_into_the_firsts(tmp_path, method):
    labels, order = ("no", "maybe", "yes"), [2, 0, 1]
    one = classifier(tmp_path / "one", 1, labels)
    two = classifier(tmp_path / "two", 2, labels)
    other = classifier(tmp_path / "other", 2, [labels[place] for place in order])
    state = tensors(tmp_path / "two")
    fisher = {
        name: torch.rand(tensor.shape, generator=torch.Generator().manual_seed(3)) for name, tensor in state.items()
    }
    head = [name for name in state if name.startswith("classifier.")]

    def turned(some):
        return some | {name: some[name][order].contiguous() for name in head}

    save_file(turned(state), tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    for folder, content in (("one", fisher), ("two", fisher), ("other", turned(fisher))):
        content = {name: tensor * (2 if folder == "one" else 1) for name, tensor in content.items()}
        (tmp_path / folder / "statistics").mkdir()
        save_file(content, tmp_path / folder / "statistics" / "fisher.safetensors")
    straight = merged(tmp_path, name="straight", method=method, members=[one, two])
    permuted = merged(tmp_path, name="permuted", method=method, members=[one, other])
    torch.testing.assert_close(tensors(permuted.folder), tensors(straight.folder), **EXACT)
    model = loaded(permuted.folder, transformers.AutoModelForSequenceClassification)
    assert model.config.id2label == dict(enumerate(labels))
    assert model.config.label2id == {label: number for number, label in enumerate(labels)}
    at_once = AutoMergedModel.from_pretrained([one, other], method)
    torch.testing.assert_close(at_once.state_dict(), model.state_dict(), **EXACT)
    if method == "average":
        first = tensors(tmp_path / "one")
        for name in head:
            torch.testing.assert_close(tensors(permuted.folder)[name], (first[name] + state[name]) / 2)
    assert [parent.sha256 for parent in permuted.manifest.parents][1] == weights_digest(tmp_path / "other")


def test_a_merge_with_joined_tokens_is_not_made_again_of_its_parents(tmp_path, berts):
    outcome = merged(tmp_path, members=[str(berts["one"]), str(berts["two"])], tokenizer="union")
    (outcome.folder / "model.safetensors").unlink()
    manifest = Manifest.read(outcome.folder)
    on_a_hub = tuple(replace(parent, repo=f"org/{parent.repo}") for parent in manifest.parents)
    manifest.replace(parents=on_a_hub).write(outcome.folder)
    with pytest.raises(PopulationError, match="blocks or tokens of several models: it can be loaded only with its"):
        AutoMergedModel.from_pretrained(str(outcome.folder))


def test_the_bases_head_is_reordered_too(tmp_path):
    labels = ("no", "maybe", "yes")
    members = [classifier(tmp_path / name, seed, labels) for seed, name in enumerate(("one", "two"))]
    base = classifier(tmp_path / "base", 5, labels[::-1])
    outcome = merged(tmp_path, method="task_arithmetic", parameters={"scale": 0.5}, members=members, base=base)
    one, two, root = (tensors(tmp_path / name)["classifier.weight"] for name in ("one", "two", "base"))
    root = root.flip(0)
    expected = root + 0.5 * (one - root) + 0.5 * (two - root)
    torch.testing.assert_close(tensors(outcome.folder)["classifier.weight"], expected)


def test_classes_that_are_others_are_refused(tmp_path):
    one = classifier(tmp_path / "one", 1, ("no", "yes"))
    two = classifier(tmp_path / "two", 2, ("cold", "warm"))
    with pytest.raises(MergeError, match=r"different classes \(no, yes; cold, warm\)"):
        merged(tmp_path, members=[one, two])
    unnamed = classifier(tmp_path / "three", 3, ("LABEL_0", "LABEL_1"))
    with pytest.raises(MergeError, match="those of .*three have no names"):
        merged(tmp_path, members=[one, unnamed])


def test_two_tasks_keep_their_heads_and_share_a_joined_vocabulary(tmp_path):
    one = classifier(tmp_path / "one", 1, ("no", "yes"), "one", task="sst")
    two = classifier(tmp_path / "two", 2, ("cold", "mild", "warm"), "two", task="weather")
    turned = classifier(tmp_path / "turned", 3, ("warm", "cold", "mild"), "two", task="weather")
    outcome = merged(tmp_path, members=[one, two, turned], tokenizer="union")
    trunk = loaded(outcome.folder, transformers.AutoModel)
    tokens = vocabulary(outcome.folder)
    states = [tensors(tmp_path / name) for name in ("one", "two", "turned")]
    own = [vocabulary(tmp_path / name) for name in ("one", "two", "turned")]
    rows = trunk.embeddings.word_embeddings.weight
    for token, number in tokens.items():
        having = [
            state["bert.embeddings.word_embeddings.weight"][known[token]]
            for state, known in zip(states, own, strict=True)
            if token in known
        ]
        filled = sum(having) / len(having)
        expected = (sum(having) + (3 - len(having)) * filled) / 3
        torch.testing.assert_close(rows[number], expected)
    for task, labels in (("sst", ("no", "yes")), ("weather", ("cold", "mild", "warm"))):
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            outcome.folder, subfolder=task, output_loading_info=True
        )
        assert not any(info.values())
        assert tuple(model.config.id2label.values()) == labels
        assert transformers.AutoTokenizer.from_pretrained(outcome.folder, subfolder=task).get_vocab() == tokens
        torch.testing.assert_close(model.bert.state_dict(), trunk.state_dict(), **EXACT)
        head = model.classifier.weight
        if task == "sst":
            torch.testing.assert_close(head, states[0]["classifier.weight"], **EXACT)
        else:  # the second member of the task has its classes in another order
            order = [1, 2, 0]
            mean = (states[1]["classifier.weight"] + states[2]["classifier.weight"][order]) / 2
            torch.testing.assert_close(head, mean)
    assert [parent.repo for parent in outcome.manifest.parents] == ["one", "two", "turned"]


def test_a_stack_of_classifiers_has_the_last_ones_task(tmp_path):
    one = classifier(tmp_path / "one", 1, ("no", "yes"), task="sst")
    two = classifier(tmp_path / "two", 2, ("cold", "warm"), task="weather")
    slices = [{"sources": [part(one, 0, 1)]}, {"sources": [part(two, 0, 1)]}]
    outcome = merged(tmp_path, method="passthrough", slices=slices)
    model = loaded(outcome.folder, transformers.AutoModelForSequenceClassification)
    assert tuple(model.config.id2label.values()) == ("cold", "warm")
    torch.testing.assert_close(model.classifier.weight, tensors(tmp_path / "two")["classifier.weight"], **EXACT)
    assert (outcome.manifest.task, outcome.manifest.num_parameters) == ("weather", model.num_parameters())


MERGEKIT = """
merge_method: linear
models:
  - {{model: {one}, parameters: {{weight: 0.3}}}}
  - {{model: {two}, parameters: {{weight: [{{filter: mlp, value: 0.9}}, {{value: 0.6}}]}}}}
parameters: {{normalize: true, int8_mask: true}}
tokenizer: {{source: union}}
chat_template: {template}
dtype: float32
out_dtype: bfloat16
"""
TEMPLATE = "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"


@pytest.fixture
def chatting(tmp_path):
    """Two Llamas with words of their own, the second with a chat template."""
    for seed, name in enumerate(("one", "two")):
        save(tmp_path / name, bpe(PAIRS[name]), seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "two")
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "two")
    return tmp_path


def verb(folder, *overrides, template=None):
    file = folder / "merge.yml"
    file.write_text(MERGEKIT.format(one=folder / "one", two=folder / "two", template=template or json.dumps(TEMPLATE)))
    return main([str(file), "name=verb", f"output={folder / 'merges'}", "lineage=ignore", *overrides])


def test_a_mergekit_file_is_run_by_the_verb(chatting, capsys):
    assert verb(chatting) == 0
    out, err = capsys.readouterr()
    assert "parameters.int8_mask: left out" in err
    assert str(chatting / "merges" / "verb") in out
    folder = chatting / "merges" / "verb"
    model = loaded(folder, transformers.AutoModelForCausalLM)
    assert model.dtype == torch.bfloat16
    one, two, made = (tensors(path) for path in (chatting / "one", chatting / "two", folder))
    for name in made:
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            weights = (0.3, 0.9) if "mlp" in name else (0.3, 0.6)
            mean = (weights[0] * one[name] + weights[1] * two[name]) / sum(weights)
            # Half a unit in the last place of bfloat16, and float32's rounding before it.
            torch.testing.assert_close(made[name].float(), mean, rtol=2**-8, atol=1e-6)
    tokens, own = vocabulary(folder), [vocabulary(chatting / name) for name in ("one", "two")]
    for token, number in tokens.items():
        rows = [
            state["lm_head.weight"][known[token]]
            for state, known in zip((one, two), own, strict=True)
            if token in known
        ]
        first, second = rows if len(rows) == 2 else rows * 2
        expected = (first + 2 * second) / 3
        torch.testing.assert_close(made["lm_head.weight"][number].float(), expected, rtol=2**-8, atol=1e-6)
    chat = transformers.AutoTokenizer.from_pretrained(folder)
    assert chat.chat_template == TEMPLATE
    said = [{"role": "user", "content": "abcd"}]
    assert chat.apply_chat_template(said, tokenize=False) == "<s>user: abcd</s>"
    manifest = Manifest.read(folder)
    assert [parent.repo for parent in manifest.parents] == ["one", "two"]
    assert manifest.method["name"] == "average"
    assert verb(chatting) == 0
    assert "already made from the same members and recipe" in capsys.readouterr().out


def test_what_the_verb_overrides_counts(chatting, capsys):
    assert verb(chatting, "dtype=float32", "tokenizer=base") == 0
    assert loaded(chatting / "merges" / "verb", transformers.AutoModelForCausalLM).dtype == torch.float32
    assert vocabulary(chatting / "merges" / "verb") == vocabulary(chatting / "one")


def test_the_chat_template_most_models_have(chatting, capsys):
    assert verb(chatting, template="auto") == 0
    folder = chatting / "merges" / "verb"
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages[0].content }}"
    assert verb(chatting, "name=other", template="chatml") != 0
    assert "chat_template 'chatml' is no template: give its Jinja text itself" in capsys.readouterr().err
    assert not (chatting / "merges" / "other").exists()


def test_a_dry_run_of_a_stack_shows_its_sources(tmp_path, llamas, capsys):
    content = {
        "merge_method": "passthrough",
        "slices": [{"sources": [part(llamas["one"], 0, 3)]}, {"sources": [part(llamas["two"], 1, 4)]}],
        "dtype": "float32",
    }
    (tmp_path / "stack.yml").write_text(yaml.safe_dump(content))
    assert main([str(tmp_path / "stack.yml"), f"output={tmp_path / 'merges'}", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for name in ("one", "two"):
        assert weights_digest(llamas[name])[:12] in out
    assert not (tmp_path / "merges").exists()


def test_members_shown_otherwise_are_measured_as_they_are(population, texts):
    """One member has its classes turned round and a word of its own: nothing of that changes what is measured."""
    folders = [population / name for name in ("zoo-000", "zoo-001")]
    data = DataSpec(path=str(texts / "sst"), validation_split="validation", max_length=16)
    model = transformers.BertForSequenceClassification.from_pretrained(folders[1])
    own = transformers.AutoTokenizer.from_pretrained(folders[1])
    own.add_tokens(["zebra"])
    model.resize_token_embeddings(len(own), mean_resizing=False)
    names = [model.config.id2label[place] for place in (1, 0)]
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    with torch.no_grad():
        for tensor in (model.classifier.weight, model.classifier.bias):
            tensor.copy_(tensor.flip(0))
    model.save_pretrained(folders[1])
    own.save_pretrained(folders[1])
    Manifest.read(folders[1]).replace(sha256=weights_digest(folders[1])).write(folders[1])
    outcome = merged(population.parent, members=[str(folder) for folder in folders], tokenizer="union", evaluate=True)
    records = {record["model"]: record for record in outcome.manifest.results}
    merge = Member(Manifest.read(folders[0]), folder=outcome.folder)
    for name, member in (("zoo-000", folders[0]), ("zoo-001", folders[1]), ("made", merge)):
        found = evaluate_member(member, data)
        for split in ("validation", "test"):
            for metric in ("loss", "accuracy"):
                assert records[name][f"{split}_{metric}"] == pytest.approx(found[split][metric], abs=1e-6), name
    assert "zebra" in vocabulary(outcome.folder)
