"""The limited memory of L-BFGS: pairs of steps and changes of the gradient, and what they say of the inverse Hessian."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from hpcdeq.petsc import PETSc

CURVED = 1e-10  # least s·y over ‖s‖ ‖y‖ of a pair that is kept
Inverse = Callable[[PETSc.Vec, PETSc.Vec], None]


@dataclass
class Pair:
    """A step s and the change y of the gradient along it, distributed like the weights, and 1 / s·y."""

    s: PETSc.Vec
    y: PETSc.Vec
    inverse: float


class LimitedMemory:
    """Quasi-Newton inverse of the last pairs (Nocedal 1980, "Updating quasi-Newton matrices with limited storage").

    Collective on the vectors' comm, every method.

    Parameters
    ----------
    history
        Pairs kept.
    """

    def __init__(self, history: int) -> None:
        self.history = history
        self.pairs: deque[Pair] = deque()

    def add(self, s: PETSc.Vec, y: PETSc.Vec) -> None:
        """Take over a pair, unless the curvature along s is not clearly positive."""
        product = s.dot(y)
        if not product > CURVED * s.norm() * y.norm():
            s.destroy()
            y.destroy()
            return
        self.pairs.append(Pair(s, y, 1 / product))
        if len(self.pairs) > self.history:
            self._free(self.pairs.popleft())

    def apply(self, x: PETSc.Vec, y: PETSc.Vec, work: PETSc.Vec, first: Inverse | None) -> None:
        """Set y = H x by the two-loop recursion.

        Parameters
        ----------
        work
            A vector to work in; neither x nor y.
        first
            ``first(x, y)`` sets y to the initial inverse times x; None: the identity. It is multiplied with the number
            that fits the last pair (Oren and Luenberger 1974), so that steps of length one are nearly always taken.
        """
        x.copy(work)
        weights = []
        for pair in reversed(self.pairs):
            weights.append(pair.inverse * pair.s.dot(work))
            work.axpy(-weights[-1], pair.y)
        scale = 1.0
        if self.pairs:
            last = self.pairs[-1]
            if first is None:
                scale = 1 / (last.inverse * last.y.dot(last.y))
            else:
                first(last.y, y)
                scale = 1 / (last.inverse * last.y.dot(y))
        if first is None:
            work.copy(y)
        else:
            first(work, y)
        y.scale(scale)
        for pair, weight in zip(self.pairs, reversed(weights), strict=True):
            y.axpy(weight - pair.inverse * pair.y.dot(y), pair.s)

    def clear(self) -> None:
        """Forget all pairs."""
        while self.pairs:
            self._free(self.pairs.popleft())

    @staticmethod
    def _free(pair: Pair) -> None:
        pair.s.destroy()
        pair.y.destroy()
