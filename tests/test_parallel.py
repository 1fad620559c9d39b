"""The MPI layer: sums, blocks, agreement on failure, and how a job ends."""

from __future__ import annotations

import math
import operator
import sys
import time

import numpy as np
import pytest
from conftest import Run

from hpcdeq import parallel
from hpcdeq.errors import CheckpointError, ConvergenceError, HpcdeqError, OptionError, RankError
from hpcdeq.parallel import Comm
from hpcdeq.traffic import counted

EVERY = pytest.mark.parallel([1, 2, 3])
SEVERAL = pytest.mark.parallel([2, 3])


def sizes_of(comm: Comm) -> list[int]:
    """Uneven blocks, one of them empty: rank 1's."""
    return [3, 0, 2][: comm.size]


# ------------------------------------------------------------------------------------------------------- reductions


@EVERY
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_sum_over_ranks_adds_elementwise_and_leaves_its_input_alone(comm: Comm, dtype: type) -> None:
    own = np.arange(6, dtype=dtype).reshape(3, 2) + comm.rank
    before = own.copy()
    total = parallel.sum_over_ranks(comm, own)
    assert total.dtype == dtype
    np.testing.assert_array_equal(total, comm.size * np.arange(6).reshape(3, 2) + sum(range(comm.size)))
    np.testing.assert_array_equal(own, before)


@EVERY
def test_sum_over_ranks_takes_strided_and_empty_arrays(comm: Comm) -> None:
    np.testing.assert_array_equal(
        parallel.sum_over_ranks(comm, np.arange(6.0)[::2]), comm.size * np.array([0.0, 2.0, 4.0])
    )
    assert parallel.sum_over_ranks(comm, np.empty(0)).shape == (0,)


@EVERY
def test_a_sum_has_the_same_bits_on_every_rank(comm: Comm) -> None:
    own = np.random.default_rng(comm.rank).standard_normal(1000) * 10.0 ** np.arange(-500, 500).clip(-15, 15)
    total = parallel.sum_over_ranks(comm, own)
    np.testing.assert_array_equal(total, parallel.from_root(comm, total))


@EVERY
def test_max_any_root_and_counts(comm: Comm) -> None:
    assert parallel.max_over_ranks(comm, 10.0 - comm.rank) == 10.0
    assert parallel.max_over_ranks(comm, -float(comm.size - comm.rank)) == -1.0
    assert parallel.any_rank(comm, comm.rank == comm.size - 1) is True
    assert parallel.any_rank(comm, False) is False
    assert parallel.from_root(comm, {"rank": comm.rank}) == {"rank": 0}
    assert parallel.counts_of_ranks(comm, 7 * comm.rank) == [0, 7, 14][: comm.size]


# ----------------------------------------------------------------------------------------------------------- blocks


@EVERY
def test_gather_blocks_joins_uneven_blocks_in_rank_order(comm: Comm) -> None:
    sizes = sizes_of(comm)
    whole = np.arange(float(sum(sizes)))
    start = sum(sizes[: comm.rank])
    out = np.full(sum(sizes), np.nan)
    joined = parallel.gather_blocks(comm, whole[start : start + sizes[comm.rank]], sizes, out)
    assert joined is out
    np.testing.assert_array_equal(out, whole)


@EVERY
def test_gather_blocks_keeps_single_precision(comm: Comm) -> None:
    block = np.full(2, comm.rank + 0.1, np.float32)
    out = parallel.gather_blocks(comm, block, [2] * comm.size, np.empty(2 * comm.size, np.float32))
    np.testing.assert_array_equal(out, np.repeat(np.arange(comm.size) + 0.1, 2).astype(np.float32))


@EVERY
def test_traffic_is_counted_where_it_is_asked_for(comm: Comm) -> None:
    sizes = [2] * comm.size
    with counted() as outer:
        parallel.sum_over_ranks(comm, np.zeros(3))
        with counted() as traffic:
            parallel.sum_over_ranks(comm, np.zeros((2, 3)))
            parallel.any_rank(comm, False)
            parallel.agree(comm, None)
            whole = parallel.gather_blocks(comm, np.zeros(2), sizes, np.empty(2 * comm.size))
            parallel.sum_and_scatter(comm, whole, sizes)
            parallel.from_root(comm, "word")
    parallel.sum_over_ranks(comm, np.zeros(3))
    if comm.size == 1:
        assert not traffic.calls and not outer.bytes
        return
    assert traffic.calls == {"allreduce": 3, "allgather": 1, "reduce_scatter": 1, "broadcast": 1}
    told = traffic.bytes.pop("broadcast")
    assert traffic.bytes == {"allreduce": 48 + 8 + 8, "allgather": 16 * comm.size, "reduce_scatter": 16 * comm.size}
    assert 4 <= told < 100 and outer.calls["allreduce"] == 4 and outer.bytes["allreduce"] == 24 + 64


@EVERY
def test_gather_blocks_takes_a_strided_block(comm: Comm) -> None:
    block = np.array([1.0, -1.0, 2.0, -1.0])[::2]
    out = parallel.gather_blocks(comm, block, [2] * comm.size, np.empty(2 * comm.size))
    np.testing.assert_array_equal(out, np.tile([1.0, 2.0], comm.size))


@EVERY
def test_sum_and_scatter_gives_each_rank_its_block_of_the_sum(comm: Comm) -> None:
    sizes = sizes_of(comm)
    own = np.arange(float(sum(sizes))) * (comm.rank + 1)
    before = own.copy()
    block = parallel.sum_and_scatter(comm, own, sizes)
    weight = sum(range(1, comm.size + 1))
    start = sum(sizes[: comm.rank])
    np.testing.assert_array_equal(block, weight * np.arange(start, start + sizes[comm.rank]))
    block[:] = np.nan  # a block of one's own, on one rank too
    np.testing.assert_array_equal(own, before)


@EVERY
def test_scatter_then_gather_is_the_sum_of_all(comm: Comm) -> None:
    sizes = sizes_of(comm)
    own = np.random.default_rng(comm.rank).standard_normal(sum(sizes))
    block = parallel.sum_and_scatter(comm, own, sizes)
    joined = parallel.gather_blocks(comm, block, sizes, np.empty(sum(sizes)))
    np.testing.assert_allclose(joined, parallel.sum_over_ranks(comm, own), rtol=1e-14)


@pytest.mark.parametrize("total", [0, 1, 2, 7, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_own_slices_cover_all_items_in_order_and_differ_by_one_at_most(total: int, size: int) -> None:
    shares = [range(total)[parallel.own_slice(total, rank, size)] for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# -------------------------------------------------------------------------------------------------------- agreement


@EVERY
def test_agree_is_silent_when_all_is_well(comm: Comm) -> None:
    parallel.agree(comm, None)
    with parallel.agreement(comm):
        pass


@SEVERAL
@pytest.mark.parametrize("kind", [OptionError, CheckpointError, ConvergenceError])
def test_an_error_of_one_rank_is_raised_on_all_with_class_and_rank(comm: Comm, kind: type[HpcdeqError]) -> None:
    last = comm.size - 1
    with pytest.raises(kind, match=f"^rank {last}: too much of it$") as caught, parallel.agreement(comm):
        if comm.rank == last:
            raise kind("too much of it")
    assert caught.type is kind and caught.value.agreed


@SEVERAL
def test_an_error_of_all_ranks_names_none(comm: Comm) -> None:
    with pytest.raises(OptionError, match="^wrong everywhere$") as caught:
        parallel.agree(comm, OptionError("wrong everywhere"))
    assert caught.value.agreed


@SEVERAL
def test_the_lowest_failing_rank_is_heard(comm: Comm) -> None:
    error = None if comm.rank == 0 else OptionError(f"text of {comm.rank}")
    with pytest.raises(OptionError, match="^rank 1: text of 1$"):
        parallel.agree(comm, error)


@SEVERAL
def test_a_text_that_names_its_rank_keeps_it(comm: Comm) -> None:
    error = ConvergenceError("DIVERGED_DTOL on rank 1") if comm.rank == 1 else None
    with pytest.raises(ConvergenceError, match="^DIVERGED_DTOL on rank 1$"):
        parallel.agree(comm, error)


@SEVERAL
def test_what_an_error_carries_stays_where_it_came_from(comm: Comm) -> None:
    error = ConvergenceError("no", record="the record") if comm.rank == 1 else None
    with pytest.raises(ConvergenceError) as caught:
        parallel.agree(comm, error)
    assert caught.value.record == ("the record" if comm.rank == 1 else None)
    assert caught.value.agreed


@SEVERAL
def test_another_exception_arrives_as_a_rank_error_with_its_text_and_place(comm: Comm) -> None:
    with (
        pytest.raises(
            RankError,
            match=r"^rank 1: ZeroDivisionError: .*division.* \(at .*test_parallel.py:\d+; HPCDEQ_TRACEBACK=1 shows",
        ) as caught,
        parallel.agreement(comm),
    ):
        if comm.rank == 1:
            _ = 1 / 0
    assert caught.value.agreed
    assert isinstance(caught.value.__cause__, ZeroDivisionError if comm.rank == 1 else type(None))


def test_on_one_rank_an_error_is_itself(comm: Comm) -> None:
    for error in (OptionError("mine"), KeyError("mine")):
        with pytest.raises(type(error)) as caught:
            parallel.agree(comm, error)
        assert caught.value is error


@EVERY
def test_sum_or_raise_sums(comm: Comm) -> None:
    np.testing.assert_array_equal(
        parallel.sum_or_raise(comm, np.array([1.0, comm.rank]), None), [comm.size, sum(range(comm.size))]
    )


@EVERY
def test_sum_or_raise_raises_on_all(comm: Comm) -> None:
    last = comm.size - 1
    error = OptionError("no number") if comm.rank == last else None
    with pytest.raises(OptionError, match="no number" if comm.size == 1 else f"^rank {last}: no number"):
        parallel.sum_or_raise(comm, np.array([np.nan]), error)


@EVERY
def test_ranks_go_on_together_after_an_agreed_error(comm: Comm) -> None:
    for failing in range(comm.size):
        with pytest.raises(HpcdeqError), parallel.agreement(comm):
            if comm.rank == failing:
                raise OptionError("again")
    assert parallel.counts_of_ranks(comm, comm.rank) == list(range(comm.size))


# ---------------------------------------------------------------------------------------------------- workers, hosts


@EVERY
def test_workers_serve_rank_0_in_order(comm: Comm) -> None:
    with parallel.workers(comm, 1) as executor:
        assert (executor is not None) == (comm.rank == 0)
        if executor is not None:
            assert list(executor.map(math.factorial, range(5))) == [1, 1, 2, 6, 24]
            with pytest.raises(ZeroDivisionError):
                executor.submit(operator.truediv, 1, 0).result()
    assert parallel.counts_of_ranks(comm, comm.rank) == list(range(comm.size))


@EVERY
def test_what_a_rank_knows_of_its_host(comm: Comm) -> None:
    assert parallel.ranks_on_this_host(comm) == comm.size  # tests run on one
    assert parallel.first_on_this_host(comm) == (comm.rank == 0)
    assert 1 <= parallel.cores_of_rank(comm)
    assert parallel.ranks_on_this_host(parallel.SELF) == 1
    assert "MPI" in parallel.mpi_library() and parallel.mpi_library().isprintable()


def test_ranks_that_share_cores_share_them_out(comm: Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {3, 4, 5, 6})
    assert parallel.cores_of_rank(comm) == 4


@pytest.mark.parallel([2])
def test_cores_are_divided_among_those_bound_to_the_same(comm: Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3, 4})
    assert parallel.cores_of_rank(comm) == 2
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {2 * comm.rank, 2 * comm.rank + 1})
    assert parallel.cores_of_rank(comm) == 2


# ----------------------------------------------------------------------------------------------------------- launch

SCRIPT = """
import sys
from hpcdeq import parallel
from hpcdeq.errors import *
from hpcdeq.errors import EXIT_INTERRUPTED

def main(arguments):
    rank, world = parallel.WORLD.rank, parallel.WORLD
{body}

parallel.launch(main, sys.argv[1:])
"""


def script(body: str) -> str:
    return SCRIPT.format(body="\n".join("    " + line for line in body.strip().splitlines()))


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("return None", 0),
        ("return EXIT_INTERRUPTED", 75),
        ("sys.exit()", 0),
        ("sys.exit(7)", 7),
        ("raise OptionError('told')", 2),
        ("raise CheckpointError('told')", 1),
        ("raise KeyError('told')", 1),
        ("return len(arguments)", 3),
    ],
)
def test_the_exit_code_is_the_command_s(run: Run, body: str, code: int) -> None:
    done = run("-c", script(body), "a", "b", "c")
    assert done.returncode == code, done.stderr
    assert ("told" in done.stderr) == ("told" in body)


def test_an_exit_with_a_text_prints_it(run: Run) -> None:
    done = run("-c", script("sys.exit('the last words')"))
    assert done.returncode == 1
    assert done.stderr == "the last words\n"


def test_errors_of_hpcdeq_come_without_traceback_others_with_one(run: Run) -> None:
    assert run("-c", script("raise OptionError('told')")).stderr == "OptionError: told\n"
    assert "Traceback" in run("-c", script("raise OptionError('told')"), HPCDEQ_TRACEBACK="1").stderr
    assert "Traceback" in run("-c", script("raise KeyError('told')")).stderr


def test_an_agreed_error_is_printed_once_and_all_leave_with_its_code(run: Run) -> None:
    body = "with parallel.agreement(world):\n    if rank == 1: raise OptionError('told')"
    done = run("-c", script(body), ranks=2, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("OptionError: rank 1: told") == 1
    assert "Traceback" not in done.stderr and "MPI_ABORT" not in done.stderr


@pytest.mark.parametrize(
    ("error", "text", "code"),
    [("KeyError('told')", "KeyError: 'told'", 1), ("OptionError('told')", "[rank 1] OptionError: told", 2)],
)
def test_an_error_of_one_rank_ends_the_job(run: Run, error: str, text: str, code: int) -> None:
    begin = time.monotonic()
    done = run("-c", script(f"if rank == 1: raise {error}\nworld.Barrier()"), ranks=2, timeout=60)
    assert time.monotonic() - begin < 10
    assert done.returncode == code
    assert "[rank 1] " in done.stderr and text in done.stderr


def test_all_ranks_leave_in_order_when_all_is_well(run: Run) -> None:
    done = run("-c", script("world.Barrier()\nprint('rank', rank)\nreturn 0"), ranks=3, timeout=60)
    assert done.returncode == 0 and sorted(done.stdout.split("\n")) == ["", "rank 0", "rank 1", "rank 2"]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
def test_a_signal_after_the_end_changes_nothing(run: Run, number: str) -> None:
    late = f"import atexit, os, signal\natexit.register(os.kill, os.getpid(), signal.{number})\n"
    assert run("-c", script(f"{late}return 0")).returncode == 0
    assert run("-c", script(f"{late}raise OptionError('told')")).returncode == 2


# --------------------------------------------------------------------------------------------------------- in process


def petsc_error(cause: BaseException | None) -> BaseException:
    """An exception as petsc4py would raise it around a callback's own."""
    kind = type("Error", (RuntimeError,), {"__module__": "petsc4py.PETSc"})
    error = kind("error code 101")
    error.__cause__ = cause
    return error


def test_unwrap_finds_what_a_callback_raised() -> None:
    mine = KeyError("mine")
    assert parallel.unwrap(petsc_error(petsc_error(mine))) is mine
    alone = petsc_error(None)
    assert parallel.unwrap(alone) is alone
    mine.__cause__ = ValueError("deeper")
    assert parallel.unwrap(mine) is mine  # only PETSc's wrappers are taken off


def test_report_error_is_one_line_for_a_known_error(capsys: pytest.CaptureFixture[str]) -> None:
    parallel.report_error(OptionError("told"), known=True)
    assert capsys.readouterr().err == "OptionError: told\n"
    try:
        raise KeyError("told")
    except KeyError as error:
        parallel.report_error(error, known=False)
    assert capsys.readouterr().err.startswith("Traceback")


@SEVERAL
def test_report_error_names_the_rank_unless_all_agree(capsys: pytest.CaptureFixture[str], comm: Comm) -> None:
    parallel.report_error(OptionError("told"), known=True)
    parallel.report_error(OptionError("told", agreed=True), known=True)
    sys.stderr.flush()
    assert capsys.readouterr().err == f"[rank {comm.rank}] OptionError: told\nOptionError: told\n"
