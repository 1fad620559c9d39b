"""Preconditioners of curvature matrices, as PETSc types: ``-tao_pc_type kronecker | gauss_newton_diagonal | inner_lbfgs``."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcdeq.errors import OptionError
from hpcdeq.optim.curvature import CurvatureMatrix, curvature_of
from hpcdeq.optim.limited_memory import LimitedMemory
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.options import number
from hpcdeq.problem.factors import PROBES, SAMPLES, KroneckerFactors
from hpcdeq.state import Known, State

# Damping of preconditioners, over the largest eigenvalue: directions that few samples tell of are not to be trusted.
DAMPING = 1e-6


class Kronecker:
    """``-pc_type kronecker``: Kronecker factors of the Gauss-Newton matrix, layer by layer; see `hpcdeq.problem.kronecker`.

    Collective on the preconditioner, every method. They are renewed with every iterate, and damped by the multiple of the
    identity that the optimiser adds to the matrix, at least by ``-pc_kronecker_damping`` (1e-6) times their largest eigenvalue.
    ``-pc_kronecker_probes`` (3) random probes are taken of ``-pc_kronecker_samples`` (128) samples.
    """

    LAYERS = True  # False: the diagonal alone

    def __init__(self) -> None:
        self.damping = DAMPING
        self.probes, self.samples = PROBES, SAMPLES
        self._factors: KroneckerFactors | None = None
        self._point: Tensor | None = None

    def setFromOptions(self, pc: PETSc.PC) -> None:  # noqa: N802 (petsc4py's name)
        """Read the options."""
        options = PETSc.Options(pc.getOptionsPrefix() or "")
        self.damping = float(number(options, "pc_kronecker_damping", self.damping))
        self.probes = int(number(options, "pc_kronecker_probes", self.probes))
        self.samples = int(number(options, "pc_kronecker_samples", self.samples))
        if not self.damping > 0 or self.probes < 1 or self.samples < 1:
            raise OptionError("-pc_kronecker_damping, _probes and _samples: give numbers above 0")

    def setUp(self, pc: PETSc.PC) -> None:  # noqa: N802 (petsc4py's name)
        """Renew the factors where the weights are new."""
        self._renewed(curvature_of(pc))

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Set y = (K + damping I)⁻¹ x."""
        curvature = curvature_of(pc)
        factors = self._renewed(curvature)
        damping = max(curvature.multiple, self.damping * factors.largest, 1e-300) + factors.of_weights
        own = factors.solve(curvature.problem.layout.gather(x.getArray(readonly=True)), damping)
        with y as values:
            values[:] = own

    def state(self) -> State:
        """Return the factors; nothing before the first."""
        return {} if self._factors is None else self._factors.state()

    def restore(self, pc: PETSc.PC, known: Known) -> None:
        """Go on from a state, at the weights of the curvature."""
        curvature = curvature_of(pc)
        if known:
            self._factors = self._made(curvature)
            self._factors.restore(known)
            self._point = curvature.point

    def _made(self, curvature: CurvatureMatrix) -> KroneckerFactors:
        return KroneckerFactors(
            curvature.problem, self.probes, self.samples, curvature.sampling.seed, layers=self.LAYERS
        )

    def _renewed(self, curvature: CurvatureMatrix) -> KroneckerFactors:
        if self._factors is None:
            self._factors = self._made(curvature)
        assert curvature.point is not None
        if self._point is not curvature.point:
            if self._point is None or not torch.equal(self._point, curvature.point):
                self._factors.update(curvature.point)
            self._point = curvature.point
        return self._factors


class GaussNewtonDiagonal(Kronecker):
    """``-pc_type gauss_newton_diagonal``: the diagonal alone, estimated by the same probes.

    Collective on the preconditioner, every method. Options as in `Kronecker`.
    """

    LAYERS = False


class InnerLBFGS(Kronecker):
    """``-pc_type inner_lbfgs``: L-BFGS from the products of the last inner solve, which begins from Kronecker factors.

    Collective on the preconditioner, every method. Morales and Nocedal 2000 ("Automatic preconditioning by limited memory
    quasi-Newton updating"): systems of neighbouring iterates are alike, and conjugate gradients have found where the factors
    are wrong. ``-pc_lbfgs_history`` (20) products are kept; the other options are those of `Kronecker`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.history = 20
        self._memory = LimitedMemory(self.history)
        self._moves = -1
        self._initial: PETSc.Vec | None = None

    def setFromOptions(self, pc: PETSc.PC) -> None:  # noqa: N802 (petsc4py's name)
        """Read the options."""
        super().setFromOptions(pc)
        self.history = int(number(PETSc.Options(pc.getOptionsPrefix() or ""), "pc_lbfgs_history", self.history))
        if self.history < 1:
            raise OptionError(f"-pc_lbfgs_history {self.history}: give 1 or more")
        self._memory.history = self.history

    def state(self) -> State:
        """Return the factors and the memory; nothing before the first."""
        factors = super().state()
        return {**factors, "memory": self._memory.state(), "moves": self._moves} if factors else {}

    def restore(self, pc: PETSc.PC, known: Known) -> None:
        """Go on from a state, at the weights of the curvature."""
        super().restore(pc, known)
        if known:
            self._moves = int(known["moves"])
            like = pc.getOperators()[1].createVecRight()
            self._memory.restore(known["memory"], like)
            like.destroy()

    def setUp(self, pc: PETSc.PC) -> None:  # noqa: N802 (petsc4py's name)
        """Renew the factors, and take in the products at the last weights, where these are new."""
        super().setUp(pc)
        curvature = curvature_of(pc)
        if curvature.pairs.maxlen != self.history:
            curvature.remember(self.history)
        if self._moves != curvature.moves:
            self._moves = curvature.moves
            self._memory.clear()
            while curvature.pairs:
                v, product = curvature.pairs.popleft()
                product.axpy(curvature.multiple, v)
                initial = product.duplicate()
                super().apply(pc, product, initial)
                self._memory.add(v, product, initial)

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Set y = H x."""
        if self._initial is None:
            self._initial = x.duplicate()
        super().apply(pc, x, self._initial)
        self._memory.apply(x, self._initial, y)

    def destroy(self, pc: PETSc.PC) -> None:
        """Free the memory."""
        self._memory.clear()
        if self._initial is not None:
            self._initial.destroy()
            self._initial = None
