"""Run a SNES or a KSP, keep a record of how it ended, and explain a failure."""

from __future__ import annotations

from dataclasses import dataclass

from hpcdeq.petsc import PETSc
from hpcdeq.petsc.python_types import full_name, short_name

# What usually helps, by PETSc's name of the reason. Names, not numbers: releases have renumbered and renamed reasons.
_REMEDIES = {
    "DIVERGED_MAX_IT": "allow more iterations (-{p}snes_max_it), or try -{p}snes_type newtonls",
    "DIVERGED_DTOL": "the map expands here; try -{p}snes_type newtonls, or make the cell more contractive",
    "KSP DIVERGED_DTOL": "the residual grows; try another -{p}ksp_type (gmres) or -{p}pc_type",
    "DIVERGED_FUNCTION_NANORINF": "the cell returned NaN or Inf; check its input and weights",
    "DIVERGED_FNORM_NAN": "the cell returned NaN or Inf; check its input and weights",
    "DIVERGED_LINE_SEARCH": "try -{p}snes_linesearch_type basic, or another -{p}snes_type",
    "DIVERGED_LINEAR_SOLVE": "the inner linear solve failed; try -{p}ksp_max_it 1000 or -{p}ksp_gmres_restart 100",
    "DIVERGED_ITS": "allow more iterations (-{p}ksp_max_it), or a longer -{p}ksp_gmres_restart",
    "DIVERGED_BREAKDOWN": "try another -{p}ksp_type (gmres)",
    "DIVERGED_BREAKDOWN_BICG": "try another -{p}ksp_type (gmres)",
    "DIVERGED_NANORINF": "the products hold NaN or Inf; check the cell's derivatives at the fixed point",
}


@dataclass(frozen=True)
class SolveRecord:
    """How a solve ended.

    Attributes
    ----------
    kind
        ``SNES`` or ``KSP``.
    solver
        PETSc's type: anderson, gmres, …
    prefix
        Options prefix of the solver.
    reason
        PETSc's own name of the reason: CONVERGED_FNORM_ABS, DIVERGED_MAX_IT, …
    converged
        Whether the reason is a success.
    iterations
        Iterations of the solver.
    residual_norm
        The solver's own last residual norm (of the whole vector).
    """

    kind: str
    solver: str
    prefix: str
    reason: str
    converged: bool
    iterations: int
    residual_norm: float

    def remedy(self) -> str:
        """Return what to type next after a failure, with this solver's prefix. Not collective."""
        usual = f"look at the history: -{{p}}{self.kind.lower()}_monitor -{{p}}{self.kind.lower()}_converged_reason"
        told = _REMEDIES.get(f"{self.kind} {self.reason}") or _REMEDIES.get(self.reason, usual)
        return told.format(p=self.prefix)


def reason_name(reasons: type, code: int) -> str:
    """Return PETSc's name of a reason.

    Not collective.

    Parameters
    ----------
    reasons
        The class that holds the names: ``PETSc.SNES.ConvergedReason`` and its like.
    code
        The number that the solver returned.
    """
    names = [name for name, value in vars(reasons).items() if value == code and name.isupper()]
    # Some numbers have two names, an alias beside the one that PETSc prints: the longer one says more.
    return max(names, key=lambda name: (name.startswith(("CONVERGED_", "DIVERGED_")), len(name)), default=str(code))


def type_name(solver: PETSc.SNES | PETSc.KSP) -> str:
    """Return the type of a solver, of a python type its short name. Not collective."""
    name = solver.getType()
    return (short_name(solver.getPythonType()) or name) if name == "python" else name


def set_type(solver: PETSc.SNES | PETSc.KSP | PETSc.PC, chooser: str, kind: str) -> None:
    """Set a solver's type by PETSc's name, or by the short name of a python type.

    Not collective.

    Parameters
    ----------
    solver
        SNES, KSP or PC.
    chooser
        ``snes_type``, ``ksp_type`` or ``pc_type``.
    kind
        The name.
    """
    place = full_name(chooser, kind)
    solver.setType(kind if place is None else "python")
    if place is not None:
        solver.setPythonType(place)


def run_snes(snes: PETSc.SNES, b: PETSc.Vec | None, x: PETSc.Vec) -> SolveRecord:
    """Solve and return the record; what a callback raised comes out as it was raised.

    Collective on the solver.
    """
    reraise(lambda: snes.solve(b, x))
    code = snes.getConvergedReason()
    return SolveRecord(
        "SNES",
        type_name(snes),
        snes.getOptionsPrefix() or "",
        reason_name(PETSc.SNES.ConvergedReason, code),
        code > 0,
        snes.getIterationNumber(),
        snes.getFunctionNorm(),
    )


def run_ksp(ksp: PETSc.KSP, b: PETSc.Vec, x: PETSc.Vec, *, transpose: bool = False) -> SolveRecord:
    """Solve A x = b, or Aᵀ x = b, and return the record; what a callback raised comes out as it was raised.

    Collective on the solver.
    """
    reraise(lambda: ksp.solveTranspose(b, x) if transpose else ksp.solve(b, x))
    code = ksp.getConvergedReason()
    return SolveRecord(
        "KSP",
        type_name(ksp),
        ksp.getOptionsPrefix() or "",
        # petsc4py knows this reason by two names, PETSc by one.
        reason_name(PETSc.KSP.ConvergedReason, code).replace("DIVERGED_MAX_IT", "DIVERGED_ITS"),
        code > 0,
        ksp.getIterationNumber(),
        ksp.getResidualNorm(),
    )


def reraise(action) -> None:
    """Run an action of PETSc's and raise a callback's own exception in place of PETSc's wrapper.

    As collective as the action.
    """
    try:
        action()
    except PETSc.Error as error:
        cause = error.__cause__
        while isinstance(cause, PETSc.Error) and cause.__cause__ is not None:
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
