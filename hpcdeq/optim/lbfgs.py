"""L-BFGS whose initial matrix is a preconditioner, as a TAO type: ``-tao_type lbfgs``.

Liu and Nocedal 1989, the memory in its compact form (`hpcdeq.optim.limited_memory`), with TAO's line searches (Moré-Thuente,
which meets the strong Wolfe conditions, unless ``-tao_ls_type`` says otherwise). The initial inverse is what ``-tao_pc_type``
names: Kronecker factors of the Gauss-Newton matrix know the curvature of every layer, and the pairs correct them along the
steps taken. TAO's own lmvm takes such a matrix too, but loses it with the first line search that fails (its fallback clears
it), and no viewer can save its memory.
"""

from __future__ import annotations

import math

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
from hpcdeq.optim.limited_memory import LimitedMemory
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.options import number
from hpcdeq.petsc.vectors import block_of, restore_vector
from hpcdeq.state import Known, State

LONGEST = 0.1  # of ‖x‖: longer steps leave the region where anything is known of the loss
INCREASE, DECREASE = 10.0, 4.0  # of the damping, when a line search fails and with every renewal
KEPT = 5  # pairs that go on when the preconditioner is renewed, which has to be applied to each of them
_NUMBERS = ("f", "iteration", "since", "length", "failed", "damping")  # of its state
EARLY = (2, 5, 10)  # iterations at which the preconditioner is renewed, too: weights change most in the beginning


class LBFGS:
    """Context of a TAO of python type. Collective on the TAO, every method.

    Options: ``-tao_lbfgs_history`` (20), pairs kept; ``-tao_lbfgs_renew`` (20), iterations after which the preconditioner is
    renewed (and early ones); ``-tao_lbfgs_damping`` (1e-2), damping of the first, and of those after a line search that failed,
    over the curvature along the gradient.
    """

    def __init__(self) -> None:
        self.history, self.renew = 20, 20
        self.first = 1e-2
        self.damping = 0.0
        self.memory = LimitedMemory(self.history)
        self.resume: Known | None = None
        # Between two iterations: the loss, iterations, those since the preconditioner was begun anew, the last step length,
        # whether a line search has failed since the preconditioner was renewed.
        self.f, self.iteration, self.since, self.length, self.failed = 0.0, 0, 0, 0.0, False

    def setFromOptions(self, tao: PETSc.TAO) -> None:  # noqa: N802 (petsc4py's name)
        """Read the options."""
        options = options_of(tao)
        self.history = int(number(options, "tao_lbfgs_history", self.history))
        self.renew = int(number(options, "tao_lbfgs_renew", self.renew))
        self.first = float(number(options, "tao_lbfgs_damping", self.first))
        self.memory.history = self.history
        if self.history < 1 or self.renew < 1 or not self.first > 0:
            raise OptionError("-tao_lbfgs_history and -tao_lbfgs_renew are 1 or more, -tao_lbfgs_damping is above 0")

    def solve(self, tao: PETSc.TAO) -> None:
        """Minimise."""
        x, g = tao.getSolution(), tao.getGradient()[0]
        hessian = tao.getHessian()[0]
        work = [x.duplicate() for _ in range(5)]
        self._hg = work[3]  # H₀ g
        try:
            self._iterate(tao, x, g, hessian, work)
        finally:
            self.memory.clear()
            for vector in work:
                vector.destroy()

    def _iterate(self, tao: PETSc.TAO, x: PETSc.Vec, g: PETSc.Vec, hessian: PETSc.Mat, work: list[PETSc.Vec]) -> None:
        direction, old_x, old_g, hg, old_hg = work
        search, searches = tao.getLineSearch(), PETSc.TAOLineSearch.ConvergedReason
        if self.resume is None:
            self.f = tao.computeObjectiveGradient(x, g)
        else:
            self._restore(tao, self.resume)
        tell(tao, self.iteration, self.f, g.norm(), self.length)
        while not tao.getConvergedReason():
            f = refreshed(tao, self.iteration, self.f, x, g)
            if self.since in EARLY or self.since % self.renew == 0:
                self._renew(tao, x, g, hessian, hg, failed=self.failed)
                self._initial(tao, g, hg)
                self.failed = False
            elif tao.getUpdate() is not None:  # the gradient is of other samples than the last
                self._initial(tao, g, hg)
            self._direct(tao, g, hg, direction)
            longest = LONGEST * x.norm()
            if longest > 0 and direction.norm() > longest:
                direction.scale(longest / direction.norm())
            x.copy(old_x)
            g.copy(old_g)
            search.setInitialStepLength(1.0)
            value, self.length, ended = search.apply(x, g, direction)
            success = ended in (searches.SUCCESS, searches.SUCCESS_USER)
            # Near the minimum rounding hides the decrease of the loss, and the gradient still tells.
            level = success and value <= f + ROUNDING * abs(f) and g.norm() < old_g.norm()
            if not (math.isfinite(value) and (value < f or level)):
                old_x.copy(x)
                old_g.copy(g)
                if not self.memory.pairs and self.since == 0:
                    tao.setConvergedReason(PETSc.TAO.ConvergedReason.DIVERGED_LS_FAILURE)
                    return
                # Once more from the preconditioner alone, renewed and damped more.
                self.memory.clear()
                self.since, self.failed = 0, True
                continue
            self.f = value
            self.iteration, self.since = self.iteration + 1, self.since + 1
            hg.copy(old_hg)
            self._initial(tao, g, hg)
            self.memory.add(*(new - old for new, old in ((x, old_x), (g, old_g), (hg, old_hg))))
            tell(tao, self.iteration, self.f, g.norm(), self.length)

    def state(self, tao: PETSc.TAO) -> State:
        """Return all that the next iteration depends on."""
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        vectors = {"x": tao.getSolution(), "g": tao.getGradient()[0], "hg": self._hg}
        return {
            **numbers,
            **{name: block_of(vector) for name, vector in vectors.items()},
            "memory": self.memory.state(),
            **solver_state(tao),
        }

    def _restore(self, tao: PETSc.TAO, known: Known) -> None:
        for name in _NUMBERS:
            setattr(self, name, known[name])
        x, g = tao.getSolution(), tao.getGradient()[0]
        for name, vector in {"x": x, "g": g, "hg": self._hg}.items():
            restore_vector(vector, known[name])
        self.memory.restore(known["memory"], x)
        restore_solver(tao, known, x)

    def _renew(
        self, tao: PETSc.TAO, x: PETSc.Vec, g: PETSc.Vec, hessian: PETSc.Mat, scratch: PETSc.Vec, *, failed: bool
    ) -> None:
        """Move the preconditioner to the present weights; ``failed``: because a line search did."""
        if _alone(tao):
            return
        tao.computeHessian(x, hessian)
        # At first little is known, and steps are long: much damping, which goes as the factors come to fit.
        if failed:
            self.damping = max(INCREASE * self.damping, self.first * curvature_along(hessian, g, scratch))
        self.damping = self.damping / DECREASE or self.first * curvature_along(hessian, g, scratch)
        hessian.getPythonContext().shift(hessian, self.damping)
        ksp = tao.getKSP()
        ksp.setOperators(hessian, hessian)
        ksp.setUp()
        self.memory.renew(KEPT, lambda a, b: self._initial(tao, a, b))

    def _direct(self, tao: PETSc.TAO, g: PETSc.Vec, hg: PETSc.Vec, direction: PETSc.Vec) -> None:
        """Set the direction to -H g, downhill."""
        self.memory.apply(g, hg, direction)
        if not g.dot(direction) > 0:
            self.memory.clear()
            hg.copy(direction)
        first = _alone(tao) and not self.memory.pairs
        direction.scale(-1 / max(1.0, direction.norm()) if first else -1.0)

    def _initial(self, tao: PETSc.TAO, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Set y = H₀ x."""
        if _alone(tao):
            x.copy(y)
        else:
            tao.getKSP().getPC().apply(x, y)


def _alone(tao: PETSc.TAO) -> bool:
    return bool(tao.getKSP().getPC().getType() == PETSc.PC.Type.NONE)
