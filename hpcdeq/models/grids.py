"""Where the points of a field lie, written as features that a network can use."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hpcdeq.errors import OptionError, suggestion

BOUNDARIES = ("auto", "periodic", "open")


def is_periodic(boundary: str, axes: int, model: str) -> bool:
    """Return what a setting ``boundary`` means on a grid; ``auto`` is periodic along one axis, and open on more.

    Not collective.

    Raises
    ------
    OptionError
        It is none of `BOUNDARIES`; ``model`` says whose setting it is.
    """
    if boundary not in BOUNDARIES:
        hint = suggestion(boundary, BOUNDARIES, f"choose one of {', '.join(BOUNDARIES)}")
        raise OptionError(f"model {model}: unknown boundary {boundary!r}: {hint}")
    return boundary == "periodic" or (boundary == "auto" and axes == 1)


def field_grid(input_shape: tuple[int, ...], output_size: int) -> tuple[int, ...]:
    """Return the grid of an output: the input's, where it has as many points, else one axis. Not collective."""
    return input_shape if math.prod(input_shape) == output_size else (output_size,)


def grid_features(grid: tuple[int, ...], periodic: bool, harmonics: int = 1) -> Tensor:
    """Return features of the points of a grid, the cell centres of the unit interval, square or cube.

    Not collective. The first cell of n along an axis is centred at 1/(2n). A point x is written as cos 2πkx and sin 2πkx
    for k = 1 to ``harmonics``, for each coordinate, where the field is periodic: no function of these has a jump at the
    boundary. Elsewhere it is written as its coordinates.

    Parameters
    ----------
    grid
        Points along each axis; they are numbered with the last axis fastest.
    periodic, harmonics
        Which features.

    Returns
    -------
    Tensor
        ``(points, 2 axes harmonics)`` or ``(points, axes)``, float64.
    """
    along = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in grid]
    places = torch.stack([axis.flatten() for axis in torch.meshgrid(*along, indexing="ij")], dim=1)
    if not periodic:
        return places
    angles = 2 * math.pi * places[:, :, None] * torch.arange(1, harmonics + 1, dtype=torch.float64)
    return torch.cat([angles.cos(), angles.sin()], dim=2).flatten(1)


class GridFeatures(nn.Module):
    """`grid_features` in the precision of what they are used with.

    Parameters
    ----------
    grid, periodic, harmonics
        As there.

    Attributes
    ----------
    values
        ``(points, features)``. In float64 until the model is moved to another precision, so that they are exact in any.
    """

    values: Tensor

    def __init__(self, grid: tuple[int, ...], periodic: bool, harmonics: int = 1) -> None:
        super().__init__()
        self.register_buffer("values", grid_features(grid, periodic, harmonics))

    def forward(self, like: Tensor) -> Tensor:
        """Return the features ``(points, features)`` in the precision and on the device of a tensor."""
        return self.values.to(like)
