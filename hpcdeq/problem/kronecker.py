"""The Gauss-Newton matrix, layer by layer, as a Kronecker product: cheap to set up, cheap to invert.

For a weight W whose map takes a to W a, a probe's gradient with respect to W is D = Σ u aᵀ over the places (samples, nodes,
grid points) that it is applied at, with u the derivative of the probed outputs with respect to W a. The block of the
Gauss-Newton matrix that belongs to W is the covariance of D for probes Rξ of the outputs, R Rᵀ the curvature of the loss and
ξ random signs; it is taken to be A ⊗ G (Martens and Grosse 2015, arXiv 1503.05671):

- a map used once a sample, at nodes of a graph or at points that all samples share: A the mean of a aᵀ, G the sum of u uᵀ;
- a map used at many places of a sample (``(B, places, c)``, convolutions), whose gradients are correlated: A = E DᵀD,
  G = E D Dᵀ over the trace of either, of the samples' own D (one step of the power iteration for the nearest product);
- a map of Fourier modes: the same as the first with complex matrices, mode by mode.

Biases are columns of the weights that they go with. *Inside a fixed point* the map's outputs are those of the cell at the
fixed point and u comes from the adjoint state, one adjoint solve a probe. What is no linear map's gets the diagonal, estimated
by the same probes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from hpcdeq.deq import FixedPoint
from hpcdeq.problem.network import leaves
from hpcdeq.problem.phases import FACTORS
from hpcdeq.problem.recording import CONVOLUTION, EMBEDDING, SPECTRAL, Call, Recording
from hpcdeq.problem.training import TrainingProblem

PLACES_AT_ONCE = 1 << 21  # numbers in the pieces in which convolutions are unfolded


@dataclass(frozen=True)
class Shape:
    """Shape of one weight's factors.

    Attributes
    ----------
    weight, bias
        Numbers of the parameters.
    kind
        Of the map.
    batch, inputs, outputs
        Number of matrices (modes), and the orders of A and G.
    """

    weight: int
    bias: int | None
    kind: str
    batch: int
    inputs: int
    outputs: int

    @property
    def is_complex(self) -> bool:
        """Whether A and G are complex."""
        return self.kind == SPECTRAL

    @property
    def lengths(self) -> tuple[int, int]:
        """Real numbers in A and in G."""
        unit = self.batch * (2 if self.is_complex else 1)
        return unit * self.inputs**2, unit * self.outputs**2

    @property
    def cost(self) -> int:
        """What the eigenvectors cost, but for a factor."""
        return self.batch * (self.inputs**3 + self.outputs**3)


class Sums:
    """Sums over samples and probes that factors are made of; those of several ranks add up.

    Parameters
    ----------
    probes, count
        Number of probes, and of weights.

    Attributes
    ----------
    gradients
        ``(probes, count)`` derivatives of each probe of all samples: the mean of their squares is the diagonal. Squares of
        parts would depend on how the samples are shared out.
    """

    def __init__(self, probes: int, count: int) -> None:
        self.shapes: dict[int, Shape] = {}
        self.given: dict[int, Tensor] = {}
        self.probed: dict[int, Tensor] = {}
        self.places: dict[int, float] = {}
        self.gradients = torch.zeros(probes, count, dtype=torch.float64)

    def add(self, shape: Shape, given: Tensor | None, probed: Tensor, places: float) -> None:
        """Add to the sums of a weight; ``given`` is None where it was added with another probe. Not collective."""
        at = shape.weight
        self.shapes[at] = shape
        if given is not None:
            self.given[at] = self.given.get(at, 0) + given
            self.places[at] = self.places.get(at, 0.0) + places
        self.probed[at] = self.probed.get(at, 0) + probed


def add_call(sums: Sums, call: Call, shape: Shape, cotangent: Tensor, *, first: bool) -> None:
    """Add what one probe says of one application of a weight.

    Not collective.

    Parameters
    ----------
    cotangent
        Derivative of the probed outputs with respect to the map's output.
    first
        Whether this is the first probe: inputs do not depend on it.
    """
    u = cotangent.detach() * call.scale
    a = call.given
    if call.kind == SPECTRAL:
        x, g = _complex(a), _complex(u)
        sums.add(shape, x.mH @ x if first else None, g.mT @ g.conj(), x.shape[1])
        return
    if call.kind == EMBEDDING:
        counts = torch.bincount(a.reshape(-1), minlength=shape.inputs).to(u)
        u = u.reshape(-1, u.shape[-1])
        sums.add(shape, torch.diag(counts) if first else None, u.T @ u, a.numel())
        return
    if call.kind == CONVOLUTION or a.dim() > 2:
        for part, own in _pieces(call, u):
            gradients = torch.einsum("bpo,bpi->boi", own, _augmented(part, call.bias is not None))
            left = torch.einsum("boi,bpi->op", gradients, gradients)
            right = torch.einsum("boi,boj->ij", gradients, gradients)
            sums.add(shape, right, left, float(left.trace()))
        return
    a = _augmented(a.reshape(-1, a.shape[-1]), call.bias is not None)
    u = u.reshape(-1, u.shape[-1])
    sums.add(shape, a.T @ a if first else None, u.T @ u, len(a))


def shape_of(call: Call, parameter: Tensor) -> Shape:
    """Return the shape of the factors of a weight. Not collective."""
    if call.kind == SPECTRAL:
        modes, inputs, outputs, _ = parameter.shape
        return Shape(call.weight, None, call.kind, modes, inputs, outputs)
    if call.kind == EMBEDDING:
        return Shape(call.weight, None, call.kind, 1, *parameter.shape)
    inputs = parameter[0].numel() + (call.bias is not None)
    return Shape(call.weight, call.bias, call.kind, 1, inputs, parameter.shape[0])


def _complex(parts: Tensor) -> Tensor:
    """Return ``(modes, B, c)`` complex numbers from ``(modes, B, 2, c)`` real ones."""
    return torch.complex(parts[:, :, 0], parts[:, :, 1])


def _augmented(a: Tensor, biased: bool) -> Tensor:
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1) if biased else a


def _pieces(call: Call, u: Tensor) -> Any:
    """Yield inputs ``(b, places, inputs)`` and cotangents ``(b, places, outputs)``, some samples at a time."""
    a = call.given
    if call.kind != CONVOLUTION:
        yield a.reshape(len(a), -1, a.shape[-1]), u.reshape(len(u), -1, u.shape[-1])
        return
    window = call.settings["kernel_size"]
    size = max(1, PLACES_AT_ONCE // max(1, a[0].numel() * window[0] * window[1]))
    for start in range(0, len(a), size):
        part = slice(start, start + size)
        yield functional.unfold(a[part], **call.settings).mT, u[part].flatten(2).mT


class _Observed(nn.Module):
    """A model together with what is to be done while it has certain weights: its cells keep them until then."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any, then: Any) -> Any:
        return then(self.model, inputs)


def local_sums(
    problem: TrainingProblem, p: Tensor, rows: np.ndarray | None, probes: int, seed: Sequence[int]
) -> tuple[Sums, int]:
    """Return this rank's sums over some samples, and the number of samples in them.

    Not collective.

    Parameters
    ----------
    p
        ``(n,)`` weights.
    rows
        Global numbers of the samples; None: all.
    probes
        Random sign vectors a sample. They depend on ``seed`` and the sample's global number alone.
    """
    layout, loss, visits = problem.layout, problem.loss_function, problem.visits
    pieces = layout.unflatten(p)
    observed = _Observed(problem.model)
    sums = Sums(probes, layout.count)

    def compute(inputs: Any, targets: Tensor, ids: Sequence[int]) -> int:
        weights = leaves(pieces)
        names = [f"model.{name}" for name in layout.names]

        def then(model: nn.Module, inputs: Any) -> None:
            recording = Recording(layout.names, weights)
            with torch.enable_grad(), recording, _Watch(model, recording) as watch:
                outputs = model(inputs)
                loss.check(outputs, targets)
                cells = watch.cells(recording)
            first = problem.dataset.offset
            noise = signs([first + i for i in ids[: len(targets)]], probes, tuple(outputs.shape[1:]), seed).to(outputs)
            for k in range(probes):
                cotangent = loss.curvature_root(outputs, targets, noise[:, k])
                wanted = [call.output for call in watch.outer] + weights
                found = torch.autograd.grad(outputs, wanted, cotangent, retain_graph=True, allow_unused=True)
                pairs = list(zip(watch.outer, found[: len(watch.outer)], strict=True))
                for layer, value, calls in cells:
                    if layer.adjoint_state is not None and calls:
                        inner = torch.autograd.grad(
                            value, [c.output for c in calls], layer.adjoint_state, retain_graph=True, allow_unused=True
                        )
                        pairs += zip(calls, inner, strict=True)
                for call, derivative in pairs:
                    if derivative is not None:
                        add_call(sums, call, shape_of(call, weights[call.weight]), derivative, first=k == 0)
                sums.gradients[k] += layout.flatten(found[len(watch.outer) :]).double().cpu()

        with problem.phases.of(FACTORS):
            functional_call(observed, dict(zip(names, weights, strict=True)), (inputs, then))
        problem.accounts.own.gradients += probes * len(targets)
        return len(targets)

    count = 0
    for ids, _ in visits.batches(rows):
        done = visits.visit(p, ids, None, compute)
        count += done or 0
    return sums, count


class _Watch:
    """Stops a recording inside fixed points, and notes their inputs and states, inside a ``with`` block."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        self._layers = [m for m in model.modules() if isinstance(m, FixedPoint)]
        self._recording = recording
        self._seen: dict[FixedPoint, list[tuple[Any, Tensor]]] = {}
        self.outer: list[Call] = []

    def __enter__(self) -> _Watch:
        self._handles = [layer.register_forward_pre_hook(self._before) for layer in self._layers]
        self._handles += [layer.register_forward_hook(self._after, with_kwargs=True) for layer in self._layers]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, layer: nn.Module, args: Any) -> None:
        self._recording.active = False

    def _after(self, layer: FixedPoint, args: tuple[Any, ...], kwargs: dict[str, Any], z: Tensor) -> None:
        self._recording.active = True
        self._seen.setdefault(layer, []).append((args[0] if args else kwargs["x"], z.detach()))

    def cells(self, recording: Recording) -> list[tuple[FixedPoint, Tensor, list[Call]]]:
        """Evaluate each cell at its fixed point once, and return layer, value and recorded calls.

        A layer that is called twice in a network keeps the adjoint of one call only, and is left to the diagonal.
        """
        self.outer = list(recording.calls)
        found = []
        for layer, calls in self._seen.items():
            if len(calls) == 1:
                before = len(recording.calls)
                x, z = calls[0]
                value = layer.cell(z, x)
                found.append((layer, value, recording.calls[before:]))
        return found


def signs(numbers: Sequence[int], probes: int, shape: tuple[int, ...], seed: Sequence[int]) -> Tensor:
    """Return random signs ``(len(numbers), probes, *shape)``, int8, each sample's by its own number.

    Not collective. A generator that is asked by number instead of in turn: splitmix64 (Steele, Lea, Flood 2014) of the seed,
    the sample and the place, 64 signs at a time.
    """
    count = probes * math.prod(shape)
    words = np.arange(-(-count // 64), dtype=np.uint64)
    key = np.zeros(1, dtype=np.uint64)
    for part in seed:
        key = _mixed(key + np.uint64(part))
    rows = _mixed(key + np.asarray(numbers, dtype=np.uint64))
    bits = np.unpackbits(_mixed(rows[:, None] + words[None, :]).view(np.uint8), axis=1)[:, :count]
    return torch.from_numpy(2 * bits.astype(np.int8) - 1).view(len(numbers), probes, *shape)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return the outputs of splitmix64 for its states ``values``, which wrap around."""
    z = values * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
