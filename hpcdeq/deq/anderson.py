"""Anderson mixing with coefficients, norms and stop of its own for every sample, as a SNES type.

With r = f(z) - z, and the last m differences Δr_j and Δf_j of residuals and images, a mixing step (type II; Anderson
1965; Walker and Ni 2011, doi 10.1137/10078356X) goes to

    z' = f(z) - Σ γ_j Δf_j - (1 - β) (r - Σ γ_j Δr_j),    γ = argmin ‖r - Σ γ_j Δr_j‖,

and one of type I asks for Δz_jᵀ (r - Σ γ_j Δr_j) = 0 instead (Fang and Saad 2009, doi 10.1002/nla.617). Mixing every
p-th iteration, plain iterations between (Pratapa, Suryanarayana and Pask 2016, doi 10.1016/j.jcp.2015.11.018), needs as
many evaluations as mixing always, and a p-th of the passes over the history.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpcdeq.deq.batch import Batch, BatchIteration, BatchSolver, Limits, Values
from hpcdeq.deq.history import History
from hpcdeq.deq.samples import SampleMap, Samples
from hpcdeq.errors import OptionError
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.options import number

# A sample whose residual grew by this factor over the plain iterations since it last mixed mixes at every one from then on.
EXPANDING = 2.0


@dataclass(frozen=True)
class Settings:
    """What can be set, by options ``-deq_snes_anderson_...``.

    Attributes
    ----------
    window
        m (``_m``); 0 is the plain iteration z ← f(z).
    mixing
        β (``_beta``).
    period
        p (``_period``).
    kind
        2, or 1 (``_type``).
    delay
        Plain iterations before the first mixing (``_delay``).
    restart
        The history starts anew after so many mixing steps; 0: never (``_restart``).
    growth
        A sample whose residual exceeds its smallest by this factor forgets its history (``_growth``).
    ridge
        Added to the Gram matrix of the normalised differences; None: from the precision (``_ridge``).
    """

    window: int = 8
    mixing: float = 1.0
    period: int = 8
    kind: int = 2
    delay: int = 0
    restart: int = 0
    growth: float = 10.0
    ridge: float | None = None

    def history(self, like: Tensor, samples: Samples, *, kept: bool = False) -> History:
        """Return an empty history for a state ``(rows, d)``. Not collective."""
        return History(like, samples, self.window, self.kind, self.ridge, kept=kept)

    @staticmethod
    def read(options: PETSc.Options, kind: str = "snes", default: Settings | None = None) -> Settings:
        """Return the settings in a database whose prefix is set.

        Not collective.

        Parameters
        ----------
        options
            The database.
        kind
            ``snes``, or ``ksp`` for ``-deq_ksp_anderson_...``.
        default
            What holds where nothing is said.

        Raises
        ------
        OptionError
            A value without a meaning.
        """
        ours = default or Settings()
        name = f"{kind}_anderson_"
        ridge = number(options, name + "ridge", -1.0 if ours.ridge is None else ours.ridge)
        settings = Settings(
            int(number(options, name + "m", ours.window)),
            number(options, name + "beta", ours.mixing),
            int(number(options, name + "period", ours.period)),
            int(number(options, name + "type", ours.kind)),
            int(number(options, name + "delay", ours.delay)),
            int(number(options, name + "restart", ours.restart)),
            number(options, name + "growth", ours.growth),
            None if ridge < 0 else ridge,
        )
        wrong = {
            "m": (settings.window < 0, "0 or more"),
            "beta": (not settings.mixing > 0, "a number above 0"),
            "period": (settings.period < 1, "1 or more"),
            "type": (settings.kind not in (1, 2), "1 or 2"),
            "delay": (settings.delay < 0, "0 or more"),
            "restart": (settings.restart < 0, "0 or more"),
            "growth": (not settings.growth > 1, "a number above 1"),
        }
        for what, (bad, fitting) in wrong.items():
            if bad:
                raise OptionError(f"-{options.prefix or ''}{name}{what}: give {fitting}")
        return settings


class AndersonIteration(BatchIteration):
    """Anderson mixing of every sample on its own.

    Not collective, every method.

    Parameters
    ----------
    map, z0, limits
        As in `BatchIteration`.
    settings
        How to mix.
    kept
        A history of the whole batch to begin with and to add to, for the use of others; None: the history is dropped with
        the samples that leave.
    """

    def __init__(
        self, map: SampleMap, z0: Tensor, limits: Limits, settings: Settings, kept: History | None = None
    ) -> None:
        super().__init__(map, z0, limits)
        self.settings = settings
        self._kept = kept
        if kept is not None:
            self.history: History | None = copy.copy(kept)  # sharing its columns until the batch is restricted
        else:
            self.history = settings.history(self.z, self.samples) if settings.window else None
        self.expanding = np.zeros(self.samples.count, dtype=bool)
        self._plain = False  # whether z is the last image
        self._iterated: Values | None = None  # samples whose z is the last image; None: none
        self._plain_from = self.norm  # norms where the plain iterations began
        self._before: tuple[Tensor, Tensor] | None = None  # image and residual
        self.image_answers = False
        self._mixings = 0
        self._since_mixing = settings.period if kept is not None and kept.filled else 0

    def answer(self) -> Tensor:
        """Return the images of converged samples where those are evaluated again: an iteration for nothing."""
        if not self.image_answers or not self.expanding.any():
            return self.image if self.image_answers else self.z
        return torch.where(self.samples.spread(self.device(self.expanding))[:, None], self.z, self.image)

    def take_residual(self) -> Tensor:
        """Return f(z) - z, and enter the differences from the last iteration into the history."""
        history, before = self.history, self._before
        if history is None or before is None:
            return self.image - self.z
        self._since_mixing += 1
        soon = self.settings.period <= history.window and self.iteration > self.settings.delay
        return history.enter(self.z, self.image, before, plain=self._plain, soon=soon)

    def advance(self) -> Tensor:
        """Return the next state."""
        settings, history = self.settings, self.history
        image, residual, norm = self.image, self.residual, self.norm
        if history is None:
            return image if settings.mixing == 1.0 else torch.lerp(self.z, image, settings.mixing)
        if self._iterated is None or settings.period == 1:
            self._plain_from = norm
        else:
            self.expanding = self.expanding | (self._iterated & (norm > EXPANDING * self._plain_from))
        self._before = (image, residual)
        due = self._since_mixing >= settings.period or (settings.delay == self.iteration and self.iteration > 0)
        mixing = history.filled > 0 and self.iteration >= settings.delay and (due or self.expanding.any())
        self._plain = not mixing and settings.mixing == 1.0
        self._iterated = None
        if settings.mixing == 1.0 and not (mixing and due):
            self._iterated = ~self.expanding if mixing else np.ones_like(self.expanding)
        if not mixing:
            return image if self._plain else torch.lerp(self.z, image, settings.mixing)
        grown = norm > settings.growth * self.best
        if not due:  # the others go on as if those that expand were not there
            grown &= self.expanding
        anew = bool(due and settings.restart and (self._mixings + 1) % settings.restart == 0)
        if anew or grown.any():
            residual = residual.clone()  # it may lie in a column of the history
            self._before = (image, residual)
        if grown.any():
            history.forget(self.device(grown))
            self.best = np.where(grown, norm, self.best)
        coefficients = history.coefficients(residual)
        if not due:
            mixed = self.samples.spread(self.device(self.expanding))[:, None]
            coefficients = torch.where(mixed, coefficients, 0.0)
        z = history.apply(image, residual, coefficients, settings.mixing)
        if due:
            self._since_mixing = 0
            self._mixings += 1
        if anew:
            history.clear()
        return z

    def keep(self, keep: Tensor, rows: Tensor, samples: Samples) -> None:
        """Go on with some samples; arguments as in `SampleMap.restrict`."""
        self.give_back()
        super().keep(keep, rows, samples)
        names = self.host(keep)
        self.expanding = self.expanding[names]
        if self._iterated is not None:
            self._iterated = self._iterated[names]
        self._plain_from = self._plain_from[names]
        if self.history is not None:
            self.history.keep(keep, rows, samples)

    def give_back(self) -> None:
        """Enter the present history into the one that is kept for others."""
        if self._kept is not None and self.history is not None:
            nothing = torch.arange(0)
            self._kept.merge(self.history, *(self.at_work or (nothing, nothing)))


class PerSampleAnderson(BatchSolver):
    """Context of a SNES of python type: ``-snes_type batched_anderson``. See `BatchSolver`."""

    settings = Settings()

    def setFromOptions(self, snes: PETSc.SNES) -> None:  # noqa: N802 (petsc4py's name)
        """Read ``-snes_anderson_...``. Not collective."""
        self.settings = Settings.read(PETSc.Options(snes.getOptionsPrefix()))

    def describe(self) -> str:
        """Return the settings in a line. Not collective."""
        return f"Anderson mixing, {self.settings}"

    def start(self, batch: Batch, z0: Tensor, limits: Limits) -> BatchIteration:
        """Return the iteration at its start. Not collective."""
        if batch.retain and self.settings.window:
            batch.history = self.settings.history(batch.map.samples.rows(z0), batch.map.samples, kept=True)
        iteration = AndersonIteration(batch.map, z0, limits, self.settings, batch.history)
        iteration.image_answers = batch.evaluated_again
        return iteration

    def finish(self, batch: Batch) -> None:
        """Complete the history that is kept. Not collective."""
        if isinstance(batch.iteration, AndersonIteration):
            batch.iteration.give_back()
