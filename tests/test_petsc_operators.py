"""Matrices and preconditioners given by their products, against dense twins."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hpcdeq import parallel
from hpcdeq.parallel import Comm
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.operators import Product, matrix_from_products, set_preconditioner
from hpcdeq.petsc.vectors import copy_to_vector, read_view

EVERY = pytest.mark.parallel([1, 2, 3])
ROWS = {1: [5], 2: [4, 1], 3: [3, 0, 2]}
COLUMNS = {1: [4], 2: [0, 4], 3: [1, 2, 1]}


class Twin:
    """A dense matrix known whole to every rank, and its products on distributed vectors."""

    def __init__(self, comm: Comm, dense: np.ndarray, rows: list[int], columns: list[int]) -> None:
        self.comm = comm
        self.dense, self.rows, self.columns = dense, rows, columns

    def vector(self, whole: np.ndarray, sizes: list[int]) -> PETSc.Vec:
        made = PETSc.Vec().createMPI((sizes[self.comm.rank], None), comm=self.comm)
        start = sum(sizes[: self.comm.rank])
        copy_to_vector(torch.from_numpy(whole[start : start + sizes[self.comm.rank]].copy()), made)
        return made

    def whole(self, vector: PETSc.Vec, sizes: list[int]) -> np.ndarray:
        with read_view(vector) as view:
            return parallel.gather_blocks(self.comm, view.numpy(), sizes, np.empty(sum(sizes)))

    def _product(self, dense: np.ndarray, from_sizes: list[int], to_sizes: list[int]) -> Product:
        def product(x: PETSc.Vec, y: PETSc.Vec) -> None:
            image = dense @ self.whole(x, from_sizes)
            start = sum(to_sizes[: self.comm.rank])
            copy_to_vector(torch.from_numpy(image[start : start + to_sizes[self.comm.rank]].copy()), y)

        return product

    def product(self, dense: np.ndarray | None = None) -> Product:
        return self._product(self.dense if dense is None else dense, self.columns, self.rows)

    def transpose_product(self, dense: np.ndarray | None = None) -> Product:
        return self._product((self.dense if dense is None else dense).T, self.rows, self.columns)

    def matrix(self, *, symmetric: bool = False) -> PETSc.Mat:
        return matrix_from_products(
            self.comm,
            (self.rows[self.comm.rank], sum(self.rows)),
            (self.columns[self.comm.rank], sum(self.columns)),
            self.product(),
            None if symmetric else self.transpose_product(),
        )


def square(comm: Comm, *, symmetric: bool = False) -> Twin:
    random = np.random.default_rng(7)
    dense = random.standard_normal((5, 5)) + 5 * np.eye(5)
    return Twin(comm, dense @ dense.T if symmetric else dense, ROWS[comm.size], ROWS[comm.size])


@EVERY
def test_a_rectangular_matrix_has_its_twin_s_products(comm: Comm) -> None:
    random = np.random.default_rng(7)
    twin = Twin(comm, random.standard_normal((5, 4)), ROWS[comm.size], COLUMNS[comm.size])
    matrix = twin.matrix()
    assert matrix.getSize() == (5, 4)
    assert matrix.getLocalSize() == (twin.rows[comm.rank], twin.columns[comm.rank])
    x, y = random.standard_normal(4), random.standard_normal(5)
    right, left = matrix.createVecs()
    matrix.mult(twin.vector(x, twin.columns), left)
    np.testing.assert_allclose(twin.whole(left, twin.rows), twin.dense @ x, rtol=1e-13)
    matrix.multTranspose(twin.vector(y, twin.rows), right)
    np.testing.assert_allclose(twin.whole(right, twin.columns), twin.dense.T @ y, rtol=1e-13)
    matrix.destroy()


@EVERY
def test_transpose_is_adjoint(comm: Comm) -> None:
    twin = square(comm)
    matrix = twin.matrix()
    random = np.random.default_rng(8)
    x, y = (twin.vector(random.standard_normal(5), twin.rows) for _ in range(2))
    ax, aty = x.duplicate(), x.duplicate()
    matrix.mult(x, ax)
    matrix.multTranspose(y, aty)
    assert ax.dot(y) == pytest.approx(x.dot(aty), rel=1e-13)
    matrix.destroy()


@EVERY
def test_shifts_add_up_and_are_taken_away(comm: Comm) -> None:
    twin = square(comm)
    matrix = twin.matrix()
    x = np.arange(5.0) - 1.5
    source = twin.vector(x, twin.rows)
    image = source.duplicate()

    def products() -> tuple[np.ndarray, np.ndarray]:
        matrix.mult(source, image)
        forward = twin.whole(image, twin.rows)
        matrix.multTranspose(source, image)
        return forward, twin.whole(image, twin.rows)

    for multiple, total in ((0.5, 0.5), (1.25, 1.75)):
        matrix.shift(multiple)
        shifted = twin.dense + total * np.eye(5)
        np.testing.assert_allclose(products(), (shifted @ x, shifted.T @ x), rtol=1e-13)
    matrix.getPythonContext().unshift()
    np.testing.assert_allclose(products(), (twin.dense @ x, twin.dense.T @ x), rtol=1e-13)
    matrix.destroy()


def test_one_product_makes_a_symmetric_matrix(comm: Comm) -> None:
    twin = square(comm, symmetric=True)
    matrix = twin.matrix(symmetric=True)
    assert matrix.isSymmetricKnown() == (True, True)
    other = square(comm).matrix()
    assert other.isSymmetricKnown() == (True, False)
    x = twin.vector(np.arange(5.0), twin.rows)
    image, transposed = x.duplicate(), x.duplicate()
    matrix.mult(x, image)
    matrix.multTranspose(x, transposed)
    assert image.equal(transposed)


@EVERY
@pytest.mark.parametrize("transpose", [False, True])
def test_a_krylov_solver_uses_the_products_and_the_preconditioner(comm: Comm, transpose: bool) -> None:
    twin = square(comm)
    inverse = np.linalg.inv(twin.dense)
    calls = {"apply": 0, "transposed": 0}

    def counted(name: str, product: Product) -> Product:
        def call(x: PETSc.Vec, y: PETSc.Vec) -> None:
            calls[name] += 1
            product(x, y)

        return call

    ksp = PETSc.KSP().create(comm)
    ksp.setOperators(twin.matrix())
    ksp.setType("gmres")
    ksp.setTolerances(rtol=1e-12)
    set_preconditioner(
        ksp.getPC(),
        counted("apply", twin.product(inverse)),
        counted("transposed", twin.transpose_product(inverse)),
    )
    b = np.arange(1.0, 6.0)
    right, x = twin.vector(b, twin.rows), twin.vector(np.zeros(5), twin.rows)
    (ksp.solveTranspose if transpose else ksp.solve)(right, x)
    dense = twin.dense.T if transpose else twin.dense
    np.testing.assert_allclose(twin.whole(x, twin.rows), np.linalg.solve(dense, b), rtol=1e-10)
    assert ksp.getIterationNumber() == 1  # the preconditioner is the inverse
    assert (calls["transposed"] > 0) == transpose and (calls["apply"] > 0) == (not transpose)
    ksp.destroy()


@EVERY
def test_a_symmetric_preconditioner_is_its_own_transpose(comm: Comm) -> None:
    twin = square(comm, symmetric=True)
    pc = PETSc.PC().create(comm)
    pc.setOperators(twin.matrix(symmetric=True))
    set_preconditioner(pc, twin.product(np.linalg.inv(twin.dense)))
    pc.setUp()
    b = twin.vector(np.arange(5.0), twin.rows)
    x, y = b.duplicate(), b.duplicate()
    pc.apply(b, x)
    pc.applyTranspose(b, y)
    np.testing.assert_allclose(twin.whole(x, twin.rows), np.linalg.solve(twin.dense, np.arange(5.0)), rtol=1e-10)
    assert x.equal(y)
    pc.destroy()
