"""Levenberg-Marquardt with inexact inner solves, as a TAO type: ``-tao_type levenberg_marquardt``.

Moré 1978 ("The Levenberg-Marquardt algorithm: implementation and theory"): the step that solves (B + λ I) s = -g minimises
the quadratic model g·s + s·B s / 2 over the ball of radius ‖s‖, so that λ controls a trust region, and unlike a radius it
improves the conditioning of the inner system and is known to its preconditioner. λ follows the ratio of the decrease of the
loss to that of the model. The inner solves are bounded conjugate gradients (``-tao_ksp_...``, ``-tao_pc_...``) that go on
from the best multiple of the last step (Martens 2010, "Deep learning via Hessian-free optimization", section 4.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from hpcdeq.errors import OptionError
from hpcdeq.optim.iterating import (
    ROUNDING,
    curvature_along,
    options_of,
    refreshed,
    restore_solver,
    solver_state,
    tell,
)
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.options import number
from hpcdeq.petsc.vectors import block_of, restore_vector
from hpcdeq.state import Known, State

GOOD, POOR = 0.75, 0.25  # ratios of decreases beyond which the damping changes
BACKTRACKS = 4  # halvings of a step before its system is solved anew with more damping
ATTEMPTS = 12
SUFFICIENT = 1e-4  # of the decrease that the slope promises (Armijo)
WINDOW = 3  # products over which their yield is averaged
_NUMBERS = ("f", "iteration", "step", "scale", "damping", "radius")  # of its state
FAILED = 4.0  # factor on the damping after a step without decrease


class LevenbergMarquardt:
    """Context of a TAO of python type. Collective on the TAO, every method.

    Options: ``-tao_lm_damping`` (1e-2), the first λ over the curvature along the gradient; ``-tao_lm_damping_min`` (1e-12), the
    least; ``-tao_lm_decrease`` (2) and ``-tao_lm_increase`` (3), by which good steps divide and poor ones multiply it;
    ``-tao_lm_reuse`` (true), whether inner solves go on from the last step; ``-tao_lm_overhead`` (5), cost of an
    iterate besides its products, in products, by which inner solves know when a new iterate pays more (0: they go on to
    ``-tao_ksp_rtol`` or ``-tao_ksp_max_it``).

    Attributes
    ----------
    damping
        λ.
    radius
        ‖s‖ of the last step that was solved for: radius of the trust region that λ stands for.
    enough
        Says after every product whether the step is to be taken as it is then: the time may be up. The same on all ranks.
    """

    enough: Callable[[], bool]

    def __init__(self) -> None:
        self.first, self.least = 1e-2, 1e-12
        self.decrease, self.increase = 2.0, 3.0
        self.reuse = True
        self.overhead = 5.0
        self.damping = 0.0
        self.radius: float | None = None
        self.enough = lambda: False
        self.resume: Known | None = None
        # Between two iterations: the loss, iterations, the length of the last step, the curvature that damping is counted in.
        self.f, self.iteration, self.step, self.scale = 0.0, 0, 0.0, 0.0

    def setFromOptions(self, tao: PETSc.TAO) -> None:  # noqa: N802 (petsc4py's name)
        """Read the options."""
        options = options_of(tao)
        self.first = float(number(options, "tao_lm_damping", self.first))
        self.least = float(number(options, "tao_lm_damping_min", self.least))
        self.decrease = float(number(options, "tao_lm_decrease", self.decrease))
        self.increase = float(number(options, "tao_lm_increase", self.increase))
        self.reuse = options.getBool("tao_lm_reuse", self.reuse)
        self.overhead = float(number(options, "tao_lm_overhead", self.overhead))
        if not (self.first > 0 and self.least > 0 and self.decrease >= 1 and self.increase > 1):
            raise OptionError(
                "-tao_lm_damping and -tao_lm_damping_min are above 0, -tao_lm_decrease is 1 or more, -tao_lm_increase more than 1"
            )

    def solve(self, tao: PETSc.TAO) -> None:
        """Minimise."""
        x, g = tao.getSolution(), tao.getGradient()[0]
        hessian = tao.getHessian()[0]
        work = _Vectors(x)
        self._last = work.last
        try:
            self._iterate(tao, x, g, hessian, work)
        finally:
            work.destroy()

    def _iterate(self, tao: PETSc.TAO, x: PETSc.Vec, g: PETSc.Vec, hessian: PETSc.Mat, work: _Vectors) -> None:
        reasons = PETSc.TAO.ConvergedReason
        if self.resume is None:
            self.f = tao.computeObjectiveGradient(x, g)
            work.last.set(0.0)
        else:
            self._restore(tao, self.resume)
        while True:
            tell(tao, self.iteration, self.f, g.norm(), self.step)
            if tao.getConvergedReason():
                return
            f = refreshed(tao, self.iteration, self.f, x, g)
            tao.computeHessian(x, hessian)
            if not self.scale:
                self.scale = curvature_along(hessian, g, work.product)
                self.damping = self.first * self.scale
            trial = None
            for _ in range(ATTEMPTS):
                self.damping = max(self.damping, self.least * self.scale)
                trial = self._attempt(tao, x, f, g, hessian, work)
                if trial is not None:
                    break
                self.damping *= FAILED
                work.last.set(0.0)
            if trial is None:
                tao.setConvergedReason(reasons.DIVERGED_TR_REDUCTION)
                return
            self.f, self.step = trial, work.step.norm()
            work.step.copy(work.last)
            work.trial.copy(x)
            work.trial_gradient.copy(g)
            self.iteration += 1

    def state(self, tao: PETSc.TAO) -> State:
        """Return all that the next iteration depends on."""
        vectors = {"x": tao.getSolution(), "g": tao.getGradient()[0], "last": self._last}
        return {
            **{name: getattr(self, name) for name in _NUMBERS},
            **{name: block_of(vector) for name, vector in vectors.items()},
            **solver_state(tao),
        }

    def _restore(self, tao: PETSc.TAO, known: Known) -> None:
        for name in _NUMBERS:
            setattr(self, name, known.get(name))
        x, g = tao.getSolution(), tao.getGradient()[0]
        for name, vector in {"x": x, "g": g, "last": self._last}.items():
            restore_vector(vector, known[name])
        restore_solver(tao, known, x)

    def _attempt(
        self, tao: PETSc.TAO, x: PETSc.Vec, f: float, g: PETSc.Vec, hessian: PETSc.Mat, work: _Vectors
    ) -> float | None:
        """Solve for a step with the present damping, and return the loss after it; None if it does not fall.

        The step, the point and its gradient are left in ``work``.
        """
        model = self._solve_for_step(tao, g, hessian, work)
        slope = g.dot(work.step)
        self.radius = work.step.norm()
        if not (model < 0 and slope < 0 and math.isfinite(self.radius)):
            return None
        work.trial.waxpy(1.0, work.step, x)
        value = tao.computeObjectiveGradient(work.trial, work.trial_gradient)
        ratio = (value - f) / model
        if ratio > GOOD:
            self.damping /= self.decrease
        elif not ratio >= POOR:
            self.damping *= self.increase
        if self._better(value, f, SUFFICIENT * slope, g, work):
            return float(value)
        for halving in range(1, BACKTRACKS + 1):
            part = 0.5**halving
            work.trial.waxpy(part, work.step, x)
            value = tao.computeObjective(work.trial)
            if value <= f + SUFFICIENT * part * slope:
                value = tao.computeObjectiveGradient(work.trial, work.trial_gradient)
                if self._better(value, f, SUFFICIENT * part * slope, g, work):
                    work.step.scale(part)
                    return float(value)
        return None

    def _better(self, value: float, f: float, least: float, g: PETSc.Vec, work: _Vectors) -> bool:
        """Say whether the loss has fallen enough, or, where rounding hides a decrease of its size, at least the gradient."""
        if abs(least) > ROUNDING * abs(f):
            return value <= f + least
        return value <= f + ROUNDING * abs(f) and work.trial_gradient.norm() < g.norm()

    def _solve_for_step(self, tao: PETSc.TAO, g: PETSc.Vec, hessian: PETSc.Mat, work: _Vectors) -> float:
        """Solve (B + λ I) s = -g inexactly from the best multiple of the last step; return the model's change g·s + s·B s / 2."""
        context = hessian.getPythonContext()
        context.unshift()
        context.shift(hessian, self.damping)
        ksp = tao.getKSP()
        ksp.setOperators(hessian, hessian)
        ksp.setUp()
        right, model = work.right, 0.0
        g.copy(right)
        right.scale(-1.0)
        multiple = 0.0
        rtol, *others = ksp.getTolerances()
        asked = rtol
        if self.reuse and work.last.norm() > 0:
            hessian.mult(work.last, work.product)
            slope, curvature = g.dot(work.last), work.last.dot(work.product)
            if slope < 0 < curvature:
                multiple = -slope / curvature
                model = multiple * slope + 0.5 * multiple * multiple * curvature
                # The inner accuracy is asked for relative to the gradient, not to what the last step leaves of it.
                whole = self._natural_norm(ksp, right, work)
                right.axpy(-multiple, work.product)
                left = self._natural_norm(ksp, right, work)
                asked = min(0.9, rtol * whole / left) if left > 0 else 0.9
        ksp.setTolerances(asked, *others)
        ksp.setConvergenceTest(Progress(right, -model, self.overhead, self.enough))
        ksp.solve(right, work.step)
        ksp.setTolerances(rtol, *others)
        # A conjugate-gradient residual is orthogonal to the solution: the model falls by half their product.
        model -= 0.5 * right.dot(work.step)
        work.step.axpy(multiple, work.last)
        return float(model - 0.5 * self.damping * work.step.dot(work.step))

    def _natural_norm(self, ksp: PETSc.KSP, r: PETSc.Vec, work: _Vectors) -> float:
        ksp.getPC().apply(r, work.trial)
        return math.sqrt(max(r.dot(work.trial), 0.0))


class Progress:
    """Ends conjugate gradients that have met their tolerance, or whose next product pays less than a new iterate.

    An iterate costs what comes before its first product (gradient, factors) and its products. Products are worth their cost
    as long as the model's decrease by the last ones, per product, is more than its whole decrease over the whole cost: the
    marginal value theorem (Charnov 1976), which maximises the decrease over the cost.

    Parameters
    ----------
    right
        Right-hand side.
    before
        The model's decrease of the initial guess.
    overhead
        Cost of an iterate besides its products, in products; 0: products are always worth it.
    enough
        See `LevenbergMarquardt`.
    """

    def __init__(
        self, right: PETSc.Vec, before: float, overhead: float, enough: Callable[[], bool] = lambda: False
    ) -> None:
        self.right, self.overhead, self.enough = right, overhead, enough
        self.decreases = [before]
        self.first = 0.0

    def __call__(self, ksp: PETSc.KSP, iteration: int, norm: float) -> int | None:
        """Return the reason to end, None to go on. Collective on the KSP."""
        reasons = PETSc.KSP.ConvergedReason
        rtol, atol, _, most = ksp.getTolerances()
        if iteration == 0:
            self.first = norm
            return reasons.CONVERGED_ATOL if norm <= atol else None
        self.decreases.append(self.decreases[0] + 0.5 * self.right.dot(ksp.getSolution()))
        if not math.isfinite(norm):
            return reasons.DIVERGED_NANORINF
        if norm <= max(rtol * self.first, atol):
            return reasons.CONVERGED_RTOL
        if self.enough():
            return reasons.CONVERGED_STEP_LENGTH
        last = self.decreases[-1]
        if self.overhead and iteration > WINDOW:
            rate = (last - self.decreases[iteration - WINDOW]) / WINDOW
            if rate < last / (self.overhead + iteration):
                return reasons.CONVERGED_STEP_LENGTH
        return reasons.DIVERGED_MAX_IT if iteration >= most else None


class _Vectors:
    """Work vectors of one minimisation."""

    def __init__(self, like: PETSc.Vec) -> None:
        made = [like.duplicate() for _ in range(6)]
        self.step, self.last, self.trial, self.trial_gradient, self.right, self.product = made
        self._made = made

    def destroy(self) -> None:
        for vector in self._made:
            vector.destroy()
