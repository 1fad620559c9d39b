"""The optimisers of our own on TAO: limited memory, inner solves that end in time, sampled curvature, preconditioners."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hpcdeq
from hpcdeq import parallel
from hpcdeq.errors import OptionError
from hpcdeq.optim.base import Recorder
from hpcdeq.optim.levenberg_marquardt import Progress
from hpcdeq.optim.limited_memory import LimitedMemory
from hpcdeq.optim.sampling import Sampling
from hpcdeq.petsc import PETSc

COMM = parallel.WORLD
N = 12


def vector(values: np.ndarray) -> PETSc.Vec:
    """Return a distributed vector of the same values on any number of ranks."""
    made = PETSc.Vec().createMPI(len(values), comm=COMM)
    first, last = made.getOwnershipRange()
    made.setArray(values[first:last])
    return made


def whole(v: PETSc.Vec) -> np.ndarray:
    first, last = v.getOwnershipRange()
    out = np.zeros(v.getSize())
    out[first:last] = v.getArray(readonly=True)
    return parallel.sum_over_ranks(COMM, out)


def spd(seed: int) -> np.ndarray:
    a = np.random.default_rng(seed).standard_normal((N, N))
    return a @ a.T + np.eye(N)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("first", [None, "diagonal"])
@pytest.mark.parametrize("renewed", [False, True])
def test_limited_memory_is_the_inverse_bfgs_update(first: str | None, renewed: bool) -> None:
    """Against the dense product form H ← (I - ρ s yᵀ) H (I - ρ y sᵀ) + ρ s sᵀ of the pairs that are kept."""
    rng, a = np.random.default_rng(0), spd(1)
    memory = LimitedMemory(4)
    pairs = [(s, a @ s) for s in rng.standard_normal((6, N))]
    d = np.linspace(1, 3, N)
    base = np.diag(1 / d) if first else np.eye(N)
    for s, y in pairs:
        memory.add(vector(s), vector(y), vector(y if renewed else base @ y))
    flat = rng.standard_normal(N)
    memory.add(vector(flat), vector(-flat), vector(flat))  # no positive curvature: left out
    if renewed:
        scaling = vector(1 / d if first else np.ones(N))
        memory.renew(3, lambda v, w: w.pointwiseMult(scaling, v))
    s, y = pairs[-1]
    h = base * ((s @ y) / (y @ base @ y))
    kept = 3 if renewed else 4
    for s, y in pairs[-kept:]:
        rho = 1 / (s @ y)
        left = np.eye(N) - rho * np.outer(s, y)
        h = left @ h @ left.T + rho * np.outer(s, s)
    x = rng.standard_normal(N)
    out = vector(x * 0)
    memory.apply(vector(x), vector(base @ x), out)
    assert len(memory.pairs) == kept
    np.testing.assert_allclose(whole(out), h @ x, rtol=1e-10)
    memory.clear()
    assert not memory.pairs


def test_inner_solves_end_where_a_new_iterate_pays_more() -> None:
    """The rule maximises decrease over cost: compared with the best of all lengths of a known sequence."""
    decreases = 1 - 0.8 ** np.arange(60)  # of a linearly convergent inner solve
    for overhead in (2.0, 5.0, 20.0):
        right = vector(np.ones(1))
        solutions = iter([vector(np.array([2 * d])) for d in decreases[1:]])
        ksp = SimpleNamespace(getTolerances=lambda: (1e-12, 0.0, 1e5, 50), getSolution=lambda it=solutions: next(it))
        rule = Progress(right, 0.0, overhead)
        assert rule(ksp, 0, 1.0) is None
        ended = next(i for i in range(1, 60) if rule(ksp, i, 0.5) is not None)
        best = int(np.argmax(decreases / (overhead + np.arange(60))))
        assert best <= ended <= best + 4  # what the last three products brought is known only after them


@pytest.mark.parametrize(
    ("norm", "tolerances", "reason"),
    [
        (1e-3, (1e-2, 0.0, 1e5, 50), "CONVERGED_RTOL"),
        (np.nan, (1e-2, 0.0, 1e5, 50), "DIVERGED_NANORINF"),
        (0.5, (1e-2, 0.0, 1e5, 1), "DIVERGED_MAX_IT"),
    ],
)
def test_inner_solves_end_as_their_options_say(norm: float, tolerances: tuple[float, ...], reason: str) -> None:
    rule = Progress(vector(np.ones(1)), 0.0, 5.0)
    ksp = SimpleNamespace(getTolerances=lambda: tolerances, getSolution=lambda: vector(np.ones(1)))
    rule(ksp, 0, 1.0)
    assert rule(ksp, 1, norm) == getattr(PETSc.KSP.ConvergedReason, reason)


@pytest.mark.parametrize("overhead", [5.0, 0.0])
def test_an_inner_solve_ends_when_the_time_is_up(overhead: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step after one product is taken and lowers the loss; with more time the same solve takes several products."""
    options = {"tao_lm_overhead": overhead, "tao_ksp_rtol": 1e-10, "tao_pc_type": "none"}
    free = hpcdeq.minimize(make(90)[0], "trgn", 1, options)
    answers = iter([False])  # when the initial point is told
    monkeypatch.setattr(Recorder, "out_of_time", lambda recorder: next(answers, True))
    hurried = hpcdeq.minimize(make(90)[0], "trgn", 50, options)
    assert hurried.iterations == 1 and hurried.loss < hurried.history[0][2]
    # One product finds the damping, one is the solve's.
    assert hurried.counts.gauss_newton_products == 2 * 90 and free.counts.gauss_newton_products > 4 * 90


# ------------------------------------------------------------------------------------------------------- sampling


def test_batches_grow_to_all_samples_and_keep_those_they_have() -> None:
    sampling = Sampling(batch_size=10, batch_growth=1.5, seed=3)
    before: set[int] = set()
    for iteration in range(20):
        rows = sampling.batch(100, iteration)
        if rows is None:
            break
        assert len(rows) == int(10 * 1.5**iteration) and (np.diff(rows) > 0).all()
        assert before <= set(rows.tolist())
        before = set(rows.tolist())
    assert rows is None and iteration == 6  # 10 * 1.5^6 > 100
    assert Sampling(batch_size=10, batch_growth=2.0).batch(100, 10**9) is None
    assert Sampling().batch(100, 0) is None


def test_curvature_is_sampled_among_the_batch_anew_at_every_iterate() -> None:
    problem, _ = make()
    batch = Sampling(batch_size=40).batch(90, 0)
    assert batch is not None
    first, second = (problem.curvature_rows(0.25, 0, moves, batch) for moves in (0, 1))
    assert first is not None and second is not None
    assert len(first) == 10 and set(first.tolist()) <= set(batch.tolist())
    assert set(first.tolist()) != set(second.tolist())
    assert problem.curvature_rows(1.0, 0, 0, batch) is batch


@pytest.mark.parametrize(
    "settings", [{"hessian_fraction": 0.0}, {"hessian_fraction": 1.1}, {"batch_size": 0}, {"batch_growth": 0.9}]
)
def test_sampling_refuses_what_makes_no_sense(settings: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(settings))):
        Sampling(**settings)


def make(count: int = 90) -> tuple[hpcdeq.TrainingProblem, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(count, 3, dtype=torch.float64)
    y = torch.stack([x[:, 0] * x[:, 1], torch.sin(x.sum(dim=1))], dim=1)
    own = parallel.own_slice(count, COMM.rank, COMM.size)
    return hpcdeq.TrainingProblem(model, (x[own], y[own]), loss="mse", chunk_size=40), y


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("method", ["trgn", "lbfgs"])
def test_growing_batches_end_on_all_samples(method: str) -> None:
    problem, _ = make()
    sizes = []

    def look(iterate) -> None:
        sizes.append(iterate.counts.gradients)

    sampling = Sampling(batch_size=9, batch_growth=1.3)
    result = hpcdeq.minimize(problem, method, 25, sampling=sampling, callback=look, raise_on_failure=False)
    loss, gradient = problem.loss_and_gradient(result.x)
    assert result.loss == pytest.approx(loss, rel=1e-12)
    assert result.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-9)
    assert sizes[0] == 9  # of the first iterate, nine samples
    exact = hpcdeq.minimize(problem, method, 25, raise_on_failure=False)
    assert result.loss < 4 * exact.loss


@pytest.mark.parallel([1, 2])
def test_a_run_that_ends_before_its_batch_is_whole_tells_the_loss_of_all() -> None:
    problem, _ = make()
    result = hpcdeq.minimize(problem, "trgn", 2, sampling=Sampling(batch_size=9, batch_growth=1.0))
    assert result.loss == pytest.approx(problem.loss(result.x), rel=1e-12)


@pytest.mark.parallel([1, 2])
def test_sampled_curvature_costs_its_fraction() -> None:
    problem, _ = make()
    options = {"tao_ksp_max_it": 5, "tao_ksp_rtol": 1e-12, "tao_lm_overhead": 0.0, "tao_lm_reuse": False}
    counts = [
        hpcdeq.minimize(problem, "trgn", 3, options, sampling=Sampling(hessian_fraction=f)).counts for f in (1.0, 0.1)
    ]
    found = [counts[0].gauss_newton_products, counts[1].gauss_newton_products - counts[0].gauss_newton_products]
    assert found[1] == pytest.approx(0.1 * found[0], rel=0.2)


@pytest.mark.parametrize(
    ("method", "sampling", "curvature", "words"),
    [
        ("adam", Sampling(hessian_fraction=0.5), None, "takes no curvature products"),
        ("adam", None, "hessian", "takes no curvature products"),
        ("newton", Sampling(batch_size=5), None, "growing batches are for trgn and lbfgs"),
        ("lbfgs", Sampling(hessian_fraction=0.5), None, "lbfgs takes no curvature products"),
        ("trgn", None, "hessian", "never negative"),
        ("tao:bntr", None, "fisher", "choose gauss_newton or hessian"),
        ("tao:brgn", Sampling(hessian_fraction=0.5), None, "all residuals"),
    ],
)
def test_what_a_method_cannot_sample_is_refused(method, sampling, curvature, words) -> None:
    problem, _ = make()
    with pytest.raises(OptionError, match=words):
        hpcdeq.minimize(problem, method, 1, sampling=sampling, curvature=curvature)


# ------------------------------------------------------------------------------------------------ preconditioners


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("kind", ["kronecker", "gauss_newton_diagonal", "inner_lbfgs", "none"])
@pytest.mark.parametrize("method", ["trgn", "tao:bntr"])
def test_every_preconditioner_serves_every_method(kind: str, method: str) -> None:
    problem, _ = make()
    prefix = "tao_" if method == "trgn" else "tao_bnk_"
    result = hpcdeq.minimize(problem, method, 12, {f"{prefix}pc_type": kind}, curvature="gauss_newton")
    assert result.loss < 0.05 * problem.loss(problem.initial())


def test_kronecker_factors_speed_up_inner_solves() -> None:
    """On inputs of very different scales; without a preconditioner conjugate gradients need far more products."""
    torch.manual_seed(0)
    x = torch.randn(200, 30, dtype=torch.float64) * torch.logspace(-2, 1, 30, dtype=torch.float64)
    t = x @ torch.randn(30, 3, dtype=torch.float64)
    options = {"tao_ksp_max_it": 300, "tao_ksp_rtol": 1e-6, "tao_lm_overhead": 0.0, "tao_lm_damping": 1e-8}
    products = {}
    for kind in ("kronecker", "none"):
        problem = hpcdeq.TrainingProblem(nn.Linear(30, 3).double(), (x, t), loss="mse")
        result = hpcdeq.minimize(problem, "trgn", 1, {**options, "tao_pc_type": kind})
        products[kind] = result.counts.gauss_newton_products / 200
    assert products["kronecker"] < 0.5 * products["none"]


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("method", ["trgn", "lbfgs"])
def test_runs_do_not_depend_on_the_number_of_ranks(method: str) -> None:
    problem, _ = make()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(90, 3, dtype=torch.float64)
    y = torch.stack([x[:, 0] * x[:, 1], torch.sin(x.sum(dim=1))], dim=1)
    alone = hpcdeq.TrainingProblem(model, (x, y), loss="mse", comm=parallel.SELF, chunk_size=30)
    found = [hpcdeq.minimize(each, method, 8).x for each in (problem, alone)]
    assert float((found[0] - found[1]).norm()) < 1e-6 * float(found[1].norm())


@pytest.mark.parametrize("method", ["trgn", "lbfgs"])
@pytest.mark.parametrize("option", ["tao_pc_kronecker_damping", "tao_pc_kronecker_probes"])
def test_options_of_factors_are_checked(method: str, option: str) -> None:
    problem, _ = make()
    with pytest.raises(OptionError, match="give numbers above 0"):
        hpcdeq.minimize(problem, method, 1, {option: -1})


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("trgn", "tao_lm_damping"),
        ("trgn", "tao_lm_increase"),
        ("lbfgs", "tao_lbfgs_history"),
        ("lbfgs", "tao_lbfgs_renew"),
    ],
)
def test_options_of_the_methods_are_checked(method: str, option: str) -> None:
    problem, _ = make()
    with pytest.raises(OptionError, match=option):
        hpcdeq.minimize(problem, method, 1, {option: 0})


@pytest.mark.parametrize("kind", ["kronecker", "none"])
def test_a_line_search_that_fails_ends_in_words(kind: str) -> None:
    """A gradient that is wrong from some way on: a few steps are taken, and then none lowers the loss."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.sign = -1.0 if x.mean() > 0.5 else 1.0
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return ctx.sign * g

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return Wrong.apply(self.map(x))

    x = torch.randn(20, 3, dtype=torch.float64)
    problem = hpcdeq.TrainingProblem(
        Model(), (x, torch.ones(20, 2, dtype=torch.float64)), loss="mse", comm=parallel.SELF
    )
    result = hpcdeq.minimize(problem, "lbfgs", 50, {"tao_pc_type": kind}, raise_on_failure=False)
    assert (result.status, result.reason) == ("diverged", "DIVERGED_LS_FAILURE")
    assert result.iterations > 0 and result.loss < result.history[0][2]
