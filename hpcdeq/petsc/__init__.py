"""The bridge to PETSc: options, vectors, operators, solves. `PETSc` is imported from here and nowhere else.

PETSc's own BLAS runs one thread a rank: its vectors are short beside a cell evaluation, and a second thread pool would
fight torch's for the same cores.
"""

import os

os.environ.setdefault("MKL_THREADING_LAYER", "SEQUENTIAL")

import petsc4py

from hpcdeq.petsc.vocabulary import given_arguments

petsc4py.init(given_arguments())

from petsc4py import PETSc

__all__ = ["PETSc"]
