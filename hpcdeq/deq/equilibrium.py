"""One fixed point, and what its derivatives share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from hpcdeq.deq.arguments import CellFunction
from hpcdeq.deq.forward import ForwardSolver
from hpcdeq.deq.jacobian import Linearisation
from hpcdeq.deq.linear import LinearSolution, LinearSolver
from hpcdeq.deq.samples import Samples
from hpcdeq.deq.solution import Solution
from hpcdeq.deq.warm import Guesses
from hpcdeq.deq.work import Work
from hpcdeq.errors import ConvergenceError
from hpcdeq.petsc.options import Options


@dataclass
class Log:
    """The last forward, adjoint and tangent solve of a layer, and what all of them cost.

    Attributes
    ----------
    method
        In words: how the last tangent or adjoint system was solved, and why so.
    methods
        All that there have been, by how many solves were expected.
    solves_before
        Tangent and adjoint solves at the fixed point that last had any.
    tangent_state, adjoint_state
        The last tangent dz, and the last adjoint u.
    amplification
        Largest ‖u_i‖ / ‖g_i‖ of gradients' adjoints since it was last set to zero: what an error of a state grows by.
    """

    work: Work
    solution: Solution | None = None
    adjoint: LinearSolution | None = None
    tangent: LinearSolution | None = None
    method: str = ""
    methods: dict[int, str] = field(default_factory=dict)
    solves_before: int = 1
    tangent_state: Tensor | None = None
    adjoint_state: Tensor | None = None
    amplification: float = 0.0


@dataclass(frozen=True)
class Help:
    """What a caller may know about a fixed point beforehand.

    Attributes
    ----------
    solves
        How many tangent and adjoint solves are to be expected; None: as many as at the last fixed point.
    guesses
        Initial guesses from earlier solves.
    loosened
        Relative tolerances of forward and derivative solves that suffice, where they are above those of the options.
    """

    solves: int | None = None
    guesses: Guesses | None = None
    loosened: tuple[float, float] = (0.0, 0.0)


class Equilibrium:
    """One fixed point with what its derivatives share: the linearised cell and the solver of its systems.

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
    help
        What the caller knows beforehand.
    on_failure
        ``raise`` or ``warn``.
    """

    def __init__(
        self,
        function: CellFunction,
        sample_index: Tensor | None,
        options: Options,
        log: Log,
        *,
        differentiated: bool,
        help: Help | None = None,
        on_failure: str = "raise",
    ) -> None:
        self.function = function
        self.sample_index = sample_index
        self.options = options
        self.log = log
        self.differentiated = differentiated
        self.help = help or Help()
        self.on_failure = on_failure
        self._at: Linearisation | None = None
        self._linear: LinearSolver | None = None
        self._done = 0

    @property
    def kind(self) -> str | None:
        """The type that the options choose for the derivative systems; None: none."""
        return self.options.chosen("ksp_type")

    def solve(self, z0: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Return the fixed point. Not collective."""
        self.samples = Samples.of(z0, self.sample_index)
        guesses = self.help.guesses
        if guesses is not None:
            z0, self._call = guesses.state(z0.detach(), self.samples)
        evaluate = None
        if self.differentiated:

            def evaluate(z: Tensor) -> Tensor:
                self._at = Linearisation(self.function, z, tensors)
                return self._at.value

        solver = ForwardSolver(self.function.bind(tensors, now=True), self.samples, self.options, self.log.work)
        # Whatever `differentiated` says, which forward-mode derivatives are not seen by.
        solver.retain = self.kind == "shine" or self.options.chosen("pc_type") == "secant"
        solver.loosened = self.help.loosened[0]
        self.log.solution = None
        self.log.solution = solver.solve(z0.detach(), evaluate)
        try:
            solver.checked(self.log.solution)
        except ConvergenceError as error:
            if self.on_failure == "raise":
                raise
            warnings.warn(f"unconverged states are used: {error}", stacklevel=2)
        self._tensors = list(tensors)
        self._history = solver.history
        self._value = self.log.solution.value
        if guesses is not None:
            guesses.keep("state", self._call, self._value, self.samples)
        self._iterations = float(self.log.solution.iterations.double().mean()) if self.samples.count else 0.0
        return self._value.clone()

    def linearisation(self) -> Linearisation:
        """Return the cell linearised at the fixed point. Not collective."""
        if self._at is None:
            self._at = Linearisation(self.function, self._value, self._tensors)
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
        if self._linear is None:
            cell = self.function.bind(self._tensors, now=False)
            log = self.log
            expected = log.solves_before if self.help.solves is None else self.help.solves
            iterations = self._iterations
            at = self.linearisation()
            self._linear = LinearSolver(
                at, cell, self.samples, self.options, log.work, self._history, solves=expected, iterations=iterations
            )
            self._linear.loosened = self.help.loosened[1]
        linear = self._linear
        # Of the first adjoint alone there is one at every visit of a sample: the gradient's.
        guesses = self.help.guesses if transpose and self.help.solves == 1 and not self._done else None
        self._done += 1
        self.log.solves_before = self._done
        guess = None if guesses is None else guesses.adjoint(self._call, g, self.samples)
        try:
            answer = linear.solve(g, transpose=transpose, guess=guess)
            if guesses is not None:
                guesses.keep("adjoint", self._call, answer, self.samples)
            if not transpose:
                self.log.tangent_state = answer
                return answer
            self.log.adjoint_state = answer
            if self.help.solves == 1 and answer.numel():
                ratio = self.samples.norms(answer) / self.samples.norms(g)
                self.log.amplification = max(self.log.amplification, float(ratio.nan_to_num(0.0).max()))
            return answer
        finally:
            self.log.method = self.log.methods[linear.solves] = linear.method
            if transpose:
                self.log.adjoint = linear.outcome
            else:
                self.log.tangent = linear.outcome
