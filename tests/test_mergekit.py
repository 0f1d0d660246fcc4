"""mergekit's YAML, with the numbers mergekit 0.1.5 gives, worked out by hand."""

import pytest

from hf_zoo.errors import RecipeError
from hf_zoo.mergekit import METHODS, is_mergekit, read_mergekit, translate
from hf_zoo.mergekit_methods import recipe_content
from hf_zoo.mergekit_values import mapped_value, recipe_value, value_at
from hf_zoo.methods.base import make_method
from hf_zoo.places import Places
from hf_zoo.varying import value_at as value_of_recipe

BLOCKS = 4
NAMES = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{block}.{part}.weight"
        for block in range(BLOCKS)
        for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
    ),
    "model.norm.weight",
    "lm_head.weight",
]


def write(folder, text):
    path = folder / "merge.yml"
    path.write_text(text)
    return path


def of_models(method, *parameters, **top):
    models = [{"model": f"org/{letter}", "parameters": own} for letter, own in zip("abc", parameters, strict=False)]
    return {"merge_method": method, "models": models, **top}


def position(name, blocks=BLOCKS):
    """How deep a tensor lies, as mergekit counts: i / (n - 1), and 0 outside the blocks."""
    return int(name.split(".")[2]) / (blocks - 1) if ".layers." in name else 0.0


def test_a_file_as_users_write_it(tmp_path):
    path = write(
        tmp_path,
        """
        models:
          - model: psmathur/orca_mini_v3_13b
            parameters:
              density: [1, 0.7, 0.1] # density gradient
              weight: 1.0
          - model: garage-bAInd/Platypus2-13B
            parameters:
              density: 0.5
              weight: [0, 0.3, 0.7, 1] # weight gradient
          - model: WizardLM/WizardMath-13B-V1.0
            parameters:
              density: 0.33
              weight:
                - filter: mlp
                  value: 0.5
                - value: 0
        merge_method: ties
        base_model: TheBloke/Llama-2-13B-fp16
        parameters:
          normalize: true
          int8_mask: true
        dtype: float16
        """,
    )
    read = read_mergekit(path)
    assert read == {
        "method": "ties",
        "members": ["psmathur/orca_mini_v3_13b", "garage-bAInd/Platypus2-13B", "WizardLM/WizardMath-13B-V1.0"],
        "base": "TheBloke/Llama-2-13B-fp16",
        "parameters": {
            "normalize": True,
            "rescale": False,
            "lambda": 1.0,
            "density": {"members": [{"layers": [1.0, 0.7, 0.1]}, 0.5, 0.33]},
            "weight": {"members": [1.0, {"layers": [0.0, 0.3, 0.7, 1.0]}, {"filters": [["mlp", 0.5], ["*", 0.0]]}]},
        },
        "dtype": "float16",
        "out_dtype": "float16",
        "slices": None,
        "tokenizer": None,
        "chat_template": None,
        "notes": ["parameters.int8_mask: left out: how mergekit stores a mask; it changes no value here"],
    }


# What mergekit takes where nothing is written, and how many models besides the base.
TASK_VECTORS = {"weight": {"members": [0.5, 0.5]}, "density": 1.0, "lambda": 1.0}
DEFAULTS = {
    "linear": {"normalize": True, "weight": {"members": [0.5, 0.5, 0.5]}},
    "slerp": {"t": 0.25},
    "nuslerp": {"nuslerp_row_wise": False, "nuslerp_flatten": True, "weight": {"members": [0.5, 0.5]}},
    "multislerp": {"normalize_weights": True, "eps": 1e-8, "weight": {"members": [0.5, 0.5]}},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "model_stock": {"filter_wise": False},
    "nearswap": {"t": 0.25},
    "arcee_fusion": {},
    "task_arithmetic": TASK_VECTORS | {"normalize": False, "rescale": False},
    "ties": TASK_VECTORS | {"normalize": True, "rescale": False},
    "dare_linear": TASK_VECTORS | {"normalize": False, "rescale": True},
    "dare_ties": TASK_VECTORS | {"normalize": False, "rescale": True},
    "breadcrumbs": TASK_VECTORS | {"normalize": False, "rescale": False, "gamma": 0.01},
    "breadcrumbs_ties": TASK_VECTORS | {"normalize": False, "rescale": False, "gamma": 0.01},
    "della": TASK_VECTORS | {"normalize": True, "rescale": True, "epsilon": 0.15},
    "della_linear": TASK_VECTORS | {"normalize": False, "rescale": True, "epsilon": 0.15},
    "sce": {"select_topk": 1.0},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5},
    "passthrough": {"scale": 1.0},
}


@pytest.mark.parametrize("method", DEFAULTS)
def test_defaults_are_written_out(method):
    count = METHODS[method].members[1] or 2
    content = of_models(method, *[{}] * count)
    content["parameters"] = {"weight": 0.5, "t": 0.25}
    if method != "passthrough":
        content["base_model"] = "org/base"
    read = translate(content)
    assert read["parameters"] == DEFAULTS[method]
    members = [f"org/{letter}" for letter in "abc"[:count]]
    if method in ("slerp", "nearswap"):  # from the base to the other one
        assert (read["members"], read["base"]) == (["org/base", *members], None)
    elif METHODS[method].base == "none":  # the base is a member like the others, and comes last
        others = [] if method == "passthrough" else ["org/base"]
        assert (read["members"], read["base"]) == (members + others, None)
    else:
        assert (read["members"], read["base"]) == (members, "org/base")
    takes = {*METHODS[method].shared, *METHODS[method].of_members}
    left_out = {note.partition(":")[0] for note in read["notes"]}
    assert left_out == {f"parameters.{name}" for name in ("weight", "t") if name not in takes}


def test_the_list_of_methods_is_checked_as_a_whole():
    assert set(DEFAULTS) == set(METHODS)


def test_a_base_among_the_models_is_no_member():
    content = of_models("ties", {"weight": 1}, None, {"weight": 2}, base_model="org/b")
    read = translate(content)
    assert read["members"] == ["org/a", "org/c"]
    assert read["base"] == "org/b"
    assert read["parameters"]["weight"] == {"members": [1.0, 2.0]}
    slerp = translate(of_models("slerp", None, None, base_model="org/b", parameters={"t": 0.3}))
    assert slerp["members"] == ["org/b", "org/a"]


def test_a_gradient_over_the_blocks():
    """Three values over four blocks: 0.1, then 2/3 of the way to 0.4, 1/3 of the way to 0.9, and 0.9."""
    read = translate(of_models("linear", {"weight": [0.1, 0.4, 0.9]}, {"weight": 1}))
    weight = read["parameters"]["weight"]
    values = {name: value_at(weight, name, position(name)) for name in NAMES}
    for block, wanted in enumerate([0.1, 0.3, 17 / 30, 0.9]):
        assert values[f"model.layers.{block}.mlp.up_proj.weight"] == pytest.approx(wanted, rel=1e-12)
    # Embeddings, the last norm and the head get the first value, wherever they lie.
    assert [values[name] for name in NAMES if ".layers." not in name] == [0.1, 0.1, 0.1]
    assert {value_at(weight, name, position(name), member=1) for name in NAMES} == {1.0}


def test_filters_are_looked_through_from_the_nearest_scope():
    content = of_models("task_arithmetic", {"weight": [{"filter": "q_proj", "value": 0.1}]}, {}, base_model="org/base")
    content["parameters"] = {"weight": [{"filter": "proj", "value": [0.2, 0.5]}, {"filter": "*", "value": 0.3}]}
    weight = translate(content)["parameters"]["weight"]

    def at(block, part, member):
        name = f"model.layers.{block}.{part}.weight"
        return value_at(weight, name, position(name), member=member)

    assert at(1, "self_attn.q_proj", 0) == pytest.approx(0.1)
    assert at(1, "self_attn.q_proj", 1) == pytest.approx(0.3)
    assert at(2, "mlp.up_proj", 0) == pytest.approx(0.4)
    assert at(2, "input_layernorm", 0) == pytest.approx(0.3)


def test_a_single_filter_falls_back_to_the_default():
    content = of_models("ties", {"weight": 1, "density": {"filter": "mlp", "value": 0.2}}, base_model="org/base")
    density = translate(content)["parameters"]["density"]
    assert density == {"filters": [["mlp", 0.2], ["*", 1.0]]}


def slices(first, second, **top):
    """A slice of three blocks and one of one block, of two models each."""
    return {
        "merge_method": "linear",
        "slices": [
            {"sources": [{"model": "org/a", "layer_range": [0, 3], "parameters": {"weight": first}},
                         {"model": "org/b", "layer_range": [1, 4]}]},
            {"sources": [{"model": "org/b", "layer_range": [3, 4]},
                         {"model": "org/c", "layer_range": [0, 1], "parameters": {"weight": second}}],
             "parameters": {"weight": [0.2, 0.6]}},
        ],
        "parameters": {"weight": 0.3, "normalize": False},
        **top,
    }  # fmt: skip


def test_slices_begin_their_gradients_anew():
    read = translate(slices([0.0, 1.0], 0.25))
    assert read["members"] == ["org/a", "org/b", "org/c"]
    assert read["slices"] == [
        {"sources": [{"model": "org/a", "layer_range": [0, 3]}, {"model": "org/b", "layer_range": [1, 4]}]},
        {"sources": [{"model": "org/b", "layer_range": [3, 4]}, {"model": "org/c", "layer_range": [0, 1]}]},
    ]
    weight = read["parameters"]["weight"]
    # A source's own value, else its slice's, else the whole file's.
    assert weight == {
        "members": [{"slices": [{"layers": [0.0, 1.0]}, {"layers": [0.2, 0.6]}]}, {"slices": [0.3, 0.25]}]
    }
    assert [value_at(weight, "", depth, number=0) for depth in (0, 0.5, 1)] == [0.0, 0.5, 1.0]
    assert value_at(weight, "", 1.0, number=1) == pytest.approx(0.6)  # a slice of one block: the last value
    written = recipe_value(weight, read["slices"])
    assert written[0] == pytest.approx({
        "block 0": 0.0, "block 1": 0.5, "block 2": 1.0, "block 3": 0.6, "embeddings": 0.0, "otherwise": 0.2
    })  # fmt: skip
    assert written[1] == {f"block {i}": 0.3 for i in range(3)} | {
        "block 3": 0.25,
        "embeddings": 0.3,
        "otherwise": 0.25,
    }


def test_slices_with_a_base_keep_it_apart():
    content = slices(1, 1, base_model="org/b") | {"merge_method": "task_arithmetic"}
    read = translate(content)
    assert (read["members"], read["base"]) == (["org/a", "org/c"], "org/b")
    assert read["slices"][1] == {
        "sources": [{"model": "org/c", "layer_range": [0, 1]}, {"model": "org/b", "layer_range": [3, 4]}],
        "base_model": "org/b",
    }
    slerp = translate(slices(1, 1, base_model="org/b", parameters={"t": [0, 1]}) | {"merge_method": "slerp"})
    assert [[one["model"] for one in own["sources"]] for own in slerp["slices"]] == [
        ["org/b", "org/a"],
        ["org/b", "org/c"],
    ]
    assert slerp["parameters"] == {"t": {"slices": [{"layers": [0.0, 1.0]}] * 2}}


VALUES = [
    0.4,
    {"layers": [0.1, 0.4, 0.9]},
    {"filters": [["self_attn", {"layers": [0.2, 0.8]}], ["mlp", 0.7], ["*", 0.5]]},
    {"filters": [["embeddings", 0.7], ["layers.1.", 0.2], ["*", 0.5]]},  # `embeddings` is a text here, no place
]


@pytest.mark.parametrize("value", VALUES)
def test_a_merge_recipe_gives_every_tensor_the_same(value):
    places = Places(NAMES, lambda: NAMES, lambda: ["lm_head.weight"])
    written = recipe_value({"members": [value, 1.0]})
    for name in NAMES:
        found = value_of_recipe(written, name, places, "parameters.weights")
        assert found == pytest.approx([value_at(value, name, position(name)), 1.0]), name


def test_a_merge_recipe_gives_every_tensor_of_slices_the_same():
    read = translate(slices([{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.9}], 0.25))
    places = Places(NAMES, lambda: NAMES, lambda: ["lm_head.weight"])
    weight = read["parameters"]["weight"]
    written = recipe_value(weight, read["slices"])
    spots = {0: (0, 0.0), 1: (0, 0.5), 2: (0, 1.0), 3: (1, 1.0)}
    for name in NAMES:
        inside = ".layers." in name
        number, depth = spots[int(name.split(".")[2])] if inside else (int(name != NAMES[0]), 0.0)
        wanted = [value_at(weight, name, depth, member=member, number=number) for member in range(2)]
        assert value_of_recipe(written, name, places, "weights") == pytest.approx(wanted), name


HALVES = {"weights": [0.5, 0.5], "scale": 1.0, "tie": "positive", "density": 1.0}
# mergekit's name -> ours, with the values that give its numbers where nothing is written.
OURS = {
    "linear": ("average", {"weights": [0.5, 0.5, 0.5]}),
    "slerp": ("slerp", {"t": 0.25}),
    "nuslerp": ("nuslerp", {"weights": [0.5, 0.5], "vectors": "tensor", "task_vectors": True}),
    "multislerp": ("multislerp", {"weights": [0.5, 0.5], "normalize": True, "task_vectors": True}),
    "karcher": ("karcher", {"max_iterations": 10, "tolerance": 1e-5}),
    "model_stock": ("model_stock", {"vectors": "tensor", "clip": False}),
    "nearswap": ("nearswap", {"t": 0.25}),
    "arcee_fusion": ("arcee_fusion", {}),
    "task_arithmetic": ("task_arithmetic", {"weights": [0.5, 0.5], "scale": 1.0, "normalize": False}),
    "ties": ("ties", HALVES | {"normalize": True, "trim": "tensor", "election": "total"}),
    "dare_linear": ("dare", HALVES | {"normalize": False, "rescale": "norm", "election": "none"}),
    "dare_ties": ("dare", HALVES | {"normalize": False, "rescale": "norm", "election": "total"}),
    "breadcrumbs": ("breadcrumbs", HALVES | {"normalize": False, "gamma": 0.01, "election": "none"}),
    "breadcrumbs_ties": ("breadcrumbs", HALVES | {"normalize": False, "gamma": 0.01, "election": "total"}),
    # mergekit calls epsilon what is half of it in the paper and here
    "della": ("della", HALVES | {"normalize": True, "rescale": "norm", "election": "total", "epsilon": 0.3}),
    "della_linear": ("della", HALVES | {"normalize": False, "rescale": "norm", "election": "none", "epsilon": 0.3}),
    "sce": ("sce", {"select_topk": 1.0, "normalize": True, "tie": "positive"}),
    "ram": ("ram", {"epsilon": 1e-5}),
    "ramplus_tl": ("ram", {"rescale": 0.1, "limit": 0.2, "epsilon": 1e-5, "scope": "tensor"}),
    "passthrough": ("passthrough", {"scale": 1.0}),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_one_here(method):
    content = of_models(method, *[{}] * (METHODS[method].members[1] or 2), parameters={"weight": 0.5, "t": 0.25})
    if method != "passthrough":
        content["base_model"] = "org/base"
    recipe = recipe_content(translate(content))
    assert (recipe["method"], recipe["parameters"]) == OURS[method]
    make_method(recipe["method"], recipe["parameters"])


def test_a_recipe_in_place_of_a_yaml():
    content = of_models("della", {"weight": 1}, {"weight": [0, 1], "epsilon": {"filter": "mlp", "value": 0.1}})
    content |= {"base_model": "org/base", "dtype": "float64", "out_dtype": "bfloat16", "tokenizer_source": "base"}
    recipe = recipe_content(translate(content))
    assert recipe["parameters"]["weights"] == [1.0, {"blocks": {"blocks": [0.0, 1.0]}, "otherwise": 0.0}]
    assert recipe["parameters"]["epsilon"] == [0.3, {"(?:mlp)": 0.2, "otherwise": 0.3}]
    assert (recipe["dtype"], recipe["compute_dtype"]) == ("bfloat16", "float64")
    assert (recipe["members"], recipe["base"]) == (["org/a", "org/b"], "org/base")
    assert recipe["tokenizer"]["source"] == "base"
    sliced = recipe_content(translate(slices(1, 1) | {"parameters": {"weight": 1}}))
    assert sliced["slices"][0]["sources"][1] == {"model": "org/b", "layer_range": [1, 4]}
    assert sliced["parameters"]["weights"][0]["block 3"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("content", "vectors"),
    [
        ({"nuslerp_flatten": True, "nuslerp_row_wise": True}, "tensor"),
        ({"nuslerp_flatten": False}, "rows"),
        ({"nuslerp_flatten": False, "nuslerp_row_wise": True}, "columns"),
    ],
)
def test_what_a_vector_is_in_nuslerp(content, vectors):
    read = translate(of_models("nuslerp", {"weight": 1}, {"weight": 3}, parameters=content))
    assert recipe_content(read)["parameters"] == {"weights": [1.0, 3.0], "vectors": vectors, "task_vectors": False}


def test_what_no_method_here_gives_is_refused():
    unnormalised = of_models("linear", {"weight": 0.5}, {"weight": 0.6}, parameters={"normalize": False})
    with pytest.raises(RecipeError, match="linear: weights that are not normalised and do not sum to 1"):
        recipe_content(translate(unnormalised))
    unnormalised["models"][1]["parameters"] = {"weight": 0.5}
    assert recipe_content(translate(unnormalised))["parameters"] == {"weights": [0.5, 0.5]}
    ties = of_models("ties", {"weight": 1}, {"weight": 1}, base_model="org/base", parameters={"rescale": True})
    with pytest.raises(RecipeError, match="ties: `rescale` is for methods that drop at random"):
        recipe_content(translate(ties))


def test_a_function_reaches_every_scalar():
    value = {"members": [1.0, {"slices": [{"layers": [1.0, 2.0]}, {"filters": [["mlp", 3.0], ["*", 4.0]]}]}]}
    assert mapped_value(value, lambda scalar: 2 * scalar) == {
        "members": [2.0, {"slices": [{"layers": [2.0, 4.0]}, {"filters": [["mlp", 6.0], ["*", 8.0]]}]}]
    }


def test_tokenizers():
    models = of_models("linear", {"weight": 1}, {"weight": 1})
    assert translate(models | {"tokenizer_source": "union"})["tokenizer"] == {
        "source": "union", "base": None, "tokens": {}, "pad_to_multiple_of": None
    }  # fmt: skip
    long = {
        "source": "org/b@v1",
        "tokens": {
            "<a>": {"source": "org/a", "force": True},
            "<z>": {"source": {"kind": "zero"}},
            "<m>": {"source": {"kind": "model_token", "model": {"path": "org/b", "revision": "v1"}, "token_id": 7}},
        },
        "pad_to_multiple_of": 8,
    }
    assert translate(models | {"tokenizer": long, "base_model": "org/a"})["tokenizer"] == {
        "source": "org/b@v1",
        "base": "org/a",
        "tokens": {
            "<a>": {"source": "org/a", "force": True},
            "<z>": {"source": {"kind": "zero"}, "force": False},
            "<m>": {"source": {"kind": "model_token", "model": "org/b@v1", "token_id": 7}, "force": False},
        },
        "pad_to_multiple_of": 8,
    }
    assert translate(models | {"tokenizer": {}})["tokenizer"]["source"] == "union"


def test_forms_of_scalars():
    content = of_models("linear", {"weight": "1e-2"}, {"weight": [0.5, 0.5]}, parameters={"normalize": "yes"})
    read = translate(content)
    assert read["parameters"] == {"normalize": True, "weight": {"members": [0.01, 0.5]}}
    karcher = translate(of_models("karcher", None, None, parameters={"max_iter": 20.0}))
    assert karcher["parameters"]["max_iter"] == 20
    assert type(karcher["parameters"]["max_iter"]) is int


def test_types_and_models():
    content = of_models("linear", {"weight": 1}, {"weight": 1}, dtype="torch.float32", out_dtype="bfloat16")
    content["models"][0]["model"] = {"model": {"path": "org/a", "revision": "abc"}}
    read = translate(content)
    assert (read["dtype"], read["out_dtype"]) == ("float32", "bfloat16")
    assert read["members"] == ["org/a@abc", "org/b"]


def test_one_module_is_the_model():
    content = of_models("karcher", None, None)
    modules = {"merge_method": "karcher", "modules": {"default": {"models": content["models"]}}}
    assert translate(modules) == translate(content)


WRONG = [
    ({"merge_method": "tise"}, r"merge_method: unknown 'tise' \(did you mean 'ties'\?\)"),
    (
        of_models("linear", {"weight": 1}, merge_metod="x"),
        r"merge_metod: unknown key \(did you mean 'merge_method'\?\)",
    ),
    (
        of_models("linear", {"wieght": 1, "weight": 1}),
        r"models\[0\].parameters.wieght: unknown \(did you mean 'weight'\?\)",
    ),
    (of_models("linear", {}), "weight of org/a: is missing"),
    (of_models("linear", {"weight": "much"}), "weight of org/a: expected a number, got 'much'"),
    (of_models("linear", {"weight": [0.1, [0.2]]}), "expected a number, a list of numbers or a list of filters"),
    (of_models("linear", {"weight": [{"filter": "mlp", "value": 1}]}), "needs a last entry without `filter`"),
    (
        of_models("linear", {"weight": [{"fitler": "mlp", "value": 1}]}),
        r"fitler: unknown key \(did you mean 'filter'\?\)",
    ),
    (of_models("linear", {"weight": 1}, parameters={"normalize": 3}), "normalize: expected true or false, got 3"),
    (of_models("linear", {"weight": 1}, parameters={"normalize": [True, False]}), "steps from block to block"),
    (of_models("linear", {"weight": 1}, dtype="bf16"), r"dtype: 'bf16' \(did you mean 'bfloat16'\?\)"),
    (of_models("ties", {"weight": 1}), "base_model: is missing: ties"),
    (
        of_models("slerp", None, None, None, base_model="org/a", parameters={"t": 0.5}),
        "slerp merges 1 models besides the base, got 2",
    ),
    (of_models("passthrough", None, None), "passthrough merges 1 models, got 2"),
    (
        {"merge_method": "linear", "models": [{"model": "a+b", "parameters": {"weight": 1}}]},
        "name the adapter 'b' alone",
    ),
    ({"merge_method": "karcher", "models": [{"model": "a"}, {"model": "a"}]}, "'a' stands there twice"),
    ({"merge_method": "karcher", "models": [{"name": "a"}]}, r"models\[0\].model: is missing"),
    ({"merge_method": "karcher"}, "expected one of `models`, `slices` and `modules`, got none"),
    (
        {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": "0-3"}]}]},
        "layer_range: expected",
    ),
    ({"merge_method": "karcher", "modules": {"a": {}, "b": {}}}, "several modules"),
    (of_models("linear", {"weight": 1}, tokenizer={}, tokenizer_source="union"), "`tokenizer_source` are both given"),
    (slices(1, 1, base_model="org/a") | {"merge_method": "ties"}, "org/a is none of a slice's sources"),
    ([], "expected a mapping with `merge_method`"),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_mistakes_are_named(content, message):
    with pytest.raises(RecipeError, match=message):
        translate(content, "merge.yml")


def test_all_mistakes_come_at_once():
    content = of_models("ties", {"weight": "x", "densty": 1}, base_model="org/base", dtype="int3")
    with pytest.raises(RecipeError) as caught:
        translate(content, "merge.yml")
    assert len(caught.value.mistakes) == 3


def test_what_is_left_out_is_said():
    content = of_models("linear", {"weight": 1, "normalize": False, "density": 0.5})
    notes = translate(content)["notes"]
    assert notes == [
        "models[0].parameters.normalize: left out: it is one for the whole merge, not one a member",
        "models[0].parameters.density: left out: linear does not take it",
    ]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match="stands here a second time"):
        read_mergekit(write(tmp_path, "merge_method: linear\nmerge_method: ties\n"))
    with pytest.raises(RecipeError, match="cannot be read"):
        read_mergekit(tmp_path / "none.yml")
    assert is_mergekit({"merge_method": "linear"})
    assert not is_mergekit({"method": "average"})
    assert not is_mergekit(None)
