"""Sparse systems of one pattern, solved again and again on one rank: A u + g(u) = b, with g pointwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hpcdeq.errors import ConvergenceError
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.options import Options, Value
from hpcdeq.petsc.solves import SolveRecord, run_snes

# A direct solve a Newton step: a few thousand unknowns in the plane are factored in a millisecond or two. The line
# search leaves a linear system alone, and the residual that Newton's method ends with is the true one.
NEWTON: Mapping[str, Value] = {
    "snes_type": "newtonls",
    "snes_rtol": 1e-10,
    "snes_stol": 0.0,
    "ksp_type": "preonly",
    "pc_type": "cholesky",
    "pc_factor_mat_ordering_type": "nd",
}

Pointwise = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def nothing(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return g = 0 and its derivative: the system is linear. Not collective."""
    return np.zeros_like(u), np.zeros_like(u)


class _Equations:
    """What the SNES calls. It does not know the SNES: a circle would keep the factors until Python looks for circles."""

    def __init__(self, matrix: PETSc.Mat) -> None:
        self.matrix = matrix
        self.pointwise: Pointwise = nothing
        self._diagonal = matrix.createVecRight()

    def set_residual(self, snes: PETSc.SNES, u: PETSc.Vec, f: PETSc.Vec) -> None:
        """Set f = A u + g(u); PETSc subtracts the right-hand side by itself."""
        self.matrix.mult(u, f)
        value, _ = self.pointwise(u.getArray(readonly=True))
        with f as array:
            array += value

    def set_jacobian(self, snes: PETSc.SNES, u: PETSc.Vec, jacobian: PETSc.Mat, preconditioner: PETSc.Mat) -> None:
        """Set the Jacobian A + diag(g'(u))."""
        _, slope = self.pointwise(u.getArray(readonly=True))
        with self._diagonal as array:
            array[:] = slope
        self.matrix.copy(jacobian, PETSc.Mat.Structure.SAME_NONZERO_PATTERN)
        jacobian.setDiagonal(self._diagonal, PETSc.InsertMode.ADD_VALUES)


class SparseSystem:
    """A u + g(u) = b for symmetric positive definite A of one sparsity pattern, and a pointwise g that does not decrease.

    Not collective: every rank has systems of its own. The symbolic factorisation is done once for all matrices.

    Parameters
    ----------
    offsets, columns
        ``(n + 1,)`` and ``(entries,)``: the pattern by compressed rows, columns ascending, with every diagonal entry.
    prefix
        Options prefix of the SNES, such as ``darcy_``.
    options
        PETSc's, without the prefix, over `NEWTON`.

    Raises
    ------
    OptionError
        An option that PETSc does not know.
    """

    def __init__(
        self, offsets: np.ndarray, columns: np.ndarray, prefix: str, options: Mapping[str, Value] | None = None
    ) -> None:
        self.offsets = np.asarray(offsets, PETSc.IntType)
        self.columns = np.asarray(columns, PETSc.IntType)
        self.options = Options(prefix, {**NEWTON, **(options or {})})
        n = len(self.offsets) - 1
        pattern = self.offsets, self.columns, np.zeros(len(self.columns))
        self._equations = _Equations(PETSc.Mat().createAIJ((n, n), csr=pattern, comm=PETSc.COMM_SELF))
        self._b, self._u = self._equations.matrix.createVecs()
        jacobian = self._equations.matrix.duplicate()
        jacobian.setOption(PETSc.Mat.Option.SPD, True)
        self.snes = PETSc.SNES().create(comm=PETSc.COMM_SELF)
        self.snes.setOptionsPrefix(self.options.prefix)
        self.snes.setFunction(self._equations.set_residual, self._u.duplicate())
        self.snes.setJacobian(self._equations.set_jacobian, jacobian)
        with self.options.inserted():
            self.snes.setFromOptions()

    def solve(
        self, entries: np.ndarray, b: np.ndarray, pointwise: Pointwise = nothing, guess: np.ndarray | None = None
    ) -> tuple[np.ndarray, SolveRecord]:
        """Return the solution and how the solve ended.

        Not collective.

        Parameters
        ----------
        entries
            ``(entries,)`` of A, in the order of the pattern.
        b
            ``(n,)`` right-hand side.
        pointwise
            ``pointwise(u)`` returns g and its derivative, ``(n,)`` each.
        guess
            ``(n,)`` where Newton's method begins; zero without one.

        Returns
        -------
        tuple
            ``(n,)`` solution, and the record of the solve.

        Raises
        ------
        ConvergenceError
            The residual has not fallen as far as ``snes_rtol`` asks for.
        """
        self._equations.matrix.setValuesCSR(self.offsets, self.columns, entries)
        self._equations.matrix.assemble()
        self._equations.pointwise = pointwise
        with self._b as array:
            array[:] = b
        with self._u as array:
            array[:] = 0.0 if guess is None else guess
        with self.options.inserted():
            record = run_snes(self.snes, self._b, self._u)
        if not record.converged:
            raise ConvergenceError(
                f"{record.reason} after {record.iterations} iterations on {len(b)} unknowns, residual"
                f" {record.residual_norm:.3g} (PETSC_OPTIONS=-{record.prefix}snes_monitor shows the history)",
                record=record,
            )
        return self._u.getArray(readonly=True).copy(), record
