"""Random numbers as a function of who asks: seed, epoch, sample and purpose, and nothing else.

A number drawn here does not depend on what was drawn before, on the batch a sample happens to be in, on the worker
process that builds the batch, or on the number of processes that train. Resuming, prefetching and distributing a run
therefore change no draw, and no global generator is touched.
"""

# B = samples of the batch

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class Draws:
    """The draws of one batch.

    Attributes:
        seed: Seed of this source of chance.
        epoch: Passes over the data done.
        indices: The samples' places in their table, (B,).
    """

    seed: int
    epoch: int
    indices: np.ndarray

    def uniform(self, purpose: str, count: int) -> np.ndarray:
        """Return numbers in [0, 1), each row a function of seed, epoch, purpose and that row's sample.

        The generator is SplitMix64 (Steele et al. 2014), started for each sample from a hash.

        Args:
            purpose: What the numbers are for; different purposes share nothing.
            count: Numbers a sample. A longer row begins with the shorter one.

        Returns:
            Float64, (B, count).
        """
        key = np.uint64(self._key(purpose))
        with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the algorithm
            start = _mix(key + _GOLDEN * (self.indices.astype(np.uint64) + np.uint64(1)))
            steps = _GOLDEN * np.arange(1, count + 1, dtype=np.uint64)
            bits = _mix(start[:, None] + steps[None, :])
        return (bits >> np.uint64(11)) * 2.0**-53

    def of_batch(self, purpose: str) -> np.random.Generator:
        """Return a generator for what a batch draws once: a function of seed, epoch, purpose and all its samples."""
        members = hashlib.sha256(np.ascontiguousarray(self.indices, dtype=np.int64).tobytes()).hexdigest()
        return np.random.Generator(np.random.Philox(key=self._key(f"{purpose}/{members}")))

    def _key(self, purpose: str) -> int:
        """Return 64 bits that are a function of seed, epoch and purpose."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{self.epoch}/{purpose}".encode()).digest()[:8], "big")


def _mix(bits: np.ndarray) -> np.ndarray:
    """Return SplitMix64's finaliser, which changes half of the output bits for every input bit."""
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    return bits ^ (bits >> np.uint64(31))
