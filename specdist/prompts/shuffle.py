# SPDX-License-Identifier: Apache-2.0
"""A shuffle of any number of things that is computed place by place: nothing is stored, and any place is as near as the
first."""

import numpy as np

_ROUNDS = 6
_ODD = np.uint64(0xD6E8FEB86659FD93)


class Shuffle:
    """A permutation of 0 to `count` - 1, another one for every seed and epoch.

    A Feistel network permutes the numbers of as many bits as `count` has; a place that comes out beyond `count` is put
    in again until it does not (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    The keys are of NumPy's SeedSequence, whose numbers never change (NEP 19).
    """

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        self.count = count
        self._bits = max((count - 1).bit_length(), 6)
        self._keys = np.random.SeedSequence([seed, epoch]).generate_state(_ROUNDS, np.uint64)

    def __call__(self, first: int, last: int) -> np.ndarray:
        """int64 [last - first], what stands at the places `first` to `last` - 1."""
        found = self._permuted(np.arange(first, last, dtype=np.uint64))
        while len(outside := np.flatnonzero(found >= self.count)):
            found[outside] = self._permuted(found[outside])
        return found.astype(np.int64)

    def _permuted(self, values: np.ndarray) -> np.ndarray:
        upper, lower = self._bits - self._bits // 2, self._bits // 2  # bits of the two halves, which change places
        left, right = values >> np.uint64(lower), values & np.uint64((1 << lower) - 1)
        for key in self._keys:
            mixed = (right + key) * _ODD
            mixed = (mixed ^ (mixed >> np.uint64(32))) * _ODD
            left, right = right, left ^ (mixed >> np.uint64(64 - upper))
            upper, lower = lower, upper
        return (left << np.uint64(lower)) | right
