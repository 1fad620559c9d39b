"""The curvature of a training problem as a PETSc matrix: products at the present weights, and what preconditioners ask for."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor

from hpcdeq.errors import OptionError
from hpcdeq.optim.sampling import Sampling
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.operators import ProductMatrix
from hpcdeq.petsc.vectors import block_of, restore_vector
from hpcdeq.problem import TrainingProblem
from hpcdeq.state import Block, Known, State, whole


class CurvatureMatrix(ProductMatrix):
    """Context of the Hessian that TAO is given: Gauss-Newton or true, of all samples or of some.

    Parameters
    ----------
    problem
        Whose curvature it is.
    kind
        ``gauss_newton`` or ``hessian``.
    sampling
        Samples that products are taken on.

    Attributes
    ----------
    point
        ``(n,)`` weights that it belongs to; None before the first.
    moves
        How many points there have been.
    batch
        Global numbers of the samples of the present iteration; None: all.
    multiple
        Multiple of the identity that TAO has added.
    pairs
        The last products (v, A v, without the multiple), where ``remember`` asked for them.
    """

    def __init__(self, problem: TrainingProblem, kind: str, sampling: Sampling) -> None:
        super().__init__(self._product)
        self.problem = problem
        self.kind = kind
        self.sampling = sampling
        self.batch: np.ndarray | None = None
        self.point: Tensor | None = None
        self.moves = 0
        self.pairs: deque[tuple[PETSc.Vec, PETSc.Vec]] = deque(maxlen=0)
        self._rows: np.ndarray | None = None

    def move(self, point: Tensor) -> None:
        """Go to new weights, the same on all ranks. Not collective."""
        self.unshift()
        if self.point is None or not torch.equal(point, self.point):
            sampling = self.sampling
            self._rows = self.problem.curvature_rows(sampling.hessian_fraction, sampling.seed, self.moves, self.batch)
            self.moves += 1
        self.point = point

    def remember(self, count: int) -> None:
        """Keep the last products from now on. Not collective."""
        self.pairs = deque(maxlen=count)

    def state(self) -> State:
        """Return where it is, and what it remembers. Collective on the problem's comm."""
        owned = self.problem.layout.owned
        return {
            "moves": self.moves,
            "multiple": self.multiple,
            "point": None if self.point is None else Block(self.point[owned].double().cpu().numpy()),
            "pairs": {str(i): {"v": block_of(v), "y": block_of(y)} for i, (v, y) in enumerate(self.pairs)},
            "remembered": self.pairs.maxlen,
        }

    def restore(self, known: Known, like: PETSc.Vec) -> None:
        """Go on from a state, with vectors like one. Collective on the problem's comm."""
        self.moves, self.multiple = int(known["moves"]), known["multiple"]
        self.point = torch.from_numpy(whole(known["point"]).copy()) if "point" in known else None
        self.remember(int(known["remembered"]))
        for i in range(len(known.get("pairs", {}))):
            v, y = like.duplicate(), like.duplicate()
            restore_vector(v, known["pairs"][str(i)]["v"])
            restore_vector(y, known["pairs"][str(i)]["y"])
            self.pairs.append((v, y))

    def forget(self) -> None:
        """Free what is kept. Collective on the problem's comm."""
        while self.pairs:
            for vector in self.pairs.popleft():
                vector.destroy()

    def _product(self, v: PETSc.Vec, y: PETSc.Vec) -> None:
        assert self.point is not None
        layout = self.problem.layout
        whole = layout.gather(v.getArray(readonly=True))
        block = self.problem.owned_product(self.point, whole, curvature=self.kind, rows=self._rows)
        with y as values:
            values[:] = block
        if self.pairs.maxlen:
            if len(self.pairs) == self.pairs.maxlen:
                for vector in self.pairs.popleft():
                    vector.destroy()
            self.pairs.append((v.copy(), y.copy()))


def curvature_of(pc: PETSc.PC) -> CurvatureMatrix:
    """Return the curvature that a preconditioner is for.

    Not collective.

    Raises
    ------
    OptionError
        It is for another matrix.
    """
    context = pc.getOperators()[1].getPythonContext()
    if not isinstance(context, CurvatureMatrix):
        raise OptionError(
            f"-{pc.getOptionsPrefix() or ''}pc_type: this preconditioner is for the curvature of a training problem"
        )
    return context
