"""Approximate adjoints that are cheaper than a solve, as KSP types: ``-deq_ksp_type jfb``, ``phantom`` or ``shine``.

They replace u = (I - J)⁻ᵀ g in first reverse derivatives, and are refused wherever an exact product is needed.

    jfb       u = g                                     (Fung et al. 2022, arXiv 2103.12803)
    phantom   u = λ Σ_{j<k} (λ Jᵀ + (1 - λ) I)ʲ g        (Geng et al. 2021, arXiv 2111.05177: Neumann series form)
    shine     u = Hᵀ g, H from the forward solve        (Ramzi et al. 2022, arXiv 2106.00553)
"""

from __future__ import annotations

from torch import Tensor

from hpcdeq.deq.systems import LinearProblem, TensorSolver
from hpcdeq.errors import HpcdeqError, OptionError
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.options import number

INEXACT = ("jfb", "phantom", "shine")


def refuse_inexact(kind: str | None, wanted: str) -> None:
    """Refuse an inexact adjoint where an exact derivative is needed.

    Not collective.

    Raises
    ------
    HpcdeqError
        The type is an inexact one.
    """
    if kind in INEXACT:
        raise HpcdeqError(
            f"{wanted} needs exact derivatives, and -ksp_type {kind} is an inexact adjoint for first reverse derivatives:"
            " leave -deq_ksp_type out (or the layer's option ksp_type)"
        )


class InexactAdjoint(TensorSolver):
    """Context of a KSP of python type whose answer is no solution. Not collective, every method."""

    def answer(self, ksp: PETSc.KSP, problem: LinearProblem, right: Tensor, *, transpose: bool) -> Tensor:
        """Return the approximate adjoint."""
        if not transpose:
            raise HpcdeqError(f"{type(self).__name__} approximates adjoint systems of fixed points only")
        ksp.setConvergedReason(PETSc.KSP.ConvergedReason.CONVERGED_ITS)
        return self.approximation(problem, right)

    def approximation(self, problem: LinearProblem, g: Tensor) -> Tensor:
        """Return u for g, both in the shape of the state."""
        raise NotImplementedError


class JacobianFree(InexactAdjoint):
    """``jfb``: the last iteration alone is differentiated. Not collective, every method."""

    def approximation(self, problem: LinearProblem, g: Tensor) -> Tensor:
        """Return g."""
        return g


class Phantom(InexactAdjoint):
    """``phantom``: k = ``-ksp_phantom_steps`` damped iterations (5), λ = ``-ksp_phantom_damping`` (1.0). Not collective."""

    steps = 5
    damping = 1.0

    def setFromOptions(self, ksp: PETSc.KSP) -> None:  # noqa: N802 (petsc4py's name)
        """Read steps and damping."""
        options = PETSc.Options(ksp.getOptionsPrefix())
        self.steps = int(number(options, "ksp_phantom_steps", self.steps))
        self.damping = number(options, "ksp_phantom_damping", self.damping)
        if self.steps < 1 or not 0 < self.damping <= 1:
            raise OptionError(
                f"-{options.prefix or ''}ksp_phantom_steps is {self.steps} and _damping {self.damping}: give 1 or more steps,"
                " and a damping above 0 up to 1"
            )

    def approximation(self, problem: LinearProblem, g: Tensor) -> Tensor:
        """Return the sum, by k - 1 products."""
        u = self.damping * g
        for _ in range(self.steps - 1):
            problem.work.cell_vjps += problem.samples.count
            u = self.damping * (g + problem.at.vjp(u)) + (1 - self.damping) * u
        return u


class Shine(InexactAdjoint):
    """``shine``: the quasi-Newton inverse that the forward solve built. Not collective, every method."""

    def approximation(self, problem: LinearProblem, g: Tensor) -> Tensor:
        """Return Hᵀ g."""
        if problem.history is None:
            raise OptionError(
                "-ksp_type shine needs the history of a forward solve by batched_anderson with a window: leave"
                " -deq_snes_type and -deq_snes_anderson_m as they are, or choose jfb or phantom"
            )
        return problem.history.inverse_product(problem.samples.rows(g), transpose=True).reshape(g.shape)
