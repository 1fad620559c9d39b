"""Find a fixed point z = f(z) with a SNES: residual z - f(z), convergence judged sample by sample."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hpcdeq.deq.batch import NANORINF, Batch, BatchSolver
from hpcdeq.deq.history import History
from hpcdeq.deq.jacobian import Linearisation
from hpcdeq.deq.resolvent import ResolventMatrix
from hpcdeq.deq.samples import SampleMap, Samples
from hpcdeq.deq.solution import Solution, Trail, explain
from hpcdeq.deq.work import Work
from hpcdeq.errors import ConvergenceError, OptionError
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.operators import ProductMatrix
from hpcdeq.petsc.options import Options
from hpcdeq.petsc.python_types import SHORT_NAMES, full_name, short_name
from hpcdeq.petsc.solves import SolveRecord, reraise, run_snes, set_type, type_name
from hpcdeq.petsc.vectors import copy_from_vector, copy_to_vector, shaped_read

# (relative, absolute) tolerances of a sample's residual, and the relative one of the derivative systems, by precision.
# Every option of PETSc's stays in reach: -deq_snes_rtol, -deq_snes_atol, -deq_ksp_rtol.
TOLERANCES = {torch.float64: (1e-10, 1e-12), torch.float32: (1e-5, 1e-6)}
MAX_ITERATIONS = 500
DEFAULT_TYPE = "batched_anderson"
# What goes on with the samples that the first solver gave up, in this order.
FALLBACK = "ngmres,newtonls"
# Up to so many of them are tried each on its own.
ONE_BY_ONE = 16
# A solver's last residual and the one computed afresh differ by rounding; more than this factor means a wrong answer.
SLACK = 10.0

_log = logging.getLogger(__name__)

PETSC_ERR_FP = 72
PETSC_ERR_LIB = 76


@dataclass
class _Attempt:
    """What one solver made of a batch: norms and iterations ``(B,)``."""

    value: Tensor
    record: SolveRecord
    since: Tensor
    known: tuple[Tensor, Tensor] | None  # true residual and size at the value, where the solver knows them
    trail: Trail = field(default_factory=list)


class ForwardSolver:
    """One forward solve: its callbacks and its counters.

    Parameters
    ----------
    function
        ``function(z) -> f(z)``, all other arguments bound; see `SampleMap`.
    samples
        Which rows belong together.
    options
        PETSc's options, with their prefix.
    work
        Counters to add to.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], samples: Samples, options: Options, work: Work) -> None:
        self.function = function
        self.samples = samples
        self.options = options
        self.work = work
        self.retain = False
        self.loosened = 0.0
        self.history: History | None = None

    def solve(self, z0: Tensor, evaluate_last: Callable[[Tensor], Tensor] | None = None) -> Solution:
        """Return the fixed point found from z0, whether or not all samples have converged.

        Not collective (the solver lives on this rank alone).

        Parameters
        ----------
        z0
            Initial guess.
        evaluate_last
            The evaluation of f at the answer that its true residual is computed from; a caller that differentiates
            keeps this evaluation's graph. None: a plain evaluation, where the solver does not know the true residual.
        """
        if z0.numel() == 0:
            nothing = SolveRecord("SNES", "none", self.options.prefix, "CONVERGED_FNORM_ABS", True, 0, 0.0)
            empty = torch.zeros(self.samples.count, dtype=torch.float64)
            whole = empty.to(torch.int64)
            return Solution(z0.detach().clone(), nothing.reason, whole, empty, empty == 0, 0.0, nothing)
        self.began = time.perf_counter()
        self.evaluated = 0
        self._again = evaluate_last is not None
        attempt = self._attempt(self.function, self.samples, z0, None)
        solution = self._judge(attempt, evaluate_last)
        for kind in self.fallback:
            if bool(solution.converged.all()):
                break
            solution = self._go_on(solution, z0, kind, evaluate_last)
        self._count(solution)
        return solution

    def checked(self, solution: Solution) -> Solution:
        """Return a solution that has converged.

        Not collective.

        Raises
        ------
        ConvergenceError
            Names the samples that did not converge; its ``record`` is the solution.
        """
        if not solution.record.converged or not bool(solution.converged.all()):
            raise ConvergenceError(explain(solution), record=solution)
        return solution

    # ----------------------------------------------------------------------------------------------- one solver

    def _attempt(
        self, function: Callable[[Tensor], Tensor], samples: Samples, z0: Tensor, kind: str | None
    ) -> _Attempt:
        run = _Run(SampleMap(function, samples, self.work), z0, self.began, self.evaluated, self.samples.count)
        rtol, atol = TOLERANCES.get(z0.dtype, TOLERANCES[torch.float32])
        vector = PETSc.Vec().createSeq(z0.numel(), comm=PETSc.COMM_SELF)
        residual = vector.duplicate()
        snes = PETSc.SNES().create(comm=PETSc.COMM_SELF)
        jacobian: PETSc.Mat | None = None
        try:
            snes.setOptionsPrefix(self.options.prefix)
            _set_type(snes, DEFAULT_TYPE)
            snes.appctx = Batch(run.map, z0, retain=self.retain and kind is None, evaluated_again=self._again)
            snes.setFunction(run.residual, residual)
            snes.setTolerances(rtol=rtol, atol=atol, stol=0.0, max_it=MAX_ITERATIONS)
            # Newton's inner solves need few digits; what is typed as -deq_ksp_rtol replaces this one too.
            snes.getKSP().setTolerances(rtol=1e-4)
            snes.getKSP().getPC().setType(PETSc.PC.Type.NONE)
            with self.options.inserted():
                reraise(snes.setFromOptions)
                snes.setTolerances(rtol=max(snes.getTolerances()[0], self.loosened))
                if kind is None:
                    chain = PETSc.Options(self.options.prefix).getString("snes_fallback", FALLBACK)
                    self.fallback = [] if chain.strip() in ("none", "") else [one.strip() for one in chain.split(",")]
                else:
                    _set_type(snes, kind)
                _set_inner_types(snes)
                # Asked of another type, PETSc would crash.
                ours = snes.getType() == PETSc.SNES.Type.PYTHON and isinstance(snes.getPythonContext(), BatchSolver)
                if ours:
                    snes.appctx.start = z0
                else:
                    copy_to_vector(z0, vector)
                    snes.setConvergenceTest(run.converged)
                    jacobian = run.jacobian_matrix()
                    snes.setJacobian(run.update_jacobian, jacobian)
                record = self._run(snes, vector)
            self.rtol, self.atol = snes.getTolerances()[:2]
            per_sample = snes.appctx.iteration
            if kind is None:
                self.history = snes.appctx.history
            if per_sample is None:
                value = copy_from_vector(vector, z0)
            else:
                value = per_sample.outcome.value.reshape(z0.shape)
        finally:
            snes.appctx = None
            snes.destroy()
            for thing in (jacobian, residual, vector):
                if thing is not None:
                    thing.destroy()
        self.evaluated += run.map.evaluated
        if per_sample is None:
            return _Attempt(value, record, run.since, None, run.trail)
        outcome = per_sample.outcome
        trail = [
            (run.mean_evaluations(evaluated), seconds + run.offset, norm, size)
            for evaluated, seconds, norm, size in outcome.trail
        ]
        since, *known = (per_sample.device(v) for v in (outcome.since, outcome.residual, outcome.size))
        return _Attempt(value, record, since, (known[0], known[1]), trail)

    def _run(self, snes: PETSc.SNES, vector: PETSc.Vec) -> SolveRecord:
        try:
            return run_snes(snes, None, vector)
        except PETSc.Error as error:
            # Some types (ngmres) raise on NaN where the others end with a reason.
            if error.ierr not in (PETSC_ERR_FP, PETSC_ERR_LIB):
                raise
            its, nan = snes.getIterationNumber(), float("nan")
            return SolveRecord("SNES", type_name(snes), self.options.prefix, NANORINF, False, its, nan)

    # ------------------------------------------------------------------------------------------------- judgement

    def _judge(self, attempt: _Attempt, evaluate_last: Callable[[Tensor], Tensor] | None) -> Solution:
        z, record = attempt.value, attempt.record
        if evaluate_last is None and attempt.known is not None:
            residual, size = attempt.known
        else:
            if evaluate_last is None:
                with torch.no_grad():
                    last = self.function(z)
            else:
                last = evaluate_last(z)
            self.evaluated += self.samples.count
            residual, size = self.samples.norms(last - z).double(), self.samples.norms(last).double()
        within = (residual <= SLACK * (self.rtol * size + self.atol)) & residual.isfinite() & size.isfinite()
        if attempt.known is not None:
            within &= attempt.since >= 0
        iterations = torch.where(attempt.since >= 0, attempt.since, record.iterations)
        line = (
            f"{record.solver}: {record.reason} after {record.iterations} iterations,"
            f" {int(within.sum())} of {self.samples.count} samples converged"
        )
        evaluations = self.evaluated / self.samples.count
        return Solution(
            z,
            record.reason,
            iterations.cpu(),
            residual.cpu(),
            within.cpu(),
            evaluations,
            record,
            attempt.trail,
            [line],
        )

    def _go_on(
        self, first: Solution, z0: Tensor, kind: str, evaluate_last: Callable[[Tensor], Tensor] | None
    ) -> Solution:
        """Try another solver on the samples that have not converged, where the cell can be told of them alone."""
        bad = (~first.converged).to(z0.device)
        if self.history is not None:
            self.history.forget(bad)  # differences from nowhere near the fixed point
        with torch.no_grad():
            image = self.function(z0)
        self.evaluated += self.samples.count
        bad &= self.samples.norms(image).isfinite()  # a cell that says NaN at once says it to everyone
        chosen = bad.nonzero().squeeze(1)
        if not len(chosen):
            return first
        value, since, trail = first.value.clone(), first.iterations.to(z0.device), list(first.trail)
        # One by one while they are few: one that has no fixed point would spoil the mixing of the others.
        groups = chosen.split(1) if len(chosen) <= ONE_BY_ONE else (chosen,)
        for group in groups:
            part = self._part(group, z0)
            if part is None:
                attempt = self._attempt(self.function, self.samples, z0, kind)
                rows = self.samples.rows_of(chosen)[0] if len(attempt.since) > 1 else slice(None)
                value[rows], since[chosen] = attempt.value[rows], attempt.since[chosen]
            else:
                function, samples, rows = part
                attempt = self._attempt(function, samples, z0.index_select(0, rows), kind)
                value[rows], since[group] = attempt.value, attempt.since
            trail += attempt.trail
            if part is None:
                break
        merged = replace(attempt, value=value, since=since, known=None, trail=trail)
        second = self._judge(merged, evaluate_last)
        done = int(second.converged.sum()) - int(first.converged.sum())
        attempts = [*first.attempts, f"{attempt.record.solver} on the other {len(chosen)}: {done} of them converged"]
        _log.warning("fixed points: %s", "; then ".join(attempts[-2:]))
        if bool(second.converged.all()):
            return replace(second, attempts=attempts)
        return replace(second, reason=first.reason, record=first.record, attempts=attempts)

    def _part(self, chosen: Tensor, z0: Tensor) -> tuple[Callable[[Tensor], Tensor], Samples, Tensor] | None:
        """Return the cell for some samples, those samples, and their rows; None where it cannot be told of them alone."""
        if z0.dim() <= 1 and self.samples.index is None:
            return None
        rows, samples = self.samples.rows_of(chosen)
        fewer = SampleMap(self.function, self.samples)
        if not fewer.restrict(chosen, rows, samples, z0):
            return None
        self.evaluated += fewer.evaluated
        return fewer.function, samples, rows

    def _count(self, solution: Solution) -> None:
        work = self.work
        work.cell_evaluations += self.evaluated
        work.solves += self.samples.count
        work.iterations_sum += int(solution.iterations.sum())
        work.iterations_max = max(work.iterations_max, int(solution.iterations.max()))
        work.unconverged += int((~solution.converged).sum())


class _Run:
    """The callbacks of one SNES. Not collective, every method."""

    def __init__(self, map: SampleMap, like: Tensor, began: float, before: int, count: int) -> None:
        self.map = map
        self.like = like
        self.began = began
        self.offset = time.perf_counter() - began
        self.before = before
        self.count = count
        self.trail: Trail = []
        self.since = torch.full((map.samples.count,), -1, dtype=torch.int64, device=like.device)

    def mean_evaluations(self, evaluated: int) -> float:
        return (self.before + evaluated) / self.count

    def residual(self, snes: PETSc.SNES, x: PETSc.Vec, residual: PETSc.Vec) -> None:
        with shaped_read(x, self.like) as z:
            copy_to_vector(z - self.map(z), residual)

    def converged(self, snes: PETSc.SNES, iteration: int, norms: tuple[float, float, float]) -> int:
        reasons, samples = PETSc.SNES.ConvergedReason, self.map.samples
        rtol, atol, _, _ = snes.getTolerances()
        with shaped_read(snes.getSolution(), self.like) as z, shaped_read(snes.getFunction()[0], self.like) as residual:
            norm, size = samples.norms(residual), samples.norms(z - residual)
        done = (norm <= rtol * size + atol) & norm.isfinite() & size.isfinite()
        self.since = torch.where(done, torch.where(self.since < 0, iteration, self.since), -1)
        elapsed = time.perf_counter() - self.began
        self.trail.append((self.mean_evaluations(self.map.evaluated), elapsed, norm.cpu().numpy(), size.cpu().numpy()))
        total = float(norm.square().sum().sqrt())
        if iteration == 0:
            self.first = total
        if done.all():
            return reasons.CONVERGED_FNORM_RELATIVE
        if total != total or total == float("inf"):
            return getattr(reasons, NANORINF)
        if total > snes.getDivergenceTolerance() * self.first > 0:
            return reasons.DIVERGED_DTOL
        return reasons.CONVERGED_ITERATING

    def jacobian_matrix(self) -> PETSc.Mat:
        n = self.like.numel()
        matrix = PETSc.Mat().createPython(((n, n), (n, n)), comm=PETSc.COMM_SELF)
        matrix.setPythonContext(ProductMatrix(_unset))
        matrix.setUp()
        return matrix

    def update_jacobian(self, snes: PETSc.SNES, x: PETSc.Vec, jacobian: PETSc.Mat, _: PETSc.Mat) -> None:
        with shaped_read(x, self.like) as z:
            at = Linearisation(lambda state: self.map.function(state), z.clone(), ())
        self.map.evaluated += self.map.samples.count
        jacobian.setPythonContext(ResolventMatrix(at, self.map.samples, self.map.work))


def _unset(x: PETSc.Vec, y: PETSc.Vec) -> None:
    raise RuntimeError("the Jacobian is used before it is computed")


def _set_inner_types(snes: PETSc.SNES) -> None:
    """Give Newton's inner systems what they can use, where the options choose for tangent and adjoint systems alone."""
    ksp = snes.getKSP()
    if ksp.getType() == PETSc.KSP.Type.PYTHON and short_name(ksp.getPythonType()) in SHORT_NAMES["ksp_type"]:
        ksp.setType(PETSc.KSP.Type.GMRES)
    pc = ksp.getPC()
    if pc.getType() == PETSc.PC.Type.PYTHON and pc.getPythonType() == full_name("pc_type", "secant"):
        pc.setType(PETSc.PC.Type.NONE)


def _set_type(snes: PETSc.SNES, kind: str) -> None:
    try:
        set_type(snes, "snes_type", kind)
    except PETSc.Error as error:
        raise OptionError(
            f"-{snes.getOptionsPrefix()}snes_fallback names {kind!r}, which PETSc does not know"
        ) from error
