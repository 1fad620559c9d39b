"""Fourier neural operator: convolutions over the whole domain by their lowest modes (Li et al. 2021, arXiv 2010.08895)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpcdeq.errors import DataError
from hpcdeq.models.base import ModelKind, register
from hpcdeq.models.grids import GridFeatures, is_periodic
from hpcdeq.models.mlp import Perceptron, activation_named
from hpcdeq.models.spectral import FourierModes, SpectralConvolution, padded


@dataclass(frozen=True)
class FnoConfig:
    """Settings of the Fourier neural operator.

    Attributes
    ----------
    width
        Channels.
    modes
        Wave numbers along each axis, zero included, that a layer's convolution keeps.
    layers
        Fourier layers.
    projection
        Units of the hidden layer of the projection.
    activation
        ``gelu``, ``tanh`` or ``silu``.
    boundary
        ``periodic``; ``open``: a layer sees a field of zeros beyond the domain; ``auto``: periodic where the grid has one
        axis.
    padding
        Width of those zeros where the domain is open, in lengths of it.
    coordinates
        Whether the network is told where a point is. A periodic one that is not told commutes with translations.
    harmonics
        Cosines and sines of each coordinate that tell it where the domain is periodic.
    """

    width: int = 12
    modes: int = 6
    layers: int = 3
    projection: int = 32
    activation: str = "gelu"
    boundary: str = "auto"
    padding: float = 0.25
    coordinates: bool = True
    harmonics: int = 1


class Lifting(nn.Module):
    """Channels at each point of a grid, from a field's value there and, where asked for, the coordinates.

    Parameters
    ----------
    grid
        Points along each axis.
    width
        Channels.
    coordinates, periodic, harmonics
        Whether they are asked for, and how they are written: see `grid_features`.
    """

    def __init__(self, grid: tuple[int, ...], width: int, coordinates: bool, periodic: bool, harmonics: int) -> None:
        super().__init__()
        self.places = GridFeatures(grid, periodic, harmonics) if coordinates else None
        self.map = nn.Linear(1 if self.places is None else 1 + self.places.values.shape[1], width)

    def forward(self, a: Tensor) -> Tensor:
        """Return ``(B, points, width)`` from ``(B, *grid)``."""
        values = a.flatten(1)[..., None]
        if self.places is not None:
            values = torch.cat([values, self.places(a).expand(len(a), -1, -1)], dim=2)
        return self.map(values)


class FourierLayer(nn.Module):
    """v ↦ K v + W v + b with a spectral convolution K and a matrix W, the same at all points.

    Parameters
    ----------
    grid, period, modes
        As for `FourierModes`.
    width
        Channels.
    """

    def __init__(self, grid: tuple[int, ...], period: tuple[int, ...], modes: int, width: int) -> None:
        super().__init__()
        self.convolution = SpectralConvolution(FourierModes(grid, modes, period), width, width)
        self.pointwise = nn.Linear(width, width)

    def forward(self, field: Tensor) -> Tensor:
        """Return fields ``(B, points, width)`` from fields of the same shape."""
        return self.convolution(field) + self.pointwise(field)


class Fno(nn.Module):
    """u = Q F_L σ(... σ(F_1 P(a, x))) with Fourier layers F, a lifting P and a projection Q at each point.

    A domain that is not periodic is continued by zeros before every layer: its modes have a longer period. (Padding once
    before the first layer, as in the paper's code, costs the same layers on a larger grid.)

    Parameters
    ----------
    config
        Sizes, activation and boundary.
    input_shape
        Grid of a, one or two axes.
    output_size
        Points of u, on the same grid.

    Raises
    ------
    DataError
        Input and output are no fields on one grid of one or two axes.
    OptionError
        A grid with too few points for the modes, or a setting that is none.
    """

    def __init__(self, config: FnoConfig, input_shape: tuple[int, ...], output_size: int) -> None:
        super().__init__()
        check_field(input_shape, output_size, "fno")
        self.activation = activation_named(config.activation, "fno")
        periodic = is_periodic(config.boundary, len(input_shape), "fno")
        period = padded(input_shape, periodic, config.padding, "fno")
        self.lifting = Lifting(input_shape, config.width, config.coordinates, periodic, config.harmonics)
        self.layers = nn.ModuleList(
            FourierLayer(input_shape, period, config.modes, config.width) for _ in range(config.layers)
        )
        self.projection = Perceptron(config.width, config.projection, 1, 1, self.activation)

    def forward(self, a: Tensor) -> Tensor:
        """Return ``(B, output_size)`` from ``(B, *input_shape)``."""
        field = self.lifting(a)
        for place, layer in enumerate(self.layers, 1):
            field = layer(field)
            if place < len(self.layers):
                field = self.activation(field)
        return self.projection(field).squeeze(2)


def check_field(input_shape: tuple[int, ...], output_size: int, model: str) -> None:
    """Check that a sample is a field on a grid of one or two axes, and its output one on the same grid.

    Not collective.

    Raises
    ------
    DataError
        It is not; ``model`` says who asks.
    """
    points = torch.Size(input_shape).numel()
    if len(input_shape) not in (1, 2) or points != output_size:
        raise DataError(
            f"model {model} maps fields on a grid of one or two axes to fields on the same grid; here a sample has shape"
            f" {input_shape} and {output_size} outputs: use --model deeponet or mlp"
        )


register("fno", ModelKind(FnoConfig, "array", Fno))
