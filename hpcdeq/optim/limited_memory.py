"""The limited memory of L-BFGS: pairs of steps and changes of the gradient, and what they say of the inverse Hessian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hpcdeq.petsc import PETSc
from hpcdeq.petsc.vectors import block_of, restore_vector
from hpcdeq.state import Known, State

CURVED = 1e-10  # least s·y over ‖s‖ ‖y‖ of a pair that is kept
Inverse = Callable[[PETSc.Vec, PETSc.Vec], None]


@dataclass
class Pair:
    """A step s, the change y of the gradient along it, and the initial inverse times y; distributed like the weights."""

    s: PETSc.Vec
    y: PETSc.Vec
    hy: PETSc.Vec

    def destroy(self) -> None:
        """Free the vectors. Collective on their comm."""
        for vector in (self.s, self.y, self.hy):
            vector.destroy()


class LimitedMemory:
    """Quasi-Newton inverse of the last pairs, in the compact form of the BFGS formula.

    Byrd, Nocedal and Schnabel 1994 ("Representations of quasi-Newton matrices and their use in limited memory methods"),
    equation 3.1. It gives what the two-loop recursion does (Nocedal 1980), with two reductions over the ranks for a new pair
    and one for a product, where the recursion has two a pair; and as H₀ y of each pair is kept, a product takes H₀ once.

    Collective on the vectors' comm, every method.

    Parameters
    ----------
    history
        Pairs kept.
    """

    def __init__(self, history: int) -> None:
        self.history = history
        self.pairs: list[Pair] = []
        self._sy = np.zeros((0, 0))  # sᵢ·yⱼ
        self._yhy = np.zeros((0, 0))  # yᵢ·H₀yⱼ

    def add(self, s: PETSc.Vec, y: PETSc.Vec, hy: PETSc.Vec) -> None:
        """Take over a pair and H₀ y, unless the curvature along s is not clearly positive."""
        pair = Pair(s, y, hy)
        if not s.dot(y) > CURVED * s.norm() * y.norm():
            pair.destroy()
            return
        self._keep(self.history - 1)
        self.pairs.append(pair)
        steps, changes = self._products(y)
        self._sy, self._yhy = np.pad(self._sy, (0, 1)), np.pad(self._yhy, (0, 1))
        self._sy[:, -1] = steps
        self._yhy[:, -1] = self._yhy[-1] = changes

    def apply(self, x: PETSc.Vec, hx: PETSc.Vec, y: PETSc.Vec) -> None:
        """Set y = H x.

        Parameters
        ----------
        x, hx
            A vector, and H₀ x. H₀ is multiplied with the number that fits the last pair (Oren and Luenberger 1974), so that
            steps of length one are nearly always taken.
        y
            None of the two.
        """
        hx.copy(y)
        if not self.pairs:
            return
        steps, changes = self._products(x)
        scale = self._sy[-1, -1] / self._yhy[-1, -1]
        upper = np.triu(self._sy)
        back = np.linalg.solve(upper, steps)
        forth = np.linalg.solve(upper.T, np.diag(self._sy) * back - scale * (changes - self._yhy @ back))
        y.scale(scale)
        y.maxpy(np.concatenate([forth, -scale * back]), self._vectors())

    def renew(self, kept: int, first: Inverse) -> None:
        """Go on with the last pairs from another initial inverse: ``first(x, y)`` sets y = H₀ x."""
        self._keep(kept)
        for pair in self.pairs:
            first(pair.y, pair.hy)
        for i, pair in enumerate(self.pairs):
            self._yhy[:, i] = self._products(pair.y)[1]

    def state(self) -> State:
        """Return the pairs and their products."""
        pairs = {
            str(i): {name: block_of(getattr(pair, name)) for name in ("s", "y", "hy")}
            for i, pair in enumerate(self.pairs)
        }
        return {"pairs": pairs, "sy": self._sy.copy(), "yhy": self._yhy.copy()}

    def restore(self, known: Known, like: PETSc.Vec) -> None:
        """Go on from a state, with vectors like one."""
        self.clear()
        for i in range(len(known["sy"])):
            pair = Pair(*(like.duplicate() for _ in range(3)))
            for name in ("s", "y", "hy"):
                restore_vector(getattr(pair, name), known["pairs"][str(i)][name])
            self.pairs.append(pair)
        self._sy, self._yhy = known["sy"].reshape(2 * [len(self.pairs)]), known["yhy"].reshape(2 * [len(self.pairs)])

    def clear(self) -> None:
        """Forget all pairs."""
        self._keep(0)

    def _keep(self, count: int) -> None:
        """Forget all pairs but the last."""
        gone = max(len(self.pairs) - count, 0)
        for pair in self.pairs[:gone]:
            pair.destroy()
        self.pairs = self.pairs[gone:]
        self._sy, self._yhy = self._sy[gone:, gone:], self._yhy[gone:, gone:]

    def _vectors(self) -> list[PETSc.Vec]:
        return [pair.s for pair in self.pairs] + [pair.hy for pair in self.pairs]

    def _products(self, x: PETSc.Vec) -> tuple[np.ndarray, np.ndarray]:
        """Return sᵢ·x and H₀yᵢ·x."""
        found = np.asarray(x.mDot(self._vectors()))
        return found[: len(self.pairs)], found[len(self.pairs) :]
