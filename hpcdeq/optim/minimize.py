"""`minimize`: one verb for every method."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from hpcdeq import parallel
from hpcdeq.errors import ConvergenceError, DataError, OptionError
from hpcdeq.methods import GROWING, METHODS, MINIBATCH, TORCH_LBFGS
from hpcdeq.optim.base import BUDGET, DIVERGED, INTERRUPTED, Callback, Keeper, Recorder, Result
from hpcdeq.optim.presets import GAUSS_NEWTON, HESSIAN, Preset, check_rebalancing, preset_of, resolved_options
from hpcdeq.optim.sampling import Sampling
from hpcdeq.optim.stochastic import MinibatchRun, MinibatchSettings
from hpcdeq.optim.tao import TaoRun
from hpcdeq.optim.torch_lbfgs import TorchLbfgs
from hpcdeq.petsc.options import Value
from hpcdeq.petsc.vocabulary import check_options
from hpcdeq.problem import LeastSquares, TrainingProblem
from hpcdeq.problem.branches import elsewhere
from hpcdeq.problem.determinism import nondeterminism
from hpcdeq.problem.randomness import random_layer
from hpcdeq.problem.rebalancing import Rebalancing
from hpcdeq.state import Known
from hpcdeq.watchdog import hang_seconds, watched

__all__ = ["METHODS", "check_method", "minimize", "resolved_options"]


def minimize(
    problem: TrainingProblem,
    method: str = "trgn",
    max_iterations: int = 100,
    options: Mapping[str, Value] | None = None,
    *,
    initial: Tensor | None = None,
    max_seconds: float | None = None,
    callback: Callback | None = None,
    minibatch: MinibatchSettings | None = None,
    sampling: Sampling | None = None,
    curvature: str | None = None,
    raise_on_failure: bool = True,
    keeper: Keeper | None = None,
    resume: Known | None = None,
    rebalancing: Rebalancing | None = None,
) -> Result:
    """Minimise a training problem.

    Collective on the problem's comm.

    Parameters
    ----------
    problem
        What is minimised.
    method
        ``trgn``, ``lbfgs``, ``newton``, ``adam``, ``adamw``, ``rmsprop``, ``torch-lbfgs``, or ``tao:TYPE`` with any type of
        TAO's.
    max_iterations
        Bound on the steps (on minibatches: epochs).
    options
        PETSc options such as ``{"tao_gatol": 1e-8}``; the command line wins over them, they win over the preset's.
    initial
        ``(n,)`` weights to begin with, the same on all ranks; default: the model's.
    max_seconds
        Bound on the wall time, checked after each iteration.
    callback
        Called with each `Iterate`, on all ranks.
    minibatch
        Settings of the methods on minibatches; only with adam, adamw and rmsprop.
    sampling
        Samples of curvature products and first iterations; only with TAO's methods. Growing batches: trgn and lbfgs alone.
    curvature
        ``gauss_newton`` or ``hessian``: the matrix that TAO is given as the Hessian, in place of the method's own.
    raise_on_failure
        Whether a diverged run raises or is returned with its status.
    keeper
        Is offered the complete state at every safe point, and may end the run there.
    resume
        A state to go on from, as a keeper was given it and `hpcdeq.record.read_checkpoint` has read it; everything else as
        it was, but for the bounds.
    rebalancing
        Moves samples between ranks where some turn out slower than others. A repeat of the run is then equal to rounding, and
        not to the last bit.

    Raises
    ------
    ConvergenceError
        The method failed; ``record`` is the `Result`.
    OptionError
        An unknown method or option, a method that does not fit the problem, or a state of another method or model.
    DataError
        The loss at the initial weights is not finite.
    """
    with parallel.agreement(problem.comm):
        _check(problem, method, max_iterations, options, minibatch)
        if rebalancing is not None:
            check_rebalancing(method)
        preset = _preset(method, sampling, curvature)
        patience = hang_seconds()
    x0 = problem.initial() if initial is None else initial.detach()
    with parallel.agreement(problem.comm):
        _check_initial(problem, x0)
        if method not in MINIBATCH:
            _check_determinism(problem, method, x0)
    recorder = Recorder(problem, callback, max_seconds, keeper=keeper, method=method, rebalancing=rebalancing)
    problem.begin(noisy=method in MINIBATCH)
    known = None if resume is None else resume["method"]
    with watched(patience), contextlib.ExitStack() as stack:
        stack.callback(problem.end)
        if resume is not None:
            if rebalancing is not None:  # first: what is remembered of samples goes to those who have them
                rebalancing.restore(resume["problem"])
            with parallel.agreement(problem.comm):
                recorder.restore(resume, x0)
        if rebalancing is not None:
            rebalancing.begin(0 if recorder.last is None else recorder.last.iteration)
        if method in MINIBATCH:
            result = MinibatchRun(recorder, method, minibatch or MinibatchSettings()).minimize(
                x0, max_iterations, known
            )
        elif method == TORCH_LBFGS:
            result = TorchLbfgs(recorder).minimize(x0, max_iterations, known)
        else:
            given = resolved_options(method, options)
            left = max_iterations - recorder.offset
            result = TaoRun(recorder, preset, sampling).minimize(x0, given, left, known)
            if problem.adapting and result.status not in (BUDGET, INTERRUPTED):
                # What ended on loose solves is taken up with tight ones: to be confirmed, or to go on.
                problem.tighten()
                recorder.offset = result.iterations
                result = TaoRun(recorder, preset, sampling).minimize(
                    result.x, given, max_iterations - result.iterations
                )
        if result.status == INTERRUPTED:
            return result
        if problem.adapting:
            problem.tighten()
            loss, gradient = problem.loss_and_gradient(result.x)
            result = dataclasses.replace(result, loss=loss, gradient_norm=float(gradient.norm()))
        result = _with_branches(problem, result)
    if result.status == DIVERGED and raise_on_failure:
        raise ConvergenceError(
            f"{method} stopped after {result.iterations} iterations: {result.reason}, {result.message}.",
            record=result,
            agreed=True,
        )
    return result


def _with_branches(problem: TrainingProblem, result: Result) -> Result:
    """Return a result whose message says so where the loss is that of fixed points which only warm starts find."""
    try:
        differing, examined = elsewhere(problem, result.x)
    except ConvergenceError:  # no fixed points at these weights at all, and the result says so
        return result
    if not differing:
        return result
    told = (
        f"{result.message}. But {differing} of {examined} samples have another fixed point from where the layers begin than"
        " the one that warm starts followed: the loss is not that of the model as it will be applied. Try"
        " --no-warm-start, or a cell with a single fixed point (mlp_deq with norm below 1, monotone_deq)"
    )
    return dataclasses.replace(result, message=told)


def _preset(method: str, sampling: Sampling | None, curvature: str | None) -> Preset:
    """Return the preset of a method with another curvature, and refuse what it does not take."""
    preset = preset_of(method)
    if method in MINIBATCH or method == TORCH_LBFGS:
        if sampling is not None or curvature is not None:
            raise OptionError(
                f"{method} takes no curvature products: leave hessian_fraction, batch_growth and curvature out"
            )
        return preset
    if curvature not in (None, GAUSS_NEWTON, HESSIAN):
        raise OptionError(f"curvature is {curvature!r}: choose {GAUSS_NEWTON} or {HESSIAN}")
    if curvature == HESSIAN and method in GROWING:
        raise OptionError(f"{method} needs a curvature that is never negative: leave curvature out, or use newton")
    if sampling is not None:
        if sampling.batch_size is not None and method not in GROWING:
            raise OptionError(
                f"growing batches are for {' and '.join(GROWING)}: {method} keeps its objective to the end"
            )
        if method == "lbfgs" and sampling.hessian_fraction != 1:
            raise OptionError("lbfgs takes no curvature products: leave hessian_fraction out")
        if preset.least_squares and sampling.hessian_fraction != 1:
            raise OptionError(f"{method} works with all residuals: leave hessian_fraction out")
    return preset if curvature is None else dataclasses.replace(preset, curvature=curvature)


def check_method(problem: TrainingProblem, method: str) -> None:
    """Refuse a method that does not fit a problem, without taking a step.

    Collective on the problem's comm.

    Raises
    ------
    OptionError
        As `minimize` does.
    """
    with parallel.agreement(problem.comm):
        _check(problem, method, 0, None, None)


def _check(
    problem: TrainingProblem,
    method: str,
    max_iterations: int,
    options: Mapping[str, Value] | None,
    minibatch: MinibatchSettings | None,
) -> None:
    preset = preset_of(method)
    if max_iterations < 0:
        raise OptionError(f"max_iterations is {max_iterations}: give 0 or more")
    if options and method in MINIBATCH:
        raise OptionError(
            f"{method} has no PETSc options: its settings are --learning-rate, --batch-size, --schedule, --warmup and --seed"
        )
    if options and method == TORCH_LBFGS:
        raise OptionError(f"{method} has no PETSc options: leave them out, or use --optimizer lbfgs")
    if method in MINIBATCH:
        return
    if minibatch is not None:
        raise OptionError(f"settings of minibatches do not go with {method}: it works on all samples at once")
    check_options([f"-{name}" for name in resolved_options(method, options)], ["tao_"])
    if preset.least_squares:
        LeastSquares(problem)
    for name, fixed_point in problem.guidance.layers.items():
        if fixed_point.inexact:
            raise OptionError(
                f"{method} needs exact derivatives, and the fixed point {name} has the inexact adjoint"
                f" {fixed_point.inexact}: leave -deq_ksp_type out, or use adam"
            )
    layer = random_layer(problem.model)
    if layer is not None:
        raise OptionError(
            f"{method} needs a loss that is the same each time, and layer {layer} makes it random: remove it, call"
            " model.eval(), or use adam"
        )


def _check_determinism(problem: TrainingProblem, method: str, x0: Tensor) -> None:
    told = nondeterminism(problem, x0)
    if told is not None:
        raise OptionError(
            f"{method} needs a loss that is the same each time, and {told}: take chance and running statistics out, call"
            " model.eval(), or use adam"
        )


def _check_initial(problem: TrainingProblem, x0: Tensor) -> None:
    if x0.shape != (problem.layout.count,):
        raise OptionError(f"initial has shape {tuple(x0.shape)}, the model has ({problem.layout.count},) weights")
    finite = torch.isfinite(x0)
    if not bool(finite.all()):
        raise DataError(
            f"the initial weights are not finite (first: number {int((~finite).nonzero()[0])} of {problem.layout.count}):"
            " mend the model's initialisation"
        )
