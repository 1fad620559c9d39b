"""This rank's samples, batch by batch, and what becomes of those whose fixed points are not found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hpcdeq.data import Dataset, GraphBatch, SampleSource
from hpcdeq.errors import ConvergenceError, HpcdeqError, OptionError
from hpcdeq.problem.guidance import Guidance
from hpcdeq.problem.parameters import ParameterLayout
from hpcdeq.problem.phases import FORWARD, Phases
from hpcdeq.watchdog import beat

RAISE, WARN, MASK = POLICIES = ("raise", "warn", "mask")
Result = TypeVar("Result")
Compute = Callable[[Any, Tensor, Sequence[int]], Result]


class Visits:
    """Batches of this rank's samples in the model's precision, on its device.

    Not collective, every method.

    Parameters
    ----------
    dataset
        Where they come from.
    layout
        Says precision and device.
    guidance
        Is told which samples are visited, and where.
    chunk_size
        Samples of a batch.
    on_failure
        ``raise``: a sample without a fixed point ends the evaluation. ``warn``: its unconverged state is used, with a
        warning. ``mask``: it is left out, and counted.
    phases
        Visits take forward time, but for what is computed in them under another name.

    Attributes
    ----------
    left_out
        Samples that the present evaluation has left out so far.
    """

    def __init__(
        self,
        dataset: SampleSource,
        layout: ParameterLayout,
        guidance: Guidance,
        chunk_size: int,
        on_failure: str,
        phases: Phases,
    ) -> None:
        if chunk_size < 1:
            raise OptionError(f"chunk_size is {chunk_size}: give 1 or more samples")
        if on_failure not in POLICIES:
            raise OptionError(f"on_failure is {on_failure!r}: choose one of {', '.join(POLICIES)}")
        self.dataset = dataset
        self.layout = layout
        self.guidance = guidance
        self.chunk_size = chunk_size
        self.on_failure = on_failure
        self.phases = phases
        self.left_out = 0
        for layer in guidance.layers.values():
            layer.on_failure = WARN if on_failure == WARN else RAISE

    @property
    def chunk_count(self) -> int:
        """Batches that all samples of this rank make."""
        return -(-len(self.dataset) // self.chunk_size)

    def chunk(self, i: int) -> range:
        """Return the numbers of the samples of a chunk."""
        return range(i * self.chunk_size, min((i + 1) * self.chunk_size, len(self.dataset)))

    def batches(self, rows: np.ndarray | None) -> list[tuple[Sequence[int], int | None]]:
        """Return this rank's batches: its numbers of their samples, and the chunk's number (None: no chunk of all).

        Parameters
        ----------
        rows
            Global numbers of samples; None: all.
        """
        if rows is None:
            return [(self.chunk(i), i) for i in range(self.chunk_count)]
        own = np.sort(self._own(rows)).tolist()
        return [(own[k : k + self.chunk_size], None) for k in range(0, len(own), self.chunk_size)]

    def own_count(self, rows: np.ndarray) -> int:
        """Return how many of some samples, given by their global numbers, are on this rank."""
        return len(self._own(rows))

    def _own(self, rows: np.ndarray) -> np.ndarray:
        if len(self.dataset) == self.dataset.count:
            return rows
        first = self.dataset.offset
        return rows[(rows >= first) & (rows < first + len(self.dataset))] - first

    def each(self, p: Tensor, rows: np.ndarray | None, compute: Compute[Result]) -> Iterator[Result]:
        """Yield what is computed of batches at weights p.

        Parameters
        ----------
        p
            ``(n,)`` weights.
        rows
            Global numbers of samples; None: all.
        compute
            ``compute(inputs, targets, ids)``, ids this rank's numbers of the samples.
        """
        self.left_out = 0
        for ids, number in self.batches(rows):
            result = self.visit(p, ids, number, compute)
            if result is not None:
                yield result

    def visit(
        self,
        p: Tensor,
        ids: Sequence[int],
        number: int | None,
        compute: Compute[Result],
        *,
        products: bool = False,
    ) -> Result | None:
        """Return what is computed of one batch, None if it had to leave out every sample; arguments as in `Guidance.batch`."""

        def attempt(left: Sequence[int]) -> Result:
            chunk = number if len(left) == len(ids) else None
            try:
                with self.phases.of(FORWARD), self.guidance.batch(left, p, chunk=chunk, products=products):
                    inputs, targets = self.move(*self.dataset.batch(rows_of(left)))
                    return compute(inputs, targets, left)
            except HpcdeqError:
                raise
            except Exception as error:
                self._blame(error, p, left, compute)
                raise

        result, missing = self.leaving_out(ids, attempt)
        self.left_out += missing
        beat()
        return result

    def leaving_out(self, ids: Sequence[int], attempt: Callable[[Sequence[int]], Result]) -> tuple[Result | None, int]:
        """Return what is attempted of samples, without those that have no fixed point where these are to be left out.

        Parameters
        ----------
        ids
            Numbers of the samples.
        attempt
            ``attempt(ids)``, of all of them or of those that are left.

        Returns
        -------
        result
            None if no sample has a fixed point.
        missing
            Number of samples that were left out.
        """
        asked = len(ids)
        while len(ids):
            try:
                return attempt(ids), asked - len(ids)
            except ConvergenceError as error:
                good = getattr(error.record, "converged", None)
                if self.on_failure != MASK or good is None or len(good) != len(ids) or bool(good.all()):
                    raise
                ids = [i for i, fine in zip(ids, good.tolist(), strict=True) if fine]
        return None, asked

    def _blame(self, error: Exception, p: Tensor, ids: Sequence[int], compute: Compute[Any]) -> None:
        """Note with an error the sample that makes it, if one does so alone."""
        for i in ids:
            try:
                with self.guidance.batch([i], p, cold=True):
                    compute(*self.move(*self.dataset.batch(slice(i, i + 1))), [i])
            except Exception as same:
                if type(same) is type(error):
                    named = f" ({self.dataset.ids[i]})" if isinstance(self.dataset, Dataset) else ""
                    error.add_note(f"It is sample {self.dataset.offset + i}{named} that makes it")
                return

    def move(self, inputs: Tensor | GraphBatch, targets: Tensor) -> tuple[Tensor | GraphBatch, Tensor]:
        """Return a batch in the model's precision, on its device; class numbers stay whole."""
        dtype, device = self.layout.dtype, self.layout.device
        whole = not targets.is_floating_point()
        return inputs.to(dtype=dtype, device=device), targets.to(device) if whole else targets.to(
            dtype=dtype, device=device
        )


def rows_of(ids: Sequence[int]) -> slice | Tensor:
    """Return what picks this rank's samples by their numbers: a slice where they follow each other. Not collective."""
    return slice(ids.start, ids.stop) if isinstance(ids, range) else torch.from_numpy(np.array(ids))
