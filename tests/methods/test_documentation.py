"""Every method stands in the README with what it does and where it comes from."""

from pathlib import Path

import pytest

from hf_zoo.methods.base import get_method, list_methods

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("name", list_methods())
def test_the_readme_says_what_a_method_does_and_where_it_comes_from(name):
    method = get_method(name)
    (row,) = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
    assert method.description().rstrip(".") in row
    assert f"[{method.paper.authors} {method.paper.year}]({method.paper.url})" in row
