"""Run a merge part by part on several threads, each part straight to its place on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_zoo.errors import MergeError
from hf_zoo.inputs import MergeInputs
from hf_zoo.methods.base import Put, Work
from hf_zoo.shards import MAX_SHARD_BYTES, WeightsWriter, describe_nonfinite, is_finite
from hf_zoo.varying import Merger


@dataclass(frozen=True)
class Written:
    """Weights that were written.

    Attributes:
        paths: Their files, index last where there is one.
        digest: The SHA-256 of the only file; null for several.
    """

    paths: list[Path]
    digest: str | None


def write_merge(
    folder: Path,
    merger: Merger,
    inputs: MergeInputs,
    *,
    num_threads: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    resume: bool = False,
) -> Written:
    """Merge into an existing folder's weights files.

    The bytes do not depend on the number of threads: every part is computed by one thread, in the same order of
    operations.

    Args:
        folder: An existing folder.
        merger: The methods, and who makes what.
        inputs: Its inputs.
        num_threads: Threads to merge with; null for one a core.
        max_shard_bytes: Largest file.
        resume: Continue what a killed process left of the same merge in the folder.

    Raises:
        ZooError: If the method refuses its inputs, an input or output is not finite, or the disk is full.
    """
    merger.check(inputs)
    with WeightsWriter(
        folder, inputs.layout, max_shard_bytes=max_shard_bytes, resume=resume, hashed=True, sync=False
    ) as writer:

        def works() -> Iterator[Work]:
            every = merger.works(inputs)
            return (work for work in every if not (work.alone and writer.has(work.name, work.start, work.size)))

        # In the order of the file, so that it can be hashed soon after it is written.
        run_works(works, writer.put_piece, num_threads, lambda work: writer.position(work.name, work.start))
    return Written(writer.paths, writer.digest)


def merge_in_memory(merger: Merger, inputs: MergeInputs, *, num_threads: int | None = None) -> dict[str, Tensor]:
    """Merge into memory, to the very bits `write_merge` would write.

    Args:
        merger: The methods, and who makes what.
        inputs: Its inputs.
        num_threads: Threads to merge with; null for one a core.

    Returns:
        Every tensor of the layout.

    Raises:
        ZooError: If the method refuses its inputs, or an input or output is not finite.
    """
    merger.check(inputs)
    tensors = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in inputs.layout.items()}

    def put(name: str, start: int, piece: Tensor) -> None:
        tensors[name].reshape(-1)[start : start + piece.numel()] = piece  # a view: the tensor is contiguous

    run_works(lambda: merger.works(inputs), put, num_threads)
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise MergeError(f"the merge: tensor {name!r} holds {describe_nonfinite(tensor)}")
    return tensors


def run_works(
    works: Callable[[], Iterable[Work]],
    put: Put,
    num_threads: int | None,
    position: Callable[[Work], Any] | None = None,
) -> None:
    """Run the parts of a merge, or of another pass over its members, each in one thread.

    Args:
        works: Returns the parts; asked for where an operation keeps to one thread.
        put: Takes what they make.
        num_threads: Threads; null for one a core.
        position: What to begin with, the smallest first; null begins with the largest part, so that at the end no
            thread waits for another's long work.
    """
    count = num_threads or num_cores()
    _keep_freed_memory()
    with one_thread_an_operation():
        ordered = sorted(works(), key=position or (lambda work: -work.size))
        if count == 1 or len(ordered) == 1:
            for work in ordered:
                work.run(put)
            return
        with ThreadPoolExecutor(count, "merge") as pool:
            futures = [pool.submit(work.run, put) for work in ordered]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:  # also when interrupted: leaving the pool waits for all that was not cancelled
                pool.shutdown(wait=False, cancel_futures=True)
            for future in done:
                future.result()


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _keep_freed_memory() -> None:
    """Keep the C library from handing memory back after every piece, only to have it paged in again for the next.

    glibc trims its heap down to twice the largest mapped block it has seen freed: with pieces of half a megabyte most
    of what a piece used, at more time than the merging takes. One large block, never touched, raises that bound.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


@contextmanager
def one_thread_an_operation() -> Generator[None, None, None]:
    """Keep torch from dividing an operation: sums would depend on the number of threads, and parts on each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
