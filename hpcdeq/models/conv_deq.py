"""Convolutional DEQ: two 3 x 3 convolutions with a normalisation of each sample as the cell, for images."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, conv2d, group_norm

from hpcdeq.deq import FixedPoint
from hpcdeq.errors import DataError, OptionError
from hpcdeq.models.base import ModelKind, register
from hpcdeq.models.blocks import BoundedConvolution

KERNEL = 3
SOFTNESS = 0.2  # square plus at zero: learns images as fast as ReLU does, and has second derivatives everywhere


@dataclass(frozen=True)
class ConvDeqConfig:
    """Settings of the convolutional DEQ.

    Attributes
    ----------
    width
        Channels of the state.
    stride
        Step of the injection's convolution: the state has ``1 / stride`` of the image's rows and columns.
    groups
        Groups of channels that are normalised together; the greatest common divisor with the width is taken.
    pool
        The head sees the state averaged over ``pool x pool`` parts of the image.
    bound
        Bound on the product of the two convolutions' norms. Below 1 every image has its one fixed point whatever the
        weights become, since neither square plus nor the cell's normalisation stretches.
    contraction
        That product at initialisation; nearer to the bound the solves take longer.
    """

    width: int = 32
    stride: int = 2
    groups: int = 8
    pool: int = 4
    bound: float = 0.95
    contraction: float = 0.8


@dataclass(frozen=True)
class Injection:
    """What the cell is given besides the state.

    Attributes
    ----------
    image
        ``(B, d, h, w)`` what the stem makes of each image.
    first, second
        ``(d, d, 3, 3)`` kernels K₁ and K₂, computed once for all iterations.
    """

    image: Tensor
    first: Tensor
    second: Tensor


def square_plus(u: Tensor) -> Tensor:
    """Return (u + √(u² + 4 h²))/2 with h = `SOFTNESS`, a smooth ReLU of slopes between 0 and 1 (Barron 2021, 2112.11687)."""
    return 0.5 * (u + (u.square() + 4.0 * SOFTNESS**2).sqrt())


class ConvCell(nn.Module):
    """z ↦ N(σ(s + K₂ ∗ N(σ(K₁ ∗ z)))) with σ = `square_plus`, a function of each sample alone.

    The cell of Kolter, Duvenaud and Johnson's tutorial (Deep implicit layers, chapter 4) without its skip connection, and
    with a normalisation N that divides each group of channels by (variance + 1)^½ where theirs divides by the standard
    deviation: N then does not stretch, and the cell contracts by ‖K₁‖ ‖K₂‖. Theirs has no fixed point for some weights.

    Parameters
    ----------
    groups
        Groups of channels that are normalised together.
    """

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def initial_state(self, given: Injection) -> Tensor:
        """Return the zero state ``(B, d, h, w)``."""
        return torch.zeros_like(given.image)

    def select(self, given: Injection, keep: Tensor) -> Injection:
        """Return the input of some of the samples, numbered by keep ``(k,)``."""
        return replace(given, image=given.image.index_select(0, keep))

    def forward(self, z: Tensor, given: Injection) -> Tensor:
        inner = self.normalised(square_plus(conv2d(z, given.first, padding=KERNEL // 2)))
        return self.normalised(square_plus(given.image + conv2d(inner, given.second, padding=KERNEL // 2)))

    def normalised(self, z: Tensor) -> Tensor:
        """Return N(z)."""
        return group_norm(z, self.groups, eps=1.0)


class ConvDeq(nn.Module):
    """Class scores, or numbers, of images ``(C, H, W)``.

    Parameters
    ----------
    config
        Sizes and contraction.
    input_shape
        Channels, rows and columns of an image.
    output_size
        Number of classes or of target numbers.

    Raises
    ------
    DataError
        A sample is no image.
    OptionError
        The contraction is not within what the bound allows.
    """

    def __init__(self, config: ConvDeqConfig, input_shape: tuple[int, ...], output_size: int) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise DataError(
                f"model conv_deq takes images (channels, rows, columns), a sample of the dataset has shape {input_shape}: use"
                " --model mlp_deq"
            )
        if not 0 < config.contraction < config.bound:
            raise OptionError(
                f"contraction {config.contraction} at initialisation must lie between 0 and the bound {config.bound}"
            )
        d, groups = config.width, math.gcd(config.groups, config.width)
        self.pool = config.pool
        self.stem = nn.Conv2d(input_shape[0], d, KERNEL, stride=config.stride, padding=KERNEL // 2, bias=False)
        self.stem_norm = nn.GroupNorm(groups, d)
        # The bound is shared out evenly over the two kernels.
        bound, contraction = math.sqrt(config.bound), math.sqrt(config.contraction)
        self.first = BoundedConvolution(d, d, KERNEL, bound, contraction)
        self.second = BoundedConvolution(d, d, KERNEL, bound, contraction)
        self.equilibrium = FixedPoint(ConvCell(groups))
        self.head = nn.Linear(d * config.pool**2, output_size)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(B, output_size)`` from ``(B, C, H, W)``."""
        injection = Injection(self.stem_norm(self.stem(images)), self.first(), self.second())
        z = self.equilibrium(injection)
        return self.head(adaptive_avg_pool2d(z, self.pool).flatten(1))


register("conv_deq", ModelKind(ConvDeqConfig, "array", ConvDeq))
