"""PETSc matrices and preconditioners that are given by their products."""

from __future__ import annotations

from collections.abc import Callable

from hpcdeq.petsc import PETSc

Product = Callable[[PETSc.Vec, PETSc.Vec], None]


class ProductMatrix:
    """Context of a PETSc matrix of python type: products instead of entries.

    Parameters
    ----------
    product
        ``product(x, y)`` sets y = A x.
    transpose_product
        ``transpose_product(x, y)`` sets y = Aᵀ x; None for a symmetric matrix.
    """

    def __init__(self, product: Product, transpose_product: Product | None = None) -> None:
        self.product = product
        self.transpose_product = transpose_product or product
        self.multiple = 0.0

    def shift(self, matrix: PETSc.Mat, multiple: float) -> None:
        """Add a multiple of the identity: TAO's line searches make an indefinite Hessian positive with it. Not collective."""
        self.multiple += multiple

    def unshift(self) -> None:
        """Take all multiples of the identity away again; the owner calls it when the matrix changes. Not collective."""
        self.multiple = 0.0

    def mult(self, matrix: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Set y = A x. Collective on the matrix."""
        self.product(x, y)
        if self.multiple:
            y.axpy(self.multiple, x)

    def multTranspose(self, matrix: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:  # noqa: N802 (petsc4py's name)
        """Set y = Aᵀ x. Collective on the matrix."""
        self.transpose_product(x, y)
        if self.multiple:
            y.axpy(self.multiple, x)


def matrix_from_products(
    comm: object,
    rows: tuple[int, int],
    columns: tuple[int, int],
    product: Product,
    transpose_product: Product | None = None,
) -> PETSc.Mat:
    """Return a matrix of python type from its products.

    Collective on comm.

    Parameters
    ----------
    rows, columns
        (local, global) sizes.
    product, transpose_product
        As in `ProductMatrix`.
    """
    context = ProductMatrix(product, transpose_product)
    matrix = PETSc.Mat().createPython((rows, columns), context=context, comm=comm)
    matrix.setOption(PETSc.Mat.Option.SYMMETRIC, transpose_product is None)
    matrix.setUp()
    return matrix


def matrix_of(context: ProductMatrix, comm: object, sizes: tuple[int, int]) -> PETSc.Mat:
    """Return a symmetric matrix of python type with a context of one's own; (local, global) sizes. Collective on comm."""
    matrix = PETSc.Mat().createPython((sizes, sizes), context=context, comm=comm)
    matrix.setOption(PETSc.Mat.Option.SYMMETRIC, True)
    matrix.setUp()
    return matrix


class ProductPreconditioner:
    """Context of a PETSc preconditioner of python type.

    Parameters
    ----------
    apply
        ``apply(x, y)`` sets y to an approximation of A⁻¹ x.
    apply_transpose
        The same for A⁻ᵀ; None for a symmetric one.
    """

    def __init__(self, apply: Product, apply_transpose: Product | None = None) -> None:
        self.apply_product = apply
        self.transpose_product = apply_transpose or apply

    def apply(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """Set y ≈ A⁻¹ x. Collective on the preconditioner."""
        self.apply_product(x, y)

    def applyTranspose(self, pc: PETSc.PC, x: PETSc.Vec, y: PETSc.Vec) -> None:  # noqa: N802 (petsc4py's name)
        """Set y ≈ A⁻ᵀ x. Collective on the preconditioner."""
        self.transpose_product(x, y)


def set_preconditioner(pc: PETSc.PC, apply: Product, apply_transpose: Product | None = None) -> None:
    """Make a PETSc preconditioner of python type out of its products. Collective on pc."""
    pc.setType(PETSc.PC.Type.PYTHON)
    pc.setPythonContext(ProductPreconditioner(apply, apply_transpose))
