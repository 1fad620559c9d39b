"""Tensors and PETSc vectors over the same memory.

A view lives inside a ``with``: PETSc then knows when the values may have changed (a view that outlives its block leaves
stale cached norms behind). At the end of the block the view is emptied, so that later use fails instead of reading
memory that PETSc may have moved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from hpcdeq.errors import ShapeError
from hpcdeq.petsc import PETSc
from hpcdeq.state import Block, Vector


class _Borrowed:
    """Memory of a locked vector, presented as writable: torch warns about every array that is not."""

    def __init__(self, array: np.ndarray) -> None:
        interface = dict(array.__array_interface__)
        interface["data"] = (interface["data"][0], False)
        self.__array_interface__ = interface


@contextlib.contextmanager
def read_view(vector: PETSc.Vec) -> Iterator[torch.Tensor]:
    """View a vector's local part as a float64 tensor for reading; shares memory.

    Not collective. Works on vectors that PETSc has locked for reading (inside monitors and callbacks). Writing through
    the view is not detected and not allowed.
    """
    array = vector.getArray(readonly=True)
    view = torch.from_numpy(np.asarray(_Borrowed(array))) if array.size else torch.empty(0, dtype=torch.float64)
    try:
        yield view
    finally:
        view.set_(torch.empty(0, dtype=view.dtype))  # type: ignore[call-overload]
        del array


@contextlib.contextmanager
def write_view(vector: PETSc.Vec) -> Iterator[torch.Tensor]:
    """View a vector's local part as a float64 tensor for reading and writing; shares memory.

    Not collective. PETSc forgets the vector's cached norms at the end of the block.
    """
    with vector as array:
        view = torch.from_numpy(array) if array.size else torch.empty(0, dtype=torch.float64)
        try:
            yield view
        finally:
            view.set_(torch.empty(0, dtype=view.dtype))  # type: ignore[call-overload]


def copy_to_vector(tensor: torch.Tensor, vector: PETSc.Vec) -> None:
    """Copy a tensor of any shape, dtype and device into a vector's local part. Not collective.

    Raises
    ------
    ShapeError
        The number of elements differs from the vector's local size.
    """
    with write_view(vector) as view:
        if view.numel() != tensor.numel():
            raise ShapeError(f"a tensor of {tensor.numel()} numbers does not fit a vector of local size {view.numel()}")
        view.copy_(tensor.detach().reshape(-1))


def block_of(vector: PETSc.Vec) -> Block:
    """Return a vector's local part as a part of a state; shares memory. Not collective."""
    return Block(np.asarray(vector.getArray(readonly=True)))


def restore_vector(vector: PETSc.Vec, known: Vector) -> None:
    """Set a vector's local part from one that was kept, on whatever number of ranks. Not collective."""
    vector.setArray(known[slice(*vector.getOwnershipRange())])


def copy_from_vector(vector: PETSc.Vec, like: torch.Tensor) -> torch.Tensor:
    """Return a new tensor with a vector's local values in the shape, dtype and device of ``like``. Not collective."""
    with read_view(vector) as view:
        return view.to(dtype=like.dtype, device=like.device, copy=True).reshape(like.shape)


@contextlib.contextmanager
def shaped_read(vector: PETSc.Vec, like: torch.Tensor) -> Iterator[torch.Tensor]:
    """View a vector for reading in the shape of ``like``: no copy in float64 on the CPU, a converted copy elsewhere.

    Not collective.
    """
    with read_view(vector) as view:
        shaped = view.to(dtype=like.dtype, device=like.device).reshape(like.shape)
        try:
            yield shaped
        finally:
            shaped.set_(torch.empty(0, dtype=shaped.dtype, device=shaped.device))  # type: ignore[call-overload]
