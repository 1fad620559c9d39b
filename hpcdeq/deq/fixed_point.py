"""`FixedPoint`: a torch module whose output is the fixed point of a cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hpcdeq.deq.arguments import Cell, CellFunction, initial_state
from hpcdeq.deq.equilibrium import Equilibrium, Help, Log
from hpcdeq.deq.forward import ForwardSolver
from hpcdeq.deq.implicit import FixedPointFunction
from hpcdeq.deq.inexact import INEXACT
from hpcdeq.deq.linear import LinearSolution
from hpcdeq.deq.samples import Samples
from hpcdeq.deq.solution import Solution
from hpcdeq.deq.spectrum import contraction, spectral_radius
from hpcdeq.deq.work import Work
from hpcdeq.errors import HpcdeqError, OptionError, ShapeError
from hpcdeq.petsc.options import Options, Value

SampleIndex = Callable[[Any], Tensor]


class FixedPoint(nn.Module):
    """The fixed point z = cell(z, x), found by a SNES and differentiated exactly through a KSP.

    Works under ``backward``, double backward, ``torch.func.jvp`` / ``vjp`` / ``functional_call`` and their compositions,
    in float32 and float64. Derivatives reach the cell's parameters and the floating-point tensors inside x.

    Parameters
    ----------
    cell
        ``cell(z, x) -> z``, any torch module; z of any shape, x a tensor or any tuple, list, dict or dataclass of
        tensors. A method ``initial_state(x)`` gives the initial guess where it is not a zero of x's shape. Samples leave
        the batch when they have converged if x is made of tensors with a row a sample, or if a method
        ``select(x, samples)`` returns x for some ``(k,)`` increasing sample numbers, in their order.
    petsc_prefix
        Prefix of this layer's options: ``-deq_snes_type``, ``-deq_ksp_rtol``. A second layer in a model needs another.
    options
        PETSc options without the prefix; the command line wins over them.
    sample_index
        ``sample_index(x) -> (rows,)`` sample of each leading row of z, where a sample has several rows (the atoms of a
        graph). Default: each row is a sample. Convergence is judged for each sample.
    on_failure
        ``raise``, or ``warn``: states that did not converge are returned with a warning, and ``solution.converged`` says
        which. (A `TrainingProblem` can leave such samples out of its loss instead.)

    Attributes
    ----------
    help
        What a caller knows of the fixed points to come: initial guesses, how many derivatives, which accuracy.

    Raises
    ------
    ConvergenceError
        By the call, or by a derivative, when a solve fails: no unconverged state is ever returned.
    """

    def __init__(
        self,
        cell: Cell,
        petsc_prefix: str = "deq_",
        options: Mapping[str, Value] | None = None,
        sample_index: SampleIndex | None = None,
        on_failure: str = "raise",
    ) -> None:
        super().__init__()
        self.cell = cell
        self.options = Options(petsc_prefix, options)
        self.sample_index = sample_index
        self._log = Log(Work())
        if on_failure not in ("raise", "warn"):
            raise OptionError(f"on_failure is {on_failure!r}: choose raise or warn")
        self.on_failure: str = on_failure
        self.help = Help()
        self._checked = False

    def add_options(self, named: Mapping[str, Value]) -> None:
        """Set options by their full names, those of this layer's prefix among them; the command line wins over them.

        Not collective.
        """
        prefix = self.options.prefix
        own = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
        self.options = Options(prefix, {**self.options.given, **own})

    @property
    def solution(self) -> Solution | None:
        """How the last forward solve ended; shares no memory with the output."""
        return self._log.solution

    @property
    def adjoint(self) -> LinearSolution | None:
        """How the last adjoint solve, of a reverse derivative, ended."""
        return self._log.adjoint

    @property
    def tangent(self) -> LinearSolution | None:
        """How the last tangent solve, of a forward or second derivative, ended."""
        return self._log.tangent

    @property
    def method(self) -> str:
        """How the last tangent or adjoint system was solved, and why so."""
        return self._log.method

    @property
    def methods(self) -> list[str]:
        """All methods that tangent and adjoint systems were solved by so far."""
        return list(self._log.methods.values())

    @property
    def inexact(self) -> str | None:
        """The inexact adjoint (jfb, phantom, shine) that the options choose; None: derivatives are exact."""
        kind = self.options.chosen("ksp_type")
        return kind if kind in INEXACT else None

    @property
    def tangent_state(self) -> Tensor | None:
        """The last tangent dz, in the shape of the state."""
        return self._log.tangent_state

    @property
    def adjoint_state(self) -> Tensor | None:
        """The last adjoint u, in the shape of the state."""
        return self._log.adjoint_state

    def spectral_radius(self, x: Any, steps: int = 30) -> Tensor:
        """Return an estimate of the spectral radius of J at each sample's fixed point, ``(B,)``; see `spectral_radius`.

        Not collective.
        """
        with torch.no_grad():
            z = self(x)
        return spectral_radius(self.cell, x, z, sample_index=self.sample_index, steps=steps)

    def contraction(self, x: Any, steps: int = 30) -> Tensor:
        """Return an estimate, from below, of ‖J‖₂ at each sample's fixed point, ``(B,)``; see `contraction`.

        Not collective.
        """
        with torch.no_grad():
            z = self(x)
        return contraction(self.cell, x, z, sample_index=self.sample_index, steps=steps)

    def take_amplification(self) -> float:
        """Return the largest ‖u_i‖ / ‖g_i‖ of gradients' adjoints since the last call.

        Not collective.
        """
        taken, self._log.amplification = self._log.amplification, 0.0
        return taken

    def note_amplification(self, amplification: float) -> None:
        """Take one that was taken, or that was known before, back into account. Not collective."""
        self._log.amplification = max(self._log.amplification, amplification)

    @property
    def work(self) -> Work:
        """Counters of everything that this layer has computed."""
        return self._log.work

    def forward(self, x: Any, z0: Tensor | None = None) -> Tensor:
        """Return the fixed point for the input x.

        Not collective.

        Parameters
        ----------
        x
            The cell's second argument.
        z0
            Initial guess; it is not differentiated.
        """
        function = CellFunction(self.cell, x)
        tensors = function.tensors
        help = self.help if z0 is None else replace(self.help, guesses=None)
        if z0 is None:
            z0 = initial_state(self.cell, x, function, tensors)
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if torch.is_grad_enabled() and not self._checked:
            self._check_no_hidden_tensors(function, z0, tensors)
        index = None if self.sample_index is None else self.sample_index(x)
        equilibrium = Equilibrium(
            function, index, self.options, self._log, differentiated=tracked, help=help, on_failure=self.on_failure
        )
        return FixedPointFunction.apply(equilibrium, z0, *tensors)

    def _check_no_hidden_tensors(self, function: Any, z0: Tensor, tensors: list[Tensor]) -> None:
        """Refuse a cell that depends on a tensor which no derivative would reach (a silent zero elsewhere)."""
        with torch.enable_grad():
            image = function(z0.detach(), *(t.detach() for t in tensors))
        if image.shape != z0.shape:
            raise ShapeError(
                f"the cell maps a state of shape {tuple(z0.shape)} to shape {tuple(image.shape)}; give z0=..."
            )
        if image.requires_grad:
            raise HpcdeqError(
                "the cell uses a tensor that requires a gradient and is neither a parameter of the cell nor inside x: its"
                " gradient would silently be zero. Make it an nn.Parameter of the cell, or pass it in x."
            )
        self._checked = True


def solve_fixed_point(
    cell: Cell,
    x: Any,
    z0: Tensor | None = None,
    petsc_prefix: str = "deq_",
    options: Mapping[str, Value] | None = None,
    sample_index: SampleIndex | None = None,
) -> Solution:
    """Find z = cell(z, x) without derivatives.

    Not collective. Arguments as in `FixedPoint`.

    Raises
    ------
    ConvergenceError
        Names the samples that did not converge; its ``record`` is the `Solution` found.
    """
    function = CellFunction(cell, x)
    if z0 is None:
        z0 = initial_state(cell, x, function, function.tensors)
    samples = Samples.of(z0, None if sample_index is None else sample_index(x))
    solver = ForwardSolver(function.bind(function.tensors, now=True), samples, Options(petsc_prefix, options), Work())
    return solver.checked(solver.solve(z0.detach()))
