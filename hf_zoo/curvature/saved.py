"""Statistics as files beside the weights: `statistics/KIND.safetensors` and what it is, `statistics/KIND.json`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.errors import CheckpointError, ModelError
from hf_zoo.files import sha256_of, weights_digest, write_json
from hf_zoo.folders import require_space
from hf_zoo.population import MANIFEST_FILE, Manifest
from hf_zoo.shards import WEIGHTS_FILE, TensorInfo, read_header, write_weights
from hf_zoo.structure import disk_name_of, saved_names

STATISTICS_FOLDER = "statistics"
KINDS = ("fisher", "gram")


def names_alike(model: nn.Module) -> dict[str, str]:
    """Return name of a tensor `save_pretrained` saves -> name `named_parameters` has for it; tied ones have one each.

    Args:
        model: The model. A module that is not transformers' own keeps its names.
    """
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    every = {name: own[id(parameter)] for name, parameter in model.named_parameters(remove_duplicate=False)}
    if not isinstance(model, PreTrainedModel):
        return {name: name for name in own.values()}
    return {name: every[name] for name in saved_names(model) if name in every}


def fisher_on_disk(model: nn.Module, fisher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring a diagonal Fisher under the names, and into the shapes, the model's tensors have on disk.

    Tensors that are split, joined or transposed on disk go through the same conversion as the weights; each entry
    stays with its parameter.

    Args:
        model: The model.
        fisher: Name in the module -> diagonal.
    """
    tensors = {name: fisher[own] for name, own in names_alike(model).items() if own in fisher}
    if not isinstance(model, PreTrainedModel):
        return tensors
    # A copy: a conversion may hand out views, and an expert's share of a joined tensor is one.
    return {name: tensor.clone() for name, tensor in revert_weight_conversion(model, tensors).items()}


def gram_on_disk(
    model: nn.Module, gram: Mapping[str, Tensor], rows: Mapping[str, int]
) -> tuple[dict[str, Tensor], dict[str, int], list[str]]:
    """Bring Gram matrices under the names their weights have on disk.

    Args:
        model: The model.
        gram: Weight's name in the module -> Gram matrix of its input.
        rows: Weight's name in the module -> number of rows.

    Returns:
        The matrices, the rows, and the weights left out because they are split or joined on disk, by their names in
        the module: none of these has an input of its own there.
    """
    on_disk = disk_name_of(model) if isinstance(model, PreTrainedModel) else {}
    matrices, counts, left_out = {}, {}, []
    for name, own in names_alike(model).items():
        if own in gram:
            there = on_disk.get(name, name) if isinstance(model, PreTrainedModel) else name
            if there is None:
                left_out.append(own)
            else:
                matrices[there], counts[there] = gram[own], rows[own]
    return matrices, counts, left_out


def summarise(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return the smallest and largest entry and the share of zeros of each tensor."""
    found = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        found[name] = {
            "min": float(tensor.min()),
            "max": float(tensor.max()),
            "zeros": float((tensor == 0).double().mean()),
        }
    return found


def trace_of(kind: str, tensors: Mapping[str, Tensor]) -> float:
    """Return the trace: the sum of a Fisher's diagonals, or of the Gram matrices' own."""
    parts = [tensor.diagonal() if kind == "gram" else tensor for tensor in tensors.values()]
    return float(sum(part.double().sum() for part in parts))


def write_statistics(folder: Path, kind: str, tensors: Mapping[str, Tensor], description: dict[str, Any]) -> None:
    """Write a kind of statistics into a member's folder.

    The description comes last: statistics without it were not finished.

    Args:
        folder: The member's folder.
        kind: `fisher` or `gram`.
        tensors: By their names on disk; written as float32.
        description: What they are.

    Raises:
        CheckpointError: If the disk is full or a value is not finite.
    """
    place = folder / STATISTICS_FOLDER
    tensors = {name: tensor.detach().float() for name, tensor in tensors.items()}
    layout = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    size = sum(info.nbytes for info in layout.values())
    require_space(place, size)
    partial = place / f".{kind}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_weights(partial, tensors.items(), layout, max_shard_bytes=size + 1)
        (place / f"{kind}.json").unlink(missing_ok=True)
        os.replace(partial / WEIGHTS_FILE, place / f"{kind}.safetensors")
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    described = description | {"kind": kind, "sha256": sha256_of(place / f"{kind}.safetensors")}
    write_json(place / f"{kind}.json", described)


def read_description(folder: Path, kind: str) -> dict[str, Any] | None:
    """Return what a member's statistics are, or null where it has none of that kind.

    Raises:
        CheckpointError: If the description cannot be read.
    """
    path = folder / STATISTICS_FOLDER / f"{kind}.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error}: run `hf-zoo curvature` on the member again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a description of statistics: run `hf-zoo curvature` on the member again")
    return content


def open_statistics(folder: str | Path, kind: str, source: str | None = None) -> CheckpointReader | None:
    """Open a member's statistics lazily, under the names its weights have on disk.

    Args:
        folder: The member's folder.
        kind: `fisher` or `gram`.
        source: Whose they are, for messages; null for the folder.

    Returns:
        A reader, or null where it has none.

    Raises:
        CheckpointError: If they are of other weights than lie beside them, or the file is damaged.
    """
    folder = Path(folder)
    source = f"{source or folder}, {STATISTICS_FOLDER}/{kind}"
    description = read_description(folder, kind)
    if description is None:
        return None
    path = folder / STATISTICS_FOLDER / f"{kind}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{source}: {path.name} is missing: run `hf-zoo curvature` on the member again")
    if description.get("model_sha256") not in (None, weights_digest(folder)):
        raise CheckpointError(
            f"{source}: was measured on other weights than lie beside it (SHA-256 "
            f"{str(description['model_sha256'])[:12]}…): run `hf-zoo curvature` on the member again"
        )
    layout, _ = read_header(path)

    def read(name: str) -> Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return CheckpointReader(source, layout, read, dict.fromkeys(layout, path))


def note_in_manifest(folder: Path, descriptions: Sequence[Mapping[str, Any]]) -> Manifest | None:
    """Put the descriptions of statistics, without the reports of single tensors, into a member's manifest."""
    if not (folder / MANIFEST_FILE).is_file():
        return None
    manifest = Manifest.read(folder)
    changed = with_statistics(manifest, descriptions)
    if changed != manifest:
        changed.write(folder)
    return changed


def with_statistics(manifest: Manifest, descriptions: Sequence[Mapping[str, Any]]) -> Manifest:
    """Return a manifest that lists statistics; those of the same kind are replaced."""
    entries = {str(entry.get("kind")): entry for entry in manifest.statistics}
    for description in descriptions:
        entries[description["kind"]] = {
            "file": f"{STATISTICS_FOLDER}/{description['kind']}.safetensors",
            **{key: value for key, value in description.items() if key not in ("tensors", "rows", "versions")},
        }
    return manifest.replace(statistics=tuple(entries[kind] for kind in sorted(entries)))


def check_covers(model_folder: Path, tensors: Mapping[str, Tensor], kind: str) -> None:
    """Check that a Fisher has every floating tensor of the weights it is of, in its shape, but for buffers.

    Raises:
        ModelError: If it has a tensor the weights have not, or of another shape.
    """
    weights = CheckpointReader.open(model_folder)
    for name, tensor in tensors.items():
        shape = weights.shape(name) if name in weights else None
        # A layer's inputs run over its weight's last axis, or over its first (GPT-2).
        expected = (
            () if shape is None else (shape,) if kind == "fisher" else tuple((n, n) for n in (shape[-1], shape[0]))
        )
        if tuple(tensor.shape) not in expected:
            raise ModelError(
                f"{model_folder}: its {kind} has {name!r} of shape {tuple(tensor.shape)}, the weights have "
                f"{'none of that name' if shape is None else f'{shape}'}: the model saves itself under other names"
            )


DTYPES = {"float32": torch.float32, "float64": torch.float64}
