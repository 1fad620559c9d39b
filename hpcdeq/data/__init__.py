"""Dataset files: their schema, how they are written, and how each rank reads its own rows.

Names are imported when they are first used: the processes that build samples need neither torch nor MPI, and a
process that was started under MPI must not start MPI itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcdeq.data.batches import GraphBatch, SampleSource
    from hpcdeq.data.dataset import Dataset, TensorDataset

_HOME = {
    "GraphBatch": "hpcdeq.data.batches",
    "SampleSource": "hpcdeq.data.batches",
    "Dataset": "hpcdeq.data.dataset",
    "TensorDataset": "hpcdeq.data.dataset",
}
__all__ = ["Dataset", "GraphBatch", "SampleSource", "TensorDataset"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hpcdeq.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
