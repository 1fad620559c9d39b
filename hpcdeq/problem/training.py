"""`TrainingProblem`: what an optimiser sees of a network and its data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hpcdeq import parallel
from hpcdeq.data import SampleSource, TensorDataset
from hpcdeq.errors import ConvergenceError, DataError, OptionError
from hpcdeq.problem.accuracy import Accuracy
from hpcdeq.problem.counts import Accounts
from hpcdeq.problem.guidance import Guidance
from hpcdeq.problem.linearised import Linearised, leaves, outputs_of
from hpcdeq.problem.losses import Loss, loss_named
from hpcdeq.problem.memory import fair_share, process_bytes
from hpcdeq.problem.parameters import ParameterLayout
from hpcdeq.problem.visits import Visits

CHUNK_SIZE = 512
Result = TypeVar("Result")


@dataclass(frozen=True)
class Evaluation:
    """Loss and metric of a model on a set of samples; NaN where a fixed point was not found."""

    loss: float
    metric: float


class TrainingProblem:
    """The mean loss of a network over a distributed set of samples, as a function of its weights.

    F(p) = 1/N Σᵢ ℓ(y(xᵢ; p), tᵢ) + λ/2 ‖p‖². Values are the same on all ranks and do not depend on their number
    beyond rounding and the tolerance of the fixed points. Samples are worked on in chunks, which bound the memory.
    Every method is collective on comm unless it says otherwise; a failure on one rank is raised on all.

    Parameters
    ----------
    model
        ``model(inputs) -> outputs``; its present weights are the initial ones.
    dataset
        This rank's samples: a `Dataset`, or a pair (inputs, targets) of tensors, possibly empty.
    loss
        ``cross_entropy``, ``mse``, or a `Loss`.
    comm
        Communicator of mpi4py.
    chunk_size
        Samples that are evaluated together on a rank.
    weight_decay
        λ.
    memory_limit
        Bytes that this process may hold before linearised chunks are no longer kept between the products of one
        iterate (they are then made anew each time). Default: half of the host's memory, shared among its ranks.
    warm_start
        Begin the fixed point of a sample where its last one was. At most an eighth of the memory limit is used for that.
    on_failure
        What becomes of samples whose fixed point is not found; see `Visits`. With ``mask`` F is the mean over the others.
    adaptive
        Solve only as accurately as an optimiser's progress asks for; see `Accuracy`. Without an optimiser, and in
        `evaluate`, the tolerances are those of the options.

    Raises
    ------
    DataError
        No samples at all, or targets of the wrong kind for the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: SampleSource | tuple[Tensor, Tensor],
        loss: str | Loss = "cross_entropy",
        comm: parallel.Comm = parallel.WORLD,
        *,
        chunk_size: int = CHUNK_SIZE,
        weight_decay: float = 0.0,
        memory_limit: int | None = None,
        warm_start: bool = True,
        adaptive: bool = False,
        on_failure: str = "raise",
    ) -> None:
        if not weight_decay >= 0:
            raise OptionError(f"weight_decay is {weight_decay}: give a number that is not negative")
        self.model = model
        self.comm = comm
        self.loss_function = loss_named(loss)
        self.dataset = TensorDataset(*dataset, comm=comm) if isinstance(dataset, tuple) else dataset
        if self.dataset.count == 0:
            raise DataError("the training set has no samples")
        self.weight_decay = weight_decay
        self.layout = ParameterLayout(model, comm)
        self.accounts = Accounts(model, comm)
        self.memory_limit = fair_share(comm) if memory_limit is None else memory_limit
        self.guidance = Guidance(model, self.memory_limit // 8 if warm_start else 0)
        self.visits = Visits(self.dataset, self.layout, self.guidance, chunk_size, on_failure)
        self.left_out = 0
        self.accuracy = Accuracy() if adaptive and self.guidance.layers else None
        self._point: Tensor | None = None
        self._kept: dict[int, Linearised] = {}

    # ------------------------------------------------------------------------------------------------- values

    def initial(self) -> Tensor:
        """Return the model's weights, ``(n,)``, the same on all ranks."""
        return self.layout.initial(self.model)

    def loss(self, p: Tensor, rows: np.ndarray | None = None) -> float:
        """Return F(p).

        Parameters
        ----------
        p
            ``(n,)`` weights, the same on all ranks.
        rows
            Global numbers of the samples to average over, the same on all ranks; None: all.
        """
        own, error = self._guarded(lambda: self._local_loss(p, rows))
        return self._summed(own or 0.0, error) / self._size(rows) + self._decay(p)

    def loss_and_gradient(self, p: Tensor, rows: np.ndarray | None = None) -> tuple[float, Tensor]:
        """Return F(p) and its gradient ``(n,)`` on every rank. Arguments as in `loss`."""
        total, own = self._local_gradient(p, rows)
        gradient = torch.from_numpy(parallel.sum_over_ranks(self.comm, own.double().cpu().numpy()))
        gradient = gradient.to(p) / self._size(rows) + self.weight_decay * p
        return total / self._size(rows) + self._decay(p), gradient

    def gradient(self, p: Tensor, rows: np.ndarray | None = None) -> Tensor:
        """Return the gradient of F, ``(n,)``, on every rank. Arguments as in `loss`."""
        return self.loss_and_gradient(p, rows)[1]

    def owned_loss_and_gradient(self, p: Tensor, rows: np.ndarray | None = None) -> tuple[float, np.ndarray]:
        """Return F(p) and this rank's block of its gradient (float64). Arguments as in `loss`."""
        total, own = self._local_gradient(p, rows)
        block = self.layout.scatter_sum(own) / self._size(rows)
        return total / self._size(rows) + self._decay(p), block + self.weight_decay * self._block(p)

    # ----------------------------------------------------------------------------------------------- products

    def gauss_newton_product(self, p: Tensor, v: Tensor) -> Tensor:
        """Return (1/N Σ Jᵢᵀ Lᵢ Jᵢ + λ I) v, ``(n,)`` on every rank; J = ∂y/∂p, L = ∂²ℓ/∂y²."""
        return self._replicated(self._local_product(p, v, "gauss_newton_products"), v)

    def hessian_product(self, p: Tensor, v: Tensor) -> Tensor:
        """Return ∇²F(p) v, ``(n,)`` on every rank."""
        return self._replicated(self._local_product(p, v, "hessian_products"), v)

    def owned_product(self, p: Tensor, v: Tensor, *, curvature: str) -> np.ndarray:
        """Return this rank's block of a curvature product (float64).

        Parameters
        ----------
        p, v
            ``(n,)`` tensors, the same on all ranks.
        curvature
            ``gauss_newton`` or ``hessian``.
        """
        own = self._local_product(p, v, f"{curvature}_products")
        return self.layout.scatter_sum(own) / self._size(None) + self.weight_decay * self._block(v)

    # ----------------------------------------------------------------------------------------------- accuracy

    def progress(self, p: Tensor, loss: float, gradient_norm: float) -> None:
        """Let the accuracy of the solves follow an optimiser's iterate."""
        if self.accuracy is None:
            return
        own = max((layer.take_amplification() for layer in self.guidance.layers.values()), default=0.0)
        if self.accuracy.update(loss, gradient_norm, parallel.max_over_ranks(self.comm, own)):
            self._loosen(self.accuracy.tolerance)
            try:
                self.accuracy.learn(self._gradient_error(p))
            except ConvergenceError:  # what cannot be measured is not to be trusted
                self.accuracy.learn(float("inf"))
        self._loosen(self.accuracy.tolerance)

    def begin(self) -> None:
        """Begin a minimisation: accuracy follows its progress from here on."""
        if self.accuracy is not None:
            self.accuracy = Accuracy()
            self._loosen(self.accuracy.tolerance)

    @property
    def adapting(self) -> bool:
        """Whether solves may have been less accurate than the options say."""
        return self.accuracy is not None and self.accuracy.factor > 0

    def tighten(self) -> None:
        """Solve as accurately as the options say for the rest of a minimisation."""
        if self.accuracy is not None:
            self.accuracy.stop()
        self._loosen(0.0)

    def end(self) -> None:
        """End a minimisation: solve as accurately as the options say again."""
        self._loosen(0.0)

    def _loosen(self, tolerance: float) -> None:
        self.guidance.loosened = (tolerance, tolerance)

    def _gradient_error(self, p: Tensor) -> float:
        """Return the relative error of the gradient of the first samples, the same on any number of ranks."""
        rows = np.arange(min(self.visits.chunk_size, self.dataset.count))

        def local() -> Tensor:
            parts = []
            for tolerance in (self.guidance.loosened, (0.0, 0.0)):
                self.guidance.loosened = tolerance
                parts.append(self._sums(p, rows)[1])
            return torch.stack([parts[0] - parts[1], parts[1]])

        sums = parallel.sum_over_ranks(self.comm, self.agreed(local).double().cpu().numpy().ravel())
        difference, tight = np.linalg.norm(sums.reshape(2, -1), axis=1)
        return float(difference / tight) if tight else 0.0

    # ------------------------------------------------------------------------------------------ looking at it

    def evaluate(self, p: Tensor, dataset: SampleSource) -> Evaluation:
        """Return mean loss and metric on a set of samples; NaN where a fixed point was not found. Not counted."""
        pieces = self.layout.unflatten(p)

        def local() -> list[float]:
            sums = np.zeros(3)
            with torch.no_grad():
                for start in range(0, len(dataset), self.visits.chunk_size):
                    rows = slice(start, min(start + self.visits.chunk_size, len(dataset)))
                    inputs, targets = self.visits.move(*dataset.batch(rows))
                    try:
                        with self.guidance.batch(range(rows.start, rows.stop), p, place=f"/{id(dataset)}"):
                            outputs = outputs_of(self.model, self.layout.names, pieces, inputs)
                    except ConvergenceError:
                        return [float("nan")] * 3
                    self.loss_function.check(outputs, targets)
                    sums += (
                        float(self.loss_function.total(outputs, targets)),
                        *self.loss_function.metric_terms(outputs, targets),
                    )
            return list(sums)

        with self.accounts.paused():
            own, error = self._guarded(local)
        total, numerator, denominator = parallel.sum_or_raise(self.comm, np.array(own or [0.0] * 3), error)
        if dataset.count == 0:
            return Evaluation(float("nan"), float("nan"))
        return Evaluation(float(total) / dataset.count, self.loss_function.metric_value(numerator, denominator))

    def sum_of_blocks(self, values: np.ndarray) -> float:
        """Return the sum of all entries of a distributed vector, given this rank's block."""
        return float(parallel.sum_over_ranks(self.comm, np.array([values.sum()]))[0])

    def randomness(self) -> str | None:
        """Name the first layer that makes the loss depend on chance or on the batch; None if there is none.

        Not collective.
        """
        for name, module in self.model.named_modules():
            if not module.training:
                continue
            kind = type(module).__name__
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                return f"{name} ({kind}, p = {module.p})"
            if isinstance(module, nn.modules.batchnorm._NormBase) and not kind.startswith(
                ("InstanceNorm", "LazyInstance")
            ):
                return f"{name} ({kind}, statistics of the batch)"
        return None

    def linearised(self, p: Tensor) -> Iterator[Linearised]:
        """Yield this rank's chunks linearised at p, those kept from the last product at the same p as they are.

        Not collective.
        """
        if self._point is None or not torch.equal(self._point, p):
            self._kept.clear()
            self._point = p.detach().clone()
            self.guidance.linearised_at(self._point)
        pieces = self.layout.unflatten(p)
        for i in range(self.visits.chunk_count):
            at = self._kept.get(i)
            if at is None:
                at = self.visits.visit(
                    p,
                    self.visits.chunk(i),
                    i,
                    lambda inputs, targets: Linearised(
                        self.model, self.layout.names, pieces, inputs, targets, self.loss_function
                    ),
                    products=True,
                )
                if at is None:
                    continue
                self.guidance.keep_states(i)
                if process_bytes() < self.memory_limit:
                    self._kept[i] = at
            yield at

    def agreed(self, local: Callable[[], Result]) -> Result:
        """Return what a local computation returns, or raise on all ranks what any of them raised."""
        own, error = self._guarded(local)
        parallel.agree(self.comm, error)
        assert own is not None
        return own

    def forget(self) -> None:
        """Free the linearised chunks of the last iterate. Not collective."""
        self._kept.clear()
        self._point = None

    # --------------------------------------------------------------------------------------------------- local

    def _size(self, rows: np.ndarray | None) -> int:
        size = (self.dataset.count if rows is None else len(rows)) - self.left_out
        if not size:
            raise ConvergenceError("no sample has a fixed point: nothing is left of the loss", agreed=True)
        return size

    def _decay(self, p: Tensor) -> float:
        return 0.5 * self.weight_decay * float(p.double() @ p.double()) if self.weight_decay else 0.0

    def _block(self, p: Tensor) -> np.ndarray:
        return p[self.layout.owned].double().cpu().numpy()

    def _zeros(self) -> Tensor:
        return torch.zeros(self.layout.count, dtype=self.layout.dtype, device=self.layout.device)

    def _guarded(self, local: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
        try:
            return local(), None
        except Exception as error:  # whatever it is: the other ranks must hear of it before this one raises
            return None, error

    def _summed(self, own: float, error: Exception | None) -> float:
        """Return the sum of a value over the ranks, and learn how many samples were left out of it."""
        sums = parallel.sum_or_raise(self.comm, np.array([own, float(self.visits.left_out)]), error)
        self.left_out = int(sums[1])
        return float(sums[0])

    def _local_loss(self, p: Tensor, rows: np.ndarray | None) -> float:
        pieces = self.layout.unflatten(p)

        def value(inputs: Any, targets: Tensor) -> float:
            outputs = outputs_of(self.model, self.layout.names, pieces, inputs)
            self.loss_function.check(outputs, targets)
            self.accounts.own.losses += len(targets)
            return float(self.loss_function.total(outputs, targets))

        with torch.no_grad():
            return sum(self.visits.each(p, rows, value))

    def _local_gradient(self, p: Tensor, rows: np.ndarray | None) -> tuple[float, Tensor]:
        own, error = self._guarded(lambda: self._sums(p, rows))
        total = self._summed(own[0] if own else 0.0, error)
        assert own is not None
        return total, own[1]

    def _sums(self, p: Tensor, rows: np.ndarray | None) -> tuple[float, Tensor]:
        """Return the sums of losses and gradients over this rank's batches."""
        pieces = self.layout.unflatten(p)

        def value_and_gradient(inputs: Any, targets: Tensor) -> tuple[float, Tensor]:
            weights = leaves(pieces)
            with torch.enable_grad():
                outputs = outputs_of(self.model, self.layout.names, weights, inputs)
                self.loss_function.check(outputs, targets)
                value = self.loss_function.total(outputs, targets)
            parts = torch.autograd.grad(value, weights, allow_unused=True)
            self.accounts.own.gradients += len(targets)
            return float(value.detach()), self.layout.flatten(parts)

        total, gradient = 0.0, self._zeros()
        for value, part in self.visits.each(p, rows, value_and_gradient):
            total += value
            gradient += part
        return total, gradient

    def _local_product(self, p: Tensor, v: Tensor, kind: str) -> Tensor:
        pieces = self.layout.unflatten(v)

        def local() -> Tensor:
            total = self._zeros()
            for i, at in enumerate(self.linearised(p)):
                if kind == "gauss_newton_products":
                    total += self.layout.flatten(at.gauss_newton_product(pieces))
                    self.guidance.keep_tangents(v, i)
                else:
                    total += self.layout.flatten(at.hessian_product(pieces))
            return total

        own = self.agreed(local)
        setattr(self.accounts.own, kind, getattr(self.accounts.own, kind) + len(self.dataset))
        return own

    def _replicated(self, own: Tensor, v: Tensor) -> Tensor:
        total = torch.from_numpy(parallel.sum_over_ranks(self.comm, own.double().cpu().numpy()))
        return total.to(v) / self._size(None) + self.weight_decay * v
