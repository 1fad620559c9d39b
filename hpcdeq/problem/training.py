"""`TrainingProblem`: what an optimiser sees of a network and its data."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hpcdeq import parallel
from hpcdeq.data import GraphBatch, SampleSource, TensorDataset
from hpcdeq.errors import ConvergenceError, DataError, OptionError
from hpcdeq.problem.accuracy import Accuracy
from hpcdeq.problem.counts import Accounts
from hpcdeq.problem.guidance import Guidance
from hpcdeq.problem.linearised import Linearised, leaves, outputs_of
from hpcdeq.problem.losses import Loss, loss_named
from hpcdeq.problem.memory import fair_share, process_bytes
from hpcdeq.problem.parameters import ParameterLayout

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
        adaptive: bool = True,
    ) -> None:
        if chunk_size < 1:
            raise OptionError(f"chunk_size is {chunk_size}: give 1 or more samples")
        if not weight_decay >= 0:
            raise OptionError(f"weight_decay is {weight_decay}: give a number that is not negative")
        self.model = model
        self.comm = comm
        self.loss_function = loss_named(loss)
        self.dataset = TensorDataset(*dataset, comm=comm) if isinstance(dataset, tuple) else dataset
        if self.dataset.count == 0:
            raise DataError("the training set has no samples")
        self.weight_decay = weight_decay
        self.chunk_size = chunk_size
        self.layout = ParameterLayout(model, comm)
        self.accounts = Accounts(model, comm)
        self.memory_limit = fair_share(comm) if memory_limit is None else memory_limit
        self.guidance = Guidance(model, self.memory_limit // 8 if warm_start else 0)
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
        (total,) = parallel.sum_or_raise(self.comm, np.array([own or 0.0]), error)
        return float(total) / self._size(rows) + self._decay(p)

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
        return self.layout.scatter_sum(own) / self.dataset.count + self.weight_decay * self._block(v)

    # ----------------------------------------------------------------------------------------------- accuracy

    def progress(self, p: Tensor, loss: float, gradient_norm: float) -> None:
        """Let the accuracy of the solves follow an optimiser's iterate."""
        if self.accuracy is None:
            return
        if self.accuracy.update(loss, gradient_norm):
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

    def end(self) -> None:
        """Solve as accurately as the options say again."""
        self._loosen(0.0)

    def _loosen(self, tolerance: float) -> None:
        self.guidance.loosened = (tolerance, tolerance)

    def _gradient_error(self, p: Tensor) -> float:
        """Return the relative error of the gradient of each rank's first chunk, the largest over the ranks."""

        def local() -> float:
            parts = []
            for tolerance in (self.guidance.loosened, (0.0, 0.0)):
                self.guidance.loosened = tolerance
                parts.append(self._sums(p, itertools.islice(self._chunks(p, None), 1))[1])
            loose, tight = parts
            norm = float(tight.norm())
            return float((loose - tight).norm()) / norm if norm else 0.0

        return parallel.max_over_ranks(self.comm, self.agreed(local))

    # ------------------------------------------------------------------------------------------ looking at it

    def evaluate(self, p: Tensor, dataset: SampleSource) -> Evaluation:
        """Return mean loss and metric on a set of samples; NaN where a fixed point was not found. Not counted."""
        pieces = self.layout.unflatten(p)
        self.guidance.silence()

        def local() -> list[float]:
            sums = np.zeros(3)
            with torch.no_grad():
                for start in range(0, len(dataset), self.chunk_size):
                    rows = slice(start, min(start + self.chunk_size, len(dataset)))
                    inputs, targets = self._move(*dataset.batch(rows))
                    try:
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
        for i in range(self._chunk_count()):
            if i in self._kept:
                yield self._kept[i]
                continue
            with self.guidance.batch(self._ids(i), p, chunk=i, products=True):
                at = Linearised(self.model, self.layout.names, pieces, *self._chunk(i), self.loss_function)
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
        return self.dataset.count if rows is None else len(rows)

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

    def _chunks(self, p: Tensor, rows: np.ndarray | None) -> Iterator[tuple[Any, Tensor]]:
        """Yield this rank's batches, the layers being told what is known of each."""
        if rows is None:
            for i in range(self._chunk_count()):
                with self.guidance.batch(self._ids(i), p, chunk=i):
                    yield self._chunk(i)
            return
        first = self.dataset.offset
        own = np.sort(rows[(rows >= first) & (rows < first + len(self.dataset))] - first)
        for start in range(0, len(own), self.chunk_size):
            chosen = own[start : start + self.chunk_size]
            with self.guidance.batch(chosen.tolist(), p):
                yield self._move(*self.dataset.batch(torch.from_numpy(chosen)))

    def _ids(self, i: int) -> range:
        return range(i * self.chunk_size, min((i + 1) * self.chunk_size, len(self.dataset)))

    def _chunk_count(self) -> int:
        return -(-len(self.dataset) // self.chunk_size)

    def _chunk(self, i: int) -> tuple[Any, Tensor]:
        ids = self._ids(i)
        return self._move(*self.dataset.batch(slice(ids.start, ids.stop)))

    def _move(self, inputs: Tensor | GraphBatch, targets: Tensor) -> tuple[Tensor | GraphBatch, Tensor]:
        """Return a batch in the model's precision, on its device; class numbers stay whole."""
        dtype, device = self.layout.dtype, self.layout.device
        whole = not targets.is_floating_point()
        return inputs.to(dtype=dtype, device=device), targets.to(device) if whole else targets.to(
            dtype=dtype, device=device
        )

    def _local_loss(self, p: Tensor, rows: np.ndarray | None) -> float:
        pieces = self.layout.unflatten(p)
        total = 0.0
        with torch.no_grad():
            for inputs, targets in self._chunks(p, rows):
                outputs = outputs_of(self.model, self.layout.names, pieces, inputs)
                self.loss_function.check(outputs, targets)
                total += float(self.loss_function.total(outputs, targets))
                self.accounts.own.losses += len(targets)
        return total

    def _local_gradient(self, p: Tensor, rows: np.ndarray | None) -> tuple[float, Tensor]:
        own, error = self._guarded(lambda: self._sums(p, self._chunks(p, rows)))
        (total,) = parallel.sum_or_raise(self.comm, np.array([own[0] if own else 0.0]), error)
        assert own is not None
        return float(total), own[1]

    def _sums(self, p: Tensor, batches: Iterator[tuple[Any, Tensor]]) -> tuple[float, Tensor]:
        """Return the sums of losses and gradients over batches of this rank."""
        pieces = self.layout.unflatten(p)
        total, gradient = 0.0, self._zeros()
        for inputs, targets in batches:
            weights = leaves(pieces)
            with torch.enable_grad():
                outputs = outputs_of(self.model, self.layout.names, weights, inputs)
                self.loss_function.check(outputs, targets)
                value = self.loss_function.total(outputs, targets)
            parts = torch.autograd.grad(value, weights, allow_unused=True)
            gradient += self.layout.flatten(parts)
            total += float(value.detach())
            self.accounts.own.gradients += len(targets)
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
        return total.to(v) / self.dataset.count + self.weight_decay * v
