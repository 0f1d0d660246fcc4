"""One model's weights, unchanged or scaled."""

import pytest
import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import ZooError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import make_method


def models():
    return [CheckpointReader.of({"w": torch.full((2, 3), float(value))}, f"m{value}") for value in (1, 2, 3)]


@pytest.mark.parametrize(("keep", "wanted"), [(0, 1.0), (1, 2.0), ("base", 3.0)])
def test_what_is_kept_is_kept(keep, wanted):
    *members, base = models()
    merged = dict(make_method("passthrough", {"keep": keep}).merge(MergeInputs.of(members, base=base)))
    torch.testing.assert_close(merged["w"], torch.full((2, 3), wanted), rtol=0, atol=0)


def test_it_may_be_scaled():
    merged = dict(make_method("passthrough", {"keep": 1, "scale": 0.25}).merge(MergeInputs.of(models())))
    torch.testing.assert_close(merged["w"], torch.full((2, 3), 0.5), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (3, r"there is no member 3: there are 3, from 0"),
        ("base", r"keep: base needs the base model"),
        ("bass", r"keep must be `base` or the place of a member from 0, got 'bass'"),
        (-1, r"keep must be `base` or the place of a member from 0, got -1"),
    ],
)
def test_a_model_that_is_not_there_is_refused(keep, message):
    with pytest.raises(ZooError, match=message):
        dict(make_method("passthrough", {"keep": keep}).merge(MergeInputs.of(models())))
