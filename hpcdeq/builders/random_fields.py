"""Random fields of few modes: sample ``i`` depends on the seed and on ``i`` only, a sample is one function on any grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def normal_draws(indices: Sequence[int] | np.ndarray, seed: int, *shape: int) -> np.ndarray:
    """Return standard normal numbers ``(b, *shape)``, those of a sample from a generator of its own. Not collective."""
    return np.stack([np.random.default_rng([seed, int(index)]).standard_normal(shape) for index in indices])


def uniform_draws(indices: Sequence[int] | np.ndarray, seed: int, *shape: int) -> np.ndarray:
    """Return numbers uniform in [-1, 1) ``(b, *shape)``, those of a sample from a generator of its own. Not collective."""
    return np.stack([np.random.default_rng([seed, int(index)]).uniform(-1, 1, shape) for index in indices])


def periodic_deviations(modes: int) -> np.ndarray:
    """Return the standard deviations ``(modes,)`` of the modes 1, 2, ... of `periodic_field`. Not collective."""
    return 25 / ((2 * np.pi * np.arange(1, modes + 1)) ** 2 + 25)


def periodic_field(indices: Sequence[int] | np.ndarray, points: int, seed: int, modes: int) -> np.ndarray:
    """Draw functions on [0, 1), periodic and of zero mean.

    Not collective. Covariance ``625 (-d^2/dx^2 + 25)^-2`` on the modes 1 to ``modes`` (Li et al., Fourier Neural
    Operator, arXiv 2010.08895, has the same on all modes): ``u = sum_k s_k sqrt(2) (a_k cos 2 pi k x + b_k sin 2 pi
    k x)``, ``s_k = 25 / ((2 pi k)^2 + 25)``, ``a_k`` and ``b_k`` standard normal.

    Returns
    -------
    numpy.ndarray
        ``(b, points)``, variance ``2 sum_k s_k^2``: standard deviation 0.6.
    """
    draws = normal_draws(indices, seed, 2, modes)
    spectrum = np.zeros((len(indices), points // 2 + 1), complex)
    spectrum[:, 1 : modes + 1] = points / math.sqrt(2) * periodic_deviations(modes) * (draws[:, 0] - 1j * draws[:, 1])
    return np.fft.irfft(spectrum, points)


def square_field(indices: Sequence[int] | np.ndarray, points: int, seed: int, modes: int) -> np.ndarray:
    """Draw functions on the unit square, of zero mean and zero normal derivative on the boundary.

    Not collective. Covariance proportional to ``(-laplacian + 9)^-2`` (Li et al., arXiv 2010.08895) on the products of
    ``cos pi k x`` and ``cos pi l y``, ``k, l < modes``, but not on the constant; scaled to variance 1, averaged over the
    square.

    Returns
    -------
    numpy.ndarray
        ``(b, points, points)`` at the centres of cells, x along the rows' index.
    """
    wave = np.pi * np.arange(modes)
    deviation = 1 / (wave[:, None] ** 2 + wave[None, :] ** 2 + 9)
    deviation[0, 0] = 0.0
    deviation /= math.sqrt((deviation**2).sum())
    centres = (np.arange(points) + 0.5) / points
    cosines = np.cos(wave[:, None] * centres) * np.where(wave > 0, math.sqrt(2), 1.0)[:, None]
    # Products of small matrices, sample by sample: one product for all would round by the size of the batch.
    return np.stack([cosines.T @ (deviation * draw) @ cosines for draw in normal_draws(indices, seed, modes, modes)])
