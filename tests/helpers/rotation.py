"""The rotation of codes written down a second time, in numpy: docs/reference/format.md#rotation."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def signs(seed: int, dim: int) -> npt.NDArray[np.float64]:
    bits: list[float] = []
    mask = 2**64 - 1
    while len(bits) < 4 * dim:
        seed = seed + 0x9E3779B97F4A7C15 & mask
        z = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        z ^= z >> 31
        bits += [1.0 if z >> j & 1 else -1.0 for j in range(64)]
    return np.array(bits).reshape(4, dim)


def rotate(vector: npt.NDArray[Any], flips: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    n = flips.shape[1]
    window = 1 << n.bit_length() - 1
    hadamard = np.ones((1, 1))
    while len(hadamard) < window:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    out = np.zeros(n)
    out[: len(vector)] = vector
    for number, flip in enumerate(flips):
        out *= flip
        part = slice(n - window, n) if number % 2 else slice(0, window)
        out[part] = hadamard @ out[part] / np.sqrt(window)
        if window < n:
            low, high = np.split(out, 2)
            out = np.concatenate([low + high, low - high]) / np.sqrt(2)
    return out
