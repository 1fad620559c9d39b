"""Checkpoint files: whole or not there, the last two, read in parts on any number of ranks."""

from __future__ import annotations

import resource
import subprocess
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import ROOT

from hpcdeq import parallel
from hpcdeq.errors import CheckpointError
from hpcdeq.record import CheckpointKeeper, CheckpointWarning, Signals, read_checkpoint, write_checkpoint
from hpcdeq.record.checkpoint import HEADER, LATEST, PREVIOUS
from hpcdeq.state import Block, State, own_share, rows_of, table, whole

LENGTH = 41


def share(comm: parallel.Comm, length: int = LENGTH) -> slice:
    return parallel.own_slice(length, comm.rank, comm.size)


def made(comm: parallel.Comm, number: int = 1) -> State:
    """Return a state with one of everything; rank 1 has no row of the table, and none of the last vector."""
    vector = number * np.arange(LENGTH, dtype=float) ** 0.5
    rows = {k: np.full(k, k + 0.25, dtype=np.float32) for k in range(7) if k % comm.size == comm.rank and k != 1}
    last = np.arange(5) if comm.rank == 0 else np.zeros(0)
    return {
        "number": number,
        "real": 0.1 + number,
        "flag": True,
        "text": "with ümlauts\nand lines",
        "nothing": None,
        "group": {"array": np.arange(6).reshape(2, 3), "deeper": {"vector": Block(vector[share(comm)])}},
        "single": Block(vector[share(comm)].astype(np.float32)),
        "rows": table(rows),
        "last": Block(last),
    }


def numbers_in(folder: Path, comm: parallel.Comm) -> list[Any]:
    with read_checkpoint(folder, comm) as known:
        return [] if known is None else [known["number"]]


@pytest.mark.parallel([1, 2, 3])
def test_a_state_comes_back_as_it_was(shared_tmp_path: Path, comm: parallel.Comm) -> None:
    write_checkpoint(shared_tmp_path, made(comm), comm)
    with read_checkpoint(shared_tmp_path, comm) as known:
        assert known is not None
        assert [type(known[name]) for name in ("number", "real", "flag", "text")] == [int, float, bool, str]
        assert (known["number"], known["real"], known["flag"]) == (1, 1.1, True)
        assert known["text"] == "with ümlauts\nand lines" and "nothing" not in known
        np.testing.assert_array_equal(known["group"]["array"], np.arange(6).reshape(2, 3))
        vector = known["group"]["deeper"]["vector"]
        assert len(vector) == LENGTH and vector[0:1].dtype == np.float64
        np.testing.assert_array_equal(whole(vector), np.arange(LENGTH) ** 0.5)
        np.testing.assert_array_equal(vector[share(comm)], (np.arange(LENGTH) ** 0.5)[share(comm)])
        assert known["single"][0:3].dtype == np.float32
        np.testing.assert_array_equal(whole(known["last"]), np.arange(5))
        found = rows_of(known["rows"], [0, 1, 3, 4, 6, 99])
        kept = [k for k in (0, 3, 4, 6)]
        assert sorted(found) == kept and all(found[k].tolist() == [k + 0.25] * k for k in kept)


@pytest.mark.parallel([3])
def test_another_number_of_ranks_reads_it(shared_tmp_path: Path, comm: parallel.Comm) -> None:
    fewer = parallel.some_ranks(comm, comm.rank != 1)
    if fewer is not None:
        write_checkpoint(shared_tmp_path, made(fewer), fewer)
    parallel.any_rank(comm, False)
    with read_checkpoint(shared_tmp_path, comm) as known:
        assert known is not None
        part = known["single"][share(comm)]
        np.testing.assert_array_equal(part, (np.arange(LENGTH) ** 0.5).astype(np.float32)[share(comm)])
        assert sorted(rows_of(known["rows"], range(7))) == [0, 2, 3, 4, 5, 6]


def test_a_ranks_own_share_is_known_on_as_many_ranks_only() -> None:
    vector = np.arange(6)
    assert [own_share(vector, rank, 3).tolist() for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]  # type: ignore[union-attr]
    assert own_share(vector, 1, 0) is None


@pytest.mark.parallel([1, 2])
def test_the_last_two_are_kept(shared_tmp_path: Path, comm: parallel.Comm) -> None:
    assert numbers_in(shared_tmp_path, comm) == []
    for number in (1, 2, 3):
        write_checkpoint(shared_tmp_path, made(comm, number), comm)
        parallel.any_rank(comm, False)
        assert numbers_in(shared_tmp_path, comm) == [number]
    parallel.any_rank(comm, False)
    names = sorted(path.name for path in shared_tmp_path.iterdir())
    assert names == sorted([LATEST, PREVIOUS])
    with h5py.File(shared_tmp_path / PREVIOUS) as file:
        assert file.attrs["number"] == 2


@pytest.mark.parallel([1, 2])
def test_scripts_read_how_far_a_run_has_come(shared_tmp_path: Path, comm: parallel.Comm) -> None:
    """As slurm/job.sh does: within an epoch, too, and whether or not the latest file is whole."""
    job = (ROOT / "slurm" / "job.sh").read_text()
    start = job.index("work() {")
    ask = f"{job[start : job.index(chr(10) + '}', start)]}\n}}\nwork '{shared_tmp_path}'"

    def told() -> int:
        parallel.any_rank(comm, False)
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", ask], capture_output=True, text=True, check=True)
        parallel.any_rank(comm, False)
        return int(done.stdout)

    assert told() == 0
    keeper = keeper_of(shared_tmp_path, comm, every=1)
    for gradients in (64, 96):
        counts = {"losses": 7, "gradients": gradients, "cell_evaluations": 10**6}
        state: State = {"number": 1, "problem": {"counts": counts}}
        keeper(gradients, lambda: state, last=False)  # noqa: B023
        assert told() == 7 + gradients
    assert numbers_in(shared_tmp_path, comm) == [1]
    if comm.rank == 0:
        (shared_tmp_path / LATEST).write_bytes(b"")
    assert told() == 7 + 64


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit of a vector": lambda path: flip(path, path.stat().st_size // 2),
    "a bit of the last byte": lambda path: flip(path, -1),
    "a bit of the header": lambda path: flip(path, 30),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "empty": lambda path: path.write_bytes(b""),
    "no header": lambda path: path.write_bytes(path.read_bytes()[HEADER:]),
}


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_latest_falls_back_to_the_previous(shared_tmp_path: Path, comm: parallel.Comm, kind: str) -> None:
    for number in (1, 2):
        write_checkpoint(shared_tmp_path, made(comm, number), comm)
    if comm.rank == 0:
        DAMAGE[kind](shared_tmp_path / LATEST)
    parallel.any_rank(comm, False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert numbers_in(shared_tmp_path, comm) == [1]
    told = [str(warning.message) for warning in caught if warning.category is CheckpointWarning]
    assert len(told) == (comm.rank == 0)
    assert all(LATEST in text and "going on from checkpoint-previous.h5" in text for text in told)
    parallel.any_rank(comm, False)
    if comm.rank == 0:
        DAMAGE[kind](shared_tmp_path / PREVIOUS)
    parallel.any_rank(comm, False)
    with pytest.raises(CheckpointError, match=r"There is no other checkpoint: begin again with another --out") as error:
        numbers_in(shared_tmp_path, comm)
    assert error.value.agreed


def test_another_version_is_refused(tmp_path: Path, comm: parallel.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcdeq.record.checkpoint.VERSION", 99)
    write_checkpoint(tmp_path, made(comm), comm)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has version 99, and this hpcdeq reads version 1"):
        numbers_in(tmp_path, comm)


@pytest.mark.parallel([1, 2, 3])
def test_a_full_disk_leaves_the_former_ones(shared_tmp_path: Path, comm: parallel.Comm) -> None:
    """The system refuses files that grow beyond a limit: every rank hears of it, and none waits for another."""
    for number in (1, 2):
        write_checkpoint(shared_tmp_path, made(comm, number), comm)
    large = {**made(comm, 3), "large": Block(np.zeros(200_000))}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot be written .*the former one is still there") as error:
            write_checkpoint(shared_tmp_path, large, comm)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.agreed
    assert numbers_in(shared_tmp_path, comm) == [2]
    parallel.any_rank(comm, False)
    assert sorted(path.name for path in shared_tmp_path.iterdir()) == sorted([LATEST, PREVIOUS])


@pytest.mark.parallel([1, 2])
def test_a_folder_that_cannot_be_written_is_told(shared_tmp_path: Path, comm: parallel.Comm) -> None:
    with pytest.raises(CheckpointError, match="cannot be written .*there is none yet"):
        write_checkpoint(shared_tmp_path / "nowhere", made(comm), comm)


# -------------------------------------------------------------------------------------------------------- keeper


class Clock:
    """A clock that only moves when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("hpcdeq.record.keeper.time.monotonic", made)
    return made


def keeper_of(folder: Path, comm: parallel.Comm, **settings: Any) -> CheckpointKeeper:
    return CheckpointKeeper(comm, folder, lambda: {"more": 1}, Signals(), **settings)


def test_states_are_kept_by_the_clock_and_by_iterations(tmp_path: Path, comm: parallel.Comm, clock: Clock) -> None:
    by_clock, by_both = keeper_of(tmp_path, comm), keeper_of(tmp_path, comm, every=3)
    written = []
    for iteration in range(8):
        assert not by_clock(iteration, lambda: {"number": iteration}, last=False)  # noqa: B023
        assert not by_both(iteration, lambda: {"number": iteration}, last=False)  # noqa: B023
        written.append((by_clock.written, by_both.written))
        clock.now += 4.0
    # Every 10 s at most, which are three safe points here; by both, at iterations 3 and 6.
    assert written == [(0, 0), (0, 0), (0, 0), (1, 1), (1, 1), (1, 1), (2, 2), (2, 2)]
    assert by_clock.written == 2 and by_both.written == 2


def test_a_costly_checkpoint_is_kept_seldom(tmp_path: Path, comm: parallel.Comm, clock: Clock) -> None:
    keeper = keeper_of(tmp_path, comm)

    def slow() -> State:
        clock.now += 2.0
        return {"number": 0}

    times = []
    for _ in range(1000):
        before = keeper.written
        keeper(1, slow, last=False)
        if keeper.written > before:
            times.append(clock.now)
        clock.now += 1.0
    assert len(times) > 3 and all(200 <= b - a <= 205 for a, b in zip(times[1:], times[2:], strict=False))


def test_one_is_kept_at_once_and_at_the_end_where_asked_for(tmp_path: Path, comm: parallel.Comm, clock: Clock) -> None:
    keeper = keeper_of(tmp_path, comm, first=True)
    for iteration, last, written in ((0, False, 1), (1, False, 1), (2, True, 2)):
        assert not keeper(iteration, lambda: {"number": 5}, last=last)
        assert keeper.written == written
    with read_checkpoint(tmp_path, comm) as known:
        assert known is not None and (known["number"], known["more"]) == (5, 1)


def test_a_run_stops_while_there_is_time_for_a_step_and_a_checkpoint(
    tmp_path: Path, comm: parallel.Comm, clock: Clock
) -> None:
    start = clock.now
    keeper = keeper_of(tmp_path, comm, left=400.0)
    while not keeper(1, lambda: {"number": 1}, last=False):
        clock.now += 40.0
    # 30 s are for ending, one and a half steps of 40 s have to fit before.
    assert clock.now - start == 320.0
    assert keeper.why == "stopped before the job's wall-time limit" and keeper.written


@pytest.mark.parallel([2, 3])
def test_a_signal_on_one_rank_stops_all(shared_tmp_path: Path, comm: parallel.Comm) -> None:
    keeper = keeper_of(shared_tmp_path, comm)
    assert not keeper(1, lambda: {"number": 1}, last=False)
    keeper.signals.caught = 15 if comm.rank == comm.size - 1 else 0
    assert keeper(1, lambda: {"number": 1}, last=False)
    assert (keeper.why, keeper.written) == ("stopped by SIGTERM", 1)
