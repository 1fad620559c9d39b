"""Newton's method with the true Hessian, inexact solves and a line search, as a TAO type: ``-tao_type newton``.

Nocedal and Wright 2006 ("Numerical Optimization"), algorithms 7.1 and 7.2: conjugate gradients solve H s = -g as far as a
forcing term asks for (Eisenstat and Walker 1996, choice 2: quadratic convergence near a minimum), or until they meet negative
curvature or the edge of a trust region, where they follow their direction to that edge (Steihaug 1983; PETSc's stcg). The
region keeps them from going far where curvature is negative or next to none; how far the step goes, TAO's line search decides
(Moré-Thuente, unless ``-tao_ls_type`` says otherwise). Where that finds no decrease, or an inner solver of another type no
descent direction, H is shifted by multiples of the identity (section 3.4), and at last the gradient is followed.
"""

from __future__ import annotations

import math

from hpcdeq.errors import OptionError
from hpcdeq.optim.iterating import ROUNDING, options_of, refreshed, restore_solver, solver_state, tell
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.options import Options, number
from hpcdeq.petsc.vectors import block_of, restore_vector
from hpcdeq.state import Known, State

SHIFTS = (0.0, 1e-2, 1.0)  # of the Hessian, over ‖H g‖ / ‖g‖, one after the other until there is a step
FAILED = 0.25  # factor on the radius after each of them without one
# Ratios of the loss's decrease to the model's, and what the radius is multiplied with beyond them. Trust regions without a
# line search take 0.25 and 0.75; here those made the radius shrink away where the loss has kinks (relu).
POOR, GOOD, BEST = 0.1, 0.5, 0.9
SHRINK, GROW, LEAP = 0.5, 2.0, 4.0
FORCING, TIGHTEST = 0.9, 1e-6  # factor on (‖g‖ / ‖the last g‖)², and the least that is asked for
REAL = (
    1e-6  # of the loss: what a line search that was halted must have gained, or it may be rounding in single precision
)
_REGIONS = (PETSc.KSP.Type.STCG, PETSc.KSP.Type.NASH, PETSc.KSP.Type.GLTR)  # types that heed a trust region
_NUMBERS = ("f", "iteration", "length", "reach", "before")  # of its state


class Newton:
    """Context of a TAO of python type. Collective on the TAO, every method.

    Options: those of the inner solver (``-tao_ksp_rtol`` is the most that the forcing term allows; stcg, nash and gltr of
    ``-tao_ksp_type`` heed the trust region), of its preconditioner and of the line search; ``-tao_newton_radius`` (1), the first
    radius over the length of the preconditioned gradient.

    Attributes
    ----------
    reach
        Radius of the trust region in the norm of the preconditioner, which is not that of the weights; 0 before the first.
    """

    def __init__(self) -> None:
        self.first = 1.0
        self.resume: Known | None = None
        self._rtol = 0.0
        # Between two iterations: the loss, iterations, the last step length, the radius, ‖g‖ an iteration before.
        self.f, self.iteration, self.length, self.reach, self.before = 0.0, 0, 0.0, 0.0, 0.0

    def setFromOptions(self, tao: PETSc.TAO) -> None:  # noqa: N802 (petsc4py's name)
        """Read the options."""
        options = options_of(tao)
        self.first = float(number(options, "tao_newton_radius", self.first))
        if not self.first > 0:
            raise OptionError(f"-tao_newton_radius {self.first:g}: give a number above 0")
        ksp = tao.getKSP()
        if ksp.getType() is None:
            ksp.setType(PETSc.KSP.Type.STCG)
        # petsc4py cannot set a radius. This one stays, and the right-hand side is -g / reach instead.
        with Options(ksp.getOptionsPrefix(), {"ksp_cg_radius": 1.0}).inserted():
            ksp.setFromOptions()

    def solve(self, tao: PETSc.TAO) -> None:
        """Minimise."""
        x, g = tao.getSolution(), tao.getGradient()[0]
        work = [x.duplicate() for _ in range(4)]
        self._rtol, *others = tao.getKSP().getTolerances()
        try:
            self._iterate(tao, x, g, work)
        finally:
            tao.getKSP().setTolerances(self._rtol, *others)
            for vector in work:
                vector.destroy()

    def _iterate(self, tao: PETSc.TAO, x: PETSc.Vec, g: PETSc.Vec, work: list[PETSc.Vec]) -> None:
        if self.resume is None:
            self.f = tao.computeObjectiveGradient(x, g)
        else:
            self._restore(tao, self.resume)
        while True:
            norm = g.norm()
            tell(tao, self.iteration, self.f, norm, self.length)
            if tao.getConvergedReason():
                return
            f = refreshed(tao, self.iteration, self.f, x, g)
            tao.computeHessian(x, tao.getHessian()[0])
            value = self._step(tao, x, f, g, work)
            if value is None:
                tao.setConvergedReason(PETSc.TAO.ConvergedReason.DIVERGED_LS_FAILURE)
                return
            self.f, self.before = value, norm
            self.iteration += 1

    def state(self, tao: PETSc.TAO) -> State:
        """Return all that the next iteration depends on."""
        return {
            **{name: getattr(self, name) for name in _NUMBERS},
            "x": block_of(tao.getSolution()),
            "g": block_of(tao.getGradient()[0]),
            **solver_state(tao),
        }

    def _restore(self, tao: PETSc.TAO, known: Known) -> None:
        for name in _NUMBERS:
            setattr(self, name, known[name])
        x, g = tao.getSolution(), tao.getGradient()[0]
        restore_vector(x, known["x"])
        restore_vector(g, known["g"])
        restore_solver(tao, known, x)

    def _step(self, tao: PETSc.TAO, x: PETSc.Vec, f: float, g: PETSc.Vec, work: list[PETSc.Vec]) -> float | None:
        """Move x to a point with a smaller loss, g along with it, and return that loss; None if none is found."""
        direction, scratch, old_x, old_g = work
        x.copy(old_x)
        g.copy(old_g)
        hessian, scale = tao.getHessian()[0], 0.0
        for multiple in SHIFTS:
            if multiple:
                hessian.getPythonContext().unshift()
                if not scale:
                    hessian.mult(g, scratch)
                    scale = scratch.norm() / g.norm()
                hessian.getPythonContext().shift(hessian, multiple * scale)
            self._direct(tao, g, hessian, scratch, direction)
            slope = g.dot(direction)
            value = self._search(tao, x, f, g, direction, old_x, old_g) if slope < 0 else None
            if value is not None:
                self._adapt(tao, value - f, slope)
                return value
            self.reach *= FAILED
        g.copy(direction)
        direction.scale(-1 / max(1.0, g.norm()))
        return self._search(tao, x, f, g, direction, old_x, old_g)

    def _direct(self, tao: PETSc.TAO, g: PETSc.Vec, hessian: PETSc.Mat, right: PETSc.Vec, direction: PETSc.Vec) -> None:
        """Solve H s = -g inexactly within the trust region."""
        ksp = tao.getKSP()
        ksp.setOperators(hessian, hessian)
        ksp.setUp()
        if not self.reach:
            ksp.getPC().apply(g, right)
            length = math.sqrt(max(g.dot(right), 0.0))
            self.reach = self.first * (length if 0 < length < math.inf else g.norm())
        g.copy(right)
        right.scale(-1.0 / self.reach)
        forcing = self._rtol
        if self.before:
            fall = min(1.0, g.norm() / self.before)
            forcing = min(forcing, max(TIGHTEST, FORCING * fall * fall))
        ksp.setTolerances(rtol=forcing)
        ksp.solve(right, direction)
        direction.scale(self.reach)

    def _search(
        self,
        tao: PETSc.TAO,
        x: PETSc.Vec,
        f: float,
        g: PETSc.Vec,
        direction: PETSc.Vec,
        old_x: PETSc.Vec,
        old_g: PETSc.Vec,
    ) -> float | None:
        """Go along a direction and return the loss there; back, and None, if it has not fallen."""
        search, searches = tao.getLineSearch(), PETSc.TAOLineSearch.ConvergedReason
        search.setInitialStepLength(1.0)
        value, self.length, ended = search.apply(x, g, direction)
        # Near the minimum rounding hides the decrease of the loss, and the gradient still tells.
        success = ended in (searches.SUCCESS, searches.SUCCESS_USER)
        level = success and value <= f + ROUNDING * abs(f) and g.norm() < old_g.norm()
        gained = value < f and (success or f - value > REAL * abs(f))
        if math.isfinite(value) and (gained or level):
            return float(value)
        old_x.copy(x)
        old_g.copy(g)
        return None

    def _adapt(self, tao: PETSc.TAO, change: float, slope: float) -> None:
        """Let the radius follow the step that was taken, and how well the model foretold the change of the loss by it."""
        ksp, reasons = tao.getKSP(), PETSc.KSP.ConvergedReason
        if ksp.getType() not in _REGIONS:
            return
        edge = ksp.getConvergedReason() in (reasons.CONVERGED_NEG_CURVE, reasons.CONVERGED_STEP_LENGTH)
        # s·H s / 2 is what the model's value has besides the slope.
        bend = self.reach * self.reach * ksp.getCGObjectiveValue() - slope
        model = self.length * (slope + self.length * bend)
        ratio = change / model if model < 0 else 0.0
        # A step that was cut back begins a new radius, and may still make it grow: the line search is there to cut.
        if edge:
            self.reach *= self.length
        if ratio < POOR:
            self.reach *= SHRINK
        elif edge and ratio > GOOD:
            self.reach *= LEAP if ratio > BEST else GROW
