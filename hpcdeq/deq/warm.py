"""The last fixed points and adjoints of samples, kept as the next initial guesses in bounded memory."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpcdeq.deq.samples import Samples


@dataclass(eq=False)
class _Chunk:
    """States of samples that were solved together."""

    value: Tensor
    ids: tuple[int, ...]
    bounds: list[int]  # rows of sample i: bounds[i] to bounds[i + 1]
    users: int


class StateCache:
    """States by sample number, for one layer or several.

    Not collective, every method.

    Parameters
    ----------
    limit
        Bytes that are kept; what does not fit is not remembered.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._places: dict[Hashable, dict[int, tuple[_Chunk, int]]] = {}

    def recall(self, key: Hashable, ids: Sequence[int], default: Tensor, samples: Samples) -> Tensor:
        """Return the remembered states of some samples, and the default's rows for the others.

        Parameters
        ----------
        key
            Which layer, and what of it.
        ids
            Numbers of the samples of the batch.
        default, samples
            Initial state of the batch, and which rows belong together.
        """
        places = self._places.get(key)
        if not places or len(ids) != samples.count:
            return default
        first = places.get(ids[0])
        if first is not None and first[0].ids == tuple(ids) and first[0].value.shape == default.shape:
            return first[0].value.to(default)
        bounds = _bounds(samples)
        if bounds is None:
            return default
        parts = []
        for i, name in enumerate(ids):
            rows = default[bounds[i] : bounds[i + 1]]
            place = places.get(name)
            if place is not None:
                chunk, number = place
                known = chunk.value[chunk.bounds[number] : chunk.bounds[number + 1]]
                rows = known.to(rows) if known.shape == rows.shape else rows
            parts.append(rows)
        return torch.cat(parts)

    def keep(self, key: Hashable, ids: Sequence[int], value: Tensor, samples: Samples) -> None:
        """Remember the states of some samples in place of what is known of them; shares memory with the value."""
        bounds = _bounds(samples)
        if bounds is None or len(ids) != samples.count or not len(ids):
            return
        places = self._places.setdefault(key, {})
        for name in ids:
            self._forget(places, name)
        size = value.numel() * value.element_size()
        if self.bytes + size > self.limit:
            return
        self.bytes += size
        chunk = _Chunk(value, tuple(ids), bounds, len(ids))
        places.update({name: (chunk, i) for i, name in enumerate(ids)})

    def keys(self) -> list[Hashable]:
        """Return all keys that anything is remembered for."""
        return [key for key, places in self._places.items() if places]

    def rows(self, key: Hashable) -> dict[int, Tensor]:
        """Return the remembered rows ``(r, ...)`` of each sample; shares memory."""
        return {
            name: chunk.value[chunk.bounds[number] : chunk.bounds[number + 1]]
            for name, (chunk, number) in self._places.get(key, {}).items()
        }

    def remember(self, key: Hashable, rows: Mapping[int, Tensor]) -> None:
        """Remember the rows of samples that will be solved for together, in the order given."""
        bounds = [0, *np.cumsum([len(row) for row in rows.values()]).tolist()]
        chunk = _Chunk(torch.cat(list(rows.values())), tuple(rows), bounds, len(rows))
        self.bytes += chunk.value.numel() * chunk.value.element_size()
        self._places.setdefault(key, {}).update({name: (chunk, i) for i, name in enumerate(rows)})

    def renumber(self, first: int, count: int) -> None:
        """Give every sample another number: ``first`` becomes 0; those that do not fall below ``count`` then are forgotten."""
        for key, places in self._places.items():
            for name in [name for name in places if not first <= name < first + count]:
                self._forget(places, name)
            for chunk in {id(chunk): chunk for chunk, _ in places.values()}.values():
                chunk.ids = tuple(name - first for name in chunk.ids)
            self._places[key] = {name - first: place for name, place in places.items()}

    def clear(self) -> None:
        """Forget everything."""
        self._places.clear()
        self.bytes = 0

    def _forget(self, places: dict[int, tuple[_Chunk, int]], name: int) -> None:
        place = places.pop(name, None)
        if place is not None:
            chunk = place[0]
            chunk.users -= 1
            if not chunk.users:
                self.bytes -= chunk.value.numel() * chunk.value.element_size()


def _bounds(samples: Samples) -> list[int] | None:
    """Return the first row of each sample and the number of rows; None where a sample's rows are not together."""
    if samples.index is None:
        return list(range(samples.count + 1))
    if bool((samples.index.diff() < 0).any()):
        return None
    sizes = torch.bincount(samples.index, minlength=samples.count)
    return [0, *sizes.cumsum(0).tolist()]


class Guesses:
    """The cache as one batch of one layer sees it.

    Not collective, every method. A layer that is called several times for a batch has a state for each call.

    Parameters
    ----------
    cache
        Shared with other batches.
    layer
        Name of the layer.
    ids
        Numbers of the samples of the batch.
    predicted
        A better guess of the state than the last one, where there is any.
    """

    def __init__(self, cache: StateCache, layer: str, ids: Sequence[int], predicted: Tensor | None = None) -> None:
        self.cache = cache
        self.layer = layer
        self.ids = ids
        self.predicted = predicted
        self._calls = 0

    def state(self, default: Tensor, samples: Samples) -> tuple[Tensor, int]:
        """Return the initial state of the next call, and the number of that call."""
        call, self._calls = self._calls, self._calls + 1
        if call == 0 and self.predicted is not None and self.predicted.shape == default.shape:
            return self.predicted.to(default), call
        return self.cache.recall((self.layer, "state", call), self.ids, default, samples), call

    def adjoint(self, call: int, default: Tensor, samples: Samples) -> Tensor:
        """Return the initial adjoint of a call."""
        return self.cache.recall((self.layer, "adjoint", call), self.ids, default, samples)

    def keep(self, what: str, call: int, value: Tensor, samples: Samples) -> None:
        """Remember a ``state`` or an ``adjoint``."""
        self.cache.keep((self.layer, what, call), self.ids, value, samples)
