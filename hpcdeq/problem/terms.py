"""Terms that are added to the loss of the data: F(p) = 1/N Σᵢ ℓ(y(xᵢ; p), tᵢ) + Σ terms.

A term is a function of the weights alone (`WeightTerm`: `L2`, `L1`, a user's own), or a mean over the samples of something
at their fixed points (`SampleTerm`: `JacobianPenalty`). Each brings its value, its gradient, a positive semidefinite
curvature product for Gauss-Newton methods and a Hessian product for Newton's; one that is a sum of squares also brings its
residual, for methods that take nothing else (TAO's brgn).

PETSc composes objectives too (``TaoTerm``, since 3.25), and that is not used here: its terms are functions of a Vec that
only a Tao evaluates, while these must serve minibatch methods, residuals and counters alike; and a term of its own could
not share the samples' fixed points with the loss, but would have to solve for them again.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from hpcdeq.deq import FixedPoint
from hpcdeq.deq.penalty import counted, sample_probes, transposed_products
from hpcdeq.deq.probes import entry_counts
from hpcdeq.deq.samples import Samples
from hpcdeq.errors import OptionError
from hpcdeq.problem.parameters import ParameterLayout

# |p| is rounded off below this: well below the size of weights that matter, far above that of steps near the end.
SMOOTHING = 1e-3


class WeightTerm(ABC):
    """A term R(p) of the weights p, ``(n,)`` float64, the same on all ranks.

    Not collective, every method: each rank evaluates it on all weights. A user's own needs `value`, written with torch's
    operations, and `curvature_product`; or `residual` and ``value = 0.5 * self.residual(p).square().sum()``, of which the
    rest follows.
    """

    name: ClassVar[str]

    def bound(self, layout: ParameterLayout) -> WeightTerm:
        """Return the term for a model's weights; most are the same for all."""
        return self

    @abstractmethod
    def value(self, p: Tensor) -> Tensor:
        """Return R(p), a differentiable scalar."""

    def gradient(self, p: Tensor) -> Tensor:
        """Return the gradient of R, ``(n,)``."""
        return torch.func.grad(self.value)(p)

    def hessian_product(self, p: Tensor, v: Tensor) -> Tensor:
        """Return ∇²R(p) v, ``(n,)``."""
        return torch.func.jvp(torch.func.grad(self.value), (p,), (v,))[1]

    def curvature_product(self, p: Tensor, v: Tensor) -> Tensor:
        """Return C(p) v, ``(n,)``, with a symmetric positive semidefinite C; of a sum of squares, (∂r/∂p)ᵀ (∂r/∂p) v."""
        if self.residual(p) is None:
            raise NotImplementedError(f"{type(self).__name__} has neither a curvature_product nor a residual")
        return self.residual_transpose_product(p, self.residual_product(p, v))

    def residual(self, p: Tensor) -> Tensor | None:
        """Return r ``(m,)`` with R = ½‖r‖², or None where R is not a sum of squares."""
        return None

    def residual_product(self, p: Tensor, v: Tensor) -> Tensor:
        """Return (∂r/∂p) v, ``(m,)``."""
        return torch.func.jvp(self._residual, (p,), (v,))[1]

    def residual_transpose_product(self, p: Tensor, u: Tensor) -> Tensor:
        """Return (∂r/∂p)ᵀ u, ``(n,)``."""
        return torch.func.vjp(self._residual, p)[1](u)[0]

    def _residual(self, p: Tensor) -> Tensor:
        r = self.residual(p)
        assert r is not None
        return r


class Separable(WeightTerm):
    """A term that is a sum over weights of one function of each: its matrices are diagonal.

    Not collective, every method.

    Parameters
    ----------
    weight
        Its factor λ, not negative.
    parameters
        Patterns (as of a shell: ``*.weight``) of the names of the parameters that it is on; None: all.

    Raises
    ------
    OptionError
        A negative weight; by `bound`, a pattern that no parameter's name fits.
    """

    def __init__(self, weight: float, parameters: Sequence[str] | None = None) -> None:
        if not 0 <= weight < float("inf"):
            raise OptionError(f"{self.name} has the weight {weight}: give a finite number that is not negative")
        self.weight = weight
        self.parameters = None if parameters is None else tuple(parameters)
        self._factor: Tensor | float = weight
        self._root: Tensor | float = weight**0.5

    def bound(self, layout: ParameterLayout) -> Separable:
        """Return the term for a model's weights."""
        if self.parameters is None:
            return self
        for pattern in self.parameters:
            if not any(fnmatchcase(name, pattern) for name in layout.names):
                raise OptionError(
                    f"{self.name}: no parameter's name fits {pattern!r}; there are {', '.join(layout.names)}"
                )
        chosen = [any(fnmatchcase(name, pattern) for pattern in self.parameters) for name in layout.names]
        term = copy.copy(self)
        factor = torch.cat(
            [
                torch.full((n,), self.weight if on else 0.0, dtype=torch.float64, device=layout.device)
                for n, on in zip(layout.lengths, chosen, strict=True)
            ]
        )
        term._factor, term._root = factor, factor.sqrt()
        return term

    @abstractmethod
    def curvature_diagonal(self, p: Tensor) -> Tensor:
        """Return the diagonal of the Hessian, ``(n,)``, without a negative entry."""

    def curvature_product(self, p: Tensor, v: Tensor) -> Tensor:
        return self.curvature_diagonal(p) * v

    def hessian_product(self, p: Tensor, v: Tensor) -> Tensor:
        return self.curvature_diagonal(p) * v


class L2(Separable):
    """λ/2 Σ pᵢ², also called weight decay or a Tikhonov or ridge penalty; parameters as of `Separable`. Not collective."""

    name = "weight decay"

    def value(self, p: Tensor) -> Tensor:
        """Return the penalty, a differentiable scalar."""
        return 0.5 * (self._factor * p * p).sum()

    def gradient(self, p: Tensor) -> Tensor:
        """Return its gradient, ``(n,)``."""
        return self._factor * p

    def curvature_diagonal(self, p: Tensor) -> Tensor:
        """Return the diagonal of its Hessian, ``(n,)``."""
        return self._factor * torch.ones_like(p)

    def residual(self, p: Tensor) -> Tensor:
        """Return r ``(n,)`` with the penalty ½‖r‖²."""
        return self._root * p


class L1(Separable):
    """λ Σ (√(pᵢ² + ε²) - ε): |pᵢ| with its kink rounded off, so that methods of second order apply (pseudo-Huber).

    It lies below λ Σ |pᵢ| by at most λ ε for each weight. Unlike the kink it puts no weight at exactly zero: those that it
    presses down end within about ε of it. The curvature at zero is λ/ε: a smaller ε is sharper, and worse conditioned. As a
    sum of squares r = p √(2λ / (√(p² + ε²) + ε)), which is smooth at zero too.
    Not collective, every method.

    Parameters
    ----------
    weight, parameters
        As of `Separable`.
    smoothing
        ε, in the unit of the weights.
    """

    name = "L1 penalty"

    def __init__(self, weight: float, smoothing: float = SMOOTHING, parameters: Sequence[str] | None = None) -> None:
        super().__init__(weight, parameters)
        if not 0 < smoothing < float("inf"):
            raise OptionError(f"{self.name} has the smoothing {smoothing}: give a finite number above 0")
        self.smoothing = smoothing

    def value(self, p: Tensor) -> Tensor:
        """Return the penalty, a differentiable scalar."""
        return (self._factor * p * p / (self._size(p) + self.smoothing)).sum()  # no cancellation near zero

    def gradient(self, p: Tensor) -> Tensor:
        """Return its gradient, ``(n,)``."""
        return self._factor * p / self._size(p)

    def curvature_diagonal(self, p: Tensor) -> Tensor:
        """Return the diagonal of its Hessian, ``(n,)``."""
        return self._factor * self.smoothing**2 / self._size(p) ** 3

    def residual(self, p: Tensor) -> Tensor:
        """Return r ``(n,)`` with the penalty ½‖r‖²."""
        return self._root * p * (2.0 / (self._size(p) + self.smoothing)) ** 0.5

    def _size(self, p: Tensor) -> Tensor:
        return (p * p + self.smoothing**2).sqrt()


@dataclass(frozen=True)
class LayerCall:
    """One call of a fixed-point layer on a batch, while the layer holds the weights that it was called with.

    Attributes
    ----------
    layer
        The layer.
    x
        Its input.
    z
        The fixed points, differentiable.
    samples
        Which rows of z belong together.
    numbers
        ``(B,)`` global numbers of the samples; None where the layer's samples are not those of the batch.
    """

    layer: FixedPoint
    x: Any
    z: Tensor
    samples: Samples
    numbers: Tensor | None


class SampleTerm(ABC):
    """A term h(φ), averaged over the samples, of features φ at the fixed points of each fixed-point layer.

    Not collective, every method. By default h = ½‖φ‖², a sum of squares; a subclass with another h has ``squares = False``.
    """

    name: ClassVar[str]
    squares: ClassVar[bool] = True

    @abstractmethod
    def features(self, call: LayerCall) -> Tensor:
        """Return φ of all samples of a call, in any shape, differentiable; a sample's must depend on it alone."""

    def total(self, features: Tensor) -> Tensor:
        """Return the sum of h over the samples, a differentiable scalar."""
        return 0.5 * features.square().sum()

    def curvature(self, features: Tensor, tangent: Tensor) -> Tensor:
        """Return ∂²h/∂φ² times a tangent, in the shape of the features; positive semidefinite."""
        return tangent


class JacobianPenalty(SampleTerm):
    """w/2 · 1/N Σᵢ 1/P Σⱼ ‖Jᵢᵀ vᵢⱼ‖² / nᵢ at the fixed points of every layer: an estimate of w/2 ‖J‖²_F / n.

    It keeps cells contractive, and their fixed points cheap, while they are trained (Bai, Koltun and Kolter 2021, arXiv
    2106.14342; see `hpcdeq.deq.penalty`). The probes v are signs that depend on the seed, on the number of the sample and
    on the place within it: they are the same at every evaluation and on any number of ranks, so that the objective is
    deterministic, and differ between samples, so that the error of the estimate falls with their number. J = ∂f/∂z is
    differentiated exactly, also through the fixed point.

    Parameters
    ----------
    weight
        w, not negative.
    probes
        P.
    seed
        Of the probes.
    """

    name = "Jacobian penalty"

    def __init__(self, weight: float, probes: int = 1, seed: int = 0) -> None:
        if not 0 <= weight < float("inf"):
            raise OptionError(f"{self.name} has the weight {weight}: give a finite number that is not negative")
        if probes < 1:
            raise OptionError(f"{self.name} has {probes} probes: give 1 or more")
        self.weight = weight
        self.probes = probes
        self.seed = seed

    def features(self, call: LayerCall) -> Tensor:
        vectors = sample_probes(call.z.detach(), call.samples, self.probes, self.seed, call.numbers)
        images = torch.stack(transposed_products(call.layer.cell, call.x, call.z, vectors))
        count, work = call.samples.count, call.layer.work
        work.cell_evaluations += count
        work.cell_vjps += self.probes * count
        entries = entry_counts(call.z, call.samples).clamp(min=1).to(images.dtype)
        scale = (self.weight / (self.probes * entries)).sqrt()
        rows = call.samples.spread(scale)
        shape = (1, -1, *[1] * (call.z.dim() - 1)) if call.z.dim() > 1 or call.samples.index is not None else (1, 1)
        # The derivative of ⟨w, Jᵀ v⟩ with respect to state and weights takes two products for each probe.
        return counted(images * rows.reshape(shape), work, 2 * self.probes * count)


Term = WeightTerm | SampleTerm


class WeightTerms:
    """The sum of terms on the weights; p and v are ``(n,)`` on all ranks, of any precision. Not collective, every method.

    Parameters
    ----------
    terms
        As they are for these weights.
    """

    def __init__(self, terms: Sequence[WeightTerm]) -> None:
        self.terms = terms

    def __iter__(self) -> Iterator[WeightTerm]:
        """Return the terms, one by one."""
        return iter(self.terms)

    def value(self, p: Tensor) -> float:
        """Return the sum of the values."""
        return sum(float(term.value(p.double())) for term in self.terms)

    def gradient(self, p: Tensor) -> Tensor:
        """Return the sum of the gradients, ``(n,)`` float64."""
        total = torch.zeros_like(p, dtype=torch.float64)
        for term in self.terms:
            total += term.gradient(p.double())
        return total

    def product(self, p: Tensor, v: Tensor, curvature: str) -> Tensor:
        """Return the sum of curvature products (``gauss_newton`` or ``hessian``), ``(n,)`` float64."""
        total = torch.zeros_like(v, dtype=torch.float64)
        for term in self.terms:
            product = term.curvature_product if curvature == "gauss_newton" else term.hessian_product
            total += product(p.double(), v.double())
        return total


def sorted_terms(
    terms: Sequence[Term], layout: ParameterLayout, *, fixed_points: bool
) -> tuple[WeightTerms, list[SampleTerm]]:
    """Return the terms on the weights, and those on the samples' fixed points.

    Not collective.

    Parameters
    ----------
    layout
        The weights that they are on.
    fixed_points
        Whether the model has any.

    Raises
    ------
    OptionError
        Something is no term, or does not fit the model.
    """
    on_samples = []
    for term in terms:
        if isinstance(term, SampleTerm):
            on_samples.append(term)
        elif not isinstance(term, WeightTerm):
            raise OptionError(
                f"{term!r} is no term of an objective: give L2, L1, JacobianPenalty, or a subclass of"
                " hpcdeq.problem.WeightTerm or SampleTerm"
            )
    if on_samples and not fixed_points:
        raise OptionError(f"the {on_samples[0].name} is on fixed points, and the model has none: leave it out")
    return WeightTerms([t.bound(layout) for t in terms if isinstance(t, WeightTerm)]), on_samples
