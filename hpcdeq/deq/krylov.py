"""Tangent and adjoint systems (I - J) w = g solved sample by sample, as KSP types.

The matrix is block diagonal over the samples, and w ↦ J w + g has the solution as its fixed point. Anderson mixing of
that map is GMRES with a short memory (Walker and Ni 2011, doi 10.1137/10078356X): ``batched_anderson`` keeps few
directions and mixes rarely, so that it costs little beside the products; ``batched_gmres`` keeps many and mixes always,
and keeps them for the next right-hand sides of the same matrix, whose residuals are first made orthogonal to them (the
recycling of de Sturler 1996, doi 10.1016/0377-0427(94)00123-5).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from hpcdeq.deq.anderson import AndersonIteration, Settings
from hpcdeq.deq.batch import NANORINF, Limits, Values
from hpcdeq.deq.jacobian import Linearisation
from hpcdeq.deq.samples import SampleMap
from hpcdeq.deq.systems import LinearProblem, TensorSolver
from hpcdeq.deq.work import Work
from hpcdeq.petsc import PETSc

_REASONS = {
    NANORINF: "DIVERGED_NANORINF",
    "DIVERGED_MAX_IT": "DIVERGED_MAX_IT",
    "DIVERGED_DTOL": "DIVERGED_DTOL",
    "CONVERGED_FNORM_RELATIVE": "CONVERGED_RTOL",
}


class AffineMap:
    """w ↦ J w + g, or Jᵀ w + g, on all samples of a linearised cell or on some. Not collective, every method.

    Parameters
    ----------
    at
        The cell at the fixed point.
    cell
        The cell as a function of the state, which may know how to restrict itself; see `BoundCell`.
    right
        g, in the shape of the state.
    transpose
        Which of the two.
    work
        Counters to add to.
    """

    def __init__(
        self, at: Linearisation, cell: Callable[[Tensor], Tensor], right: Tensor, transpose: bool, work: Work
    ) -> None:
        self.at = at
        self.cell = cell
        self.right = right
        self.transpose = transpose
        self.work = work

    def __call__(self, w: Tensor) -> Tensor:
        """Return the value in the shape of w."""
        return (self.at.vjp(w) if self.transpose else self.at.jvp(w)) + self.right

    def restrict(self, keep: Tensor, rows: Tensor, count: int, w: Tensor) -> AffineMap | None:
        """Return the map for some samples, by linearising their cells alone; arguments as in `BoundCell.restrict`."""
        restrict = getattr(self.cell, "restrict", None)
        if restrict is None:
            return None
        cell = restrict(keep, rows, count, self.at.z.detach())
        if cell is None:
            return None
        at = Linearisation(cell, self.at.z.detach().index_select(0, rows), ())
        self.work.cell_evaluations += len(keep)
        return AffineMap(at, cell, self.right.index_select(0, rows), self.transpose, self.work)


class LinearAnderson(AndersonIteration):
    """Anderson mixing of w ↦ J w + g; residuals are compared with g. Not collective, every method."""

    _sizes: Values | None = None

    def worth_leaving(self, ended: int) -> bool:
        """Say whether the products that are saved exceed the evaluation that linearises the other samples again."""
        if not self.iteration:
            return False
        goal = np.maximum(self.sizes() * self.limits.rtol, np.finfo(float).tiny)
        left = np.log((self.norm / goal).max())
        gained = np.log(self.first.max() / self.norm.max()) / self.iteration
        return bool(gained > 0 and ended * left / gained >= 2 * self.samples.count)

    def sizes(self) -> Values:
        """Return the norms of the right-hand sides."""
        right = self.map.function.right  # type: ignore[attr-defined]
        if self._sizes is None or len(self._sizes) != self.samples.count:
            self._sizes = self.host(self.samples.norms(right))
        return self._sizes


class PerSampleAnderson(TensorSolver):
    """Context of a KSP of python type: ``-ksp_type batched_anderson``; options ``-ksp_anderson_...``.

    Its application context is a `LinearProblem`. Tolerances are judged sample by sample: ‖g - (I - J) w‖ ≤ rtol ‖g‖ + atol.
    Not collective, every method.
    """

    settings = Settings()
    recycles = False

    def setFromOptions(self, ksp: PETSc.KSP) -> None:  # noqa: N802 (petsc4py's name)
        """Read ``-ksp_anderson_...``."""
        self.settings = Settings.read(PETSc.Options(ksp.getOptionsPrefix()), "ksp", type(self).settings)

    def view(self, ksp: PETSc.KSP, viewer: PETSc.Viewer) -> None:
        """Print the settings, for ``-ksp_view``."""
        viewer.printfASCII(f"  per sample: Anderson mixing, {self.settings}\n")

    def answer(self, ksp: PETSc.KSP, problem: LinearProblem, right: Tensor, *, transpose: bool) -> Tensor:
        """Return the answer in any shape, and set the KSP's reason."""
        rtol, atol, divergence, most = ksp.getTolerances()
        map = AffineMap(problem.at, problem.cell, right, transpose, problem.work)
        samples = SampleMap(map, problem.samples, problem.work)
        kept = problem.kept.get(transpose) if self.recycles else None
        if self.recycles and kept is None:
            kept = problem.kept[transpose] = self.settings.history(
                problem.samples.rows(right), problem.samples, kept=True
            )
        # Started from g, unless something better is known: its residual is J g, as after one plain iteration from zero.
        start = right if problem.guess is None else problem.guess
        iteration = LinearAnderson(samples, start, Limits(rtol, atol, most, divergence), self.settings, kept)

        def watch(number: int, norm: float) -> None:
            ksp.setIterationNumber(number)
            ksp.setResidualNorm(norm if norm == norm else float("inf"))  # PETSc takes no NaN here
            ksp.logConvergenceHistory(norm)
            ksp.monitor(number, norm)

        reason = iteration.run(watch)
        iteration.give_back()
        problem.residual = iteration.device(iteration.outcome.residual)
        if transpose:
            problem.work.cell_vjps += samples.evaluated
        else:
            problem.work.cell_jvps += samples.evaluated
        ksp.setConvergedReason(getattr(PETSc.KSP.ConvergedReason, _REASONS[reason]))
        return iteration.outcome.value


class PerSampleGMRES(PerSampleAnderson):
    """Context of a KSP of python type: ``-ksp_type batched_gmres``; ``-ksp_anderson_m`` is its memory."""

    settings = Settings(window=30, period=1)
    recycles = True
