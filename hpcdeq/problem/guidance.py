"""What a training problem knows of the fixed points to come, and tells the layers: guesses, accuracy, how many products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hpcdeq.deq import FixedPoint, Guesses, Help, StateCache

# Products of an optimiser's iterate, at least: inner solves take that many and more.
PRODUCTS = 20
# A step is taken to lie in the span of the products' directions when this much of it does not.
OUTSIDE = 1e-6


class Guidance:
    """Initial guesses from the last visit of each sample, extrapolated along Gauss-Newton steps.

    Not collective, every method.

    Parameters
    ----------
    model
        Its `FixedPoint` layers are told.
    limit
        Bytes that may be remembered; 0 turns warm starts off.
    """

    def __init__(self, model: nn.Module, limit: int) -> None:
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, FixedPoint)}
        self.cache = StateCache(limit) if limit and self.layers else None
        self.loosened = (0.0, 0.0)
        self._point: Tensor | None = None
        self._states: dict[tuple[int, str], Tensor] = {}
        self._directions: list[Tensor] = []
        self._tangents: list[dict[tuple[int, str], Tensor]] = []
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
        mix = self._mixture(p) if chunk is not None and not products else None
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

    def linearised_at(self, p: Tensor) -> None:
        """Note that products will be taken at a new point."""
        self._point = p
        self._states.clear()
        self._directions.clear()
        self._tangents.clear()
        self._bytes = 0

    def keep_states(self, chunk: int) -> None:
        """Note the fixed points of a chunk at the present point, which its layers have just found."""
        if self.cache is not None:
            for name, layer in self.layers.items():
                if layer.solution is not None:
                    self._states[chunk, name] = layer.solution.value

    def keep_tangents(self, v: Tensor, chunk: int) -> None:
        """Note the tangents of a chunk's fixed points along v, which its layers have just found; in bounded memory."""
        if self.cache is None or self._bytes > self.cache.limit:
            return
        if not self._directions or self._directions[-1] is not v:
            self._directions.append(v)
            self._tangents.append({})
        for name, layer in self.layers.items():
            tangent = layer.tangent_state
            if tangent is not None:
                self._tangents[-1][chunk, name] = tangent
                self._bytes += tangent.numel() * tangent.element_size()

    def _mixture(self, p: Tensor) -> Tensor | None:
        """Return the coefficients of p - point in the directions, None where it is not made of them."""
        if self._point is None or not self._directions:
            return None
        step = (p - self._point).double()
        norm = step.norm()
        if not norm > 0:
            return None
        directions = torch.stack([v.double() / v.double().norm() for v in self._directions], dim=1)
        mix = torch.linalg.lstsq(directions, step[:, None], driver="gelsd" if step.device.type == "cpu" else None)
        coefficients = mix.solution[:, 0]
        if not (directions @ coefficients - step).norm() <= OUTSIDE * norm:
            return None
        return coefficients / torch.stack([v.double().norm() for v in self._directions])

    def _predict(self, mix: Tensor, chunk: int, name: str) -> Tensor | None:
        state = self._states.get((chunk, name))
        if state is None or any((chunk, name) not in tangents for tangents in self._tangents):
            return None
        for c, tangents in zip(mix.tolist(), self._tangents, strict=True):
            state = torch.add(state, tangents[chunk, name], alpha=c)
        return state
