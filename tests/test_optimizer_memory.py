"""Vectors of an optimiser are distributed: what one rank holds of them falls as one over the number of ranks."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch

import hpcdeq
from hpcdeq import parallel
from hpcdeq.optim.stochastic import MinibatchSettings
from hpcdeq.parallel import Comm

WIDTH, LAYERS = 100, 5
# What a rank may hold whole, of the length of the weights: the point of an evaluation and the one before, the initial weights,
# the last iterate, and what the caller is given of it. Of Kronecker factors, the largest layer's: they go to ranks whole.
WHOLE = 7


def allocated() -> int:
    """Return the bytes that the C library has handed out."""
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    kind = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
    try:
        look = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        pytest.skip("the C library does not say what it has handed out (mallinfo2 of glibc 2.33)")
    look.restype = kind
    found = look()
    return int(found.hblkhd + found.uordblks)


def vectors_held(comm: Comm, method: str, options: dict[str, object], iterations: int) -> float:
    """Return what a rank has allocated in the last callback of a minimisation, in vectors of the weights."""
    torch.manual_seed(0)
    layers = [part for _ in range(LAYERS) for part in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh())]
    model = torch.nn.Sequential(*layers).double()
    x, y = (torch.randn(6, WIDTH, dtype=torch.float64) for _ in range(2))
    own = parallel.own_slice(6, comm.rank, comm.size)
    problem = hpcdeq.TrainingProblem(model, (x[own], y[own]), "mse", comm)
    problem.gauss_newton_product(problem.initial(), problem.gradient(problem.initial()))
    problem.forget()
    gc.collect()
    before, found = allocated(), [0]

    def look(iterate: hpcdeq.optim.Iterate) -> None:
        gc.collect()
        found.append(allocated() - before)

    given = {"minibatch": MinibatchSettings(batch_size=6)} if method == "adam" else {"options": options}
    hpcdeq.minimize(problem, method, iterations, callback=look, raise_on_failure=False, **given)  # type: ignore[arg-type]
    assert len(found) == iterations + 2
    return found[-1] / (8 * problem.layout.count)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize(
    ("method", "options", "iterations", "distributed"),
    [
        ("adam", {}, 3, 3.5),  # its block of the weights and two moments
        # Pairs s, y and H₀ y, work vectors, gradient.
        ("lbfgs", {"tao_pc_type": "none", "tao_lbfgs_history": 12}, 14, 3 * 12),
    ],
)
def test_what_a_rank_holds_falls_with_their_number(
    comm: Comm, method: str, options: dict[str, object], iterations: int, distributed: float
) -> None:
    """Compare with the same minimisation by one rank alone: all but a few vectors are shared out."""
    alone = vectors_held(parallel.SELF, method, options, iterations)
    shared = vectors_held(comm, method, options, iterations)
    assert alone >= distributed - 0.5
    assert shared <= WHOLE + (alone + 3) / comm.size
