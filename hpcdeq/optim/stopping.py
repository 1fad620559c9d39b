"""Why a minimisation ended, in words, and what to try next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hpcdeq.deq.forward import TOLERANCES
from hpcdeq.optim.base import BUDGET, CONVERGED, DIVERGED, Recorder
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.options import number

_BUDGETS = {
    "DIVERGED_MAXITS": "the iterations are used up; --max-iterations allows more",
    "DIVERGED_MAXFCN": "the evaluations are used up; -tao_max_funcs allows more",
    "DIVERGED_USER": "the time is up; --max-seconds allows more",
}
_TOLERANCES = {
    "CONVERGED_GATOL": "the gradient norm is below -tao_gatol",
    "CONVERGED_GRTOL": "the gradient norm over the loss is below -tao_grtol",
    "CONVERGED_GTTOL": "the gradient norm has fallen by the factor -tao_gttol",
    "CONVERGED_MINF": "the loss is below -tao_fmin",
}
# What ends where no decrease was found, whatever PETSc calls it.
_NO_DECREASE = {
    "DIVERGED_LS_FAILURE": "the line search found no decrease",
    "DIVERGED_TR_REDUCTION": "the trust region shrank without finding a decrease",
    "CONVERGED_STEPTOL": "the step or the trust radius fell below -tao_steptol",
}
# The last change of the loss is at the limit of what can be told where it is below so many roundings of the loss, or below
# so many times the tolerance of the fixed points.
NEAR_ROUNDING, NEAR_TOLERANCE = 1e3, 1e1
# A run stalls that changed the loss by less than this part of it in so many iterations.
STALLED, PATIENCE = 1e-4, 10
# A gradient is small, and a loss is large, against the first ones.
SMALL_GRADIENT, LARGE_LOSS = 1e-3, 0.1


@dataclass(frozen=True)
class Ending:
    """What is known of a minimisation at its end.

    Attributes
    ----------
    reason
        PETSc's own name of the reason.
    losses, gradient_norms
        Of all iterates, in order.
    dtype
        Precision of the model.
    tolerance
        Relative tolerance of its fixed points, the largest of its layers; None without any.
    unreached, infinite
        Trial points without a fixed point, and with a loss or gradient that is NaN or infinite.
    gatol
        What -tao_gatol was; None if that is not known.
    """

    reason: str
    losses: Sequence[float]
    gradient_norms: Sequence[float]
    dtype: torch.dtype = torch.float64
    tolerance: float | None = None
    unreached: int = 0
    infinite: int = 0
    gatol: float | None = None


def ending_of(
    recorder: Recorder, reason: str, *, unreached: int = 0, infinite: int = 0, gatol: float | None = None
) -> Ending:
    """Return what a recorder knows of the end of its run. Not collective; the same on all ranks."""
    losses = [entry[2] for entry in recorder.history]
    gradient_norms = [entry[3] for entry in recorder.history]
    dtype = recorder.problem.layout.dtype
    tolerances = []
    for layer in recorder.problem.guidance.layers.values():
        given = layer.options.given.get("snes_rtol", TOLERANCES.get(dtype, TOLERANCES[torch.float32])[0])
        tolerances.append(number(PETSc.Options(layer.options.prefix), "snes_rtol", float(given)))
    return Ending(reason, losses, gradient_norms, dtype, max(tolerances, default=None), unreached, infinite, gatol)


def status_of(ending: Ending) -> str:
    """Return ``converged``, ``budget`` or ``diverged``: PETSc's verdict.

    Not collective. A step that got too short counts as convergence only where the gradient is small against the first one.
    """
    if ending.reason in _BUDGETS:
        return BUDGET
    if ending.reason == "CONVERGED_STEPTOL" and not _gradient_is_small(ending):
        return DIVERGED
    return CONVERGED if ending.reason.startswith("CONVERGED") else DIVERGED


def words(ending: Ending) -> str:
    """Return why the run ended and what to try next, in two lines of text at most. Not collective."""
    reason = ending.reason
    if reason in _BUDGETS:
        return _BUDGETS[reason] + _stall(ending)
    if reason in _TOLERANCES:
        return _begun(ending) or _other_objective(ending) or _TOLERANCES[reason] + _fit(ending)
    if reason in _NO_DECREASE:
        return f"{_NO_DECREASE[reason]}: {_obstacle(ending)}"
    if reason == "DIVERGED_NAN":
        return (
            "the method stepped to where loss or gradient cannot be computed; the weights before that are the result."
            f" {_refused(ending) or 'Try --optimizer trgn, which survives such points'}"
        )
    return "see PETSc's manual page of TaoConvergedReason"


def _begun(ending: Ending) -> str:
    """Say that the run ended where it began; empty if it did not."""
    if len(ending.losses) > 1 or ending.reason == "CONVERGED_MINF":
        return ""
    norm = ending.gradient_norms[-1]
    if norm == 0.0 and ending.losses[-1] == 0.0:
        return "loss and gradient are zero at the initial weights: nothing is left to learn"
    if norm == 0.0:
        return (
            "the gradient is zero at the initial weights: they are a stationary point, and nothing was learnt. Change them"
            " (--seed), or look for what cuts the loss off from the weights"
        )
    return (
        f"nothing was done: at the initial weights, with a gradient of norm {norm:.1e}, {_TOLERANCES[ending.reason]} already."
        f" Give a smaller {_TOLERANCES[ending.reason].split()[-1]}, or scale the targets"
    )


def _other_objective(ending: Ending) -> str:
    """Say that the method's gradient is not the loss's; empty if it is."""
    norm = ending.gradient_norms[-1]
    if ending.reason != "CONVERGED_GATOL" or ending.gatol is None or norm <= 1.01 * ending.gatol:
        return ""
    return (
        f"the gradient norm of the method's own objective is below -tao_gatol, that of the loss is {norm:.1e}. Try a smaller"
        " -tao_brgn_regularizer_weight, or --optimizer trgn"
    )


def _fit(ending: Ending) -> str:
    """Say of a run that met its tolerance that its loss has hardly fallen; empty where it has."""
    first, last = ending.losses[0], ending.losses[-1]
    if not 0 < first or last <= LARGE_LOSS * first:
        return ""
    return (
        f"; the loss is {last / first:.0%} of the first: the model fits no better than this from here. Widen it, or change the"
        " initial weights (--seed)"
    )


def _stall(ending: Ending) -> str:
    """Say of a run whose budget ended it that it had stalled before; empty where it had not."""
    if _is_zero(ending):
        return ". But the loss is zero up to rounding, and nothing is left to gain"
    if len(ending.losses) <= PATIENCE:
        return ""
    changed = _relative(abs(ending.losses[-1 - PATIENCE] - ending.losses[-1]), ending)
    if not changed < STALLED:
        return ""
    did = f"changed the loss by {changed:.0e} of itself" if changed else "did not change the loss"
    return f". But the last {PATIENCE} {did}: {_cause(ending, changed or _last_change(ending))}"


def _obstacle(ending: Ending) -> str:
    """Say why no decrease was found."""
    if _is_zero(ending):
        return "the loss is zero up to rounding, and nothing is left to gain"
    return _cause(ending, _last_change(ending))


def _cause(ending: Ending, change: float) -> str:
    """Say why the loss falls no further, after a last relative change."""
    refused, limit = _refused(ending), _limit(ending, change)
    if not _gradient_is_small(ending):
        return (
            refused
            or limit
            or (
                "the gradient says that it could. Look for kinks in the model (ReLU, abs, rounding) that derivatives do not see,"
                " or try another --optimizer"
            )
        )
    return (
        limit
        or refused
        or (
            f"the gradient has fallen to {_fallen(ending):.0e} of the first: the model fits no better than this from here. Widen"
            " it, or change the initial weights (--seed)"
        )
    )


def _refused(ending: Ending) -> str:
    """Say how many trial points no step could end at; empty if there were none."""
    if ending.unreached:
        return (
            f"{ending.unreached} trial points had no fixed point. Make the cell more contractive, or allow more of"
            " -deq_snes_max_it"
        )
    if ending.infinite:
        return (
            f"{ending.infinite} trial points had a NaN or infinite loss or gradient. Bound what overflows in the model, or try"
            " -tao_lm_damping 1 (trgn)"
        )
    return ""


def _limit(ending: Ending, change: float) -> str:
    """Say what hides a relative change of the loss, rounding or the tolerance of fixed points; empty if nothing does."""
    name = str(ending.dtype).removeprefix("torch.")
    near = change <= NEAR_ROUNDING * torch.finfo(ending.dtype).eps
    if near and ending.dtype != torch.float64:
        return f"{name}'s rounding hides what is left to gain (the last change was {change:.0e} of the loss). Try --dtype float64"
    if near and _gradient_is_small(ending):
        return (
            f"the loss is as low as {name}'s rounding can tell (the last change was {change:.0e} of it). A larger -tao_gatol"
            " stops before"
        )
    if ending.tolerance is not None and change <= NEAR_TOLERANCE * ending.tolerance:
        wider = "" if ending.dtype == torch.float64 else "--dtype float64 and "
        return (
            f"fixed points solved to {ending.tolerance:.0e} hide what is left to gain ({change:.0e} of the loss). Try"
            f" {wider}tighter -deq_snes_rtol and -deq_ksp_rtol"
        )
    return ""


def _last_change(ending: Ending) -> float:
    """Return the last relative change of the loss that was one; infinite if there was none."""
    changes = [abs(a - b) for a, b in zip(ending.losses, ending.losses[1:], strict=False) if a != b]
    return _relative(changes[-1], ending) if changes else float("inf")


def _relative(change: float, ending: Ending) -> float:
    size = abs(ending.losses[-1])
    return change / size if size else float("inf")


def _is_zero(ending: Ending) -> bool:
    """Whether the loss is zero up to rounding."""
    return ending.losses[-1] >= 0 and ending.losses[-1] <= torch.finfo(ending.dtype).eps * ending.losses[0]


def _fallen(ending: Ending) -> float:
    return ending.gradient_norms[-1] / ending.gradient_norms[0] if ending.gradient_norms[0] else 0.0


def _gradient_is_small(ending: Ending) -> bool:
    return _fallen(ending) <= SMALL_GRADIENT
