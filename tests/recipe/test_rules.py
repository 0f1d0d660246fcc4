import pytest

from hf_zoo.recipe.rules import OWN_ARGUMENTS, check_repo_name
from hf_zoo.recipe.schema import FinetuneRecipe, MergeRecipe

TEXT = "name: zoo\nobjective: masked_lm\nmodel: {type: bert}\ndata: docs\n"
MERGE = "members: [a, b]\n"


def paths(found):
    return {mistake.partition(":")[0] for mistake in found}


def test_a_sound_recipe_passes(load, small):
    assert load(small).name == "zoo"
    assert load(TEXT).data.path == "docs"


@pytest.mark.parametrize(
    "override",
    [
        "training.learning_rate=0",
        "training.learning_rate=-1e-3",
        "training.epochs=0",
        "training.max_steps=0",
        "training.batch_size=0",
        "training.eval_batch_size=0",
        "training.accumulation=0",
        "training.weight_decay=-0.1",
        "training.betas=[0.9,1.0]",
        "training.warmup=-1",
        "training.warmup=1.5",
        "training.max_grad_norm=-1",
        "training.momentum=0.9",
        "training.nesterov=true",
        "augmentation.flip=1.1",
        "augmentation.rotation=181",
        "augmentation.blur=4",
        "augmentation.mixup=-1",
        "augmentation.label_smoothing=1",
        "augmentation.random_erasing=-0.1",
        "model.head.hidden=[0]",
        "model.head.hidden=[8]",
        "model.head.dropout=0.5",
        "model.head.reuse=true",
        "data.validation_fraction=1",
        "data.num_train=0",
        "data.image_size=0",
        "data.validation_split=train",
        "data.test_split=train",
        "data.path=''",
        "data.path=docs",
        "data.text=sentence",
        "objective.mode=continued",
        "tokenizer.vocab_size=50",
        "snapshots.every_epochs=0",
        "snapshots.log_spaced=0",
        "seed=-1",
        "seeds.init=-1",
        "publish.workers=0",
        "publish.namespace=my org",
        "output=''",
        "parent=''",
    ],
)
def test_a_value_out_of_its_range_or_place_is_refused_at_its_path(mistakes, small, override):
    assert paths(mistakes(small, override)) == {override.partition("=")[0]}


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["model.type="], "model.type"),
        (["model.type=timm"], "model.config.architecture"),
        (["model.head=mlp"], "model.head.hidden"),
        (["model.adapter={}"], "model.adapter"),
        (["parent=a", "model.adapter={}", "model.freeze_encoder=true"], "model.freeze_encoder"),
        (["parent=a", "model.adapter={}", "model.head={type: mlp, hidden: 8}"], "model.head.type"),
        (["parent=a", "model.adapter.target_modules=[]"], "model.adapter.target_modules"),
        (["objective=contrastive", "augmentation.mixup=0.8"], "augmentation.mixup"),
        (["objective=contrastive", "augmentation.label_smoothing=0.1"], "augmentation.label_smoothing"),
        (["objective=contrastive", "training.batch_size=1"], "training.batch_size"),
        (["objective.temperature=0"], "objective.temperature"),
        (["training.optimizer=sgd", "training.nesterov=true"], "training.nesterov"),
        (["training.optimizer=sgd", "training.betas=[0.8, 0.9]"], "training.betas"),
        (["data.validation_split=test"], "data.test_split"),
        (["snapshots.best=accuracy", "data.validation_fraction=0"], "snapshots.best"),
        (["snapshots.keep_last=2", "snapshots.every_epochs="], "snapshots.keep_last"),
    ],
)
def test_keys_that_need_or_exclude_one_another(mistakes, small, overrides, path):
    assert paths(mistakes(small, *overrides)) == {path}


@pytest.mark.parametrize(
    ("overrides", "path"),
    [
        (["objective.mlm_probability=0"], "objective.mlm_probability"),
        (["objective.mode=continued"], "parent"),
        (["data=digits"], "data.path"),
        (["data.image_size=8"], "data.image_size"),
        (["augmentation.flip=0.5"], "augmentation"),
        (["model.head={type: mlp, hidden: 8}"], "model.head.type"),
        (["data.max_length=2"], "data.max_length"),
    ],
)
def test_rules_of_texts(mistakes, overrides, path):
    assert paths(mistakes(TEXT, *overrides)) == {path}


def test_legal_combinations_are_not_refused(load, small):
    load(small, "training.optimizer=sgd", "training.momentum=0.9", "training.nesterov=true", "training.warmup=0.1")
    load(small, "parent=runs/a/a-000", "model.type=", "model.head={type: mlp, hidden: 8, dropout: 0.1}")
    load(small, "parent=runs/a/a-000", "model.adapter=lora", "model.head.reuse=true")
    load(small, "snapshots.every_epochs=", "snapshots.best=", "training.warmup=100", "data.test_split=")
    load(TEXT, "parent=google-bert/bert-base-cased", "objective.mode=continued", "model.type=")


def test_finetuning_needs_a_parent_for_every_member(load, mistakes, small):
    assert paths(mistakes(small, recipe_class=FinetuneRecipe)) == {"parent"}
    load(small, "vary.parent=[a, b]", recipe_class=FinetuneRecipe)
    found = mistakes(small, "vary.parent=[a, null]", recipe_class=FinetuneRecipe)
    assert len(found) == 1
    assert "in 1 of 2 members, the first with parent=null" in found[0]


@pytest.mark.parametrize("argument", sorted(OWN_ARGUMENTS))
def test_arguments_of_the_trainer_that_a_recipe_says_itself_are_refused(mistakes, small, argument):
    found = mistakes(small, f"training.arguments.{argument}=1")
    assert found == [f"training.arguments.{argument}: is said in a recipe by {OWN_ARGUMENTS[argument]}"]


def test_a_token_in_a_recipe_is_refused_without_repeating_it(mistakes, small):
    found = mistakes(small, "training.arguments.hub_token=hf_secret")
    assert "HF_TOKEN" in found[0]
    assert "hf_secret" not in found[0]


@pytest.mark.parametrize("name", ["zoo-vit", "a", "A.b_c-1", "_x", "z" * 96])
def test_names_a_hub_takes(name):
    from huggingface_hub.utils import validate_repo_id

    assert check_repo_name(name, None) is None
    validate_repo_id(name)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a--b", "a..b", "-a", ".a", "a-", "a.", "a.git", "zoö", "z" * 97])
def test_names_a_hub_refuses(name):
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    assert "Hub refuses" in check_repo_name(name, None)
    if name not in {"zoö", "", "a/b"}:  # the client takes these as another form, the Hub does not
        with pytest.raises(HFValidationError):
            validate_repo_id(name)


def test_namespace_and_member_number_count_towards_the_length(mistakes, load, small):
    load(small, f"name={'z' * 88}", "publish.namespace=org")  # 3 + 1 + 88 + 4 = 96
    assert paths(mistakes(small, f"name={'z' * 89}", "publish.namespace=org")) == {"name"}
    assert paths(mistakes(small, "name=zoo-")) == {"name"}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("method: average", "members"),
        (MERGE + "tasks: [sst]\npopulation: runs/zoo", "members"),
        ("tasks: [sst]", "population"),
        (MERGE + "population: runs/zoo", "population"),
        (MERGE + "where: {seed: 1}", "where"),
        ("members: [a, a]", "members"),
        ("population: p\ntasks: [sst, mnli]\ndata: {ssst: docs}", "data.ssst"),
        (MERGE + "data: {sst: {num_eval: 0}}", "data.sst.num_eval"),
        (MERGE + "name: a--b", "name"),
        (MERGE + "num_eval: 0", "num_eval"),
        (MERGE + "method: averag", "method"),
    ],
)
def test_rules_of_merges(mistakes, text, path):
    assert paths(mistakes(text, recipe_class=MergeRecipe)) == {path}


def test_an_unknown_method_names_the_nearest(mistakes):
    assert "(did you mean 'greedy_soup'?)" in mistakes(MERGE + "method: greedysoup", recipe_class=MergeRecipe)[0]
