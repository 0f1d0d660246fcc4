"""Lengths and angles of the members' weights, and linear combinations of them.

Means on a sphere lie in the span of their members, so a K x K matrix of inner products says everything about them: one
pass over the members finds it, the geometry is then solved in float64 on K numbers, and a second pass combines the
members linearly.
"""

# K = members, V = vectors a tensor is cut into, L = entries a vector, or rows of columns

from __future__ import annotations

from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor

from hf_zoo.inputs import PIECE_ENTRIES, MemberTensors, MergeInputs

Vectors = Literal["tensor", "rows", "columns"]

# Entries of all members together in float64 at a time, and the fewest of one member: 2 MB stay in a core's own cache,
# and reading pieces that are too short costs more than it saves.
SURVEYED_ENTRIES = 2 * PIECE_ENTRIES
FEWEST_ENTRIES = 1 << 14
_report_lock = Lock()


def gram_matrices(tensors: MemberTensors, *, task_vectors: bool = False, vectors: Vectors = "tensor") -> Tensor:
    """Return the inner products of the members' weights, in one pass over the members.

    Args:
        tensors: A floating tensor of every member, whole.
        task_vectors: Take the members' differences to the base; needs one.
        vectors: What one vector is: the whole tensor laid out flat; one row, the weights of one output, a kernel laid
            out as (outputs, everything else); or one column of that. A tensor of fewer than two dimensions is always
            one vector.

    Returns:
        (V, K, K) in float64 on the CPU, from float32 or wider entries; symmetric.
    """
    count, length = len(tensors), row_length(tensors.shape)
    if _is_whole(tensors.shape, vectors):
        return _gram_of_whole(tensors, task_vectors)[None]
    rows = max(1, SURVEYED_ENTRIES // (count * length))
    device = tensors.inputs.device
    num_vectors = tensors.numel // length if vectors == "rows" else length
    gram_VKK = torch.zeros(num_vectors, count, count, dtype=torch.float64, device=device)
    for piece in tensors.pieces(rows * length):
        if not piece.numel:
            continue
        values = [one.to(torch.float64).reshape(-1, length) for one in _values(piece, task_vectors)]
        place = slice(piece.start // length, (piece.start + piece.numel) // length)
        for i, first in enumerate(values):
            for j, second in enumerate(values[: i + 1]):
                if vectors == "rows":
                    gram_VKK[place, i, j] = gram_VKK[place, j, i] = (first * second).sum(1)
                else:
                    gram_VKK[:, i, j] += (first * second).sum(0)
                    gram_VKK[:, j, i] = gram_VKK[:, i, j]
    return gram_VKK.cpu()


def mix(
    pieces: MemberTensors, coefficients_VK: Tensor, *, task_vectors: bool = False, vectors: Vectors = "tensor"
) -> Tensor:
    """Combine the members' entries linearly.

    Args:
        pieces: The same entries of every member, flat.
        coefficients_VK: Factors of the members for each vector of the tensor, (V, K); V may be 1 for a whole tensor.
        task_vectors: Combine the differences to the base and add the base.
        vectors: How the tensor is cut into vectors, as for `gram_matrices`.

    Returns:
        The combined entries, flat, in float32 or wider.
    """
    wide = torch.promote_types(pieces.inputs.layout[pieces.name].dtype, pieces.inputs.dtype)
    total = pieces.base.to(wide, copy=True) if task_vectors else None
    members = pieces.task_vectors() if task_vectors else iter(pieces)
    if len(coefficients_VK) == 1:
        for member, factor in zip(members, coefficients_VK[0].tolist(), strict=True):
            total = member.to(wide) * factor if total is None else total.add_(member.to(wide), alpha=factor)
    else:
        for member, factors_V in zip(members, coefficients_VK.to(pieces.inputs.device, wide).T, strict=True):
            spread = _spread(factors_V, pieces, vectors)
            total = spread * member if total is None else total.addcmul_(spread, member.to(wide))
    assert total is not None
    return total


def slerp_coefficients(gram_VKK: Tensor, t: float, threshold: float) -> Tensor:
    """Return the factors of two vectors on the way from the first to the second.

    sin((1 - t) theta) / sin(theta) and sin(t theta) / sin(theta) with the angle theta between them (Shoemake
    1985), 1 - t and t where they are too near to parallel or opposite. A vector of zeros has no direction and counts
    as orthogonal.

    Args:
        gram_VKK: Inner products, (V, 2, 2), float64.
        t: How far to go, 0 to 1.
        threshold: Interpolate linearly where the cosine is beyond it on either side.

    Returns:
        The factors, (V, 2), float64.
    """
    cosine = cosines(gram_VKK)[:, 0, 1]
    linear = cosine.abs() > threshold
    angle = torch.acos(torch.where(linear, 0.0, cosine))
    both = torch.stack([torch.sin((1 - t) * angle), torch.sin(t * angle)], 1) / torch.sin(angle)[:, None]
    return torch.where(linear[:, None], torch.tensor([1 - t, t], dtype=both.dtype), both)


def cosines(gram_VKK: Tensor) -> Tensor:
    """Return the cosines of the angles between vectors, from their inner products.

    Args:
        gram_VKK: Inner products, (V, K, K) or (K, K), float64.

    Returns:
        Cosines of the same shape, in [-1, 1]; 0 with a vector of zeros, 1 with itself otherwise.
    """
    norms = norms_of(gram_VKK)
    products = norms[..., :, None] * norms[..., None, :]
    return torch.where(products > 0, gram_VKK / products, 0.0).clamp_(-1, 1)


def norms_of(gram_VKK: Tensor) -> Tensor:
    """Return the lengths of vectors, (V, K) or (K,), from their inner products."""
    return gram_VKK.diagonal(dim1=-2, dim2=-1).sqrt()


def row_length(shape: tuple[int, ...]) -> int:
    """Return the entries of one row of a tensor laid out as (outputs, everything else); at least 1."""
    return max(1, torch.Size(shape[1:]).numel())


def note(inputs: MergeInputs, key: str, name: str, value: Any) -> None:
    """Tell something about one tensor in the merge's report; several threads may.

    Args:
        inputs: The merge's inputs.
        key: What is told.
        name: The tensor's name.
        value: What is to be told, as JSON can hold it.
    """
    with _report_lock:
        # Sorted, because the threads' order is not the same twice and the report is part of the merge.
        inputs.report[key] = dict(sorted({**inputs.report.get(key, {}), name: value}.items()))


def _gram_of_whole(tensors: MemberTensors, task_vectors: bool) -> Tensor:
    count, device = len(tensors), tensors.inputs.device
    size = min(max(SURVEYED_ENTRIES // count, FEWEST_ENTRIES), max(tensors.numel, 1))
    buffer = torch.empty(count, size, dtype=torch.float64, device=device)
    gram_KK = torch.zeros(count, count, dtype=torch.float64, device=device)
    for piece in tensors.pieces(size):
        values = buffer[:, : piece.numel]
        for row, one in zip(values, _values(piece, task_vectors), strict=True):
            row.copy_(one.reshape(-1))
        gram_KK.addmm_(values, values.T)
    return gram_KK.cpu()


def _values(piece: MemberTensors, task_vectors: bool) -> Any:
    return piece.task_vectors() if task_vectors else iter(piece)


def _is_whole(shape: tuple[int, ...], vectors: Vectors) -> bool:
    return vectors == "tensor" or len(shape) < 2


def _spread(factors_V: Tensor, pieces: MemberTensors, vectors: Vectors) -> Tensor:
    """Return the factor of each entry's vector."""
    length = row_length(pieces.shape)
    first, past = pieces.start // length, -(-(pieces.start + pieces.numel) // length)
    rows = factors_V[first:past, None] if vectors == "rows" else factors_V[None, :]
    start = pieces.start - first * length
    return rows.expand(past - first, length).reshape(-1)[start : start + pieces.numel]
