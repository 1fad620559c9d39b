"""HDF5 files that are whole, or whose disk is told of; HDF5 itself never hears that it is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import Run

from hpcdeq.data.new_file import NewFile
from hpcdeq.data.rows import SampleRows
from hpcdeq.data.schema import Schema
from hpcdeq.data.writer import DatasetWriter
from hpcdeq.errors import CheckpointError, DataError
from hpcdeq.record import save_model


def fill(file: h5py.File) -> None:
    random = np.random.default_rng(0)
    grown = file.create_dataset("grown", (0, 3), maxshape=(None, 3), chunks=(1000, 3), dtype="f8")
    for _ in range(7):
        grown.resize(len(grown) + 900, axis=0)
        grown[-900:] = random.standard_normal((900, 3))
    file["group/names"] = np.array(["a", "bü", ""], dtype=object)
    file["group/names"].attrs["told"] = "later"
    file.create_dataset("checked", data=random.standard_normal(50_000), fletcher32=True)
    file["grown"][:5] = 7.0
    del file["checked"]
    file["again"] = np.arange(12)


@pytest.mark.parametrize("settings", [{}, {"libver": "latest", "userblock_size": 512}])
def test_a_file_holds_what_one_of_hdf5s_own_would(tmp_path: Path, settings: dict) -> None:
    with NewFile(tmp_path / "a.h5", **settings) as new:
        fill(new.hdf5)
        new.check()
    with h5py.File(tmp_path / "b.h5", "w", **settings) as file:
        fill(file)
    with h5py.File(tmp_path / "a.h5") as found, h5py.File(tmp_path / "b.h5") as wanted:
        names: list[str] = []
        wanted.visit(names.append)
        assert names == ["again", "group", "group/names", "grown"]
        for name in ("again", "grown", "group/names"):
            assert np.array_equal(found[name][...], wanted[name][...]), name
        assert found["group/names"].attrs["told"] == "later"
        assert found.userblock_size == wanted.userblock_size


def full_after(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk take so many bytes; of a write that is too long, the first ones."""
    left, write = [size], os.pwrite

    def pwrite(descriptor: int, data: memoryview, place: int) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(descriptor, data[: left[0]], place)
        left[0] -= taken
        return taken

    monkeypatch.setattr(os, "pwrite", pwrite)


@pytest.mark.parametrize("size", [0, 1, 3_000, 100_000, 200_000])
def test_a_full_disk_is_told_by_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], size: int
) -> None:
    full_after(size, monkeypatch)
    with pytest.raises(OSError, match="No space left on device"), NewFile(tmp_path / "a.h5") as new:
        fill(new.hdf5)
    with pytest.raises(ZeroDivisionError), NewFile(tmp_path / "a.h5") as new:
        fill(new.hdf5)
        raise ZeroDivisionError  # what the block says comes first
    assert capfd.readouterr().err == ""


def test_a_file_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        NewFile(tmp_path / "nowhere" / "a.h5")


def test_a_dataset_on_a_full_disk_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    schema = Schema("classification", "array", classes=("a", "b"), sample_shape=(100,))
    samples = SampleRows([str(k) for k in range(300)], np.zeros(300, np.int64), np.ones((300, 100)))
    full_after(1_000_000, monkeypatch)
    with pytest.raises(DataError, match=r"cannot write .*d.h5.partial: No space left on device; is the disk"):
        with DatasetWriter(tmp_path / "d.h5", schema) as writer:
            for _ in range(100):
                writer.append(samples, np.zeros(300, np.uint8))
    assert writer.count < 9000  # it was told in time
    assert not list(tmp_path.iterdir()) and capfd.readouterr().err == ""


def test_a_model_on_a_full_disk_leaves_the_former(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch

    path = tmp_path / "best.h5"
    save_model(path, "mlp", "", {"w": torch.ones(9)}, {}, {"iteration": 1})
    full_after(10_000, monkeypatch)
    with pytest.raises(CheckpointError, match=r"cannot write .*best.h5: .*No space left"):
        save_model(path, "mlp", "", {"w": torch.ones(9000)}, {}, {"iteration": 2})
    with h5py.File(path) as file:
        assert file.attrs["iteration"] == 1
    assert [found.name for found in tmp_path.iterdir()] == ["best.h5"] and capfd.readouterr().err == ""


FULL = """
import resource, sys
import numpy as np
from pathlib import Path
from hpcdeq import parallel
from hpcdeq.record import write_checkpoint
from hpcdeq.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
try:
    write_checkpoint(Path("."), {f"vector {k}": np.ones(10_000) for k in range(40)}, parallel.WORLD)
except CheckpointError as error:
    print(error)
"""


def test_a_process_ends_well_after_a_file_that_was_not_written(run: Run, tmp_path: Path) -> None:
    """As HDF5 alone does not: it complains of every object, and may crash."""
    done = run("-c", FULL)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cannot be written" in done.stdout and not list(tmp_path.iterdir())
