"""`TrainingProblem`: what an optimiser sees of a network and its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hpcdeq import parallel
from hpcdeq.data import SampleSource, TensorDataset
from hpcdeq.errors import ConvergenceError, DataError, OptionError
from hpcdeq.problem.accuracy import Accuracy
from hpcdeq.problem.counts import Accounts
from hpcdeq.problem.guidance import Guidance
from hpcdeq.problem.linearised import Linearised
from hpcdeq.problem.local import LocalSums
from hpcdeq.problem.losses import Loss, loss_named
from hpcdeq.problem.memory import fair_share
from hpcdeq.problem.network import Network
from hpcdeq.problem.parameters import ParameterLayout
from hpcdeq.problem.phases import RECORD, REDUCTION, Phases
from hpcdeq.problem.terms import L2, Term, sorted_terms
from hpcdeq.problem.visits import MASK, Visits

Rows = np.ndarray | None  # global numbers of samples; None: all
CHUNK_SIZE = 512
# Keeps the samples of curvature products independent of what else is drawn with the same seed: a minibatch, say.
CURVATURE_STREAM = 0x6375_7276
Result = TypeVar("Result")


@dataclass(frozen=True)
class Evaluation:
    """Loss and metric of a model on a set of samples; NaN where a fixed point was not found.

    Where such samples are left out (``left_out`` is their number) loss and metric are of the others; but an accuracy is of
    all samples, as one without an answer is not classified rightly.
    """

    loss: float
    metric: float
    left_out: int = 0


class TrainingProblem:
    """The mean loss of a network over a distributed set of samples, and terms added to it, as a function of its weights.

    F(p) = 1/N Σᵢ ℓ(y(xᵢ; p), tᵢ) + Σ terms. Values are the same on all ranks and do not depend on their number
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
        λ of a term λ/2 ‖p‖²: short for ``L2(weight_decay)`` among the terms.
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
    terms
        Added to the loss: see `hpcdeq.problem.terms`. Losses, gradients and products are of the whole; `evaluate` looks at
        the data alone.

    Attributes
    ----------
    phases
        Where the time goes.
    spoilt
        Whether the last loss, or its gradient, was not finite on some rank; the same on all.
    weight_terms, sample_terms
        The terms on the weights alone, as they are for these weights, and those on the samples' fixed points.

    Raises
    ------
    DataError
        No samples at all, or targets of the wrong kind for the loss.
    OptionError
        A setting out of range, or a term that does not fit the model.
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
        terms: Sequence[Term] = (),
    ) -> None:
        if not weight_decay >= 0:
            raise OptionError(f"weight_decay is {weight_decay}: give a number that is not negative")
        self.model = model
        self.comm = comm
        self.loss_function = loss_named(loss)
        self.dataset = TensorDataset(*dataset, comm=comm) if isinstance(dataset, tuple) else dataset
        if self.dataset.count == 0:
            raise DataError("the training set has no samples")
        self.phases = Phases()
        self.layout = ParameterLayout(model, comm, self.phases)
        self.accounts = Accounts(model, comm)
        self.memory_limit = fair_share(comm) if memory_limit is None else memory_limit
        self.guidance = Guidance(model, self.memory_limit // 8 if warm_start else 0, self.layout)
        self.visits = Visits(self.dataset, self.layout, self.guidance, chunk_size, on_failure, self.phases)
        with parallel.agreement(comm):
            terms = [*([L2(weight_decay)] if weight_decay else []), *terms]
            found = sorted_terms(terms, self.layout, fixed_points=bool(self.guidance.layers))
        self.weight_terms, self.sample_terms = found
        self.local = LocalSums(
            Network(model, self.layout.names, self.guidance.layers, self.sample_terms, self.dataset.offset),
            self.layout,
            self.loss_function,
            self.visits,
            self.guidance,
            self.accounts,
            self.phases,
            self.memory_limit,
        )
        self.left_out = 0
        self.spoilt = False
        self.accuracy = Accuracy() if adaptive and self.guidance.layers else None

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
        self.guidance.foresee(p, rows)
        own, error = self._guarded(lambda: self.local.loss(p, rows))
        return self._summed(own or 0.0, error) / self._size(rows) + self.weight_terms.value(p)

    def loss_and_gradient(self, p: Tensor, rows: np.ndarray | None = None) -> tuple[float, Tensor]:
        """Return F(p) and its gradient ``(n,)`` on every rank. Arguments as in `loss`."""
        total, own = self._local_gradient(p, rows)
        gradient = self._over_ranks(own).to(p) / self._size(rows) + self.weight_terms.gradient(p).to(p)
        return total / self._size(rows) + self.weight_terms.value(p), gradient

    def gradient(self, p: Tensor, rows: np.ndarray | None = None) -> Tensor:
        """Return the gradient of F, ``(n,)``, on every rank. Arguments as in `loss`."""
        return self.loss_and_gradient(p, rows)[1]

    def owned_loss_and_gradient(self, p: Tensor, rows: np.ndarray | None = None) -> tuple[float, np.ndarray]:
        """Return F(p) and this rank's block of its gradient (float64). Arguments as in `loss`."""
        total, own = self._local_gradient(p, rows)
        block = self.layout.scatter_mean(own, self._size(rows))
        if self.weight_terms.terms:  # a step on a small network notices every pass over its weights
            block += self.layout.block(self.weight_terms.gradient(p))
        return total / self._size(rows) + self.weight_terms.value(p), block

    # ----------------------------------------------------------------------------------------------- products

    def gauss_newton_product(self, p: Tensor, v: Tensor, rows: np.ndarray | None = None) -> Tensor:
        """Return (1/N Σ Jᵢᵀ Lᵢ Jᵢ + Σ C) v, ``(n,)`` on every rank; J = ∂y/∂p, L = ∂²ℓ/∂y², C of terms."""
        own, size = self._product(p, v, "gauss_newton", rows)
        return self._over_ranks(own).to(v) / size + self.weight_terms.product(p, v, "gauss_newton").to(v)

    def hessian_product(self, p: Tensor, v: Tensor, rows: np.ndarray | None = None) -> Tensor:
        """Return ∇²F(p) v, ``(n,)`` on every rank. Arguments as in `loss`."""
        own, size = self._product(p, v, "hessian", rows)
        return self._over_ranks(own).to(v) / size + self.weight_terms.product(p, v, "hessian").to(v)

    def owned_product(self, p: Tensor, v: Tensor, *, curvature: str, rows: np.ndarray | None = None) -> np.ndarray:
        """Return this rank's block of a curvature product (float64).

        Parameters
        ----------
        p, v
            ``(n,)`` tensors, the same on all ranks.
        curvature
            ``gauss_newton`` or ``hessian``.
        rows
            Global numbers of the samples to average over, the same on all ranks (as `curvature_rows` chooses them);
            None: all. What is linearised is kept for the last choice, and for all samples, while p stays.
        """
        own, size = self._product(p, v, curvature, rows)
        return self.layout.scatter_sum(own) / size + self.layout.block(self.weight_terms.product(p, v, curvature))

    def curvature_rows(self, fraction: float, seed: int, iteration: int, among: Rows = None) -> Rows:
        """Choose samples to take curvature products on: a fresh choice in every iteration.

        Not collective: the choice depends on the arguments alone, and is the same on any number of ranks. Every sample is
        as likely as any other, so that products are unbiased (Byrd, Chin, Neveitt and Nocedal 2011, "On the use of
        stochastic Hessian information in optimization methods for machine learning").

        Parameters
        ----------
        fraction
            Of all samples, above 0 and at most 1; at least one sample is chosen.
        seed, iteration
            What the choice depends on.
        among
            Global numbers to choose from; None: all.

        Returns
        -------
        rows
            Increasing global numbers, for `owned_product`; None stands for all.

        Raises
        ------
        OptionError
            The fraction is out of range.
        """
        if not 0 < fraction <= 1:
            raise OptionError(f"a fraction of {fraction} of the samples: give a number above 0 and at most 1")
        count = self.dataset.count if among is None else len(among)
        size = max(1, round(fraction * count))
        drawn = np.random.default_rng([CURVATURE_STREAM, seed, iteration])
        return among if size == count else np.sort(drawn.choice(count if among is None else among, size, replace=False))

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

    def begin(self, *, noisy: bool = False) -> None:
        """Begin a minimisation, noisy if it is on minibatches: accuracy follows its progress, and its time is taken."""
        self.phases.begin()
        if self.accuracy is not None:
            self.accuracy = Accuracy(noisy=noisy)
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
        self.phases.end()
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
                with torch.random.fork_rng():  # the same numbers for both, where layers draw some
                    parts.append(self.local.loss_and_gradient(p, rows)[1])
            return torch.stack([parts[0] - parts[1], parts[1]])

        difference, tight = torch.linalg.vector_norm(self._over_ranks(self.agreed(local)), dim=1).tolist()
        return float(difference / tight) if tight else 0.0

    # ------------------------------------------------------------------------------------------ looking at it

    def evaluate(self, p: Tensor, dataset: SampleSource) -> Evaluation:
        """Return mean loss and metric on a set of samples. Not counted."""
        with self.phases.of(RECORD):
            with self.accounts.paused():
                own, error = self._guarded(lambda: self.local.evaluation(p, dataset))
            total, *terms, missing = parallel.sum_or_raise(self.comm, np.array(own or [0.0] * 4), error).tolist()
        if dataset.count == 0 or math.isnan(missing):
            return Evaluation(math.nan, math.nan)
        left = dataset.count - int(missing)
        metric = self.loss_function.metric_value(*terms)
        return Evaluation(total / left if left else math.nan, metric, int(missing))

    def sum_of_blocks(self, values: np.ndarray) -> float:
        """Return the sum of all entries of a distributed vector, given this rank's block."""
        with self.phases.of(REDUCTION):
            return float(parallel.sum_over_ranks(self.comm, np.array([values.sum()]))[0])

    def linearised(self, p: Tensor, rows: np.ndarray | None = None) -> Iterator[Linearised]:
        """Yield this rank's chunks linearised at p, those kept from the last product at the same p as they are.

        Not collective. Chunks of all samples and of the last choice of some (``rows``, as in `owned_product`) are kept.
        """
        return self.local.linearised(p, rows)

    def agreed(self, local: Callable[[], Result]) -> Result:
        """Return what a local computation returns, or raise on all ranks what any of them raised."""
        own, error = self._guarded(local)
        with self.phases.of(REDUCTION):
            parallel.agree(self.comm, error)
        assert own is not None
        return own

    def forget(self) -> None:
        """Free the linearised chunks of the last iterate. Not collective."""
        self.local.forget()

    # --------------------------------------------------------------------------------------------------- shares

    def _asked(self, rows: np.ndarray | None) -> int:
        if rows is not None and not len(rows):
            raise OptionError("no samples are chosen: rows is empty", agreed=True)
        return self.dataset.count if rows is None else len(rows)

    def _size(self, rows: np.ndarray | None) -> int:
        return _some(self._asked(rows) - self.left_out)

    def _guarded(self, local: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
        try:
            return local(), None
        except Exception as error:  # whatever it is: the other ranks must hear of it before this one raises
            return None, error

    def _over_ranks(self, own: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks, float64 on the CPU."""
        with self.phases.of(REDUCTION):
            return torch.from_numpy(parallel.sum_over_ranks(self.comm, own.double().cpu().numpy()))

    def _summed(self, own: float, error: Exception | None, gradient: Tensor | None = None) -> float:
        """Return the sum of a value over the ranks; learn how many samples were left out, and whether all is finite."""
        whole = math.isfinite(own) and (gradient is None or math.isfinite(float(gradient.sum(dtype=torch.float64))))
        with self.phases.of(REDUCTION):
            sums = parallel.sum_or_raise(self.comm, np.array([own, float(self.visits.left_out), not whole]), error)
        self.left_out, self.spoilt = int(sums[1]), bool(sums[2])
        return float(sums[0])

    def _local_gradient(self, p: Tensor, rows: np.ndarray | None) -> tuple[float, Tensor]:
        self.guidance.foresee(p, rows)
        own, error = self._guarded(lambda: self.local.loss_and_gradient(p, rows))
        total = self._summed(own[0] if own else 0.0, error, own[1] if own else None)
        assert own is not None
        return total, own[1]

    def _product(self, p: Tensor, v: Tensor, curvature: str, rows: np.ndarray | None) -> tuple[Tensor, int]:
        """Return this rank's sum of products, and the number of samples on all ranks that products are averaged over."""
        own, count = self.agreed(lambda: self.local.product(p, v, curvature, rows))
        if curvature == "gauss_newton" and rows is None:
            self.guidance.keep_direction(v)
        kind = f"{curvature}_products"
        asked = len(self.dataset) if rows is None else self.visits.own_count(rows)
        setattr(self.accounts.own, kind, getattr(self.accounts.own, kind) + asked)
        if self.visits.on_failure != MASK:
            return own, self._asked(rows)
        with self.phases.of(REDUCTION):
            sums = parallel.sum_over_ranks(self.comm, np.array([count], dtype=np.int64))
        return own, _some(int(sums[0]))


def _some(size: int) -> int:
    if not size:
        raise ConvergenceError("no sample has a fixed point: nothing is left of the loss", agreed=True)
    return size
