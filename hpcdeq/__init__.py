"""Deep equilibrium networks trained with PETSc: SNES fixed points, KSP derivatives, TAO optimisers, over MPI.

Names are imported when they are first used, so that a command's ``--help`` needs neither torch nor PETSc nor MPI.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

# Scalar products of MKL's (in torch, and in PETSc where it was built with it) otherwise sum in an order that hangs on the
# addresses of their vectors, and a run would not repeat itself to the last bit. MKL reads it before its first product.
os.environ.setdefault("MKL_CBWR", "AUTO")

__version__ = "0.1.0"

_HOME = {
    "FixedPoint": "hpcdeq.deq",
    "solve_fixed_point": "hpcdeq.deq",
    "Solution": "hpcdeq.deq",
    "TrainingProblem": "hpcdeq.problem",
    "minimize": "hpcdeq.optim",
    "Result": "hpcdeq.optim",
    "Dataset": "hpcdeq.data",
    "load": "hpcdeq.record.restore",
    "HpcdeqError": "hpcdeq.errors",
    "CheckpointError": "hpcdeq.errors",
    "ConvergenceError": "hpcdeq.errors",
    "DataError": "hpcdeq.errors",
    "OptionError": "hpcdeq.errors",
    "ShapeError": "hpcdeq.errors",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hpcdeq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
