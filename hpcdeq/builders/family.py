"""What a differential equation hands to the writer of its dataset: numbered samples, and what they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Samples = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class FieldFamily:
    """Fields of one equation, numbered.

    Attributes
    ----------
    source
        The equation and its settings in words.
    sample
        ``sample(indices)`` returns inputs ``(b, *sample_shape)`` and targets ``(b, T)`` of the samples with these
        numbers. A sample depends on its number only, to the last bit.
    sample_shape
        Shape of one sample's input.
    target_names
        ``T`` names: the field and the place.
    attributes
        What the file says of its inputs, and of the grid of its targets.
    """

    source: str
    sample: Samples
    sample_shape: tuple[int, ...]
    target_names: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


def line(points: int) -> np.ndarray:
    """Return the points 0, 1/n, ... of a periodic interval. Not collective."""
    return np.arange(points) / points


def centres(points: int) -> np.ndarray:
    """Return the middles of n equal cells on [0, 1]. Not collective."""
    return (np.arange(points) + 0.5) / points


def names_on_line(name: str, points: int) -> tuple[str, ...]:
    """Return the names of targets at the end time on a periodic interval. Not collective."""
    return tuple(f"{name}(x={x:g},T)" for x in line(points))


def names_on_square(name: str, points: int) -> tuple[str, ...]:
    """Return the names of targets at the centres of n x n cells, y running fastest. Not collective."""
    return tuple(f"{name}(x={x:g},y={y:g})" for x in centres(points) for y in centres(points))
