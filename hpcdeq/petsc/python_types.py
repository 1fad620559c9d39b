"""This package's own PETSc types, written in Python: their short names, and the options that they read."""

from __future__ import annotations

from collections.abc import Mapping

# By the option that chooses: short name -> the class, as PETSc's python type takes it.
SHORT_NAMES = {
    "snes_type": {
        "batched_anderson": "hpcdeq.deq.anderson.PerSampleAnderson",
        "batched_newton": "hpcdeq.deq.newton.PerSampleNewton",
    },
    "ksp_type": {
        "batched_anderson": "hpcdeq.deq.krylov.PerSampleAnderson",
        "batched_lu": "hpcdeq.deq.dense.PerSampleLU",
        "batched_gmres": "hpcdeq.deq.krylov.PerSampleGMRES",
        "jfb": "hpcdeq.deq.inexact.JacobianFree",
        "phantom": "hpcdeq.deq.inexact.Phantom",
        "shine": "hpcdeq.deq.inexact.Shine",
    },
    "pc_type": {
        "batched_lu": "hpcdeq.deq.dense.BatchedLU",
        "secant": "hpcdeq.deq.secant.SecantPreconditioner",
        "kronecker": "hpcdeq.optim.preconditioners.Kronecker",
        "gauss_newton_diagonal": "hpcdeq.optim.preconditioners.GaussNewtonDiagonal",
        "inner_lbfgs": "hpcdeq.optim.preconditioners.InnerLBFGS",
    },
    "tao_type": {
        "lbfgs": "hpcdeq.optim.lbfgs.LBFGS",
        "levenberg_marquardt": "hpcdeq.optim.levenberg_marquardt.LevenbergMarquardt",
        "newton": "hpcdeq.optim.newton.Newton",
    },
}
# What PETSc's library does not have among its strings.
OPTIONS = frozenset(
    {
        "-snes_anderson_period",
        "-snes_anderson_type",
        "-snes_anderson_delay",
        "-snes_anderson_growth",
        "-snes_anderson_ridge",
        "-snes_newton_lag",
        "-ksp_anderson_m",
        "-ksp_anderson_beta",
        "-ksp_anderson_period",
        "-ksp_anderson_type",
        "-ksp_anderson_delay",
        "-ksp_anderson_restart",
        "-ksp_anderson_growth",
        "-ksp_anderson_ridge",
        "-ksp_phantom_steps",
        "-ksp_phantom_damping",
        "-snes_fallback",
        "-pc_kronecker_damping",
        "-pc_kronecker_probes",
        "-pc_kronecker_samples",
        "-pc_lbfgs_history",
        "-tao_lbfgs_history",
        "-tao_lbfgs_renew",
        "-tao_lbfgs_damping",
        "-tao_lm_damping",
        "-tao_lm_damping_min",
        "-tao_lm_increase",
        "-tao_lm_decrease",
        "-tao_lm_reuse",
        "-tao_lm_overhead",
        "-tao_newton_radius",
        # petsc4py reads these, not PETSc's library.
        "-snes_python_type",
        "-ksp_python_type",
        "-pc_python_type",
        "-tao_python_type",
    }
)


def spelled_out(options: Mapping[str, object]) -> dict[str, object]:
    """Return options with every short name of a type written as PETSc's python type and its class. Not collective."""
    result: dict[str, object] = {}
    for name, value in options.items():
        chooser = next((c for c in SHORT_NAMES if name == c or name.endswith("_" + c)), None)
        place = SHORT_NAMES[chooser].get(str(value)) if chooser else None
        if place is None:
            result[name] = value
        else:
            result[name] = "python"
            result[name.removesuffix("type") + "python_type"] = place
    return result


def full_name(chooser: str, short: str) -> str | None:
    """Return the class behind a short name of ``snes_type``, ``ksp_type`` or ``pc_type``. Not collective."""
    return SHORT_NAMES[chooser].get(short)


def short_name(place: str | None) -> str | None:
    """Return the short name of a class, the class itself where it has none. Not collective."""
    return next((short for kind in SHORT_NAMES.values() for short, full in kind.items() if full == place), place)
