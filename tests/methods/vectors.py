"""Models of a tensor or two around a base, for tests of methods on task vectors."""

import torch

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import make_method


def reader_of(values, source, dtype):
    tensors = values if isinstance(values, dict) else {"w": values}
    tensors = {name: torch.as_tensor(value) for name, value in tensors.items()}
    return CheckpointReader.of(
        {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}, source
    )


def inputs_of(base, members, dtype=torch.float32, **others):
    readers = [reader_of(values, f"m{i}", dtype) for i, values in enumerate(members)]
    return MergeInputs.of(readers, base=reader_of(base, "base", dtype), **others)


def merge_all(method, base, members, dtype=torch.float32, seed=0, **parameters):
    return dict(make_method(method, parameters).merge(inputs_of(base, members, dtype, seed=seed)))


def merge_values(method, base, members, dtype=torch.float32, seed=0, **parameters):
    """Merge models of one tensor `w` and return it."""
    return merge_all(method, base, members, dtype, seed, **parameters)["w"]


def around(base, vectors):
    """Return members whose task vectors are these."""
    return [base + vector for vector in vectors]


def draw(*shape, seed=0):
    """Return numbers on a grid of 2^-10 below 8: sums and differences of a few are exact in float32."""
    values = torch.randint(-4096, 4097, shape, generator=torch.Generator().manual_seed(seed))
    return values.float() / 1024


def draw_normal(*shape, seed=0):
    """Return standard normal numbers in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merge_vectors(method_class, vectors, base=None, dtype=torch.float64, **parameters):
    """Merge models given by their task vectors and return the merged one; the base is drawn."""
    vectors = [torch.as_tensor(vector, dtype=dtype) for vector in vectors]
    if base is None:
        base = torch.randn(vectors[0].shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    inputs = inputs_of(base, around(base, vectors), dtype, compute_dtype=dtype)
    return dict(method_class(**parameters).merge(inputs))["w"] - base
