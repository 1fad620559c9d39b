"""Kronecker factors of the Gauss-Newton matrix on many ranks: each decomposes and applies those of some layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpcdeq import parallel, state
from hpcdeq.problem.kronecker import Shape, Sums, local_sums
from hpcdeq.problem.phases import FACTORS
from hpcdeq.problem.recording import EMBEDDING, KINDS, SPECTRAL
from hpcdeq.problem.training import TrainingProblem
from hpcdeq.state import Known, State, rows_of, table, whole

PROBES = 3
SAMPLES = 128
# Random subsets of samples and probes change from iterate to iterate, the matrix less: this much of the last factors stays.
MEMORY = 0.5


@dataclass
class Block:
    """A ⊗ G of one weight by its eigenvectors, A = U diag(a) Uᴴ and G = Q diag(g) Qᴴ.

    Attributes
    ----------
    shape
        Whose it is.
    given, probed
        A and G, ``(batch, inputs, inputs)`` and ``(batch, outputs, outputs)``, in double precision.
    dtype
        Precision in which they are applied: the model's.
    """

    shape: Shape
    given: Tensor
    probed: Tensor
    dtype: torch.dtype

    def __post_init__(self) -> None:
        a, left = torch.linalg.eigh(self.given)
        g, right = torch.linalg.eigh(self.probed)
        kind = self.dtype.to_complex() if self.shape.is_complex else self.dtype
        self._left, self._right = left.to(kind), right.to(kind)
        # A complex number is two real ones, among which its variance is shared.
        share = 0.5 if self.shape.is_complex else 1.0
        self.values = share * a.clamp(min=0)[:, :, None] * g.clamp(min=0)[:, None, :]
        self._inverse = (0.0, self.values)

    def solve(self, v: Tensor, damping: float) -> Tensor:
        """Return (A ⊗ G + damping I)⁻¹ v for ``(batch, inputs, outputs)`` numbers. Not collective."""
        if self._inverse[0] != damping:
            self._inverse = (damping, (self.values + damping).reciprocal().to(self.dtype))
        inner = self._left.mH @ v @ self._right.conj()
        return self._left @ (inner * self._inverse[1]) @ self._right.mT


class KroneckerFactors:
    """An approximation of the Gauss-Newton matrix of a problem that is quick to invert.

    Collective on the problem's comm, every method.

    Parameters
    ----------
    problem
        Whose matrix it is.
    probes, samples
        Random probes a sample, and number of samples (chosen anew at each update) that factors are made of.
    seed
        Of both.
    layers
        False: nothing but the diagonal.

    Attributes
    ----------
    largest
        Largest eigenvalue.
    of_weights
        Curvature of the terms of the weights alone (weight decay), their mean over the weights: they are no part of the
        factors, and a multiple of the identity or nearly so.
    """

    def __init__(
        self,
        problem: TrainingProblem,
        probes: int = PROBES,
        samples: int = SAMPLES,
        seed: int = 0,
        *,
        layers: bool = True,
    ) -> None:
        self.problem = problem
        self.layers = layers
        self.probes = probes
        self.samples = samples
        self.seed = seed
        self.largest = 0.0
        self.of_weights = 0.0
        self.blocks: list[Block] = []
        self.diagonal = np.zeros(0)
        self._updates = 0
        self._shapes: list[Shape] = []
        layout = problem.layout
        self._starts = np.concatenate([[0], np.cumsum(layout.lengths)])
        self._covered = np.zeros(layout.count, dtype=bool)

    def update(self, p: Tensor) -> None:
        """Move to weights p, ``(n,)``."""
        problem = self.problem
        with problem.phases.of(FACTORS):
            rows = problem.curvature_rows(min(1.0, self.samples / problem.dataset.count), self.seed, self._updates)
            seed = (self.seed, self._updates)
            sums, own = problem.agreed(lambda: local_sums(problem, p, rows, self.probes, seed))
            count = parallel.sum_over_ranks(problem.comm, np.array([own]))[0]
            shapes = self._agreed_shapes(sums) if self.layers else []
            owners = shared_out([shape.cost for shape in shapes], problem.comm.size)
            self._reduce(sums, shapes, owners, float(count))
            self._reduce_diagonal(sums, shapes, float(count))
            own_largest = max((float(block.values.max()) for block in self.blocks), default=0.0)
            self.largest = parallel.max_over_ranks(problem.comm, max(own_largest, self.diagonal.max(initial=0.0)))
            diagonal = problem.weight_terms.product(p, torch.ones_like(p), "gauss_newton")
            self.of_weights = float(torch.as_tensor(diagonal, dtype=torch.float64).mean())
            self._updates += 1

    def solve(self, v: Tensor, damping: float) -> np.ndarray:
        """Return this rank's block of (K + damping I)⁻¹ v, v ``(n,)`` the same on all ranks."""
        layout = self.problem.layout
        v = v.to("cpu", layout.dtype)
        out = torch.zeros(layout.count, dtype=layout.dtype)
        for block in self.blocks:
            self._put(out, block.shape, block.solve(self._take(v, block.shape), damping))
        own = layout.scatter_sum(out)
        rest = ~self._covered[layout.owned]
        own[rest] = v[layout.owned].double().numpy()[rest] / (self.diagonal[layout.owned][rest] + damping)
        return own

    # --------------------------------------------------------------------------------------------------- state

    def state(self) -> State:
        """Return the factors, each from the rank that owns it, and the diagonal."""
        kinds = [
            (s.weight, -1 if s.bias is None else s.bias, KINDS.index(s.kind), s.batch, s.inputs, s.outputs)
            for s in self._shapes
        ]
        return {
            "updates": self._updates,
            "largest": self.largest,
            "of_weights": self.of_weights,
            "diagonal": state.Block(self.diagonal[self.problem.layout.owned]),
            "shapes": np.array(kinds, dtype=np.int64).reshape(-1, 6),
            "factors": table({b.shape.weight: np.concatenate([_flat(b.given), _flat(b.probed)]) for b in self.blocks}),
        }

    def restore(self, known: Known) -> None:
        """Go on from a state: decompose the factors that this rank owns now."""
        self._updates = int(known["updates"])
        self.largest, self.of_weights = known["largest"], known["of_weights"]
        self.diagonal = whole(known["diagonal"])
        shapes = [
            Shape(weight, None if bias < 0 else bias, KINDS[kind], *orders)
            for weight, bias, kind, *orders in known["shapes"].tolist()
        ]
        comm = self.problem.comm
        owners = shared_out([shape.cost for shape in shapes], comm.size)
        own = [shape for shape, owner in zip(shapes, owners, strict=True) if owner == comm.rank]
        rows = rows_of(known["factors"], [shape.weight for shape in own])
        self.blocks = []
        for shape in own:
            given, probed = np.split(rows[shape.weight], [shape.lengths[0]])
            self.blocks.append(
                Block(
                    shape,
                    _square(given, shape.batch, shape.inputs, shape.is_complex).clone(),
                    _square(probed, shape.batch, shape.outputs, shape.is_complex).clone(),
                    self.problem.layout.dtype,
                )
            )
        self._cover(shapes)

    # ---------------------------------------------------------------------------------------------------- sums

    def _agreed_shapes(self, sums: Sums) -> list[Shape]:
        """Return the shapes that any rank has found: one without samples has found none."""
        table = np.zeros((len(self.problem.layout.lengths), 6), dtype=np.int64)
        for shape in sums.shapes.values():
            bias = 0 if shape.bias is None else shape.bias + 1
            table[shape.weight] = (1, KINDS.index(shape.kind), bias, shape.batch, shape.inputs, shape.outputs)
        table = parallel.sum_over_ranks(self.problem.comm, table.ravel()).reshape(table.shape)
        found = []
        for weight, (ranks, *entries) in enumerate(table):
            if ranks:
                kind, bias, batch, inputs, outputs = (int(entry // ranks) for entry in entries)
                found.append(Shape(weight, bias - 1 if bias else None, KINDS[kind], batch, inputs, outputs))
        return found

    def _reduce(self, sums: Sums, shapes: list[Shape], owners: list[int], count: float) -> None:
        """Sum up every layer's factors on the rank that owns it, blend them with its last ones, and decompose them."""
        comm = self.problem.comm
        order = [
            shape for rank in range(comm.size) for shape, owner in zip(shapes, owners, strict=True) if owner == rank
        ]
        parts, sizes = [], [0] * comm.size
        for shape, owner in sorted(zip(shapes, owners, strict=True), key=lambda pair: pair[1]):
            first, second = shape.lengths
            sizes[owner] += first + second + 1
            for tensor, length in ((sums.given.get(shape.weight), first), (sums.probed.get(shape.weight), second)):
                parts.append(np.zeros(length) if tensor is None else _flat(tensor))
            parts.append(np.array([sums.places.get(shape.weight, 0.0)]))
        packed = np.concatenate(parts) if parts else np.zeros(0)
        own = parallel.sum_and_scatter(comm, packed, sizes)
        before = {block.shape: block for block in self.blocks}
        self.blocks, place = [], 0
        for shape in order:
            if owners[shapes.index(shape)] != comm.rank:
                continue
            first, second = shape.lengths
            given = _square(own[place : place + first], shape.batch, shape.inputs, shape.is_complex)
            probed = _square(own[place + first : place + first + second], shape.batch, shape.outputs, shape.is_complex)
            places = own[place + first + second]
            place += first + second + 1
            given, probed = given / max(places, 1e-300), probed / (count * self.probes)
            last = before.get(shape)
            if last is not None:
                given = MEMORY * last.given + (1 - MEMORY) * given
                probed = MEMORY * last.probed + (1 - MEMORY) * probed
            self.blocks.append(Block(shape, given, probed, self.problem.layout.dtype))

    def _reduce_diagonal(self, sums: Sums, shapes: list[Shape], count: float) -> None:
        """Find the diagonal of what has no factors, and smooth what few probes say of one number by its tensor's mean."""
        layout = self.problem.layout
        self._cover(shapes)
        gradients = sums.gradients.numpy()[:, ~self._covered]
        total = parallel.sum_over_ranks(self.problem.comm, gradients.ravel()).reshape(gradients.shape)
        found = np.zeros(layout.count)
        found[~self._covered] = (total * total).mean(axis=0) / count
        for start, length in zip(self._starts, layout.lengths, strict=False):
            part = found[start : start + length]
            part[:] = 0.5 * part + 0.5 * (part.mean() if length else 0.0)
        last = self.diagonal
        self.diagonal = MEMORY * last + (1 - MEMORY) * found if len(last) else found

    def _cover(self, shapes: list[Shape]) -> None:
        """Note which weights have factors."""
        self._shapes = shapes
        self._covered[:] = False
        for shape in shapes:
            for number in (shape.weight, shape.bias):
                if number is not None:
                    self._covered[self._starts[number] : self._starts[number + 1]] = True

    # ------------------------------------------------------------------------------------------------- vectors

    def _piece(self, v: Tensor, number: int) -> Tensor:
        layout = self.problem.layout
        return v[self._starts[number] : self._starts[number + 1]].view(layout.shapes[number])

    def _take(self, v: Tensor, shape: Shape) -> Tensor:
        """Return a layer's part of a vector as ``(batch, inputs, outputs)``."""
        weight = self._piece(v, shape.weight)
        if shape.kind == SPECTRAL:
            return torch.view_as_complex(weight.contiguous())
        if shape.kind == EMBEDDING:
            return weight[None]
        matrix = weight.flatten(1).T
        if shape.bias is not None:
            matrix = torch.cat([matrix, self._piece(v, shape.bias)[None]])
        return matrix[None]

    def _put(self, out: Tensor, shape: Shape, values: Tensor) -> None:
        weight = self._piece(out, shape.weight)
        if shape.kind == SPECTRAL:
            weight.copy_(torch.view_as_real(values))
        elif shape.kind == EMBEDDING:
            weight.copy_(values[0])
        else:
            matrix = values[0]
            if shape.bias is not None:
                self._piece(out, shape.bias).copy_(matrix[-1])
                matrix = matrix[:-1]
            weight.copy_(matrix.T.reshape(weight.shape))


def shared_out(costs: Sequence[int], ranks: int) -> list[int]:
    """Return a rank for each cost, the largest first to the least burdened. Not collective."""
    burdens, owners = [0] * ranks, [0] * len(costs)
    for place in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[place] = burdens.index(min(burdens))
        burdens[owners[place]] += costs[place]
    return owners


def _flat(tensor: Tensor) -> np.ndarray:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.double().cpu().reshape(-1).numpy()


def _square(values: np.ndarray, batch: int, order: int, is_complex: bool) -> Tensor:
    tensor = torch.from_numpy(values.copy())
    if is_complex:
        return torch.view_as_complex(tensor.view(batch, order, order, 2))
    return tensor.view(batch, order, order)
