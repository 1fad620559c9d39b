"""Run a TAO solver on a `TrainingProblem`: its callbacks, and what its reasons mean."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hpcdeq.errors import ConvergenceError, DataError
from hpcdeq.optim.base import BUDGET, CONVERGED, DIVERGED, Recorder, Result
from hpcdeq.optim.presets import GAUSS_NEWTON, Preset
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.communicators import anchor
from hpcdeq.petsc.operators import matrix_from_products
from hpcdeq.petsc.options import Options, Value
from hpcdeq.petsc.solves import reason_name, reraise
from hpcdeq.problem import LeastSquares

_WORDS = {
    "CONVERGED_GATOL": "the gradient norm is below -tao_gatol",
    "CONVERGED_GRTOL": "the gradient norm over the loss is below -tao_grtol",
    "CONVERGED_GTTOL": "the gradient norm has fallen by the factor -tao_gttol",
    "CONVERGED_STEPTOL": "the step (or the trust radius) is below -tao_steptol",
    "CONVERGED_MINF": "the loss is below -tao_fmin",
    "DIVERGED_MAXITS": "the iterations are used up; --max-iterations allows more",
    "DIVERGED_MAXFCN": "the evaluations are used up; -tao_max_funcs allows more",
    "DIVERGED_LS_FAILURE": "the line search found no decrease: rounding or a loose fixed point limits the loss. Try"
    " --dtype float64, tighter -deq_snes_rtol and -deq_ksp_rtol, or --optimizer trgn",
    "DIVERGED_TR_REDUCTION": "the trust region shrank without finding a decrease: rounding or a loose fixed point limits"
    " the loss. Try --dtype float64, or tighter -deq_snes_rtol and -deq_ksp_rtol",
    "DIVERGED_NAN": "the loss became NaN or infinite at a trial point. Try --optimizer trgn, which survives such points",
    "DIVERGED_USER": "the time is up; --max-seconds allows more",
}
_BUDGETS = {"DIVERGED_MAXITS", "DIVERGED_MAXFCN", "DIVERGED_USER"}


# A trial point without fixed points counts as this many times the largest loss seen so far.
WALL = 10.0


class TaoRun:
    """One minimisation by TAO. Collective on the problem's comm, every method.

    Parameters
    ----------
    problem
        From `TrainingProblem`; what is minimised is its mean loss.
    recorder
        Takes the iterates, watches the clock.
    preset
        What TAO is given.
    """

    def __init__(self, recorder: Recorder, preset: Preset) -> None:
        self.recorder = recorder
        self.problem = recorder.problem
        self.layout = self.problem.layout
        self.preset = preset
        self.rejected = 0
        self._started = False
        self._worst = 0.0
        self._point: Tensor | None = None
        self._jacobian_at: Tensor | None = None

    def minimize(self, x0: Tensor, options: Mapping[str, Value], max_iterations: int) -> Result:
        """Minimise from x0 ``(n,)`` and return the result; reports failure in its status."""
        comm = self.problem.comm
        anchor(comm)
        own = self.layout.block_sizes[comm.rank]
        sizes = (own, self.layout.count)
        tao = PETSc.TAO().create(comm=comm)
        x = PETSc.Vec().createMPI(sizes, comm=comm)
        made: list[PETSc.Object] = [x]
        try:
            x.setArray(x0[self.layout.owned].double().cpu().numpy())
            tao.setSolution(x)
            if self.preset.least_squares:
                made += self._set_least_squares(tao, x, sizes)
            else:
                g = x.duplicate()
                tao.setObjective(self._objective)
                tao.setObjectiveGradient(self._objective_gradient, g)
                tao.setGradient(self._gradient, g)
                hessian = matrix_from_products(comm, sizes, sizes, self._curvature_product)
                tao.setHessian(self._move, hessian)
                made += [g, hessian]
            tao.setMonitor(self._monitor)
            tao.setMaximumIterations(max_iterations)
            given = Options("tao_", {name.removeprefix("tao_"): value for name, value in options.items()})
            with given.inserted():
                tao.setFromOptions()
                reraise(tao.solve)
            reason = reason_name(PETSc.TAO.ConvergedReason, tao.getConvergedReason())
            self._finish(tao, x)
        finally:
            tao.destroy()
            for thing in made:
                thing.destroy()
            PETSc.garbage_cleanup(comm)
            self.problem.forget()
        status = BUDGET if reason in _BUDGETS else CONVERGED if reason.startswith("CONVERGED") else DIVERGED
        message = _WORDS.get(reason, "see PETSc's manual page of TaoConvergedReason")
        if status == DIVERGED and self.rejected:
            message += f" ({self.rejected} trial points had no fixed point: make the cell more contractive)"
        return self.recorder.result(status, reason, message, self.rejected)

    # ---------------------------------------------------------------------------------------------- callbacks

    def _gather(self, x: PETSc.Vec) -> Tensor:
        return self.layout.gather(x.getArray(readonly=True))

    def _objective(self, tao: PETSc.TAO, x: PETSc.Vec) -> float:
        try:
            return self._checked(self.problem.loss(self._gather(x)))
        except ConvergenceError:
            return self._reject()

    def _gradient(self, tao: PETSc.TAO, x: PETSc.Vec, g: PETSc.Vec) -> None:
        self._objective_gradient(tao, x, g)

    def _objective_gradient(self, tao: PETSc.TAO, x: PETSc.Vec, g: PETSc.Vec) -> float:
        try:
            loss, block = self.problem.owned_loss_and_gradient(self._gather(x))
        except ConvergenceError:
            g.set(0.0)
            return self._reject()
        with g as values:
            values[:] = block
        return self._checked(loss)

    def _checked(self, loss: float) -> float:
        if not self._started and not np.isfinite(loss):
            raise initial_loss_error(loss)
        self._started = True
        self._worst = max(self._worst, loss)
        return loss

    def _reject(self) -> float:
        """Return a loss for a trial point without fixed points; at the initial point, raise what was raised.

        It is worse than any seen, so that no descent method takes the point, and finite, because several types of TAO's
        (bqnktr, bntl, lmvm) end at an infinite value where they only shorten the step at a large one.
        """
        if not self._started:
            raise
        self.rejected += 1
        return WALL * max(self._worst, 1e-300)

    def _move(self, tao: PETSc.TAO, x: PETSc.Vec, hessian: PETSc.Mat, _: PETSc.Mat) -> None:
        self._point = self._gather(x)
        hessian.getPythonContext().unshift()

    def _curvature_product(self, v: PETSc.Vec, y: PETSc.Vec) -> None:
        assert self._point is not None
        curvature = "gauss_newton" if self.preset.curvature == GAUSS_NEWTON else "hessian"
        block = self.problem.owned_product(self._point, self._gather(v), curvature=curvature)
        with y as values:
            values[:] = block

    def _monitor(self, tao: PETSc.TAO) -> None:
        iteration, loss, gradient_norm, *_ = tao.getSolutionStatus()
        iteration += self.recorder.offset
        if self.recorder.last is not None and iteration <= self.recorder.last.iteration:
            return
        radius = (
            tao.getCurrentTrustRegionRadius()
            if tao.getType() in ("ntr", "ntl", "bntr", "bntl", "bqnktr", "bqnktl")
            else None
        )
        if self.rejected and loss >= WALL * self._worst:
            raise ConvergenceError(
                f"TAO's {tao.getType()} took a point without fixed points: use --optimizer trgn", agreed=True
            )
        x = self._gather(tao.getSolution())
        if self.preset.least_squares:  # what TAO tells is of its inner problem
            loss, gradient = self.problem.loss_and_gradient(x)
            gradient_norm = float(gradient.norm())
        self.recorder.emit(iteration, x, loss, gradient_norm, radius)
        if self.recorder.out_of_time():
            tao.setConvergedReason(PETSc.TAO.ConvergedReason.DIVERGED_USER)

    def _finish(self, tao: PETSc.TAO, x: PETSc.Vec) -> None:
        """Record the point at which TAO ended, where its last monitor call was before its last step."""
        iteration = tao.getIterationNumber() + self.recorder.offset
        last = self.recorder.last
        point = self._gather(x)
        if last is None or not torch.equal(point, last.x):
            loss, gradient = self.problem.loss_and_gradient(point)
            self.recorder.emit(iteration, point, loss, float(gradient.norm()), None)

    # ------------------------------------------------------------------------------------------ least squares

    def _set_least_squares(self, tao: PETSc.TAO, x: PETSc.Vec, sizes: tuple[int, int]) -> list[PETSc.Object]:
        self._squares = LeastSquares(self.problem)
        residual = self._squares.residual(self._gather(x))
        self._checked(self._half_square(residual))
        r = PETSc.Vec().createMPI((len(residual), PETSc.DETERMINE), comm=self.problem.comm)
        jacobian = matrix_from_products(
            self.problem.comm, r.getSizes(), sizes, self._jacobian_product, self._jacobian_transpose_product
        )
        tao.setResidual(self._residual, r)
        tao.setJacobianResidual(self._move_jacobian, jacobian)
        return [r, jacobian]

    def _residual(self, tao: PETSc.TAO, x: PETSc.Vec, r: PETSc.Vec) -> None:
        try:
            rows = self._squares.residual(self._gather(x))
        except ConvergenceError:
            # Equal residuals whose half sum of squares is the rejected point's loss.
            r.set((2.0 * self._reject() / r.getSize()) ** 0.5)
            return
        self._checked(self._half_square(rows))
        with r as values:
            values[:] = rows

    def _half_square(self, rows: np.ndarray) -> float:
        with np.errstate(over="ignore"):  # infinity is an answer here
            return 0.5 * self.problem.sum_of_blocks(rows * rows)

    def _move_jacobian(self, tao: PETSc.TAO, x: PETSc.Vec, jacobian: PETSc.Mat, _: PETSc.Mat) -> None:
        self._jacobian_at = self._gather(x)

    def _jacobian_product(self, v: PETSc.Vec, y: PETSc.Vec) -> None:
        assert self._jacobian_at is not None
        try:
            rows = self._squares.jacobian_product(self._jacobian_at, self._gather(v))
        except ConvergenceError:  # brgn linearises at rejected trial points too
            y.set(0.0)
            return
        with y as values:
            values[:] = rows

    def _jacobian_transpose_product(self, u: PETSc.Vec, y: PETSc.Vec) -> None:
        assert self._jacobian_at is not None
        try:
            block = self._squares.owned_jacobian_transpose_product(self._jacobian_at, u.getArray(readonly=True))
        except ConvergenceError:
            y.set(0.0)
            return
        with y as values:
            values[:] = block


def initial_loss_error(loss: float) -> DataError:
    """Return the error for a loss that is not finite at the start. Not collective."""
    return DataError(
        f"the loss at the initial weights is {loss}: look for NaN in the initial weights, or for inputs or targets that are"
        " far out of scale",
        agreed=True,
    )
