"""The bridge to PETSc: options, vectors, operators, solves. `PETSc` is imported from here and nowhere else.

PETSc's own BLAS runs one thread a rank: its vectors are short beside a cell evaluation, and a second thread pool would
fight torch's for the same cores.
"""

import os

os.environ.setdefault("MKL_THREADING_LAYER", "SEQUENTIAL")

import petsc4py  # noqa: E402 (after the environment)

from hpcdeq.startup import PETSC_ARGUMENTS  # noqa: E402

# What no solver read is told by the commands themselves. Several scalar products at once are taken by a matrix product where
# the vectors happen to lie at equal distances in memory, with another rounding than one by one: a run would not repeat itself.
_FIXED = ["-options_left", "no", "-vec_mdot_use_gemv", "0", "-vec_maxpy_use_gemv", "0"]
petsc4py.init(["hpcdeq", *_FIXED, *PETSC_ARGUMENTS])

from petsc4py import PETSc  # noqa: E402 (after init)

__all__ = ["PETSc"]
