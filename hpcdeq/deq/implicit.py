"""Exact derivatives of a fixed point, of any order, by linear solves.

At z = f(z, θ) with J = ∂f/∂z (implicit function theorem; Bai, Kolter, Koltun 2019, arXiv 1909.01377, section 3):

    tangent   dz = (I - J)⁻¹ (∂f/∂θ) dθ
    adjoint   θ̄ = (∂f/∂θ)ᵀ u,   u = (I - J)⁻ᵀ z̄

Two differentiable functions say all of it: `FixedPointFunction`, θ ↦ z, and `Resolvent`, g ↦ (I - J)⁻¹ g or
(I - J)⁻ᵀ g, which depends on (z, θ) through J. Each one's derivatives are written with the other and with derivatives
of f: derivatives of any order and any mix of forward and reverse mode follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpcdeq.deq.arguments import StateFunction
from hpcdeq.deq.forward import SLACK, TOLERANCES, ForwardSolver, Samples, Solution, bind, resolvent_product
from hpcdeq.deq.jacobian import Linearisation
from hpcdeq.deq.work import Work
from hpcdeq.errors import ConvergenceError, HpcdeqError
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.operators import matrix_from_products
from hpcdeq.petsc.options import Options
from hpcdeq.petsc.solves import SolveRecord, run_ksp
from hpcdeq.petsc.vectors import copy_from_vector, copy_to_vector

MAX_ITERATIONS = 1000
GMRES_RESTART = 50


@dataclass(frozen=True)
class LinearSolution:
    """How a tangent or adjoint solve ended.

    Attributes
    ----------
    reason
        PETSc's name of the reason.
    iterations
        Krylov iterations.
    residual
        ``(B,)`` true residual norms of each sample, computed afresh at the answer.
    right_hand_side
        ``(B,)`` norms of the right-hand side, which the residuals are to be compared with.
    record
        PETSc's record of the solve.
    """

    reason: str
    iterations: int
    residual: Tensor
    right_hand_side: Tensor
    record: SolveRecord


@dataclass
class Log:
    """The last forward, adjoint and tangent solve of a layer, and what all of them cost."""

    work: Work
    solution: Solution | None = None
    adjoint: LinearSolution | None = None
    tangent: LinearSolution | None = None


class Equilibrium:
    """One fixed point with what its derivatives share: the linearised cell and the Krylov solver.

    Parameters
    ----------
    function
        ``function(z, *tensors)``.
    sample_index
        As in `Samples.of`.
    options
        PETSc's options, with their prefix.
    log
        Where the outcome of each solve is kept.
    differentiated
        Whether a derivative will be asked for: the last evaluation of the forward solve then is the linearisation.
    """

    def __init__(
        self,
        function: StateFunction,
        sample_index: Tensor | None,
        options: Options,
        log: Log,
        *,
        differentiated: bool,
    ) -> None:
        self.function = function
        self.sample_index = sample_index
        self.options = options
        self.log = log
        self.differentiated = differentiated
        self._at: Linearisation | None = None
        self._ksp: PETSc.KSP | None = None

    def solve(self, z0: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Return the fixed point. Not collective."""
        self.samples = Samples.of(z0, self.sample_index)
        self._point: tuple[Tensor, list[Tensor]] | None = None
        evaluate = None
        if self.differentiated:

            def evaluate(z: Tensor) -> Tensor:
                self._at = Linearisation(self.function, z, tensors)
                return self._at.value

        solver = ForwardSolver(bind(self.function, tensors), self.samples, self.options, self.log.work)
        try:
            self.log.solution = solver.solve(z0.detach(), evaluate)
        except ConvergenceError as error:
            self.log.solution = error.record if isinstance(error.record, Solution) else None
            raise
        self._point = (self.log.solution.value, list(tensors))
        return self.log.solution.value.clone()

    def linearisation(self) -> Linearisation:
        """Return the cell linearised at the fixed point. Not collective."""
        if self._at is None:
            assert self._point is not None
            self._at = Linearisation(self.function, *self._point)
            self.log.work.cell_evaluations += self.samples.count
        return self._at

    def resolvent(self, g: Tensor, *, transpose: bool) -> Tensor:
        """Return (I - J)⁻¹ g, or (I - J)⁻ᵀ g.

        Not collective.

        Raises
        ------
        ConvergenceError
            The linear solve failed, or its true residual says that it did.
        """
        norm = self.samples.norms(g)
        if not bool(norm.any()):
            done = SolveRecord("KSP", "none", self.options.prefix, "CONVERGED_ATOL", True, 0, 0.0)
            self._keep(LinearSolution(done.reason, 0, norm.cpu(), norm.cpu(), done), transpose=transpose)
            return torch.zeros_like(g)
        at = self.linearisation()
        ksp = self._solver(at)
        b = PETSc.Vec().createSeq(g.numel(), comm=PETSc.COMM_SELF)
        x = b.duplicate()
        try:
            copy_to_vector(g, b)
            with self.options.inserted():
                record = run_ksp(ksp, b, x, transpose=transpose)
            rtol, atol = ksp.getTolerances()[:2]
            answer = copy_from_vector(x, g)
        finally:
            b.destroy()
            x.destroy()
        if transpose:
            self.log.work.cell_vjps += self.samples.count
            error = g - answer + at.vjp(answer)
        else:
            self.log.work.cell_jvps += self.samples.count
            error = g - answer + at.jvp(answer)
        residual = self.samples.norms(error)
        outcome = LinearSolution(record.reason, record.iterations, residual.cpu(), norm.cpu(), record)
        self._keep(outcome, transpose=transpose)
        total, bound = float(residual.norm()), SLACK * max(rtol * float(norm.norm()), atol)
        if not record.converged or not total <= bound:
            name = "adjoint" if transpose else "tangent"
            raise ConvergenceError(
                f"{name} system of the fixed point not solved by {record.solver}: {record.reason} after"
                f" {record.iterations} iterations, true residual {total:.3g}"
                f" where the right-hand side has {float(norm.norm()):.3g}.\n"
                f"Likely fix: {record.remedy()}.\n"
                f"History: add -{record.prefix}ksp_monitor_true_residual -{record.prefix}ksp_converged_reason.",
                record=outcome,
            )
        return answer

    def _keep(self, outcome: LinearSolution, *, transpose: bool) -> None:
        if transpose:
            self.log.adjoint = outcome
        else:
            self.log.tangent = outcome

    def _solver(self, at: Linearisation) -> PETSc.KSP:
        if self._ksp is None:
            n = at.z.numel()
            work, count = self.log.work, self.samples.count
            # The products hold the linearisation, not this object: PETSc's references are invisible to Python's
            # garbage collector, and a cycle through them would never be freed.
            matrix = matrix_from_products(
                PETSc.COMM_SELF,
                (n, n),
                (n, n),
                resolvent_product(at, work, count, transpose=False),
                resolvent_product(at, work, count, transpose=True),
            )
            ksp = PETSc.KSP().create(comm=PETSc.COMM_SELF)
            ksp.setOptionsPrefix(self.options.prefix)
            ksp.setOperators(matrix)
            ksp.setType(PETSc.KSP.Type.GMRES)
            ksp.setGMRESRestart(GMRES_RESTART)
            ksp.getPC().setType(PETSc.PC.Type.NONE)
            rtol = TOLERANCES.get(at.z.dtype, TOLERANCES[torch.float32])[0]
            ksp.setTolerances(rtol=rtol, atol=1e-50, max_it=MAX_ITERATIONS)
            with self.options.inserted():
                ksp.setFromOptions()
            self._ksp = ksp
        return self._ksp


class FixedPointFunction(torch.autograd.Function):
    """θ ↦ z with z = f(z, θ)."""

    @staticmethod
    def forward(equilibrium: Equilibrium, z0: Tensor, *tensors: Tensor) -> Tensor:
        return equilibrium.solve(z0, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.equilibrium, _, *tensors = inputs
        ctx.save_for_backward(output, *tensors)
        ctx.save_for_forward(output, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], equilibrium: Equilibrium, z0: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, None]:
        """Solve once where a vmap is over directions of differentiation alone. Not collective."""
        refuse_batched(in_dims[1:])
        return FixedPointFunction.apply(equilibrium, z0, *tensors), None

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
        equilibrium, (z, *tensors) = ctx.equilibrium, ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if cotangent is None or not any(wanted):
            return (None,) * (2 + len(tensors))
        u = Resolvent.apply(equilibrium, True, cotangent, z, *tensors)
        equilibrium.log.work.cell_vjps += equilibrium.samples.count
        if not torch.is_grad_enabled():  # first derivatives only: the graph of the linearisation has them
            return None, None, *equilibrium.linearisation().tensor_vjp(u, wanted)
        partial, chosen = restrict(equilibrium.function, z, tensors, wanted)
        pull = pullback(partial, *chosen)
        products = iter(pull(u))
        return None, None, *(next(products) if want else None for want in wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        equilibrium, (z, *tensors) = ctx.equilibrium, ctx.saved_tensors
        given = tangents[2:]
        wanted = [t is not None for t in given]
        partial, chosen = restrict(equilibrium.function, z, tensors, wanted)
        equilibrium.log.work.cell_jvps += equilibrium.samples.count
        right = push_forward(partial, chosen, [t for t in given if t is not None], z)
        return Resolvent.apply(equilibrium, False, right, z, *tensors)


class Resolvent(torch.autograd.Function):
    """(g, z, θ) ↦ (I - J(z, θ))⁻¹ g, or with the transpose.

    With s(z, θ; a, b) = <a, J(z, θ) b> and A = I - J, both derivatives of w = A⁻¹ g are derivatives of s:
    dw = A⁻¹ (dg + dJ w), and a cotangent w̄ gives ḡ = v = A⁻ᵀ w̄ and (z̄, θ̄) = ∂s(z, θ; v, w). For w = A⁻ᵀ g the roles of
    a and b change.
    """

    @staticmethod
    def forward(equilibrium: Equilibrium, transpose: bool, g: Tensor, z: Tensor, *tensors: Tensor) -> Tensor:
        return equilibrium.resolvent(g, transpose=transpose)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.equilibrium, ctx.transpose, _, z, *tensors = inputs
        ctx.save_for_backward(output, z, *tensors)
        ctx.save_for_forward(output, z, *tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        equilibrium: Equilibrium,
        transpose: bool,
        g: Tensor,
        z: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, int | None]:
        """Solve for many right-hand sides at one fixed point, as ``jacrev`` and ``hessian`` ask for. Not collective."""
        refuse_batched(in_dims[3:])
        if in_dims[2] is None:
            return Resolvent.apply(equilibrium, transpose, g, z, *tensors), None
        parts = [Resolvent.apply(equilibrium, transpose, part, z, *tensors) for part in g.unbind(in_dims[2])]
        return torch.stack(parts), 0

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None) -> tuple[Tensor | None, ...]:
        equilibrium, (w, z, *tensors) = ctx.equilibrium, ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        if cotangent is None:
            return (None,) * (4 + len(tensors))
        v = Resolvent.apply(equilibrium, not ctx.transpose, cotangent, z, *tensors)
        # The gradient of s vanishes with w, as it does wherever a product J v is taken by differentiating a zero Jᵀ u.
        if not any(wanted) or not (torch.is_grad_enabled() or bool(w.any())):
            return None, None, v, *(None for _ in wanted)
        equilibrium.log.work.cell_vjps += 2 * equilibrium.samples.count
        gradient, _ = bilinear_gradient(equilibrium.function, z, tensors, wanted)
        products = iter(gradient(w, v) if ctx.transpose else gradient(v, w))
        return None, None, v, *(next(products) if want else None for want in wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        equilibrium, (w, z, *tensors) = ctx.equilibrium, ctx.saved_tensors
        right, given = tangents[2], tangents[3:]
        wanted = [t is not None for t in given]
        if any(wanted):
            equilibrium.log.work.cell_jvps += 2 * equilibrium.samples.count
            gradient, _ = bilinear_gradient(equilibrium.function, z, tensors, wanted)
            if ctx.transpose:
                pull = pullback(lambda b: gradient(w, b), torch.zeros_like(z))
            else:
                pull = pullback(lambda a: gradient(a, w), torch.zeros_like(z))
            (change,) = pull(tuple(t for t in given if t is not None))
            right = change if right is None else right + change
        assert right is not None
        return Resolvent.apply(equilibrium, ctx.transpose, right, z, *tensors)


def refuse_batched(in_dims: Sequence[int | None]) -> None:
    """Refuse a vmap over the inputs or weights of a fixed point. Not collective."""
    if any(dim is not None for dim in in_dims):
        raise HpcdeqError(
            "vmap over the input or the weights of a fixed point is not supported: give the samples as one batch"
        )


def pullback(function: Callable[..., Any], *at: Tensor) -> Callable[..., Any]:
    """Return the transpose of a function's derivative at a point. Not collective."""
    return torch.func.vjp(function, *at)[1]


def alias(tensor: Tensor) -> Tensor:
    """Return the tensor under a new name.

    Not collective. A saved *output* that is differentiated with respect to would lead back into the function that is
    being differentiated, and from there around without end.
    """
    return tensor.view_as(tensor)


def restrict(
    function: StateFunction, z: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Return f as a function of the wanted tensors only, and their aliased values. Not collective."""
    state = alias(z)

    def partial(*chosen: Tensor) -> Tensor:
        values = iter(chosen)
        return function(state, *(next(values) if want else t for t, want in zip(tensors, wanted, strict=True)))

    return partial, tuple(alias(t) for t, want in zip(tensors, wanted, strict=True) if want)


def push_forward(
    function: Callable[..., Tensor], at: Sequence[Tensor], tangents: Sequence[Tensor], like: Tensor
) -> Tensor:
    """Return the derivative of a function along tangents, by differentiating its transpose twice.

    Not collective. Forward-mode automatic differentiation cannot be nested, and this runs inside its rules.
    """
    pull = pullback(function, *at)
    pull_back = pullback(pull, torch.zeros_like(like))
    return pull_back(tuple(tangents))[0]


def bilinear_gradient(
    function: StateFunction, z: Tensor, tensors: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Callable[[Tensor, Tensor], tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Return (a, b) ↦ ∂s/∂(the wanted of z, *tensors) of s = <a, J b>, and those arguments. Not collective."""
    points = (z, *tensors)
    chosen = tuple(alias(p) for p, want in zip(points, wanted, strict=True) if want)

    def gradient(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        def transpose_product(*values: Tensor) -> Tensor:
            given = iter(values)
            state, *rest = (next(given) if want else alias(p) for p, want in zip(points, wanted, strict=True))
            pull = pullback(lambda y: function(y, *rest), state)
            return pull(a)[0]

        pull = pullback(transpose_product, *chosen)
        return pull(b)

    return gradient, chosen
