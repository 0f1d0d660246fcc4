"""What the Hub reads off a repo's files, and which cards it refuses."""

import json
import struct

import pytest

from hf_zoo.hub.local.card_check import check_card
from hf_zoo.hub.local.metadata import Catalogue, front_matter, safetensors_parameters, without_front_matter
from hf_zoo.hub.local.store import Store, regular_file


@pytest.fixture
def facts_of(tmp_path):
    """Return a function from files to what the Hub says about a repo that holds them."""
    store = Store(tmp_path / "hub")
    numbers = iter(range(1000))

    def facts(files, kind="model"):
        repo = store.create_repo(kind, f"org/r{next(numbers)}", "a", False)
        with store.objects.batch() as batch:
            changes = [regular_file(path, content, batch) for path, content in files.items()]
            batch.keep()
        commit = store.add_commit(repo, "main", changes, author="a", title="x")
        return Catalogue(store.objects).facts(kind, commit)

    yield facts
    store.close()


def card(yaml):
    return f"---\n{yaml}\n---\n# Title\n".encode()


def weights(**tensors):
    header = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [0, 0]}
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded


def test_everything_the_hub_reads_off_a_merge(facts_of):
    facts = facts_of({
        "README.md": card(
            "library_name: transformers\nlicense: mit\nlanguage: [en, de]\npipeline_tag: fill-mask\n"
            "base_model: [zoo/a, zoo/b]\nbase_model_relation: merge\ntags: [merge, model-zoo]\ndatasets: [imdb]\n"
            "date: 2026-11-20\nlearning_rate: 1.0e-4"
        )
        + b"See https://arxiv.org/abs/2306.01708.",
        "config.json": b'{"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 4}',
        "model-00001-of-00002.safetensors": weights(a=("F32", [3, 4]), b=("I64", [2])),
        "model-00002-of-00002.safetensors": weights(c=("F32", [5])),
        "mnli/model.safetensors": weights(d=("F32", [100])),
    })
    assert facts.tags == (
        *("transformers", "safetensors", "bert", "fill-mask", "merge", "model-zoo", "dataset:imdb", "en", "de"),
        *("license:mit", "arxiv:2306.01708", "base_model:zoo/a", "base_model:merge:zoo/a", "base_model:zoo/b"),
        *("base_model:merge:zoo/b", "region:us"),
    )
    assert facts.parameters == {"F32": 17, "I64": 2}  # the root's own, not the heads' in the sub-folders
    assert (facts.card["date"], facts.card["learning_rate"]) == ("2026-11-20", 1e-4)
    assert facts.config == {"model_type": "bert", "architectures": ["BertForMaskedLM"]}


@pytest.mark.parametrize(
    ("yaml", "files", "relation"),
    [
        ("base_model: zoo/a", {}, "finetune"),
        ("base_model: [zoo/a, zoo/b]", {}, "merge"),
        ("base_model: zoo/a\ntags: [merge]", {}, "merge"),
        ("base_model: zoo/a\nbase_model_relation: quantized", {}, "quantized"),
        ("base_model: zoo/a", {"adapter_config.json": b'{"peft_type": "LORA"}'}, "adapter"),
        ("license: mit", {"adapter_config.json": b'{"base_model_name_or_path": "zoo/a"}'}, "adapter"),
    ],
)
def test_how_a_model_comes_from_its_base(facts_of, yaml, files, relation):
    facts = facts_of({"README.md": card(yaml), **files})
    assert f"base_model:{relation}:zoo/a" in facts.tags


@pytest.mark.parametrize(
    ("config", "library", "task"),
    [
        (
            {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
            "transformers",
            "image-classification",
        ),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "transformers", None),
        ({"architecture": "resnet18", "pretrained_cfg": {}}, "timm", None),
        ({}, None, None),
    ],
)
def test_library_and_task_without_a_card(facts_of, config, library, task):
    facts = facts_of({"config.json": json.dumps(config).encode()})
    assert (facts.library_name, facts.pipeline_tag) == (library, task)


@pytest.mark.parametrize("junk", [b"", b"\xff\xfe", b"[1]", b"{", b'{"model_type": 7}', b"[" * 100_000, b'{"a": NaN}'])
def test_junk_is_kept_but_says_nothing(facts_of, junk):
    facts = facts_of({"config.json": junk, "adapter_config.json": junk, "README.md": junk, "model.safetensors": junk})
    assert (facts.parameters, facts.pipeline_tag, facts.card) == ({}, None, {})


@pytest.mark.parametrize(
    "header", [b"\xff" * 8, b"\0" * 7, struct.pack("<Q", 4) + b"null", struct.pack("<Q", 9) + b'{"a": {}}']
)
def test_safetensors_that_are_none(tmp_path, header):
    (tmp_path / "w").write_bytes(header)
    assert safetensors_parameters(tmp_path / "w") == {}


GOOD_INDEX = """model-index:
- name: m
  results:
  - task: {type: text-classification}
    dataset: {type: glue, name: SST-2}
    metrics:
    - {type: accuracy, value: 0.0}"""


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("license: [mit]\ntags: [a]\nbase_model: org/a\nbase_model_relation: merge\nlanguage: en", None),
        (GOOD_INDEX, None),
        ("tags: merge", '"tags" must be an array of strings'),
        ("tags: [1]", '"tags" must be an array of strings'),
        ("license: 7", '"license" must be an array of strings'),
        ("language: no", '"language" must be an array of strings'),  # YAML's no is false
        ("base_model: https://huggingface.co/org/a", '"base_model" with value "https://huggingface.co/org/a"'),
        ("base_model: /home/me/model", '"base_model" with value "/home/me/model" is not valid'),
        ("base_model_relation: cousin", '"base_model_relation" must be one of [adapter, merge, quantized, finetune]'),
        ("pipeline_tag: [fill-mask]", '"pipeline_tag" must be a string'),
        ("model-index: {}", '"model-index" must be an array'),
        (GOOD_INDEX.replace("type: glue, ", ""), '"model-index[0].results[0].dataset.type" is required'),
        (GOOD_INDEX.replace("task: {type: text-classification}", "source: x"), '"model-index[0].results[0].task" is'),
        (GOOD_INDEX.replace(", value: 0.0", ""), '"model-index[0].results[0].metrics[0].value" is required'),
        ("license: [", "cannot be read"),
        ("- a\n- b", "must be a mapping"),
        ("a: &a [*a]", "too large or too deep"),
        ("a: !!python/object/apply:os.system [ls]", "cannot be read"),
        ("a: " + "[" * 2000, "cannot be read"),
        ("a: " + "[" * 90 + "]" * 90, "too large or too deep"),
    ],
)  # fmt: skip
def test_cards_are_checked(yaml, message):
    errors, _ = check_card(card(yaml).decode(), "model")
    if message is None:
        assert errors == []
    else:
        assert [error for error in errors if message in error], errors


@pytest.mark.usefixtures("no_hang")
def test_aliases_that_unfold_without_end_are_refused():
    """The billion laughs: ten levels of ten aliases each."""
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    metadata, problem = front_matter(card("\n".join(lines)).decode())
    assert metadata is None
    assert "too large" in problem


def test_warnings():
    assert check_card("# no metadata", "model") == ([], ["empty or missing yaml metadata in repo card"])
    assert "official list" in check_card(card("pipeline_tag: merging").decode(), "model")[1][0]
    assert check_card(card("pretty_name: x").decode(), "dataset") == ([], [])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_text_of_a_card(end):
    text = end.join(["---", "license: mit", "---", "# Title", "", "---", "more"])
    assert front_matter(text) == ({"license": "mit"}, None)
    assert without_front_matter(text) == end.join(["# Title", "", "---", "more"])
    assert front_matter("# Title\n---\nlicense: mit\n---\n") == (None, None)  # a rule further down is no card data
