"""Which samples the methods on all samples work on, where passes over all of them are too dear."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from hpcdeq.errors import OptionError

STREAM = 0x6261  # keeps this choice apart from others that are made with the same seed


@dataclass(frozen=True)
class Sampling:
    """Samples of curvature products and of first iterations.

    Attributes
    ----------
    hessian_fraction
        Part of the samples, drawn anew at every iterate, that curvature products are taken on (Byrd, Chin, Neveitt and
        Nocedal 2011); loss and gradient stay those of all samples. With 0.1 a product costs a tenth.
    batch_size
        Samples of the first iteration; None: all.
    batch_growth
        Factor from one iteration to the next (Friedlander and Schmidt 2012, "Hybrid deterministic-stochastic methods for data
        fitting"): earlier samples stay, so that the last iterations see all of them.
    seed
        Of both choices; they do not depend on the number of ranks.

    Raises
    ------
    OptionError
        A number is out of range.
    """

    hessian_fraction: float = 1.0
    batch_size: int | None = None
    batch_growth: float = 1.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.hessian_fraction <= 1:
            raise OptionError(f"hessian_fraction is {self.hessian_fraction}: give a number above 0 and at most 1")
        if self.batch_size is not None and self.batch_size < 1:
            raise OptionError(f"batch_size is {self.batch_size}: give 1 or more samples")
        if not self.batch_growth >= 1:
            raise OptionError(f"batch_growth is {self.batch_growth}: give 1 or more")

    def batch(self, count: int, iteration: int) -> np.ndarray | None:
        """Return increasing global numbers of the samples of an iteration; None: all.

        Not collective.

        Parameters
        ----------
        count
            Samples that there are.
        iteration
            From 0 on.
        """
        if self.batch_size is None:
            return None
        # By logarithms: powers leave the range of numbers.
        if math.log(self.batch_size) + iteration * math.log(self.batch_growth) >= math.log(max(count, 1)):
            return None
        size = int(self.batch_size * self.batch_growth**iteration)
        return np.sort(np.random.default_rng([STREAM, self.seed]).permutation(count)[:size])
