"""What our own TAO types share: their options, telling TAO of an iterate, objectives that change between iterates."""

from __future__ import annotations

import math
from typing import Any, Protocol

from hpcdeq.petsc import PETSc
from hpcdeq.state import Known, State

ROUNDING = 1e-14  # relative error of a loss


def options_of(tao: PETSc.TAO) -> PETSc.Options:
    """Return the options of a TAO of python type, whose inner solver gets its prefix: PETSc leaves it without.

    Collective on the TAO.
    """
    prefix = tao.getOptionsPrefix() or ""
    tao.getKSP().setOptionsPrefix(prefix + "tao_")
    return PETSc.Options(prefix)


class Resumable(Protocol):
    """A TAO type that knows its state between two iterations.

    Collective on the TAO, every method.

    Attributes
    ----------
    resume
        A state to begin with; None: from the TAO's solution.
    """

    resume: Known | None

    def state(self, tao: PETSc.TAO) -> State:
        """Return all that the next iteration depends on, but for the TAO's objective. Collective on the TAO."""
        ...


def solver_state(tao: PETSc.TAO) -> State:
    """Return the states of the Hessian's context and of the preconditioner. Collective on the TAO."""
    context = _own_preconditioner(tao)
    return {
        "curvature": tao.getHessian()[0].getPythonContext().state(),
        "preconditioner": {} if context is None else context.state(),
    }


def restore_solver(tao: PETSc.TAO, known: Known, like: PETSc.Vec) -> None:
    """Go on from the states of the Hessian's context and of the preconditioner. Collective on the TAO."""
    hessian = tao.getHessian()[0]
    hessian.getPythonContext().restore(known["curvature"], like)
    context = _own_preconditioner(tao)
    if context is not None and "preconditioner" in known:
        tao.getKSP().setOperators(hessian, hessian)
        context.restore(tao.getKSP().getPC(), known["preconditioner"])
        tao.getKSP().setUp()


def _own_preconditioner(tao: PETSc.TAO) -> Any:
    """Return the context of a preconditioner of ours; None for PETSc's."""
    pc = tao.getKSP().getPC()
    return pc.getPythonContext() if pc.getType() == PETSc.PC.Type.PYTHON else None


def tell(tao: PETSc.TAO, iteration: int, f: float, gradient_norm: float, step: float) -> None:
    """Tell TAO of an iterate: its monitors, and its tests of convergence. Collective on the TAO."""
    tao.setIterationNumber(iteration)
    tao.monitor(iteration, f, gradient_norm, 0.0, step)
    if tao.getConvergedReason():
        return
    if tao.getHessian()[0].getPythonContext().batch is None:
        tao.setConvergedReason(tao.checkConverged())
    elif iteration >= tao.getMaximumIterations():  # what is stationary for some of the samples is not for all
        tao.setConvergedReason(PETSc.TAO.ConvergedReason.DIVERGED_MAXITS)


def refreshed(tao: PETSc.TAO, iteration: int, f: float, x: PETSc.Vec, g: PETSc.Vec) -> float:
    """Call the TAO's update of an iteration, which may change the objective, and return the loss, with its gradient in g.

    Collective on the TAO.
    """
    update = tao.getUpdate()
    if update is None:
        return f
    call, args, keywords = update
    call(tao, iteration, *args, **keywords)
    return float(tao.computeObjectiveGradient(x, g))


def curvature_along(hessian: PETSc.Mat, g: PETSc.Vec, work: PETSc.Vec) -> float:
    """Return g·B g / g·g, 1 where that is no positive number. Collective on the matrix."""
    hessian.mult(g, work)
    curvature, square = g.dot(work), g.dot(g)
    return curvature / square if curvature > 0 and math.isfinite(curvature) else 1.0
