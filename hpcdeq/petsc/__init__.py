"""The bridge to PETSc: options, vectors, operators, solves. `PETSc` is imported from here and nowhere else.

PETSc's own BLAS runs one thread a rank: its vectors are short beside a cell evaluation, and a second thread pool would
fight torch's for the same cores.
"""

import os

os.environ.setdefault("MKL_THREADING_LAYER", "SEQUENTIAL")

import petsc4py  # noqa: E402 (after the environment)

from hpcdeq.startup import PETSC_ARGUMENTS  # noqa: E402

# What no solver read is told by the commands themselves.
petsc4py.init(["hpcdeq", "-options_left", "no", *PETSC_ARGUMENTS])

from petsc4py import PETSc  # noqa: E402 (after init)

__all__ = ["PETSc"]
