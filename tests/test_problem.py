"""Training problems: derivatives against second computations, and the same numbers on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cells import DeqRegressor, TanhCell
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from hpcdeq import parallel
from hpcdeq.data import TensorDataset
from hpcdeq.deq import FixedPoint
from hpcdeq.errors import ConvergenceError, DataError, HpcdeqError, OptionError, ShapeError
from hpcdeq.problem import LOSSES, CrossEntropy, LeastSquares, TrainingProblem
from hpcdeq.problem.randomness import random_layer

TIGHT = {"snes_rtol": 1e-13, "snes_atol": 1e-14, "ksp_rtol": 1e-13}
LOSS_NAMES = ["cross_entropy", "mse"]


def deq_model(outputs: int = 3) -> DeqRegressor:
    torch.manual_seed(5)
    return DeqRegressor(FixedPoint(TanhCell(), options=TIGHT), 5, outputs)


def explicit_model(outputs: int = 3) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def samples(loss: str, count: int = 11) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    if loss == "mse":
        return x, torch.randn(count, 3, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (count,), generator=generator)


def serial(model: nn.Module, loss: str, **settings: object) -> TrainingProblem:
    return TrainingProblem(model, samples(loss), loss, parallel.SELF, **settings)  # type: ignore[arg-type]


def distributed(model: nn.Module, loss: str, comm: parallel.Comm, **settings: object) -> TrainingProblem:
    """The same samples over the ranks of comm, the last of several ranks without any."""
    inputs, targets = samples(loss)
    working = max(1, comm.size - 1)
    own = parallel.own_slice(len(inputs), comm.rank, working) if comm.rank < working else slice(0, 0)
    return TrainingProblem(model, (inputs[own], targets[own]), loss, comm, **settings)  # type: ignore[arg-type]


def directions(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(n, dtype=torch.float64, generator=generator) for _ in range(2))  # type: ignore[return-value]


def assert_same(a: Tensor | float, b: Tensor | float, relative: float) -> None:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert float((a - b).norm()) <= relative * float(b.norm())


# ------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_taylor_rates_of_a_deq_problem(loss: str) -> None:
    problem = serial(deq_model(), loss, weight_decay=0.1)
    p, (v, _) = problem.initial(), directions(problem.layout.count)
    value, gradient = problem.loss_and_gradient(p)
    product = problem.hessian_product(p, v)
    first, second = [], []
    for h in (2e-2, 1e-2, 5e-3):
        change = problem.loss(p + h * v) - value
        first.append(abs(change - h * float(gradient @ v)))
        second.append(abs(change - h * float(gradient @ v) - h * h / 2 * float(v @ product)))
    assert min(np.log2(first[i] / first[i + 1]) for i in range(2)) > 1.9
    assert min(np.log2(second[i] / second[i + 1]) for i in range(2)) > 2.9


@pytest.mark.parametrize("loss", LOSS_NAMES)
@pytest.mark.parametrize("model", [deq_model, explicit_model])
def test_products_equal_dense_matrices(loss: str, model: object) -> None:
    problem = serial(model(), loss, chunk_size=4, weight_decay=0.1)  # type: ignore[operator]
    p = problem.initial()
    inputs, targets = samples(loss)
    layout, n = problem.layout, problem.layout.count

    def outputs(flat: Tensor) -> Tensor:
        pieces = [t.reshape(s) for t, s in zip(flat.split(layout.lengths), layout.shapes, strict=True)]
        return functional_call(problem.model, dict(zip(layout.names, pieces, strict=True)), (inputs,))

    rows = []
    for i in range(len(inputs)):
        for j in range(3):
            leaf = p.clone().requires_grad_()
            rows.append(torch.autograd.grad(outputs(leaf)[i, j], leaf)[0])
    jacobian = torch.stack(rows).reshape(len(inputs), 3, n)
    y = outputs(p).detach()
    if loss == "mse":
        curvature = torch.eye(3, dtype=torch.float64).expand(len(inputs), 3, 3) / 3
    else:
        q = torch.softmax(y, 1)
        curvature = torch.diag_embed(q) - q[:, :, None] * q[:, None, :]
    dense = torch.einsum("bin,bij,bjm->nm", jacobian, curvature, jacobian) / len(inputs) + 0.1 * torch.eye(
        n, dtype=torch.float64
    )
    ours = torch.stack([problem.gauss_newton_product(p, e) for e in torch.eye(n, dtype=torch.float64)])
    assert_same(ours, dense, 1e-10)
    assert_same(ours, ours.T, 1e-12)
    assert float(torch.linalg.eigvalsh((ours + ours.T) / 2)[0]) > 0.1 - 1e-10
    product = torch.stack([problem.hessian_product(p, e) for e in torch.eye(n, dtype=torch.float64)])
    assert_same(product, product.T, 1e-10)


@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_hessian_of_an_explicit_network_equals_torchs(loss: str) -> None:
    problem = serial(explicit_model(), loss, chunk_size=5)
    p = problem.initial()
    inputs, targets = samples(loss)
    layout = problem.layout

    def mean_loss(flat: Tensor) -> Tensor:
        pieces = [t.reshape(s) for t, s in zip(flat.split(layout.lengths), layout.shapes, strict=True)]
        y = functional_call(problem.model, dict(zip(layout.names, pieces, strict=True)), (inputs,))
        if loss == "mse":
            return 0.5 * nn.functional.mse_loss(y, targets)
        return nn.functional.cross_entropy(y, targets)

    v, _ = directions(layout.count)
    assert abs(problem.loss(p) - float(mean_loss(p))) < 1e-14
    assert_same(problem.gradient(p), jacrev(mean_loss)(p), 1e-12)
    assert_same(problem.hessian_product(p, v), hessian(mean_loss)(p) @ v, 1e-11)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
def test_curvature_is_the_second_derivative_of_the_loss(loss: object) -> None:
    inputs, targets = samples(loss.name)  # type: ignore[attr-defined]
    y = torch.randn(11, 3, dtype=torch.float64)
    along = torch.randn_like(y)
    dense = hessian(lambda given: loss.total(given, targets))(y).reshape(33, 33)  # type: ignore[attr-defined]
    assert_same(loss.curvature(y, targets, along).reshape(-1), dense @ along.reshape(-1), 1e-12)  # type: ignore[attr-defined]


def test_residual_and_its_jacobian_belong_to_the_loss() -> None:
    problem = serial(deq_model(), "mse", chunk_size=4)
    p, (v, _) = problem.initial(), directions(problem.layout.count)
    squares = LeastSquares(problem)
    r = squares.residual(p)
    assert abs(0.5 * float(r @ r) - problem.loss(p)) < 1e-14
    assert_same(torch.from_numpy(squares.owned_jacobian_transpose_product(p, r)), problem.gradient(p), 1e-10)
    product = squares.jacobian_product(p, v)
    twice = squares.owned_jacobian_transpose_product(p, product)
    assert_same(torch.from_numpy(twice), problem.gauss_newton_product(p, v), 1e-10)
    h = 1e-6
    difference = (squares.residual(p + h * v) - squares.residual(p - h * v)) / (2 * h)
    assert_same(torch.from_numpy(product), torch.from_numpy(difference), 1e-7)


# ------------------------------------------------------------------------------------------------ rank counts


@pytest.mark.parallel([1, 2, 3, 5])
@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_every_quantity_is_the_same_on_any_number_of_ranks(loss: str, comm: parallel.Comm) -> None:
    one, many = (
        serial(deq_model(), loss, weight_decay=0.1),
        distributed(deq_model(), loss, comm, weight_decay=0.1, chunk_size=2),
    )
    p, (v, _) = one.initial(), directions(one.layout.count)
    assert_same(many.initial(), p, 0.0)
    assert_same(many.loss(p), one.loss(p), 1e-12)
    assert_same(many.gradient(p), one.gradient(p), 1e-12)
    assert_same(many.gauss_newton_product(p, v), one.gauss_newton_product(p, v), 1e-12)
    assert_same(many.hessian_product(p, v), one.hessian_product(p, v), 1e-12)
    for curvature in ("gauss_newton", "hessian"):
        whole = many.layout.gather(many.owned_product(p, v, curvature=curvature))
        assert_same(whole, torch.from_numpy(one.owned_product(p, v, curvature=curvature)), 1e-12)
    value, block = many.owned_loss_and_gradient(p)
    assert_same(many.layout.gather(block), one.gradient(p), 1e-12)
    rows = np.array([10, 3, 4, 0])
    assert_same(many.gradient(p, rows), one.gradient(p, rows), 1e-12)
    assert_same(many.loss(p, rows), one.loss(p, rows), 1e-12)


@pytest.mark.parallel([1, 2, 3])
def test_work_is_counted_in_samples_of_all_ranks(comm: parallel.Comm) -> None:
    problem = distributed(deq_model(), "mse", comm)
    p, (v, _) = problem.initial(), directions(problem.layout.count)
    problem.loss(p)
    problem.gradient(p)
    problem.gauss_newton_product(p, v)
    problem.hessian_product(p, v)
    counts = problem.accounts.totals()
    assert (counts.losses, counts.gradients) == (11, 11)
    assert (counts.gauss_newton_products, counts.hessian_products) == (11, 11)
    assert counts.cell_evaluations > 11 and counts.cell_vjps > 11 and counts.cell_jvps > 11
    problem.evaluate(p, problem.dataset)
    assert problem.accounts.totals() == counts
    statistics = problem.accounts.statistics()
    assert statistics is not None
    assert 0 < statistics.mean_iterations <= statistics.max_iterations and statistics.unconverged == 0


@pytest.mark.parallel([1, 2, 3])
def test_evaluation_equals_loss_and_counts_right_answers(comm: parallel.Comm) -> None:
    problem = distributed(deq_model(), "cross_entropy", comm)
    p = problem.initial()
    found = problem.evaluate(p, problem.dataset)
    inputs, targets = samples("cross_entropy")
    with torch.no_grad():
        right = (problem.model(inputs).argmax(1) == targets).double().mean()
    assert found.metric == pytest.approx(float(right), abs=1e-15)
    assert found.loss == pytest.approx(problem.loss(p), rel=1e-12)


@pytest.mark.parallel([1, 2, 3])
def test_a_failure_on_one_rank_is_raised_on_all(comm: parallel.Comm) -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            if comm.rank == 0:
                raise ValueError("the cell has a bug")
            return x @ self.weight

    problem = distributed(Failing(), "mse", comm)
    p = problem.initial()
    for quantity in (problem.loss, problem.gradient, lambda at: problem.gauss_newton_product(at, at)):
        with pytest.raises((ValueError, HpcdeqError), match="the cell has a bug"):
            quantity(p)


@pytest.mark.parallel([1, 2, 3])
def test_a_fixed_point_that_fails_on_one_rank_is_raised_on_all(comm: parallel.Comm) -> None:
    problem = distributed(deq_model(), "mse", comm)
    problem.model.layer.options.given["snes_max_it"] = 1 if comm.rank == 0 else 100
    with pytest.raises(ConvergenceError, match="DIVERGED_MAX_IT"):
        problem.loss(problem.initial())


# ---------------------------------------------------------------------------------------------------- memory


def test_chunks_and_kept_linearisations_do_not_change_the_numbers() -> None:
    problems = [serial(deq_model(), "mse", chunk_size=c, memory_limit=m) for c, m in ((100, None), (2, None), (2, 0))]
    p, (v, w) = problems[0].initial(), directions(problems[0].layout.count)
    for problem in problems:
        assert_same(problem.gradient(p), problems[0].gradient(p), 1e-12)
        for direction in (v, w):
            assert_same(
                problem.gauss_newton_product(p, direction), problems[0].gauss_newton_product(p, direction), 1e-12
            )
    assert len(problems[1].local.whole.kept) == 6 and not problems[2].local.whole.kept


def test_products_follow_the_point() -> None:
    problem = serial(deq_model(), "mse")
    p, (v, w) = problem.initial(), directions(problem.layout.count)
    before = problem.gauss_newton_product(p, v)
    moved = problem.gauss_newton_product(p + 0.1 * w, v)
    assert float((moved - before).norm()) > 1e-3
    assert_same(problem.gauss_newton_product(p, v), before, 1e-12)


def test_smoothed_labels_are_learned_and_plain_ones_are_judged_by() -> None:
    """Loss, gradient and curvature of (1 - ε) e_t + ε / c, against that formula; evaluations are of the labels themselves."""
    inputs, targets = samples("cross_entropy")
    problem = TrainingProblem(explicit_model(), (inputs, targets), CrossEntropy(0.3), parallel.SELF)
    p = problem.initial()
    layout = problem.layout
    q = 0.7 * nn.functional.one_hot(targets, 3).double() + 0.1

    def scores(flat: Tensor) -> Tensor:
        pieces = [t.reshape(s) for t, s in zip(flat.split(layout.lengths), layout.shapes, strict=True)]
        return functional_call(problem.model, dict(zip(layout.names, pieces, strict=True)), (inputs,))

    def smoothed(flat: Tensor) -> Tensor:
        return -(q * torch.log_softmax(scores(flat), 1)).sum() / len(inputs)

    v, _ = directions(layout.count)
    assert abs(problem.loss(p) - float(smoothed(p))) < 1e-14
    assert_same(problem.gradient(p), jacrev(smoothed)(p), 1e-12)
    assert_same(problem.hessian_product(p, v), hessian(smoothed)(p) @ v, 1e-11)
    plain = nn.functional.cross_entropy(scores(p), targets)
    assert abs(problem.evaluate(p, problem.dataset).loss - float(plain)) < 1e-14


# ----------------------------------------------------------------------------------------------------- refusals


def test_targets_of_the_wrong_kind() -> None:
    inputs, targets = samples("mse")
    with pytest.raises(DataError, match="use the loss mse"):
        problem = TrainingProblem(explicit_model(), (inputs, targets), "cross_entropy", parallel.SELF)
        problem.loss(problem.initial())
    with pytest.raises(DataError, match="use the loss cross_entropy"):
        problem = TrainingProblem(explicit_model(), samples("cross_entropy"), "mse", parallel.SELF)
        problem.loss(problem.initial())


def test_a_model_with_the_wrong_outputs() -> None:
    problem = TrainingProblem(explicit_model(outputs=2), samples("mse"), "mse", parallel.SELF)
    with pytest.raises(ShapeError, match=r"outputs of shape \(11, 2\), the targets have \(11, 3\)"):
        problem.loss(problem.initial())
    problem = TrainingProblem(explicit_model(outputs=2), samples("cross_entropy"), "cross_entropy", parallel.SELF)
    with pytest.raises(ShapeError, match="2 classes"):
        problem.loss(problem.initial())


def test_other_refusals() -> None:
    model = explicit_model()
    with pytest.raises(OptionError, match="unknown loss 'hinge'"):
        serial(model, "mse").__class__(model, samples("mse"), "hinge", parallel.SELF)
    with pytest.raises(OptionError, match="weight_decay"):
        serial(model, "mse", weight_decay=-1.0)
    with pytest.raises(OptionError, match="chunk_size"):
        serial(model, "mse", chunk_size=0)
    with pytest.raises(DataError, match="no samples"):
        TrainingProblem(model, (torch.empty(0, 3), torch.empty(0, 3)), "mse", parallel.SELF)
    problem = serial(model, "mse")
    with pytest.raises(ShapeError, match=r"has shape \(3,\)"):
        problem.loss(torch.zeros(3))
    with pytest.raises(OptionError, match="needs a sum of squares"):
        LeastSquares(serial(model, "cross_entropy"))


def test_layers_that_make_the_loss_random_are_named() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).double()
    assert random_layer(model) == "1 (Dropout, p = 0.5)"
    model.eval()
    assert random_layer(model) is None
    batch_norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    found = random_layer(batch_norm)
    assert found is not None and "BatchNorm1d" in found


def test_tensor_pairs_become_datasets() -> None:
    problem = serial(explicit_model(), "mse")
    assert isinstance(problem.dataset, TensorDataset) and problem.dataset.count == 11
