"""Run a merge part by part on several threads, each part straight to its place on the disk."""

from __future__ import annotations

import os
from collections.abc import Generator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import torch

from hf_zoo.inputs import MergeInputs
from hf_zoo.shards import MAX_SHARD_BYTES, WeightsWriter
from hf_zoo.varying import Merger


def write_merge(
    folder: Path,
    merger: Merger,
    inputs: MergeInputs,
    *,
    num_threads: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Merge into an existing folder's weights files.

    The bytes do not depend on the number of threads: every part is computed by one thread, in the same order of
    operations.

    Args:
        folder: An existing folder.
        merger: The methods, and who makes what.
        inputs: Its inputs.
        num_threads: Threads to merge with; null for one a core.
        max_shard_bytes: Largest file.

    Returns:
        The weights files, index last where there is one.

    Raises:
        ZooError: If the method refuses its inputs, an input or output is not finite, or the disk is full.
    """
    merger.check(inputs)
    count = num_threads or num_cores()
    with WeightsWriter(folder, inputs.layout, max_shard_bytes=max_shard_bytes) as writer, _one_thread_an_operation():
        # The largest first: at the end no thread waits for another's long work.
        works = sorted(merger.works(inputs), key=lambda work: -work.size)
        if count == 1 or len(works) == 1:
            for work in works:
                work.run(writer.put_piece)
        else:
            with ThreadPoolExecutor(count, "merge") as pool:
                futures = [pool.submit(work.run, writer.put_piece) for work in works]
                done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
                for future in waiting:
                    future.cancel()
                for future in done:
                    future.result()
    return writer.paths


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _one_thread_an_operation() -> Generator[None, None, None]:
    """Keep torch from dividing an operation: sums would depend on the number of threads, and parts on each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
