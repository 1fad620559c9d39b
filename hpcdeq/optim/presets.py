"""The named methods: sets of PETSc options and the curvature that goes with them. Nothing here is out of a user's reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hpcdeq.errors import OptionError, suggestion
from hpcdeq.methods import METHODS
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.options import Value
from hpcdeq.petsc.python_types import SHORT_NAMES

GAUSS_NEWTON, HESSIAN = "gauss_newton", "hessian"


@dataclass(frozen=True)
class Preset:
    """A way to minimise.

    Attributes
    ----------
    summary
        One line for help texts.
    options
        PETSc options, names with their ``tao_`` and without a dash.
    curvature
        Which matrix TAO is given as the Hessian: ``gauss_newton`` or ``hessian``.
    least_squares
        Whether TAO is given residuals and their Jacobian instead of a loss.
    """

    summary: str
    options: Mapping[str, Value] = field(default_factory=dict)
    curvature: str = HESSIAN
    least_squares: bool = False


# Inner conjugate-gradient steps are bounded: without a bound TAO spends around 80 products on an iteration. A residual of
# a tenth is asked of them: at a hundredth, rounding in the last steps grows until runs on different numbers of ranks
# part (a change of 1e-15 in the initial weights became 1e-2 in ten iterations of a small classification).
_INNER = 20

PRESETS: dict[str, Preset] = {
    "trgn": Preset(
        "trust-region Gauss-Newton (Levenberg-Marquardt on TAO): few, costly iterations; the usual choice for full batches",
        {
            "tao_type": "levenberg_marquardt",
            "tao_ksp_type": "cg",
            "tao_ksp_norm_type": "natural",
            "tao_ksp_max_it": 100,
            "tao_ksp_rtol": 1e-2,
            "tao_pc_type": "kronecker",
        },
        GAUSS_NEWTON,
    ),
    "lbfgs": Preset(
        "limited-memory BFGS on TAO's line search, from Kronecker factors: cheap iterations, no curvature products",
        {"tao_type": "lbfgs", "tao_pc_type": "kronecker"},
        GAUSS_NEWTON,
    ),
    "newton": Preset(
        "inexact Newton with line search and the true Hessian: fast near a minimum",
        {
            "tao_type": "newton",
            "tao_ksp_type": "stcg",
            "tao_ksp_norm_type": "natural",
            "tao_ksp_max_it": _INNER,
            "tao_ksp_rtol": 1e-1,
            "tao_pc_type": "kronecker",
            # The true curvature of directions that Gauss-Newton has none in is not known to the factors.
            "tao_pc_kronecker_damping": 1e-3,
        },
    ),
    "adam": Preset("Adam on minibatches (Kingma and Ba 2015); an iteration is an epoch"),
    "adamw": Preset(
        "Adam with weight decay apart from the loss (Loshchilov and Hutter 2019); an iteration is an epoch"
    ),
    "rmsprop": Preset("RMSprop on minibatches (Hinton 2012); an iteration is an epoch"),
    "torch-lbfgs": Preset("torch's own L-BFGS with strong-Wolfe line search on full batches: a reference from outside"),
}

# What PETSc's types need beyond their defaults to be usable here.
_TYPES: dict[str, Preset] = {
    "brgn": Preset(
        "regularised Gauss-Newton",
        {"tao_brgn_subsolver_tao_type": "bntr", "tao_brgn_subsolver_tao_bnk_ksp_max_it": _INNER},
        GAUSS_NEWTON,
        least_squares=True,
    ),
    "pounders": Preset("derivative-free least squares", least_squares=True),
    "nls": Preset("Newton line search", {"tao_nls_ksp_max_it": _INNER}),
    "ntr": Preset("Newton trust region", {"tao_ntr_ksp_max_it": _INNER}),
    "ntl": Preset("Newton trust region with line search", {"tao_ntl_ksp_max_it": _INNER}),
    **{name: Preset("bounded Newton-Krylov", {"tao_bnk_ksp_max_it": _INNER}) for name in ("bnls", "bntr", "bntl")},
    **{
        name: Preset("bounded quasi-Newton-Krylov", {"tao_bnk_ksp_max_it": _INNER})
        for name in ("bqnkls", "bqnktr", "bqnktl")
    },
}


def preset_of(method: str) -> Preset:
    """Return the preset of a method's name, or of ``tao:TYPE``.

    Not collective.

    Raises
    ------
    OptionError
        There is no such method or type; the nearest is named.
    """
    if method in PRESETS:
        return PRESETS[method]
    if method.startswith("tao:"):
        kind = method[4:]
        types = sorted({*(v for k, v in vars(PETSc.TAO.Type).items() if k.isupper()), *SHORT_NAMES["tao_type"]})
        if kind not in types:
            hint = suggestion(kind, types, f"types: {', '.join(types)}", prefix="tao:")
            raise OptionError(f"unknown TAO type {kind!r}: {hint}")
        known = _TYPES.get(kind, Preset(f"TAO {kind}"))
        return Preset(known.summary, {"tao_type": kind, **known.options}, known.curvature, known.least_squares)
    hint = suggestion(method, METHODS, f"choose one of {', '.join(METHODS)} or tao:TYPE")
    raise OptionError(f"unknown optimizer {method!r}: {hint}")


def check_rebalancing(method: str) -> None:
    """Refuse a method that cannot go on when samples move to other ranks.

    Not collective.

    Raises
    ------
    OptionError
        It keeps vectors that lie with the samples.
    """
    if preset_of(method).least_squares:
        raise OptionError(
            f"--rebalance moves samples between ranks, and {method} keeps residuals where its samples are: leave it out, or use"
            " another optimizer (trgn takes any loss)"
        )


def resolved_options(method: str, options: Mapping[str, Value] | None = None) -> dict[str, Value]:
    """Return the PETSc options that a method runs with, the given ones in place of the preset's. Not collective."""
    return {**preset_of(method).options, **{name.lstrip("-"): value for name, value in (options or {}).items()}}
