"""Multilayer perceptron: the explicit network that other models are made of, and one of its own for arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpcdeq.errors import OptionError, suggestion
from hpcdeq.models.base import ModelKind, register

# Smooth ones only: second-order methods differentiate a network twice.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "silu": functional.silu,
}


def activation_named(name: str, model: str) -> Callable[[Tensor], Tensor]:
    """Return an activation; ``model`` says whose setting it is.

    Not collective.

    Raises
    ------
    OptionError
        There is none of that name.
    """
    if name not in ACTIVATIONS:
        hint = suggestion(name, ACTIVATIONS, f"choose one of {', '.join(ACTIVATIONS)}")
        raise OptionError(f"model {model}: unknown activation {name!r}: {hint}")
    return ACTIVATIONS[name]


class Perceptron(nn.Module):
    """Affine maps with an activation between them, over the last dimension of its input.

    Parameters
    ----------
    inputs, width, depth, outputs
        ``depth`` hidden layers of ``width`` units.
    activation
        From `ACTIVATIONS`.
    last
        Whether the outputs go through the activation too.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        depth: int,
        outputs: int,
        activation: Callable[[Tensor], Tensor],
        *,
        last: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.last = last
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise([inputs, *[width] * depth, outputs]))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., outputs)`` from ``(..., inputs)``."""
        for place, layer in enumerate(self.layers, 1):
            x = layer(x)
            if place < len(self.layers) or self.last:
                x = self.activation(x)
        return x


@dataclass(frozen=True)
class MlpConfig:
    """Settings of the multilayer perceptron.

    Attributes
    ----------
    width
        Units of a hidden layer.
    depth
        Hidden layers.
    activation
        ``tanh``, ``gelu`` or ``silu``.
    """

    width: int = 64
    depth: int = 2
    activation: str = "tanh"


class Mlp(nn.Module):
    """y = A_n σ(... σ(A_0 x)), with affine maps A: from parameters to a field, for instance.

    Parameters
    ----------
    config
        Sizes and activation.
    input_shape
        Shape of one sample; it is flattened.
    output_size
        Length of y.

    Raises
    ------
    OptionError
        There is no such activation.
    """

    def __init__(self, config: MlpConfig, input_shape: tuple[int, ...], output_size: int) -> None:
        super().__init__()
        activation = activation_named(config.activation, "mlp")
        self.network = Perceptron(math.prod(input_shape), config.width, config.depth, output_size, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(B, output_size)`` from ``(B, *input_shape)``."""
        return self.network(x.flatten(1))


register("mlp", ModelKind(MlpConfig, "array", Mlp))
