"""The convolutional DEQ: what its cell promises of any weights, and what its settings mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import hpcdeq
from hpcdeq.errors import DataError, OptionError
from hpcdeq.models import build_model, model_config
from hpcdeq.models.blocks import squeezed
from hpcdeq.models.conv_deq import SOFTNESS, ConvCell, ConvDeq, Injection, square_plus

IMAGE = (3, 12, 10)


def built(seed: int = 0, shape: tuple[int, ...] = IMAGE, **settings: object) -> ConvDeq:
    config = model_config("conv_deq", {"width": 8, "groups": 4, "pool": 2, **settings})
    model = build_model("conv_deq", config, "array", shape, 5, seed=seed)
    assert isinstance(model, ConvDeq)
    return model


def images(count: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(count, *IMAGE, dtype=torch.float64)


def seized(model: ConvDeq, batch: Tensor) -> Injection:
    """Return what the cell is given for a batch."""
    seen: list[Injection] = []
    hook = model.equilibrium.register_forward_pre_hook(lambda layer, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        model(batch)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_state_is_the_image_at_the_stride(stride: int) -> None:
    model = built(stride=stride)
    assert model(images(4)).shape == (4, 5)
    solution = model.equilibrium.solution
    assert solution is not None
    assert solution.value.shape == (4, 8, -(-12 // stride), -(-10 // stride))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("contraction", [0.1, 0.4, 0.9])
def test_a_fresh_model_has_a_fixed_point_that_anderson_finds(contraction: float, scale: float) -> None:
    model = built(contraction=contraction)
    given = seized(model, images(6, scale))
    options = {"snes_type": "anderson", "snes_rtol": 1e-6, "snes_atol": 0.0, "snes_max_it": 30}
    solution = hpcdeq.solve_fixed_point(model.equilibrium.cell, given, options=options)
    z = solution.value
    with torch.no_grad():
        again = model.equilibrium.cell(z, given)
    assert float(((again - z).flatten(1).norm(dim=1) / z.flatten(1).norm(dim=1)).max()) < 2e-6


@pytest.mark.parametrize("factor", [1.0, 1e4])
def test_iterating_contracts_by_the_bound_whatever_the_weights_become(factor: float) -> None:
    """Between any two states, near and far, measured by the cell itself and not by its derivative."""
    model = built(bound=0.8, contraction=0.4)
    with torch.no_grad():
        for part in (model.first, model.second):
            for parameter in part.parameters():
                parameter.copy_(factor * torch.randn_like(parameter))
    given = seized(model, images(6, 1e-2))
    for distance in (1e-4, 1.0, 100.0):
        a = torch.randn_like(given.image)
        b = a + distance * torch.randn_like(a)
        with torch.no_grad():
            moved = (model.equilibrium.cell(a, given) - model.equilibrium.cell(b, given)).flatten(1).norm(dim=1)
        assert bool((moved <= 0.8 * (a - b).flatten(1).norm(dim=1)).all())


def norm_of_convolution(kernel: Tensor) -> float:
    """Return the 2-norm of a convolution of images of 16 x 16, by power iteration."""
    v = torch.randn(1, kernel.shape[1], 16, 16, dtype=kernel.dtype)
    for _ in range(200):
        image = functional.conv2d(v / v.norm(), kernel, padding=1)
        v = functional.conv_transpose2d(image, kernel, padding=1)
    return float(image.norm())


@pytest.mark.parametrize("factor", [None, 1e4])
def test_the_settings_are_of_the_product_of_both_convolutions(factor: float | None) -> None:
    model = built(bound=0.9, contraction=0.6)
    expected = 0.6 if factor is None else 0.9
    with torch.no_grad():
        for part in (model.first, model.second):
            part.parameter.copy_(part.parameter if factor is None else factor * torch.randn_like(part.parameter))
        product = norm_of_convolution(model.first()) * norm_of_convolution(model.second())
        bounds = [part.norm_bound() * squeezed(part.norm_bound(), part.bound) for part in (model.first, model.second)]
    assert 0.6 * expected < product <= expected
    assert float(bounds[0] * bounds[1]) == pytest.approx(expected, rel=1e-6)


def test_a_normalisation_does_not_stretch_and_sees_one_sample() -> None:
    cell = ConvCell(groups=2)
    z = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(cell.normalised, z)
    assert float(torch.linalg.matrix_norm(jacobian.reshape(48, 48), 2)) <= 1.0
    groups = z.reshape(3, 2, 8)
    expected = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1.0).sqrt()
    torch.testing.assert_close(cell.normalised(z), expected.reshape(z.shape))


def test_square_plus_is_a_smooth_relu_that_does_not_stretch() -> None:
    u = torch.linspace(-50.0, 50.0, 10_001, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(square_plus(u).sum(), u)[0]
    above = (square_plus(u) - u.relu()).detach()
    assert float(slope.min()) > 0.0 and float(slope.max()) < 1.0
    assert float(above.max()) == pytest.approx(SOFTNESS)  # at zero
    assert float(above[[0, -1]].abs().max()) < 1e-3


def test_samples_may_leave_the_batch() -> None:
    model = built()
    batch = images(5)
    given = seized(model, batch)
    keep = torch.tensor([0, 3])
    fewer = model.equilibrium.cell.select(given, keep)
    z = torch.randn_like(given.image)
    with torch.no_grad():
        torch.testing.assert_close(model.equilibrium.cell(z[keep], fewer), model.equilibrium.cell(z, given)[keep])
    assert fewer.first is given.first and fewer.second is given.second


@pytest.mark.parametrize(("width", "groups", "expected"), [(8, 4, 4), (6, 4, 2), (5, 4, 1), (8, 100, 4)])
def test_any_width_has_groups(width: int, groups: int, expected: int) -> None:
    model = built(width=width, groups=groups)
    assert model.equilibrium.cell.groups == model.stem_norm.num_groups == expected
    model(images(2))


@pytest.mark.parametrize("shape", [(64,), (8, 8), ()])
def test_what_is_no_image_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"conv_deq takes images \(channels, rows, columns\).*use --model mlp_deq"):
        built(shape=shape)


@pytest.mark.parametrize("contraction", [0.0, 0.95, 1.5])
def test_a_contraction_beyond_the_bound_is_refused(contraction: float) -> None:
    with pytest.raises(OptionError, match=f"contraction {contraction} .* between 0 and the bound 0.95"):
        built(contraction=contraction)


def test_the_second_derivative_is_that_of_the_gradient() -> None:
    """A Hessian-vector product through the fixed point, against a difference of gradients."""
    model = built(width=4, groups=2, contraction=0.8)
    model.equilibrium.options.given |= {"snes_rtol": 1e-13, "snes_atol": 1e-13, "ksp_rtol": 1e-12}
    x = images(2)
    weights = [p for p in model.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in weights]

    def gradient() -> list[Tensor]:
        return list(torch.autograd.grad(model(x).square().sum(), weights, create_graph=True))

    product = torch.autograd.grad(sum((g * d).sum() for g, d in zip(gradient(), direction, strict=True)), weights)
    step, sides = 1e-5, []
    for distance in (step, -2 * step):
        with torch.no_grad():
            nn.utils.vector_to_parameters(
                nn.utils.parameters_to_vector(weights) + distance * nn.utils.parameters_to_vector(direction),
                weights,
            )
        sides.append(torch.cat([g.detach().flatten() for g in gradient()]))
    torch.testing.assert_close(
        torch.cat([p.flatten() for p in product]), (sides[0] - sides[1]) / (2 * step), rtol=1e-5, atol=1e-7
    )
