"""Sparse systems against dense algebra: linear, nonlinear, one after the other, and failing."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from hpcdeq.errors import ConvergenceError, OptionError
from hpcdeq.parallel import Comm
from hpcdeq.petsc.sparse import SparseSystem

N = 30


def random_matrix(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return offsets, columns and entries of a symmetric, diagonally dominant matrix with a fixed pattern, and the matrix."""
    pattern = np.random.default_rng(0).random((N, N)) < 0.1
    pattern |= pattern.T | np.eye(N, dtype=bool)
    numbers = np.random.default_rng(seed).standard_normal((N, N))
    dense = np.where(pattern, numbers + numbers.T, 0.0)
    np.fill_diagonal(dense, 1 + np.abs(dense).sum(axis=1))
    rows, columns = np.nonzero(pattern)
    return np.searchsorted(rows, np.arange(N + 1)), columns, dense[rows, columns], dense


@pytest.mark.parallel([1, 2])
def test_linear_systems_one_after_the_other(comm: Comm) -> None:
    """Solve with three matrices of one pattern, each rank its own; the rank without any does not matter."""
    offsets, columns, _, _ = random_matrix(0)
    system = SparseSystem(offsets, columns, "test_")
    for seed in range(3 if comm.rank == 0 else 0):
        _, _, entries, dense = random_matrix(seed)
        b = np.random.default_rng(100 + seed).standard_normal(N)
        found, record = system.solve(entries, b)
        assert np.abs(found - np.linalg.solve(dense, b)).max() < 1e-13
        assert (record.converged, record.iterations, record.prefix) == (True, 1, "test_")


def test_pointwise_nonlinearity() -> None:
    """Compare A u + u^3 + u = b with Newton's method on dense matrices, from zero and from a guess."""
    offsets, columns, entries, dense = random_matrix(4)
    b = 100 * np.random.default_rng(1).standard_normal(N)
    exact = np.zeros(N)
    for _ in range(40):
        residual = dense @ exact + exact**3 + exact - b
        exact -= np.linalg.solve(dense + np.diag(3 * exact**2 + 1), residual)
    assert np.abs(exact - np.linalg.solve(dense, b)).max() > 0.1
    system = SparseSystem(offsets, columns, "test_")
    found, first = system.solve(entries, b, lambda u: (u**3 + u, 3 * u**2 + 1))
    assert np.abs(found - exact).max() < 1e-9
    found, second = system.solve(entries, b, lambda u: (u**3 + u, 3 * u**2 + 1), guess=exact + 1e-3)
    assert np.abs(found - exact).max() < 1e-9
    assert second.iterations < first.iterations
    found, record = system.solve(entries, b)
    assert np.abs(found - np.linalg.solve(dense, b)).max() < 1e-12 and record.iterations == 1


def test_other_solvers_by_options() -> None:
    """Take PETSc's options, and name one that does not exist."""
    offsets, columns, entries, dense = random_matrix(5)
    b = np.ones(N)
    system = SparseSystem(offsets, columns, "test_", {"ksp_type": "cg", "pc_type": "jacobi", "ksp_rtol": 1e-12})
    assert np.abs(system.solve(entries, b)[0] - np.linalg.solve(dense, b)).max() < 1e-11
    assert system.snes.getKSP().getType() == "cg"
    with pytest.raises(OptionError, match="-test_snes_rtoll"):
        SparseSystem(offsets, columns, "test_", {"snes_rtoll": 1e-3})


def test_failures_are_raised() -> None:
    """Say how a solve ended that does not converge, or whose nonlinearity is not finite; the next one is unharmed."""
    offsets, columns, entries, dense = random_matrix(6)
    b = np.ones(N)
    system = SparseSystem(offsets, columns, "test_", {"snes_max_it": 1})
    with pytest.raises(ConvergenceError, match="DIVERGED_MAX_IT after 1 iterations on 30 unknowns, residual") as told:
        system.solve(entries, 1e3 * b, lambda u: (u**3, 3 * u**2))
    assert "PETSC_OPTIONS=-test_snes_monitor" in str(told.value)
    with pytest.raises(ConvergenceError, match="DIVERGED_F.*NAN"):
        system.solve(entries, b, lambda u: (u + np.nan, u))
    assert np.abs(system.solve(entries, b)[0] - np.linalg.solve(dense, b)).max() < 1e-13


def test_a_system_is_freed_at_once() -> None:
    """Leave no circle of references: the collector of circles is off, and what the system held is gone all the same."""
    offsets, columns, entries, _ = random_matrix(7)

    class Cubic:
        def __call__(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return u**3, 3 * u**2

    gc.disable()
    try:
        system, cubic = SparseSystem(offsets, columns, "test_"), Cubic()
        alive = weakref.ref(cubic)
        system.solve(entries, np.ones(N), cubic)
        del cubic
        assert alive() is not None
        del system
        assert alive() is None
    finally:
        gc.enable()
