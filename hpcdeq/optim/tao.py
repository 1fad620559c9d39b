"""Run a TAO solver on a `TrainingProblem`: its callbacks, and what its reasons mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcdeq import parallel
from hpcdeq.errors import ConvergenceError
from hpcdeq.optim.base import DIVERGED, Recorder, Result
from hpcdeq.optim.beginning import initial_gradient_error, initial_loss_error
from hpcdeq.optim.curvature import CurvatureMatrix
from hpcdeq.optim.presets import Preset
from hpcdeq.optim.sampling import Sampling
from hpcdeq.optim.stopping import ending_of, status_of, words
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.communicators import anchor
from hpcdeq.petsc.operators import matrix_from_products, matrix_of
from hpcdeq.petsc.options import Options, Value
from hpcdeq.petsc.solves import reason_name, reraise
from hpcdeq.petsc.vectors import block_of, restore_vector
from hpcdeq.problem import LeastSquares
from hpcdeq.problem.culprit import culprit
from hpcdeq.state import Block, Known, State, whole

# A trial point without fixed points, or with a loss that is not finite, counts as this many times the largest loss seen.
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
    sampling
        Samples of its products and first iterations; default: all.
    """

    def __init__(self, recorder: Recorder, preset: Preset, sampling: Sampling | None = None) -> None:
        self.recorder = recorder
        self.problem = recorder.problem
        self.layout = self.problem.layout
        self.preset = preset
        self.sampling = sampling or Sampling()
        self._rows: np.ndarray | None = None
        self._curvature: CurvatureMatrix | None = None
        self.rejected = 0  # trial points of all kinds that no step may end at
        self.infinite = 0  # those of them whose loss or gradient is NaN or infinite
        self._idle = False  # whether no step is to be taken
        self._started = False
        self._differentiated = False
        self._worst = 0.0
        self._rejected_at: Tensor | None = None
        self._valued: tuple[Tensor, float, np.ndarray] | None = (
            None  # the last gradient, which line searches ask for again
        )
        self._jacobian_at: Tensor | None = None
        self._gathered: Tensor | None = None
        self._own: Any = None  # the context of a type that knows its state
        self._grown = 0  # the iteration whose samples are worked on
        self._interrupted = False

    def minimize(
        self, x0: Tensor, options: Mapping[str, Value], max_iterations: int, resume: Known | None = None
    ) -> Result:
        """Minimise from x0 ``(n,)``, or on from a state, and return the result; reports failure in its status."""
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
                self._curvature = CurvatureMatrix(self.problem, self.preset.curvature, self.sampling)
                hessian = matrix_of(self._curvature, comm, sizes)
                tao.setHessian(self._move, hessian)
                made += [g, hessian]
                if self.sampling.batch_size is not None:
                    self._grow(tao, 0)
                    tao.setUpdate(self._grow)
            max_iterations = self._begin(tao, x, max_iterations, resume)
            self._idle = max_iterations <= 0
            tao.setMaximumIterations(max(max_iterations, 1))  # PETSc takes no 0
            given = Options("tao_", {name.removeprefix("tao_"): value for name, value in options.items()})
            with given.inserted():
                reraise(tao.setFromOptions)
                self._prepare(tao, resume)
                # brgn leaves its iterations to a solver inside, which knows nothing of a monitor set from Python.
                (tao.getBRGNSubsolver() if tao.getType() == "brgn" else tao).setMonitor(self._monitor)
                reraise(tao.solve)
            if self._interrupted:
                return self.recorder.interrupted()
            reason = reason_name(PETSc.TAO.ConvergedReason, tao.getConvergedReason())
            self._finish(tao, x)
            gatol = tao.getTolerances()[0]
        finally:
            tao.destroy()
            if self._curvature is not None:
                self._curvature.forget()
            for thing in made:
                thing.destroy()
            PETSc.garbage_cleanup(comm)
            self.problem.forget()
        last = self.recorder.last
        if self._rows is not None and last is not None:  # what ended on some samples is told for all of them
            self._rows = None
            loss, gradient = self.problem.loss_and_gradient(last.x)
            self.recorder.last = replace(last, loss=loss, gradient_norm=float(gradient.norm()))
        unreached = self.rejected - self.infinite
        ending = ending_of(self.recorder, reason, unreached=unreached, infinite=self.infinite, gatol=gatol)
        told, status = words(ending), status_of(ending)
        if status == DIVERGED and self.infinite and self._rejected_at is not None:
            told = ". ".join(filter(None, [told, culprit(self.problem, self._rejected_at)]))
        return self.recorder.result(status, reason, told, self.rejected)

    # -------------------------------------------------------------------------------------------------- state

    def _begin(self, tao: PETSc.TAO, x: PETSc.Vec, max_iterations: int, resume: Known | None) -> int:
        """Set what a run that goes on begins with; return how many iterations are left to this solver's own count."""
        if resume is None:
            return max_iterations
        restore_vector(x, resume["x"])
        self._started = self._differentiated = True
        self._worst, self.rejected, self.infinite = resume["worst"], int(resume["rejected"]), int(resume["infinite"])
        if "valued" in resume:
            valued = resume["valued"]
            point = torch.from_numpy(whole(valued["point"]).copy())
            self._valued = (point, valued["loss"], valued["gradient"][self.layout.owned])
        if "context" not in resume and self.recorder.last is not None:
            before = self.recorder.offset
            self.recorder.offset = self.recorder.last.iteration  # PETSc's types count from 0 again
            return max_iterations - (self.recorder.offset - before)
        return max_iterations

    def _prepare(self, tao: PETSc.TAO, resume: Known | None) -> None:
        """Tell a type of our own, which is known by now, what it needs of the run."""
        context = tao.getPythonContext() if tao.getType() == "python" else None
        if context is not None and hasattr(context, "enough"):
            context.enough = self.recorder.out_of_time
        self._own = context if context is not None and hasattr(context, "resume") else None
        if resume is None:
            return
        if self.sampling.batch_size is not None and self._curvature is not None:
            self._grown = int(resume["grown"])
            self._rows = self._curvature.batch = self.sampling.batch(self.problem.dataset.count, self._grown)
        if self._own is not None and "context" in resume:
            self._own.resume = resume["context"]
            return
        if "radius" in resume:
            tao.setInitialTrustRegionRadius(resume["radius"])
        kept = "; its trust radius was kept" if "radius" in resume else ""
        self.recorder.notes.append(
            f"Resumed at iteration {self.recorder.offset}: what PETSc's {tao.getType()} remembers of earlier steps (quasi-Newton"
            f" pairs, perturbations) cannot be saved, and was begun anew{kept}"
        )

    def _state(self, tao: PETSc.TAO, radius: float | None) -> State:
        """Return all that the next iteration depends on. Collective."""
        valued = None
        if self._valued is not None:
            point, loss, gradient = self._valued
            valued = {"point": Block(point[self.layout.owned].numpy()), "loss": loss, "gradient": Block(gradient)}
        return {
            "x": block_of(tao.getSolution()),
            "radius": radius,
            "worst": self._worst,
            "rejected": self.rejected,
            "infinite": self.infinite,
            "grown": self._grown,
            "valued": valued,
            "context": None if self._own is None else self._own.state(tao),
        }

    # ---------------------------------------------------------------------------------------------- callbacks

    def _grow(self, tao: PETSc.TAO, iteration: int) -> None:
        """Go on to the samples of an iteration."""
        self._grown = iteration
        rows = self.sampling.batch(self.problem.dataset.count, iteration)
        before = self._rows
        if (rows is before is None) or (rows is not None and before is not None and np.array_equal(rows, before)):
            return
        assert self._curvature is not None
        self._rows = self._curvature.batch = rows
        self._valued = None

    def _gather(self, x: PETSc.Vec) -> Tensor:
        """Return a whole vector, the very tensor of the last time where it is the same: whoever keeps it keeps no copy."""
        found = self.layout.gather(x.getArray(readonly=True))
        if self._gathered is None or not torch.equal(found, self._gathered):
            self._gathered = found
        return self._gathered

    def _objective(self, tao: PETSc.TAO, x: PETSc.Vec) -> float:
        point = self._gather(x)
        if self._valued is not None and torch.equal(self._valued[0], point):
            return self._valued[1]
        try:
            return self._checked(point, self.problem.loss(point, self._rows))
        except ConvergenceError:
            return self._reject(point)

    def _gradient(self, tao: PETSc.TAO, x: PETSc.Vec, g: PETSc.Vec) -> None:
        self._objective_gradient(tao, x, g)

    def _objective_gradient(self, tao: PETSc.TAO, x: PETSc.Vec, g: PETSc.Vec) -> float:
        point = self._gather(x)
        if self._valued is not None and torch.equal(self._valued[0], point):
            with g as values:
                values[:] = self._valued[2]
            return self._valued[1]
        try:
            loss, block = self.problem.owned_loss_and_gradient(point, self._rows)
        except ConvergenceError:
            g.set(0.0)
            return self._reject(point)
        value = self._checked(point, loss)
        with np.errstate(over="ignore", invalid="ignore"):  # TAO needs the norm, too, to be finite
            norm_is_finite = np.isfinite(self.problem.comm.size * (block @ block))
        if parallel.any_rank(self.problem.comm, not norm_is_finite):
            if not self._differentiated:
                raise initial_gradient_error(self.problem, point, self._rows)
            block = np.zeros_like(block)
            value = self._refuse(point) if value == loss else value
        self._differentiated = True
        self._valued = (point, value, block)
        with g as values:
            values[:] = block
        return value

    def _checked(self, point: Tensor, loss: float) -> float:
        """Return a loss that TAO can go on with; see `_reject`."""
        if not np.isfinite(loss):
            if not self._started:
                raise initial_loss_error(self.problem, loss, point, self._rows)
            return self._refuse(point)
        self._started = True
        self._worst = max(self._worst, loss)
        return loss

    def _refuse(self, point: Tensor) -> float:
        self.infinite += 1
        return self._reject(point)

    def _reject(self, point: Tensor) -> float:
        """Return a loss for a trial point without fixed points; at the initial point, raise what was raised.

        It is worse than any seen, so that no descent method takes the point, and finite, because several types of TAO's
        (bqnktr, bntl, lmvm) end at an infinite value where they only shorten the step at a large one.
        """
        if not self._started:
            raise
        self.rejected += 1
        self._rejected_at = point
        return self._wall

    @property
    def _wall(self) -> float:
        return min(WALL * max(self._worst, 1e-300), float(np.finfo(float).max))

    def _move(self, tao: PETSc.TAO, x: PETSc.Vec, hessian: PETSc.Mat, _: PETSc.Mat) -> None:
        assert self._curvature is not None
        self._curvature.move(self._gather(x))
        hessian.stateIncrease()  # PETSc sets a preconditioner up again where it sees that the matrix has changed

    def _monitor(self, tao: PETSc.TAO) -> None:
        if self._idle:
            tao.setConvergedReason(PETSc.TAO.ConvergedReason.DIVERGED_MAXITS)
            return
        iteration, loss, gradient_norm, *_ = tao.getSolutionStatus()
        iteration += self.recorder.offset
        if self.recorder.last is not None and iteration <= self.recorder.last.iteration:
            return
        radius = None
        if tao.getType() in ("ntr", "ntl", "bntr", "bntl", "bqnktr", "bqnktl"):
            radius = tao.getCurrentTrustRegionRadius()
        elif tao.getType() == "python":
            radius = getattr(tao.getPythonContext(), "radius", None)
        x = self._gather(tao.getSolution())
        if self.rejected and (loss >= self._wall or self._is_rejected(x)):
            # Some types look at the loss alone before they take a step; the last iterate stands.
            tao.setConvergedReason(PETSc.TAO.ConvergedReason.DIVERGED_NAN)
            return
        if self.preset.least_squares:  # what TAO tells is of its inner problem
            loss, gradient = self.problem.loss_and_gradient(x)
            gradient_norm = float(gradient.norm())
        self.recorder.emit(iteration, x, loss, gradient_norm, radius)
        out_of_time = self.recorder.out_of_time()
        last = out_of_time or iteration - self.recorder.offset >= tao.getMaximumIterations()
        self._interrupted = self.recorder.safe_point(lambda: self._state(tao, radius), last=last)
        if self._interrupted or out_of_time:
            tao.setConvergedReason(PETSc.TAO.ConvergedReason.DIVERGED_USER)

    def _finish(self, tao: PETSc.TAO, x: PETSc.Vec) -> None:
        """Record the point at which TAO ended, where its last monitor call was before its last step."""
        iteration = tao.getIterationNumber() + self.recorder.offset
        last = self.recorder.last
        point = self._gather(x)
        if last is not None and (torch.equal(point, last.x) or self._is_rejected(point)):
            return
        loss, gradient = self.problem.loss_and_gradient(point)
        norm = float(gradient.norm())
        if last is None or np.isfinite(loss + norm):
            after = 0 if last is None else last.iteration + 1
            self.recorder.emit(max(iteration, after), point, loss, norm, None)

    def _is_rejected(self, point: Tensor) -> bool:
        return self._rejected_at is not None and torch.equal(point, self._rejected_at)

    # ------------------------------------------------------------------------------------------ least squares

    def _set_least_squares(self, tao: PETSc.TAO, x: PETSc.Vec, sizes: tuple[int, int]) -> list[PETSc.Object]:
        self._squares = LeastSquares(self.problem)
        point = self._gather(x)
        residual = self._squares.residual(point)
        self._checked(point, self._half_square(residual))
        r = PETSc.Vec().createMPI((len(residual), PETSc.DETERMINE), comm=self.problem.comm)
        jacobian = matrix_from_products(
            self.problem.comm, r.getSizes(), sizes, self._jacobian_product, self._jacobian_transpose_product
        )
        tao.setResidual(self._residual, r)
        tao.setJacobianResidual(self._move_jacobian, jacobian)
        return [r, jacobian]

    def _residual(self, tao: PETSc.TAO, x: PETSc.Vec, r: PETSc.Vec) -> None:
        point = self._gather(x)
        try:
            rows = self._squares.residual(point)
            loss = self._checked(point, true := self._half_square(rows))
        except ConvergenceError:
            loss, true = self._reject(point), np.inf
        if loss != true:
            # Equal residuals whose half sum of squares is the rejected point's loss.
            r.set((2.0 * loss / r.getSize()) ** 0.5)
            return
        with r as values:
            values[:] = rows

    def _half_square(self, rows: np.ndarray) -> float:
        with np.errstate(over="ignore"):  # infinity is an answer here
            return 0.5 * self.problem.sum_of_blocks(rows * rows)

    def _move_jacobian(self, tao: PETSc.TAO, x: PETSc.Vec, jacobian: PETSc.Mat, _: PETSc.Mat) -> None:
        self._jacobian_at = self._gather(x)

    def _jacobian_product(self, v: PETSc.Vec, y: PETSc.Vec) -> None:
        assert self._jacobian_at is not None
        if self._is_rejected(self._jacobian_at):  # brgn linearises there too
            y.set(0.0)
            return
        rows = self._squares.jacobian_product(self._jacobian_at, self._gather(v))
        with y as values:
            values[:] = rows

    def _jacobian_transpose_product(self, u: PETSc.Vec, y: PETSc.Vec) -> None:
        assert self._jacobian_at is not None
        if self._is_rejected(self._jacobian_at):
            y.set(0.0)
            return
        block = self._squares.owned_jacobian_transpose_product(self._jacobian_at, u.getArray(readonly=True))
        with y as values:
            values[:] = block
