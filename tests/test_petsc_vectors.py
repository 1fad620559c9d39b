"""Tensors and PETSc vectors over the same memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hpcdeq.errors import ShapeError
from hpcdeq.parallel import Comm
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.vectors import copy_from_vector, copy_to_vector, read_view, shaped_read, write_view

EVERY = pytest.mark.parallel([1, 2, 3])
READ_ONLY = 73  # PETSC_ERR_ARG_WRONGSTATE: a vector that is locked for reading


@pytest.fixture
def vector() -> Iterator[PETSc.Vec]:
    """(1, 1, 1, 1) on this rank alone."""
    made = PETSc.Vec().createSeq(4, comm=PETSc.COMM_SELF)
    made.set(1.0)
    yield made
    made.destroy()


@pytest.fixture
def uneven(comm: Comm) -> Iterator[PETSc.Vec]:
    """A vector over all ranks of which the last holds nothing; one rank alone holds three."""
    local = 0 if comm.size > 1 and comm.rank == comm.size - 1 else 3
    made = PETSc.Vec().createMPI((local, None), comm=comm)
    made.set(1.0)
    yield made
    made.destroy()


def address(vector: PETSc.Vec) -> int:
    return vector.getArray(readonly=True).ctypes.data


# ------------------------------------------------------------------------------------------------------------ views


@pytest.mark.parametrize("view_of", [read_view, write_view])
def test_a_view_copies_nothing(vector: PETSc.Vec, view_of) -> None:
    where = address(vector)
    with view_of(vector) as view:
        assert view.data_ptr() == where
        assert view.dtype == torch.float64 and view.shape == (4,)
        assert view.tolist() == [1, 1, 1, 1]


def test_what_is_written_through_a_view_is_the_vector_s(vector: PETSc.Vec) -> None:
    with write_view(vector) as view:
        view.copy_(torch.arange(4))
    assert vector.getArray().tolist() == [0, 1, 2, 3]
    vector.scale(2.0)
    with read_view(vector) as view:
        assert view.tolist() == [0, 2, 4, 6]


def test_a_norm_is_not_stale_after_writing(vector: PETSc.Vec) -> None:
    assert vector.norm() == 2.0  # PETSc keeps it
    with write_view(vector) as view:
        view.fill_(50.0)
    assert vector.norm() == 100.0


def test_copying_into_a_vector_forgets_its_norm(vector: PETSc.Vec) -> None:
    assert vector.norm() == 2.0
    copy_to_vector(torch.full((4,), 50.0), vector)
    assert vector.norm() == 100.0


def test_reading_keeps_the_norm(vector: PETSc.Vec) -> None:
    vector.norm()
    state = vector.stateGet()
    with read_view(vector) as view:
        assert view.norm() == 2.0
    assert vector.stateGet() == state


@pytest.mark.parametrize("view_of", [read_view, write_view])
def test_a_view_is_empty_after_its_block(vector: PETSc.Vec, view_of) -> None:
    with view_of(vector) as view:
        pass
    assert view.numel() == 0
    with pytest.raises(ZeroDivisionError), view_of(vector) as view:
        _ = 1 / 0
    assert view.numel() == 0


def test_a_write_view_gives_the_vector_back_after_an_exception(vector: PETSc.Vec) -> None:
    with pytest.raises(ZeroDivisionError), write_view(vector) as view:
        view.fill_(50.0)
        _ = 1 / 0
    assert vector.norm() == 100.0


def test_a_locked_vector_is_read_but_not_written() -> None:
    """PETSc locks the point at which it evaluates a function."""
    seen: list[object] = []

    def function(snes: PETSc.SNES, x: PETSc.Vec, f: PETSc.Vec) -> None:
        with read_view(x) as view:
            seen.append(view.tolist())
        with shaped_read(x, torch.empty(2, 1, dtype=torch.float64)) as view:
            seen.append(view.tolist())
        with pytest.raises(PETSc.Error) as caught, write_view(x):
            pass
        seen.append(caught.value.ierr)
        copy_to_vector(torch.zeros(2), f)

    snes = PETSc.SNES().create(PETSc.COMM_SELF)
    x = PETSc.Vec().createSeq(2, comm=PETSc.COMM_SELF)
    x.setArray([3.0, 4.0])
    snes.setFunction(function, x.duplicate())
    snes.setType("nrichardson")
    snes.solve(None, x)
    assert seen[:3] == [[3.0, 4.0], [[3.0], [4.0]], READ_ONLY]
    snes.destroy()


@EVERY
def test_a_rank_without_entries_takes_part(uneven: PETSc.Vec, comm: Comm) -> None:
    local = uneven.getLocalSize()
    with write_view(uneven) as view:
        assert view.shape == (local,) and view.dtype == torch.float64
        view.fill_(2.0)
    holders = max(1, comm.size - 1)
    assert uneven.norm(PETSc.NormType.NORM_1) == 6.0 * holders
    with read_view(uneven) as view:
        assert view.shape == (local,) and view.dtype == torch.float64
        assert (view == 2.0).all()
    copy_to_vector(torch.full((local, 1), 5.0), uneven)
    assert uneven.norm(PETSc.NormType.NORM_1) == 15.0 * holders
    like = torch.empty(local, 1, dtype=torch.float32)
    assert copy_from_vector(uneven, like).shape == (local, 1)
    with shaped_read(uneven, like) as view:
        assert view.shape == (local, 1) and view.dtype == torch.float32


@EVERY
def test_ranks_see_their_own_entries(comm: Comm) -> None:
    vector = PETSc.Vec().createMPI((2, None), comm=comm)
    copy_to_vector(torch.tensor([comm.rank, 10.0 + comm.rank]), vector)
    assert vector.sum() == sum(2 * rank + 10 for rank in range(comm.size))
    with read_view(vector) as view:
        assert view.tolist() == [comm.rank, 10.0 + comm.rank]
    vector.destroy()


# ------------------------------------------------------------------------------------------------------ conversions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_a_tensor_of_any_shape_and_type_is_copied(vector: PETSc.Vec, dtype: torch.dtype) -> None:
    copy_to_vector(torch.arange(4, dtype=dtype).reshape(2, 2).T, vector)  # not contiguous
    assert vector.getArray().tolist() == [0, 2, 1, 3]
    back = copy_from_vector(vector, torch.empty(2, 2, dtype=dtype))
    assert back.dtype == dtype and back.tolist() == [[0, 2], [1, 3]]


def test_a_tensor_with_a_gradient_is_copied(vector: PETSc.Vec) -> None:
    copy_to_vector(torch.full((4,), 3.0, requires_grad=True), vector)
    assert vector.norm() == 6.0


def test_single_precision_is_exact_there_and_back(vector: PETSc.Vec) -> None:
    numbers = torch.tensor([0.1, 1 / 3, -2e-30, 3e30])
    copy_to_vector(numbers, vector)
    assert torch.equal(copy_from_vector(vector, numbers), numbers)


def test_a_copy_from_a_vector_is_one_s_own(vector: PETSc.Vec) -> None:
    copied = copy_from_vector(vector, torch.empty(4, dtype=torch.float64))
    vector.set(7.0)
    assert copied.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_tensor_that_does_not_fit_is_refused(vector: PETSc.Vec, count: int) -> None:
    with pytest.raises(ShapeError, match=f"a tensor of {count} numbers does not fit a vector of local size 4"):
        copy_to_vector(torch.zeros(count), vector)
    assert vector.norm() == 2.0


def test_a_shaped_view_copies_nothing_in_double_precision(vector: PETSc.Vec) -> None:
    where = address(vector)
    with shaped_read(vector, torch.empty(2, 2, dtype=torch.float64)) as view:
        assert view.data_ptr() == where and view.shape == (2, 2)
    with shaped_read(vector, torch.empty(2, 2, dtype=torch.float32)) as view:
        assert view.data_ptr() != where and view.dtype == torch.float32 and view.shape == (2, 2)


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_a_shaped_view_is_empty_after_its_block(vector: PETSc.Vec, shape: tuple[int, ...]) -> None:
    with shaped_read(vector, torch.empty(shape, dtype=torch.float64)) as view:
        assert view.shape == shape
    assert view.numel() == 0
