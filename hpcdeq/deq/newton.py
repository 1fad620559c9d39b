"""Newton's method with dense Jacobians of its own for every sample, as a SNES type: for small states."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hpcdeq.deq.batch import Batch, BatchIteration, BatchSolver, Limits, Values
from hpcdeq.deq.dense import Factors
from hpcdeq.deq.jacobian import Linearisation
from hpcdeq.deq.resolvent import ResolventMatrix
from hpcdeq.deq.samples import SampleMap, Samples
from hpcdeq.errors import OptionError
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.options import number

HALVINGS = 10


class NewtonIteration(BatchIteration):
    """Newton steps (I - J) s = r with a step length of its own for every sample. Not collective, every method.

    Where a step does not decrease ‖r‖ enough, the sample goes back and takes half of it. The factors serve `lag`
    iterations (lag > 1: the chord method).
    """

    def __init__(self, map: SampleMap, z0: Tensor, limits: Limits, lag: int) -> None:
        super().__init__(map, z0, limits)
        if self.samples.index is not None:
            raise OptionError("-snes_type batched_newton needs a state with one row a sample: use newtonls")
        self.lag = lag
        self._factors: Factors | None = None
        self._age = 0
        self._step = torch.zeros_like(self.z)
        self._from = self.z
        self._length = np.zeros(self.samples.count)
        self._merit = np.full(self.samples.count, np.inf)

    def advance(self) -> Tensor:
        """Return the next state."""
        # A decrease in proportion to the step (Armijo's, for ‖r‖).
        back = ~(self.norm <= (1 - 1e-4 * self._length) * self._merit) & self._may_go_back() & ~self.over
        if back.any():
            self._length = np.where(back, self._length / 2, 0.0)
            self._age = self.lag  # after a step that failed the Jacobian is made anew
            length = self.device(self._length)[:, None].to(self.z.dtype)
            return torch.where(self.device(back)[:, None], self._from + length * self._step, self.z)
        if self._factors is None or self._age >= self.lag:
            with torch.enable_grad():
                at = Linearisation(lambda state: self.map.function(state), self.shaped(self.z), ())
            self.map.evaluated += self.samples.count
            self._factors = Factors(ResolventMatrix(at, self.samples, self.map.work).dense())
            self._age = 0
        self._age += 1
        self._from, self._merit = self.z, self.norm
        self._step = self._factors.solve(self.residual, transpose=False)
        self._length = np.ones_like(self.norm)
        return self.z + self._step

    def hopeful(self, finite: Values) -> Values:
        """Return which samples may go on: those too that are at the end of a step that can be halved."""
        return super().hopeful(finite) | self._may_go_back()

    def _may_go_back(self) -> Values:
        return (self._length > 2.0**-HALVINGS) & np.isfinite(self._merit)

    def keep(self, keep: Tensor, rows: Tensor, samples: Samples) -> None:
        """Go on with some samples; arguments as in `SampleMap.restrict`."""
        super().keep(keep, rows, samples)
        self._step, self._from = self._step.index_select(0, keep), self._from.index_select(0, keep)
        names = self.host(keep)
        self._length, self._merit = self._length[names], self._merit[names]
        if self._factors is not None:
            self._factors.keep(keep)


class PerSampleNewton(BatchSolver):
    """Context of a SNES of python type: ``-snes_type batched_newton``. See `BatchSolver`.

    ``-snes_newton_lag`` iterations share a Jacobian (1: Newton's method).
    """

    lag = 1

    def setFromOptions(self, snes: PETSc.SNES) -> None:  # noqa: N802 (petsc4py's name)
        """Read the lag. Not collective."""
        options = PETSc.Options(snes.getOptionsPrefix())
        self.lag = int(number(options, "snes_newton_lag", 1))
        if self.lag < 1:
            raise OptionError(f"-{options.prefix or ''}snes_newton_lag is {self.lag}: give 1 or more iterations")

    def describe(self) -> str:
        """Return the settings in a line. Not collective."""
        return f"Newton's method, dense Jacobians that serve {self.lag} iterations"

    def start(self, batch: Batch, z0: Tensor, limits: Limits) -> BatchIteration:
        """Return the iteration at its start. Not collective."""
        if not batch.differentiable:
            raise OptionError(
                "-snes_type batched_newton differentiates a cell, and a SNES of yours has a function only: use newtonls, or"
                " batched_anderson"
            )
        return NewtonIteration(batch.map, z0, limits, self.lag)
