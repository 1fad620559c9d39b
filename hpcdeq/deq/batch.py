"""Solvers that treat every sample of a batch on its own, as SNES types written in Python."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hpcdeq.deq.history import History
from hpcdeq.deq.samples import SampleMap, Samples
from hpcdeq.errors import HpcdeqError
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.vectors import copy_from_vector, copy_to_vector, read_view

NANORINF = (
    "DIVERGED_FUNCTION_NANORINF"
    if hasattr(PETSc.SNES.ConvergedReason, "DIVERGED_FUNCTION_NANORINF")
    else "DIVERGED_FNORM_NAN"
)


@dataclass(frozen=True)
class Limits:
    """When a sample has converged, and when it has no hope.

    Attributes
    ----------
    rtol, atol
        ‖f(z) - z‖ ≤ rtol ‖f(z)‖ + atol.
    iterations
        Most iterations.
    divergence
        Growth of the residual over the first one; negative: any.
    """

    rtol: float
    atol: float
    iterations: int
    divergence: float


Values = np.ndarray  # numbers or truth values by sample, (B,): decisions are taken on the host


@dataclass
class Outcome:
    """What a per-sample solve found, by sample in the order of the batch.

    Attributes
    ----------
    value
        ``(rows, d)`` state: of each sample one that satisfied the tolerance, else the last.
    residual, size
        ``(B,)`` norms of f(z) - z and of f(z), in float64, of the iterate that was judged.
    since
        ``(B,)`` iteration at which a sample converged, -1 if it did not.
    trail
        Per iteration: samples evaluated so far, seconds, norms of f(z) - z and of f(z) of the samples at work.
    """

    value: Tensor
    residual: Values
    size: Values
    since: Values
    trail: list[tuple[int, float, Values, Values]] = field(default_factory=list)


class BatchIteration:
    """Iterates until every sample has converged or has no hope; what has ended leaves the batch.

    A subclass says how to go on, in `advance`, and keeps its own memory of the samples at work, in `keep`. States stay on
    their device; norms come to the host. Not collective, every method.

    Parameters
    ----------
    map
        The cell.
    z0
        Initial state.
    limits
        When to stop.

    Attributes
    ----------
    z, image, residual
        ``(rows, d)`` of the samples at work.
    norm, best, first
        ``(B,)`` norms of the present residual, of the smallest and of the first.
    size
        ``(B,)`` what residuals are compared with.
    over
        ``(B,)`` which of the samples at work have converged or have no hope: at work only until they leave.
    leave_at
        Samples leave once this part of those at work has ended: each time what is kept of the others is copied.
    """

    leave_at = 1 / 4

    def __init__(self, map: SampleMap, z0: Tensor, limits: Limits) -> None:
        self.map = map
        self.limits = limits
        self.samples = map.samples
        self.iteration = 0
        self.shape = z0.shape
        self.z = self.image = self.residual = self.samples.rows(z0)
        count = self.samples.count
        self.norm = self.size = self.best = self.first = np.full(count, np.inf)
        self.outcome = Outcome(self.z.clone(), np.full(count, np.inf), np.full(count, np.inf), np.full(count, -1))
        self._names = np.arange(count)
        self._rows: Tensor | None = None  # of the samples at work in the whole state; None: all of them
        self._since = np.full(count, -1)
        self._settled = np.zeros(count, dtype=bool)  # those whose answer stands
        self._together = False  # whether samples cannot leave: they may depend on each other, and end at one state
        self.over = np.zeros(count, dtype=bool)
        self._finished = 0.0  # sum of squares of the residuals of samples that have left
        self._failures: set[str] = set()

    def advance(self) -> Tensor:
        """Return the next state from the present one, its image and residual."""
        raise NotImplementedError

    def take_residual(self) -> Tensor:
        """Return f(z) - z."""
        return self.image - self.z

    def answer(self) -> Tensor:
        """Return the states ``(rows, d)`` that stand for converged samples."""
        return self.z

    def worth_leaving(self, ended: int) -> bool:
        """Say whether so many samples that have ended should leave now."""
        return ended >= max(1.0, self.leave_at * self.samples.count)

    def hopeful(self, finite: Values) -> Values:
        """Return which samples may go on, of those whose norms are finite, ``(B,)``."""
        if self.limits.divergence <= 0:
            return finite
        return finite & (self.norm <= self.limits.divergence * self.first)

    def sizes(self) -> Values:
        """Return what the residual of each sample is compared with, ``(B,)``."""
        return self.host(self.samples.norms(self.image))

    def host(self, values: Tensor) -> Values:
        """Return numbers by sample on the host."""
        return values.detach().cpu().numpy().astype(np.float64 if values.is_floating_point() else np.int64)

    def device(self, values: Values) -> Tensor:
        """Return numbers by sample on the device of the state."""
        return torch.from_numpy(values).to(self.z.device)

    def keep(self, keep: Tensor, rows: Tensor, samples: Samples) -> None:
        """Go on with some samples; arguments as in `SampleMap.restrict`."""
        self.z, self.image, self.residual = (t.index_select(0, rows) for t in (self.z, self.image, self.residual))
        names = self.host(keep)
        self.norm, self.size = self.norm[names], self.size[names]
        self.best, self.first = self.best[names], self.first[names]
        self._names, self._since, self.over = self._names[names], self._since[names], self.over[names]
        self._settled = self._settled[names]
        self._rows = rows if self._rows is None else self._rows.index_select(0, rows)
        self.samples = samples

    def run(self, watch: Callable[[int, float], None]) -> str:
        """Iterate to the end and return the name of PETSc's reason: of success only if all samples converged.

        Parameters
        ----------
        watch
            Told the iteration and the norm of the whole residual.
        """
        began = time.perf_counter()
        limits = self.limits
        # A state that runs off to infinity is an answer here.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            while True:
                self.image = self.samples.rows(self.map(self.shaped(self.z)))
                self.residual = self.take_residual()
                self.norm = self.host(self.samples.norms(self.residual))
                if self.iteration == 0:
                    self.best = self.first = self.norm
                size = self.size = self.sizes()
                self.outcome.trail.append((self.map.evaluated, time.perf_counter() - began, self.norm, size))
                # An infinite residual is within any multiple of an infinite size.
                finite = np.isfinite(self.norm) & np.isfinite(size)
                converged = finite & (self.norm <= limits.rtol * size + limits.atol)
                self._since = np.where(converged, np.where(self._since < 0, self.iteration, self._since), -1)
                self.over = converged | ~self.hopeful(finite)
                if self.iteration >= limits.iterations:
                    self.over[:] = True
                if not self._together:
                    fresh = self.over & ~self._settled
                    if fresh.any():
                        # At once, and not when it leaves: an answer must not depend on when its batch mates are done.
                        self._settle(fresh, converged)
                        self._settled |= fresh
                    self.over |= self._settled
                watch(self.iteration, (self._finished + float(self.norm @ self.norm)) ** 0.5)
                ended = int(self.over.sum())
                if ended == self.samples.count:
                    if self._together:
                        self._settle(self.over, converged)
                    return self._reason()
                if ended and not self._together and self.worth_leaving(ended):
                    self._leave()
                self.best = np.minimum(self.best, self.norm)
                self.z = self.advance()
                self.iteration += 1

    @property
    def at_work(self) -> tuple[Tensor, Tensor] | None:
        """Samples and rows at work, by their numbers in the whole batch; None: all of them."""
        return None if self._rows is None else (self.device(self._names), self._rows)

    def shaped(self, rows: Tensor) -> Tensor:
        """Return rows of the samples at work in the shape of a state."""
        return rows.reshape(-1, *self.shape[1:]) if len(self.shape) > 1 else rows.reshape(-1)

    def value(self) -> Tensor:
        """Return the state of all samples as it is now, ``(rows, d)``."""
        return self.z if self._rows is None else self.outcome.value.index_copy(0, self._rows, self.z)

    def _settle(self, which: Values, converged: Values) -> None:
        gone = which.nonzero()[0]
        rows, _ = self.samples.rows_of(self.device(gone))
        value = self.answer().index_select(0, rows)
        if not converged[gone].all():
            answered = self.samples.spread(self.device(converged)).index_select(0, rows)[:, None]
            value = torch.where(answered, value, self.z.index_select(0, rows))
        self.outcome.value[rows if self._rows is None else self._rows.index_select(0, rows)] = value
        names, norm, good = self._names[gone], self.norm[gone], converged[gone]
        self.outcome.residual[names], self.outcome.size[names] = norm, self.size[gone]
        self.outcome.since[names] = self._since[gone]
        finite = np.isfinite(norm[~good])
        if not finite.all():
            self._failures.add(NANORINF)
        if finite.any():
            self._failures.add("DIVERGED_MAX_IT" if self.iteration >= self.limits.iterations else "DIVERGED_DTOL")

    def _leave(self) -> None:
        keep = self.device((~self.over).nonzero()[0])
        rows, samples = self.samples.rows_of(keep)
        if self.map.restrict(keep, rows, samples, self.shaped(self.z)):
            gone = self.outcome.residual[self._names[self.over]]
            self._finished += float(np.square(gone[np.isfinite(gone)]).sum())
            self.keep(keep, rows, samples)
        else:
            self._together = True
            self._failures.clear()

    def _reason(self) -> str:
        for name in (NANORINF, "DIVERGED_DTOL", "DIVERGED_MAX_IT"):
            if name in self._failures:
                return name
        return "CONVERGED_FNORM_RELATIVE"


class Batch:
    """What a per-sample solver is told through the application context of its SNES.

    Parameters
    ----------
    map
        The cell.
    like
        A tensor of the state's shape, precision and device.
    start
        Initial state where the vector does not hold it: then state and answer stay on their device.
    retain
        Whether what the solver learns of the Jacobian is kept for the whole batch.
    evaluated_again
        Whether the caller evaluates the cell at the answer anyway, and judges its residual then.
    differentiable
        Whether torch can differentiate the map.

    Attributes
    ----------
    iteration
        The iteration, after the solve.
    history
        Differences of residuals and images near the fixed point, where they were to be retained and there are any.
    """

    def __init__(
        self,
        map: SampleMap,
        like: Tensor,
        *,
        start: Tensor | None = None,
        retain: bool = False,
        evaluated_again: bool = False,
        differentiable: bool = True,
    ) -> None:
        self.start = start
        self.evaluated_again = evaluated_again
        self.differentiable = differentiable
        self.map = map
        self.like = like
        self.retain = retain
        self.iteration: BatchIteration | None = None
        self.history: History | None = None


class BatchSolver:
    """Context of a SNES of python type that treats every sample on its own.

    The SNES's application context is a `Batch`. Without one, its vector (on one process) is one sample, and f(z) is z
    minus the SNES's function. Tolerances are judged sample by sample, see `Limits`; PETSc's monitors are told the norm of
    the whole residual. Not collective, every method.
    """

    def start(self, batch: Batch, z0: Tensor, limits: Limits) -> BatchIteration:
        """Return the iteration at its start."""
        raise NotImplementedError

    def finish(self, batch: Batch) -> None:
        """Do what is left to do after the last iteration."""

    def describe(self) -> str:
        """Return method and settings in a line."""
        raise NotImplementedError

    def view(self, snes: PETSc.SNES, viewer: PETSc.Viewer) -> None:
        """Print the settings, for ``-snes_view``."""
        viewer.printfASCII(f"  per sample: {self.describe()}\n")

    def solve(self, snes: PETSc.SNES, b: PETSc.Vec | None, x: PETSc.Vec) -> None:
        """Solve from the state in x, and leave the answer there."""
        batch = snes.appctx if isinstance(snes.appctx, Batch) else _whole_vector(snes, x)
        rtol, atol, _, most = snes.getTolerances()
        z0 = copy_from_vector(x, batch.like) if batch.start is None else batch.start
        prefix = snes.getOptionsPrefix() or ""
        watched = bool(snes.getMonitor()) or any(
            name.startswith(prefix + "snes_monitor") for name in PETSc.Options().getAll()
        )
        with torch.no_grad():
            iteration = self.start(batch, z0, Limits(rtol, atol, most, snes.getDivergenceTolerance()))
            batch.iteration = iteration

            def watch(number: int, norm: float) -> None:
                snes.setIterationNumber(number)
                snes.setFunctionNorm(norm)
                snes.logConvergenceHistory(norm, 0)
                if watched:
                    copy_to_vector(iteration.value(), x)
                    snes.monitor(number, norm)

            reason = iteration.run(watch)
            self.finish(batch)
            if batch.start is None or watched:
                copy_to_vector(iteration.outcome.value, x)
        snes.setConvergedReason(getattr(PETSc.SNES.ConvergedReason, reason))


def _whole_vector(snes: PETSc.SNES, x: PETSc.Vec) -> Batch:
    """Return the batch of one sample that any other SNES is."""
    if x.getComm().getSize() > 1:
        raise HpcdeqError(
            f"-{snes.getOptionsPrefix() or ''}snes_type {snes.getPythonType()}: a per-sample solver works on one process;"
            " choose one of PETSc's own types here"
        )
    with read_view(x) as values:
        like = torch.empty_like(values)
    state, residual = x.duplicate(), x.duplicate()

    def function(z: Tensor) -> Tensor:
        copy_to_vector(z, state)
        snes.computeFunction(state, residual)  # less the right-hand side
        return z - copy_from_vector(residual, like)

    return Batch(SampleMap(function, Samples(1)), like, differentiable=False)
