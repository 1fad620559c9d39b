"""What a training problem knows of the fixed points to come, and tells the layers: guesses, accuracy, how many products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpcdeq import parallel
from hpcdeq.deq import FixedPoint, Guesses, Help, StateCache
from hpcdeq.problem.parameters import ParameterLayout

# Products of an optimiser's iterate, at least: inner solves take that many and more.
PRODUCTS = 20
# A step is taken to lie in the span of the products' directions when this much of it does not.
OUTSIDE = 1e-6
MOST = 64  # directions kept of one point


class Guidance:
    """Initial guesses from the last visit of each sample, extrapolated along Gauss-Newton steps.

    Not collective, every method but `foresee`. Of directions each rank keeps its block.

    Parameters
    ----------
    model
        Its `FixedPoint` layers are told.
    limit
        Bytes that may be remembered; 0 turns warm starts off.
    layout
        How vectors of weights are distributed.
    """

    def __init__(self, model: nn.Module, limit: int, layout: ParameterLayout) -> None:
        self._layout = layout
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, FixedPoint)}
        self.cache = StateCache(limit) if limit and self.layers else None
        self.loosened = (0.0, 0.0)
        self._point: Tensor | None = None
        self._states: dict[tuple[int, str], Tensor] = {}
        self._directions: list[Tensor] = []
        self._tangents: list[dict[tuple[int, str], Tensor]] = []
        self._pending: dict[tuple[int, str], Tensor] = {}
        self._mix: Tensor | None = None
        self._bytes = 0

    def describe(self) -> list[str]:
        """Return a line for each way in which tangent and adjoint systems were solved so far."""
        return [f"layer {name}: derivatives by {way}" for name, layer in self.layers.items() for way in layer.methods]

    @contextlib.contextmanager
    def batch(
        self, ids: Sequence[int], p: Tensor, *, chunk: int | None = None, products: bool = False, cold: bool = False
    ) -> Iterator[None]:
        """Tell the layers, inside a ``with`` block, what is known of a batch.

        Parameters
        ----------
        ids
            This rank's numbers of its samples.
        p
            Weights.
        chunk
            Its number among the chunks of the whole set; None: another batch.
        products
            Whether many products will be asked for at this point.
        cold
            Whether to solve as whoever applies the model does: from the layers' own initial states, as accurately as the
            options say. Nothing is remembered of it.
        """
        mix = self._mix if chunk is not None and not products else None
        for name, layer in self.layers.items():
            guesses = None
            if self.cache is not None and not cold:
                predicted = self._predict(mix, chunk, name) if mix is not None and chunk is not None else None
                guesses = Guesses(self.cache, name, ids, predicted)
            layer.help = Help(2 * PRODUCTS if products else 1, guesses, (0.0, 0.0) if cold else self.loosened)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.help = Help()

    def move(self, first: int, count: int) -> None:
        """Note that this rank has other samples now: the former ones from number ``first`` on, ``count`` in all.

        Guesses for those that it had before stay; chunks are others, and with them what was known of the last point's.
        """
        if self.cache is not None:
            self.cache.renumber(first, count)
        self.linearised_at(None)

    def linearised_at(self, p: Tensor | None) -> None:
        """Note that products will be taken at a new point; None: at one that is not known yet."""
        self._point = p
        self._states.clear()
        self._directions.clear()
        self._tangents.clear()
        self._pending = {}
        self._mix = None
        self._bytes = 0

    def keep_states(self, chunk: int) -> None:
        """Note the fixed points of a chunk at the present point, which its layers have just found."""
        if self.cache is not None:
            for name, layer in self.layers.items():
                if layer.solution is not None:
                    self._states[chunk, name] = layer.solution.value

    def keep_tangents(self, chunk: int) -> None:
        """Note the tangents of a chunk's fixed points that its layers have just found; in bounded memory."""
        if self.cache is None or self._bytes > self.cache.limit:
            return
        for name, layer in self.layers.items():
            tangent = layer.tangent_state
            if tangent is not None:
                self._pending[chunk, name] = tangent
                self._bytes += tangent.numel() * tangent.element_size()

    def keep_direction(self, v: Tensor) -> None:
        """Note that the last tangents of all samples are along v, ``(n,)``; all ranks call this alike."""
        if self.cache is not None and len(self._directions) < MOST:
            self._directions.append(v[self._layout.owned].detach().to("cpu", torch.float64, copy=True))
            self._tangents.append(self._pending)
        self._pending = {}

    def foresee(self, p: Tensor, rows: Any) -> None:
        """Prepare for an evaluation at p, ``(n,)``: of all samples (``rows`` None) what lies along the directions is known.

        Collective on comm.
        """
        self._mix = self._mixture(p) if rows is None else None

    def _mixture(self, p: Tensor) -> Tensor | None:
        """Return the coefficients of p - point in the directions, None where it is not made of them."""
        if self._point is None or not self._directions or p.shape != self._point.shape:
            return None
        owned, comm = self._layout.owned, self._layout.comm
        step = (p[owned] - self._point[owned]).to("cpu", torch.float64)
        rows = torch.stack([*self._directions, step])
        gram = torch.from_numpy(parallel.sum_over_ranks(comm, (rows @ rows.T).numpy()))
        norms = gram.diagonal().sqrt()
        if not ((norms > 0) & norms.isfinite()).all():
            return None
        gram = gram / norms / norms[:, None]
        mix = torch.linalg.lstsq(gram[:-1, :-1], gram[:-1, -1:], driver="gelsd").solution[:, 0]
        coefficients = mix * norms[-1] / norms[:-1]
        left = (coefficients @ rows[:-1] - step).square().sum()
        outside = float(parallel.sum_over_ranks(comm, left.numpy().reshape(1))[0]) ** 0.5
        return coefficients if outside <= OUTSIDE * float(norms[-1]) else None

    def _predict(self, mix: Tensor, chunk: int, name: str) -> Tensor | None:
        state = self._states.get((chunk, name))
        if state is None or any((chunk, name) not in tangents for tangents in self._tangents):
            return None
        for c, tangents in zip(mix.tolist(), self._tangents, strict=True):
            state = torch.add(state, tangents[chunk, name], alpha=c)
        return state
