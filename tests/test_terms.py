"""Terms beside the loss of the data: against dense matrices, known minima, and the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cells import DeqRegressor, TanhCell, unrolled
from oracles import graphs
from test_problem import TIGHT, assert_same, deq_model, directions, explicit_model, samples, serial
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev

from hpcdeq import parallel
from hpcdeq.deq import FixedPoint
from hpcdeq.deq.penalty import sample_probes
from hpcdeq.deq.samples import Samples
from hpcdeq.errors import HpcdeqError, OptionError
from hpcdeq.methods import Schedule
from hpcdeq.models.graph_deq import MessageCell
from hpcdeq.optim import minimize
from hpcdeq.optim.stochastic import MinibatchSettings
from hpcdeq.problem import L1, L2, JacobianPenalty, LeastSquares, SampleTerm, TrainingProblem, WeightTerm
from hpcdeq.problem.terms import LayerCall, Term


class Differences(WeightTerm):
    """A user's sum of squares: neighbouring weights are alike. Everything else follows from its residual."""

    name = "difference penalty"

    def residual(self, p: Tensor) -> Tensor:
        return 0.5 * (p[1:].sin() - p[:-1])

    def value(self, p: Tensor) -> Tensor:
        return 0.5 * self.residual(p).square().sum()


class Quartic(WeightTerm):
    """A user's term that is no sum of squares in so many words: its curvature is given."""

    name = "quartic penalty"

    def value(self, p: Tensor) -> Tensor:
        return 0.25 * (p**4).sum()

    def curvature_product(self, p: Tensor, v: Tensor) -> Tensor:
        return 3 * p * p * v


class LogState(SampleTerm):
    """A user's term on fixed points that is no sum of squares."""

    name = "log penalty"
    squares = False

    def features(self, call: LayerCall) -> Tensor:
        return call.z

    def total(self, features: Tensor) -> Tensor:
        return 0.5 * (1 + features.square()).log().sum()

    def curvature(self, features: Tensor, tangent: Tensor) -> Tensor:
        return tangent / (1 + features.square())


ALL: list[Term] = [
    L2(0.05),
    L1(0.03, smoothing=0.05, parameters=["*weight"]),
    JacobianPenalty(2.0, probes=2, seed=3),
    Differences(),
]


def with_terms(comm: parallel.Comm, terms: list[Term], loss: str = "mse", chunk_size: int = 4) -> TrainingProblem:
    """The samples of test_problem over the ranks, the last of several without any."""
    inputs, targets = samples(loss)
    working = max(1, comm.size - 1)
    own = parallel.own_slice(len(inputs), comm.rank, working) if comm.rank < working else slice(0, 0)
    data = (inputs[own], targets[own])
    return TrainingProblem(deq_model(), data, loss, comm, chunk_size=chunk_size, terms=terms)


# ---------------------------------------------------------------------------------------- terms on the weights


@pytest.mark.parametrize(
    "term",
    [L2(0.7), L1(0.7, smoothing=0.3), L2(0.7, ["0.*", "*bias"]), L1(0.7, 0.3, ["*weight"]), Differences(), Quartic()],
    ids=lambda term: f"{term.name} {getattr(term, 'parameters', '')}",
)
def test_derivatives_of_a_weight_term_are_those_of_its_value(term: WeightTerm) -> None:
    problem = serial(explicit_model(), "mse")
    term = term.bound(problem.layout)
    p, (v, w) = problem.initial(), directions(problem.layout.count)
    leaf = p.clone().requires_grad_()
    (slope,) = torch.autograd.grad(term.value(leaf), leaf)
    assert_same(term.gradient(p), slope, 1e-13)
    dense = hessian(term.value)(p)
    assert_same(term.hessian_product(p, v), dense @ v, 1e-12)
    assert abs(float(term.curvature_product(p, v) @ w - term.curvature_product(p, w) @ v)) < 1e-12
    assert float(term.curvature_product(p, v) @ v) >= 0
    residual = term.residual(p)
    if residual is None:
        return
    assert abs(0.5 * float(residual @ residual) - float(term.value(p))) < 1e-13
    jacobian = jacrev(term.residual)(p)
    assert_same(term.residual_product(p, v), jacobian @ v, 1e-12)
    assert_same(term.residual_transpose_product(p, residual), slope, 1e-12)


def test_a_selection_is_of_the_named_parameters() -> None:
    problem = serial(explicit_model(), "mse")
    p = problem.initial()
    pieces = dict(zip(problem.layout.names, problem.layout.unflatten(p), strict=True))
    found = float(L2(2.0, ["*.weight"]).bound(problem.layout).value(p))
    assert found == pytest.approx(float(pieces["0.weight"].square().sum() + pieces["2.weight"].square().sum()))
    sharp = float(L1(1.0, 1e-9, ["2.bias"]).bound(problem.layout).value(p))
    assert sharp == pytest.approx(float(pieces["2.bias"].abs().sum()), abs=1e-8)


def test_weight_decay_is_short_for_l2() -> None:
    short, long = serial(deq_model(), "mse", weight_decay=0.3), serial(deq_model(), "mse", terms=[L2(0.3)])
    p, (v, _) = short.initial(), directions(short.layout.count)
    plain = serial(deq_model(), "mse")
    assert short.loss(p) == long.loss(p) == pytest.approx(plain.loss(p) + 0.15 * float(p @ p), rel=1e-12)
    assert_same(short.gradient(p), plain.gradient(p) + 0.3 * p, 1e-12)
    assert_same(short.hessian_product(p, v), plain.hessian_product(p, v) + 0.3 * v, 1e-12)
    assert short.evaluate(p, short.dataset).loss == pytest.approx(plain.loss(p), rel=1e-12)  # of the data alone


# ------------------------------------------------------------------------------- the whole against second roads


def somewhere(problem: TrainingProblem) -> Tensor:
    """Weights near the initial ones, whose orthogonal matrices would make every estimate of a norm exact."""
    return problem.initial() + 0.1 * directions(problem.layout.count)[1]


@pytest.mark.parametrize("terms", [ALL, [LogState(), Quartic()]], ids=["squares", "others"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_taylor_rates_with_all_terms(loss: str, terms: list[Term]) -> None:
    problem = with_terms(parallel.SELF, terms, loss)
    p, (v, _) = somewhere(problem), directions(problem.layout.count)
    value, gradient = problem.loss_and_gradient(p)
    product = problem.hessian_product(p, v)
    first, second = [], []
    for h in (1e-3, 5e-4, 2.5e-4):
        change = problem.loss(p + h * v) - value
        first.append(abs(change - h * float(gradient @ v)))
        second.append(abs(change - h * float(gradient @ v) - h * h / 2 * float(v @ product)))
    assert min(np.log2(first[i] / first[i + 1]) for i in range(2)) > 1.9
    assert min(np.log2(second[i] / second[i + 1]) for i in range(2)) > 2.9


def unrolled_parts(problem: TrainingProblem, penalty: JacobianPenalty) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return p ↦ outputs and penalty features of all samples: states by iteration, Jacobians dense."""
    inputs, _ = samples("mse")
    layout, cell = problem.layout, problem.model.layer.cell

    def parts(flat: Tensor) -> tuple[Tensor, Tensor]:
        pieces = [t.reshape(s) for t, s in zip(flat.split(layout.lengths), layout.shapes, strict=True)]
        weights = dict(zip(layout.names, pieces, strict=True))
        own = {n.removeprefix("layer.cell."): t for n, t in weights.items() if n.startswith("layer.")}

        def apply(z: Tensor, x: Tensor) -> Tensor:
            return functional_call(cell, own, (z, x))

        z = unrolled(apply, inputs, torch.zeros(len(inputs), 5, dtype=torch.float64), 150)
        outputs = torch.nn.functional.linear(z, weights["head.weight"], weights["head.bias"])
        jacobians = torch.stack([jacrev(apply)(z[i], inputs[i]) for i in range(len(inputs))])
        probes = torch.stack(
            sample_probes(z.detach(), Samples(len(z)), penalty.probes, penalty.seed, torch.arange(len(z)))
        )
        images = torch.einsum("bji,pbj->pbi", jacobians, probes)
        return outputs, images * (penalty.weight / (penalty.probes * 5)) ** 0.5

    return parts


def test_values_and_products_equal_dense_matrices() -> None:
    penalty, l1 = JacobianPenalty(2.0, probes=2, seed=3), L1(0.03, smoothing=0.05)
    problem = with_terms(parallel.SELF, [penalty, L2(0.05), l1])
    p, n = somewhere(problem), problem.layout.count
    parts = unrolled_parts(problem, penalty)
    _, targets = samples("mse")

    def objective(flat: Tensor) -> Tensor:
        outputs, features = parts(flat)
        fit = 0.5 * (outputs - targets).square().sum() / 3 + 0.5 * features.square().sum()
        return fit / 11 + 0.025 * flat.square().sum() + 0.03 * ((flat**2 + 0.05**2).sqrt() - 0.05).sum()

    leaf = p.clone().requires_grad_()
    value = objective(leaf)
    assert problem.loss(p) == pytest.approx(value.item(), rel=1e-11)
    assert_same(problem.gradient(p), torch.autograd.grad(value, leaf)[0], 1e-10)
    along = jacrev(lambda flat: parts(flat)[0])(p).reshape(-1, n), jacrev(lambda flat: parts(flat)[1])(p).reshape(-1, n)
    diagonal = 0.05 + 0.03 * 0.05**2 / (p**2 + 0.05**2) ** 1.5
    dense = (along[0].T @ along[0] / 3 + along[1].T @ along[1]) / 11 + torch.diag(diagonal)
    ours = torch.stack([problem.gauss_newton_product(p, e) for e in torch.eye(n, dtype=torch.float64)])
    assert_same(ours, dense, 1e-9)
    assert_same(ours, ours.T, 1e-11)
    assert float(torch.linalg.eigvalsh((ours + ours.T) / 2)[0]) > 0.05 - 1e-10
    product = torch.stack([problem.hessian_product(p, e) for e in torch.eye(n, dtype=torch.float64)])
    assert_same(product, hessian(objective)(p), 1e-9)


@pytest.mark.parallel([1, 2, 3])
def test_every_quantity_with_terms_is_the_same_on_any_number_of_ranks(comm: parallel.Comm) -> None:
    one, many = with_terms(parallel.SELF, ALL), with_terms(comm, ALL, chunk_size=3)
    p, (v, _) = somewhere(one), directions(one.layout.count)
    assert_same(many.loss(p), one.loss(p), 1e-12)
    assert_same(many.gradient(p), one.gradient(p), 1e-11)
    rows = np.array([10, 3, 4, 0])
    for curvature in ("gauss_newton", "hessian"):
        for chosen in (None, rows):
            found = many.layout.gather(many.owned_product(p, v, curvature=curvature, rows=chosen))
            assert_same(found, torch.from_numpy(one.owned_product(p, v, curvature=curvature, rows=chosen)), 1e-11)
            assert_same(getattr(many, f"{curvature}_product")(p, v, chosen), found, 1e-12)
    value, block = many.owned_loss_and_gradient(p, rows)
    assert_same(value, one.loss(p, rows), 1e-12)
    assert_same(many.layout.gather(block), one.gradient(p, rows), 1e-11)


@pytest.mark.parallel([1, 2, 3])
def test_residuals_with_terms_belong_to_the_objective(comm: parallel.Comm) -> None:
    problem = with_terms(comm, ALL)
    p, (v, _) = somewhere(problem), directions(problem.layout.count)
    squares = LeastSquares(problem)
    r = squares.residual(p)
    assert 0.5 * problem.sum_of_blocks(r * r) == pytest.approx(problem.loss(p), rel=1e-12)
    gradient = problem.layout.gather(squares.owned_jacobian_transpose_product(p, r))
    assert_same(gradient, problem.gradient(p), 1e-10)
    product = squares.jacobian_product(p, v)
    h = 1e-6
    difference = (squares.residual(p + h * v) - squares.residual(p - h * v)) / (2 * h)
    error, size = problem.sum_of_blocks((product - difference) ** 2), problem.sum_of_blocks(product**2)
    assert error <= 1e-14 * size
    # Equal to the Gauss-Newton product but for L1, which has its own curvature there.
    plain = with_terms(comm, [ALL[0], *ALL[2:]])
    squares = LeastSquares(plain)
    twice = plain.layout.gather(squares.owned_jacobian_transpose_product(p, squares.jacobian_product(p, v)))
    assert_same(twice, plain.gauss_newton_product(p, v), 1e-10)


# ------------------------------------------------------------------------------------------- Jacobian penalty


def test_the_penalty_estimates_the_jacobian_s_norm() -> None:
    problem = with_terms(parallel.SELF, [JacobianPenalty(1.0, probes=400)])
    p = somewhere(problem)
    problem.layout.load(problem.model, p)
    exact = squared_jacobian_norms(problem.model.layer, samples("mse")[0]) / (2 * 5 * 11)
    found = problem.loss(p) - problem.evaluate(p, problem.dataset).loss
    assert found == pytest.approx(exact, rel=0.05)
    one = [with_terms(parallel.SELF, [JacobianPenalty(1.0, seed=s)]) for s in (0, 0, 1)]
    values = [it.loss(p) - found for it in one]
    assert values[0] == values[1] != values[2]


def test_probes_are_a_sample_s_own() -> None:
    z = torch.zeros(6, 7, 3, dtype=torch.float64)
    whole = torch.stack(sample_probes(z, Samples(6), 2, 5, torch.arange(6)))
    assert set(whole.unique().tolist()) == {-1.0, 1.0}
    part = torch.stack(sample_probes(z[:2], Samples(2), 2, 5, torch.tensor([4, 1])))
    assert torch.equal(part, whole[:, [4, 1]])
    overlaps = torch.einsum("pbij,pcij->pbc", whole, whole) / 21
    assert float((overlaps - torch.eye(6, dtype=torch.float64)).abs().max()) < 0.8
    many = torch.stack(sample_probes(z.new_zeros(2000, 21), Samples(2000), 1, 5, torch.arange(2000)))[0]
    assert float(many.mean(0).abs().max()) < 4.5 / 2000**0.5  # as independent signs would be


def test_graphs_weigh_as_samples_whatever_their_sizes() -> None:
    x = graphs([3, 5, 4], width=4)
    layer = FixedPoint(MessageCell(), sample_index=lambda given: given.node_graph)
    z = layer(x).detach()
    samples_of = Samples.of(z, x.node_graph)
    call = LayerCall(layer, x, z, samples_of, torch.tensor([7, 8, 9]))
    dense = jacrev(lambda s: layer.cell(s, x))(z).reshape(48, 48)
    (probe,) = sample_probes(z, samples_of, 1, 0, call.numbers)
    image = (dense.T @ probe.reshape(-1)).reshape(12, 4).square().sum(1)
    expected = sum(float(image[x.node_graph == g].sum()) / (4 * n) for g, n in enumerate([3, 5, 4]))
    penalty = JacobianPenalty(3.0)
    assert float(penalty.total(penalty.features(call))) == pytest.approx(1.5 * expected, rel=1e-12)


def test_work_on_the_penalty_is_counted() -> None:
    plain, penal = (with_terms(parallel.SELF, terms) for terms in ([], [JacobianPenalty(1.0, probes=3)]))
    p, (v, _) = somewhere(plain), directions(plain.layout.count)

    def spent(problem: TrainingProblem, call: str, *given: Tensor) -> np.ndarray:
        before = problem.accounts.totals()
        getattr(problem, call)(*given)
        after = problem.accounts.totals()
        return np.array([after.cell_evaluations, after.cell_vjps, after.cell_jvps]) - np.array(
            [before.cell_evaluations, before.cell_vjps, before.cell_jvps]
        )

    assert (spent(penal, "loss", p) - spent(plain, "loss", p)).tolist() == [11, 33, 0]
    cold = [with_terms(parallel.SELF, terms) for terms in ([], [JacobianPenalty(1.0, probes=3)])]
    more = spent(cold[1], "gauss_newton_product", p, v) - spent(cold[0], "gauss_newton_product", p, v)
    assert more[0] == 11
    more = spent(cold[1], "gauss_newton_product", p, 2 * v) - spent(cold[0], "gauss_newton_product", p, 2 * v)
    assert more[2] >= 66  # the tangent through the penalty, twice three products a sample
    assert spent(penal, "evaluate", p, penal.dataset).tolist() == [0, 0, 0]


def squared_jacobian_norms(layer: FixedPoint, inputs: Tensor) -> float:
    """Return Σᵢ ‖∂f/∂z‖²_F at the fixed points."""
    z = layer(inputs).detach()
    squares = (jacrev(lambda s, x=x: layer.cell(s, x))(at).square().sum() for at, x in zip(z, inputs, strict=True))
    return sum(square.item() for square in squares)


def test_training_with_the_penalty_keeps_the_cell_contractive() -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return DeqRegressor(FixedPoint(TanhCell(norm=0.9), options=TIGHT), 5, 3)

    norms = []
    for weight in (0.0, 3.0):
        terms = [JacobianPenalty(weight, probes=2)]
        problem = TrainingProblem(model(), samples("mse"), "mse", parallel.SELF, terms=terms)
        result = minimize(problem, "trgn", max_iterations=8)
        problem.layout.load(problem.model, result.x)
        norms.append(squared_jacobian_norms(problem.model.layer, samples("mse")[0]))
    assert norms[1] < 0.5 * norms[0]


# ---------------------------------------------------------------------------------------------- known minima


class Plain(nn.Module):
    """x ↦ x w."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def linear_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(40, 6, dtype=torch.float64, generator=generator)
    t = x @ torch.tensor([[2.0], [-1.0], [0.3], [0.0], [0.02], [0.7]], dtype=torch.float64)
    return x, t + 0.1 * torch.randn(40, 1, dtype=torch.float64, generator=generator)


def spread(data: tuple[Tensor, Tensor], comm: parallel.Comm, terms: list[Term]) -> TrainingProblem:
    """Linear regression over the ranks, the last of several without samples."""
    x, t = data
    working = max(1, comm.size - 1)
    own = parallel.own_slice(len(x), comm.rank, working) if comm.rank < working else slice(0, 0)
    start = torch.full((6, 1), 0.1, dtype=torch.float64)
    return TrainingProblem(Plain(start), (x[own], t[own]), "mse", comm, terms=terms)


METHODS = ["trgn", "lbfgs", "newton", "tao:brgn", "adam"]


def minimum(problem: TrainingProblem, method: str) -> Tensor:
    if method == "adam":
        settings = MinibatchSettings(learning_rate=0.05, batch_size=None, schedule=Schedule("cosine"))
        return minimize(problem, method, max_iterations=500, minibatch=settings).x
    options = {"tao_gatol": 1e-10, "tao_grtol": 0, "tao_gttol": 0}
    if method == "tao:brgn":  # its own penalty, made too small to matter
        options |= {"tao_brgn_regularizer_weight": 1e-10}
    return minimize(problem, method, max_iterations=300, options=options, raise_on_failure=False).x


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("method", METHODS[:-1])
def test_ridge_regression_to_its_closed_form(method: str, comm: parallel.Comm) -> None:
    x, t = linear_data()
    answer = torch.linalg.solve(x.T @ x / 40 + 0.3 * torch.eye(6, dtype=torch.float64), x.T @ t / 40)
    found = minimum(spread((x, t), comm, [L2(0.3)]), method)
    torch.testing.assert_close(found, answer.reshape(-1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_all_methods_reach_the_minimum_with_l1_and_l2(method: str) -> None:
    terms: list[Term] = [L1(0.2, smoothing=0.05), L2(0.1)]
    x, t = linear_data()
    # By fixed-point iteration on weights 1/√(w² + ε²) of a ridge problem, which no method under test is.
    w = torch.zeros(6, 1, dtype=torch.float64)
    for _ in range(500):
        ridge = torch.diag((0.1 + 0.2 / (w * w + 0.05**2).sqrt()).reshape(-1))
        w = torch.linalg.solve(x.T @ x / 40 + ridge, x.T @ t / 40)
    found = minimum(spread((x, t), parallel.SELF, terms), method)
    torch.testing.assert_close(found, w.reshape(-1), rtol=0, atol=1e-6)


def test_l1_tends_to_soft_thresholding() -> None:
    x, t = linear_data()
    q = torch.linalg.qr(x).Q * 40**0.5  # XᵀX/N = I: every weight for itself
    plain = (q.T @ t / 40).reshape(-1)
    soft = plain.sign() * (plain.abs() - 0.4).clamp(min=0)
    assert 0 < int((soft == 0).sum()) < 6
    errors = []
    for smoothing in (1e-2, 1e-3, 1e-4):
        found = minimum(spread((q, t), parallel.SELF, [L1(0.4, smoothing)]), "trgn")
        errors.append(float((found - soft).abs().max()))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]  # of first order in the smoothing
    assert errors[2] < 1e-3


# ------------------------------------------------------------------------------------------------- refusals


def test_refusals() -> None:
    for wrong in (lambda: L2(-1.0), lambda: L1(float("nan")), lambda: JacobianPenalty(float("inf"))):
        with pytest.raises(OptionError, match="finite number that is not negative"):
            wrong()
    with pytest.raises(OptionError, match="smoothing 0.0: give a finite number above 0"):
        L1(1.0, smoothing=0.0)
    with pytest.raises(OptionError, match="has 0 probes"):
        JacobianPenalty(1.0, probes=0)
    with pytest.raises(OptionError, match=r"no parameter's name fits 'wieght'; there are 0.weight, 0.bias"):
        serial(explicit_model(), "mse", terms=[L2(1.0, ["wieght"])])
    with pytest.raises(OptionError, match="Jacobian penalty is on fixed points, and the model has none"):
        serial(explicit_model(), "mse", terms=[JacobianPenalty(1.0)])
    with pytest.raises(OptionError, match="0.5 is no term of an objective"):
        serial(explicit_model(), "mse", terms=[0.5])
    for term in (Quartic(), LogState()):
        with pytest.raises(OptionError, match=f"needs a sum of squares, and the {term.name} is none"):
            LeastSquares(serial(deq_model(), "mse", terms=[term]))
    with pytest.raises(NotImplementedError, match="neither a curvature_product nor a residual"):
        p = torch.ones(2)
        WeightTerm.curvature_product(Quartic(), p, p)


@pytest.mark.parallel([2, 3])
def test_a_term_that_fails_on_one_rank_is_raised_on_all(comm: parallel.Comm) -> None:
    class Failing(LogState):
        def features(self, call: LayerCall) -> Tensor:
            if comm.rank == 0:
                raise ValueError("the term has a bug")
            return call.z

    problem = with_terms(comm, [Failing()])
    with pytest.raises((ValueError, HpcdeqError), match="the term has a bug"):
        problem.gradient(problem.initial())
