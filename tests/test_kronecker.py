"""Kronecker factors of the Gauss-Newton matrix against dense matrices made sample by sample, on 1, 2 and 3 ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hpcdeq
from hpcdeq import parallel
from hpcdeq.data import GraphBatch
from hpcdeq.models import build_model, model_config
from hpcdeq.models.base import MODELS
from hpcdeq.models.fno import Fno, FnoConfig
from hpcdeq.models.mlp_deq import MlpDeq, MlpDeqConfig
from hpcdeq.problem.factors import KroneckerFactors, shared_out
from hpcdeq.problem.kronecker import local_sums, signs

COMM = parallel.WORLD
SEED = (0, 0)


def share(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return this rank's rows: rank 0 has none where there are three."""
    size = COMM.size - 1 if COMM.size == 3 else COMM.size
    rank = COMM.rank - 1 if COMM.size == 3 else COMM.rank
    if rank < 0:
        return inputs[:0], targets[:0]
    own = parallel.own_slice(len(inputs), rank, size)
    return inputs[own], targets[own]


def make(model: nn.Module, shape: tuple[int, ...], outputs: int, count: int = 7, classes: bool = False):
    torch.manual_seed(1)
    inputs = torch.randn(count, *shape, dtype=torch.float64)
    targets = torch.randint(0, outputs, (count,)) if classes else torch.randn(count, outputs, dtype=torch.float64)
    return (
        hpcdeq.TrainingProblem(
            model.double(), share(inputs, targets), loss="cross_entropy" if classes else "mse", chunk_size=3
        ),
        inputs,
        targets,
    )


def sample_gradients(model: nn.Module, problem, inputs: Tensor, targets: Tensor, name: str, probes: int) -> Tensor:
    """Return D of every sample and probe, ``(samples, probes, *shape)``, each by a reverse derivative of its own."""
    parameter = dict(model.named_parameters())[name]
    loss = problem.loss_function
    found = []
    for i in range(len(inputs)):
        outputs = model(inputs[i : i + 1])
        noise = signs([i], probes, tuple(outputs.shape[1:]), SEED).to(outputs)
        own = [
            torch.autograd.grad(
                outputs,
                parameter,
                loss.curvature_root(outputs, targets[i : i + 1], noise[:, k]).detach(),
                retain_graph=True,
            )[0]
            for k in range(probes)
        ]
        found.append(torch.stack(own))
    return torch.stack(found)


class Net(nn.Module):
    """Linear maps alone, with a tanh between: gradients of a sample have rank one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class PlainCell(nn.Module):
    """A cell with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u = nn.Linear(4, 4), nn.Linear(3, 4, bias=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.3 * self.w(z) + self.u(x))


class PlainDeq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = hpcdeq.FixedPoint(PlainCell(), options={"snes_rtol": 1e-12, "ksp_rtol": 1e-12})
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(2, 3, 3, padding=1, stride=2), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(1))


def factors_of(problem, name: str, probes: int = 2):
    """Return this rank's block of a weight after an update on all samples, None where another rank has it."""
    factors = KroneckerFactors(problem, probes=probes, samples=10**6)
    factors.update(problem.initial())
    at = problem.layout.names.index(name)
    return factors, next((b for b in factors.blocks if b.shape.weight == at), None)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize(
    ("build", "shape", "outputs", "name", "bias", "classes"),
    [
        (Net, (4,), 3, "first.weight", "first.bias", False),
        (Net, (4,), 3, "first.weight", "first.bias", True),
        (Net, (4,), 3, "second.weight", None, False),
        (PlainDeq, (3,), 2, "layer.cell.w.weight", "layer.cell.w.bias", False),
        (PlainDeq, (3,), 2, "layer.cell.u.weight", None, True),
        (PlainDeq, (3,), 2, "head.weight", "head.bias", False),
    ],
)
def test_factors_are_those_of_rank_one_gradients(build, shape, outputs, name, bias, classes) -> None:
    """With D = u aᵀ of every sample: A is the mean of a aᵀ, and tr A · G + ... follow from D alone."""
    model = build()
    problem, inputs, targets = make(model, shape, outputs, classes=classes)
    probes = 2
    _, block = factors_of(problem, name, probes)
    d = sample_gradients(model, problem, inputs, targets, name, probes)
    if bias is not None:
        u = sample_gradients(model, problem, inputs, targets, bias, probes)
        d = torch.cat([d, u[..., None]], dim=-1)
    # Left and right singular vectors of the rank-one D, up to a scale that the last column (a = 1) or the input fixes.
    left, values, right = torch.linalg.svd(d)
    assert float(values[..., 1:].max()) < 1e-9 * float(values.max())
    if bias is not None:
        a = right[..., 0, :] / right[..., 0, -1:]
        u = d[..., -1]
        expected_a = (a[:, 0, :, None] * a[:, 0, None, :]).mean(dim=0)
        expected_g = (u[..., :, None] * u[..., None, :]).sum(dim=(0, 1)) / (len(inputs) * probes)
        if block is not None:
            assert torch.allclose(block.given[0], expected_a, rtol=1e-7, atol=1e-10)
            assert torch.allclose(block.probed[0], expected_g, rtol=1e-7, atol=1e-12)
    if block is not None and bias is None:
        a = inputs if build is PlainDeq else torch.tanh(model.first(inputs)).detach()
        assert torch.allclose(block.given[0], a.T @ a / len(a), rtol=1e-9)
        u = torch.einsum("skoi,si->sko", d, a) / (a * a).sum(dim=1)[:, None, None]
        expected_g = torch.einsum("sko,skp->op", u, u) / (len(inputs) * probes)
        assert torch.allclose(block.probed[0], expected_g, rtol=1e-7, atol=1e-12)
    assert parallel.sum_over_ranks(COMM, np.array([int(block is not None)]))[0] == 1


@pytest.mark.parallel([1, 2, 3])
def test_factors_of_a_convolution_are_those_of_its_samples_gradients() -> None:
    model = Conv()
    problem, inputs, targets = make(model, (2, 4, 4), 3)
    _, block = factors_of(problem, "conv.weight")
    d = sample_gradients(model, problem, inputs, targets, "conv.weight", 2).flatten(3)
    u = sample_gradients(model, problem, inputs, targets, "conv.bias", 2)
    d = torch.cat([d, u[..., None]], dim=-1)
    right, left = torch.einsum("skoi,skoj->ij", d, d), torch.einsum("skoi,skpi->op", d, d)
    if block is not None:
        assert torch.allclose(block.given[0], right / right.trace(), rtol=1e-9, atol=1e-12)
        assert torch.allclose(block.probed[0], left / (2 * len(inputs)), rtol=1e-9, atol=1e-12)


@pytest.mark.parallel([1, 2, 3])
def test_factors_of_fourier_modes_are_those_of_their_gradients() -> None:
    torch.manual_seed(0)
    model = Fno(FnoConfig(width=3, modes=3, layers=1, projection=4), (8,), 8)
    problem, inputs, targets = make(model, (8,), 8)
    name = next(n for n in problem.layout.names if dict(model.named_parameters())[n].dim() == 4)
    _, block = factors_of(problem, name)
    d = torch.view_as_complex(sample_gradients(model, problem, inputs, targets, name, 2))
    # D = conj(x) g of rank one, mode by mode; x does not depend on the probe.
    _, values, _ = torch.linalg.svd(d)
    assert float(values[..., 1:].max()) < 1e-9 * float(values.max())
    whole = torch.einsum("skmio,skmjp->mijop", d, d.conj()) / (2 * len(inputs))
    if block is not None:
        # Of rank one a sample: the trace over outputs of E[D ⊗ D̄] is E[|g|² conj(x) x], and the same for inputs.
        assert block.shape.is_complex
        trace = torch.einsum("mii->m", block.given) * torch.einsum("mii->m", block.probed)
        x = block.given
        assert torch.allclose(x, x.mH) and torch.allclose(block.probed, block.probed.mH)
        assert float(trace.real.min()) > 0
        assert torch.allclose(
            whole.diagonal(dim1=1, dim2=2).sum(-1).diagonal(dim1=1, dim2=2).sum(-1).real > 0, trace.real > 0
        )


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize(
    ("build", "shape", "outputs"),
    [
        (Net, (4,), 3),
        (PlainDeq, (3,), 2),
        (Conv, (2, 4, 4), 3),
        (lambda: MlpDeq(MlpDeqConfig(width=6), (3,), 2), (3,), 2),
        (lambda: Fno(FnoConfig(width=3, modes=3, layers=2, projection=4), (8,), 8), (8,), 8),
    ],
)
def test_solve_inverts_the_factors(build: Callable[[], nn.Module], shape: tuple[int, ...], outputs: int) -> None:
    """(K + λ I) applied to the solution by explicit Kronecker products gives the right-hand side back."""
    torch.manual_seed(0)
    problem, _, _ = make(build(), shape, outputs)
    factors = KroneckerFactors(problem, probes=2, samples=10**6)
    factors.update(problem.initial())
    layout = problem.layout
    v = torch.from_numpy(np.random.default_rng(0).standard_normal(layout.count))
    x = layout.gather(factors.solve(v, 1e-2))
    product = torch.zeros_like(v)
    for block in factors.blocks:
        part = factors._take(x, block.shape)
        factors._put(
            product, block.shape, (0.5 if block.shape.is_complex else 1.0) * block.given @ part @ block.probed.mT
        )
    own = layout.owned.start + factors._places
    product[own] = torch.from_numpy(factors.diagonal) * x[own]
    product = torch.from_numpy(parallel.sum_over_ranks(COMM, product.numpy()))
    assert torch.allclose(product + 1e-2 * x, v, rtol=1e-8, atol=1e-8)


# What no linear map's is: scales, a bias of the outputs, weights that are squares of parameters.
ELSEWHERE = {
    "conv_deq": {"stem_norm.weight", "stem_norm.bias"},
    "deeponet": {"trunk.bias"},
    "deeponet_deq": {"trunk.bias"},
    "monotone_deq": {"recurrent.symmetric", "recurrent.skew"},
}


def small_crystals() -> GraphBatch:
    """Return four graphs of three atoms, each with two neighbours."""
    torch.manual_seed(0)
    first = 3 * torch.arange(4).repeat_interleave(6)
    source = first + torch.tensor([1, 2, 0, 2, 0, 1]).repeat(4)
    target = first + torch.tensor([0, 0, 1, 1, 2, 2]).repeat(4)
    vectors = torch.randn(24, 3, dtype=torch.float64) + 1.0
    return GraphBatch(torch.randint(1, 90, (12,)), source, target, vectors, torch.arange(4).repeat_interleave(3), 4)


@pytest.mark.parametrize("name", list(MODELS))
def test_every_weight_of_the_models_has_factors(name: str) -> None:
    """Bounded weights inside fixed points, messages between atoms and Fourier modes included."""
    kind = MODELS[name]
    torch.manual_seed(0)
    if kind.representation == "graph":
        inputs, targets = small_crystals(), torch.tensor([0, 1, 2, 0])
    elif name == "conv_deq":
        inputs, targets = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    else:
        inputs, targets = torch.randn(4, 16, dtype=torch.float64), torch.randn(4, 16, dtype=torch.float64)
    classes = not targets.is_floating_point()
    shape = () if kind.representation == "graph" else tuple(inputs.shape[1:])
    model = build_model(name, model_config(name, {}), kind.representation, shape, 3 if classes else 16)
    problem = hpcdeq.TrainingProblem(model, (inputs, targets), "cross_entropy" if classes else "mse")
    factors = KroneckerFactors(problem)
    factors.update(problem.initial())
    norms = {n for n in problem.layout.names if ".norm." in n}  # vectors that scale: they have no matrix of inputs
    assert {problem.layout.names[k] for k in factors._rest} - norms == ELSEWHERE.get(name, set())
    assert np.isfinite(factors.solve(problem.initial(), 1e-3)).all()


@pytest.mark.parallel([1, 2, 3])
def test_the_diagonal_is_the_gauss_newton_matrix_s() -> None:
    """The mean of many probes tends to the diagonal that products with unit vectors give."""
    model = Net()
    problem, _, _ = make(model, (4,), 3, count=5)
    p = problem.initial()
    sums, count = local_sums(problem, p, None, 4000, SEED)
    gradients = parallel.sum_over_ranks(COMM, sums.gradients.numpy().ravel()).reshape(4000, -1)
    total = (gradients * gradients).sum(axis=0)
    count = parallel.sum_over_ranks(COMM, np.array([count]))[0]
    eye = torch.eye(problem.layout.count, dtype=torch.float64)
    dense = torch.stack([problem.gauss_newton_product(p, e) for e in eye]).diagonal()
    assert count == 5
    assert torch.allclose(torch.from_numpy(total / (count * 4000)), dense, rtol=0.15, atol=1e-3 * float(dense.max()))


@pytest.mark.parallel([1, 2, 3])
def test_factors_do_not_depend_on_the_number_of_ranks() -> None:
    """What this job finds, one process that holds all samples finds."""
    torch.manual_seed(0)
    model = MlpDeq(MlpDeqConfig(width=5), (3,), 2)
    problem, inputs, targets = make(model, (3,), 2, count=11)
    alone = hpcdeq.TrainingProblem(model, (inputs, targets), loss="mse", comm=parallel.SELF, chunk_size=4)
    v = torch.from_numpy(np.random.default_rng(0).standard_normal(problem.layout.count))
    found = []
    for each in (problem, alone):
        factors = KroneckerFactors(each, samples=6)
        p = each.initial()
        for step in (0.0, 0.1):
            factors.update(p + step)
        found.append(each.layout.gather(factors.solve(v, 1e-3)))
    assert float((found[0] - found[1]).norm()) < 1e-6 * float(found[1].norm())


def test_probes_are_fair_and_a_sample_s_own() -> None:
    s = signs(range(400), 3, (5, 7), SEED).double()
    assert set(s.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(s.mean())) < 5 / s.numel() ** 0.5
    rows = s.reshape(400, -1)
    correlation = rows @ rows.T / rows.shape[1]
    assert float(correlation.fill_diagonal_(0).abs().max()) < 6 / rows.shape[1] ** 0.5
    assert torch.equal(signs([7, 390], 3, (5, 7), SEED).double(), s[[7, 390]])
    assert not torch.equal(signs([7], 3, (5, 7), (0, 1)).double(), s[[7]])


def test_layers_are_shared_out_evenly() -> None:
    assert shared_out([5, 3, 3, 2, 1], 2) in ([0, 1, 1, 0, 0], [0, 1, 1, 0, 1])
    assert shared_out([1, 1], 3) == [0, 1]
