import pytest

from hf_zoo.errors import RecipeError
from hf_zoo.recipe.loader import load_recipe
from hf_zoo.recipe.schema import PretrainRecipe

SMALL = """
name: zoo
objective: image_classification
model: {type: vit, config: {hidden_size: 32}}
data: digits
"""


@pytest.fixture
def small():
    return SMALL


@pytest.fixture
def load(tmp_path):
    """Write a recipe and load it."""

    def load_text(text, *overrides, recipe_class=PretrainRecipe):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return load_recipe(path, recipe_class, overrides)

    return load_text


@pytest.fixture
def mistakes(load):
    """Load a recipe that must be refused, and return its mistakes."""

    def mistakes_of(text, *overrides, recipe_class=PretrainRecipe):
        with pytest.raises(RecipeError) as caught:
            load(text, *overrides, recipe_class=recipe_class)
        return list(caught.value.mistakes)

    return mistakes_of
