"""Preparing graphs that was cut short: what was built is used, what does not fit any more is not, nothing stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import clean_environment

from hpcdeq import parallel
from hpcdeq.builders.crystals import BAND_GAP, prepare_crystals, structure_recipe
from hpcdeq.builders.graphs import prepare_graphs
from hpcdeq.builders.labelling import Labelling
from hpcdeq.builders.periodic import StructureSettings
from hpcdeq.builders.samples import BLOCK, Report, Shares
from hpcdeq.builders.spool import Built, Spool
from hpcdeq.data.graphs import no_graphs
from hpcdeq.errors import DataError, HpcdeqError

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = 5
COUNT = BLOCK * (BLOCKS - 1) + 20


def row(number: int, metal: int = 11) -> dict[str, Any]:
    """Return a rock salt, distorted and labelled by its number; every ninth has no label."""
    shift = 0.01 * (number % 17)
    frac = [0, 0, 0, 0.5 + shift, 0.5, 0.5 - shift]
    gap = None if number % 9 == 4 else number / 80
    cell = [4 + number / 500, 4.1, 4.2, 90, 90, 95]
    return {"id": f"salt-{number}", "band_gap": gap, "cell": cell, "Z": [metal + number % 2, 17], "frac": frac}


def source(folder: Path, **options: Any) -> Path:
    """Write the rows of five blocks, the last of which is not full, one id twice."""
    rows = [row(number, **options) for number in range(COUNT)]
    rows[COUNT - 3]["id"] = "salt-0"
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


class Work:
    """Building, counted; raises in a block where it is told to."""

    def __init__(self, error: BaseException | None = None, block: int = -1) -> None:
        self.error, self.block = error, block
        self.first: list[str] = []

    def prepare(
        self, out: Path, rows: Path, labels: Labelling = BAND_GAP, shares: Shares | None = None, **settings: Any
    ) -> Report:
        """Prepare crystals with this building."""
        recipe = structure_recipe("crystals", StructureSettings(**settings))

        def build(block: list[Any], *common: Any) -> Built:
            self.first.append(block[0].name)
            if self.error is not None and len(self.first) > self.block:
                raise self.error
            return recipe.build(block, *common)

        return prepare_graphs(
            out, rows, replace(recipe, build=build), labels, shares or Shares(), comm=parallel.SELF, command="as typed"
        )


def contents(path: Path) -> dict[str, Any]:
    """Return all that a dataset file holds: bytes, shapes and types of its datasets, and the attributes."""
    found: dict[str, Any] = {}
    with h5py.File(path) as file:

        def note(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                text = item.dtype.kind == "O"
                values = item.asstr()[:].tolist() if text else item[:].tobytes()
                found[name] = (values, item.shape, item.dtype.str, item.chunks, dict(item.attrs))

        file.visititems(note)
        found["/"] = {name: np.asarray(value).tolist() for name, value in file.attrs.items()}
    return found


def lines_of_blocks(numbers: Iterable[int]) -> list[str]:
    return [f"line {BLOCK * number + 1}" for number in numbers]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()], ids=repr
)
def test_a_second_run_builds_what_is_missing(tmp_path: Path, error: BaseException) -> None:
    """Cut a run in its fourth block: the next one builds two blocks, and writes what an undisturbed run writes."""
    rows, out = source(tmp_path), tmp_path / "out.h5"
    whole = Work()
    expected = whole.prepare(tmp_path / "whole.h5", rows)
    assert whole.first == lines_of_blocks(range(BLOCKS)) and not expected.notes
    with pytest.raises(type(error)):
        Work(error, block=3).prepare(out, rows)
    assert not out.exists() and (tmp_path / "out.h5.blocks").is_dir()
    again = Work()
    report = again.prepare(out, rows)
    assert again.first == lines_of_blocks([3, 4])
    assert contents(out) == contents(tmp_path / "whole.h5")
    assert report.notes == ["3 blocks of an earlier run that was cut were used"]
    assert replace(report, notes=[]) == expected
    assert sum(report.split_counts) == len(contents(out)["sample/id"][0]) == COUNT - len(report.skipped)
    reasons = [skipped.reason for skipped in report.skipped]
    assert reasons.count("no band_gap") == sum(number % 9 == 4 for number in range(COUNT)) > BLOCKS
    assert [skipped.row for skipped in report.skipped if "duplicate" in skipped.reason] == ["salt-0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.h5", "rows.jsonl", "whole.h5"]


def test_a_run_that_was_cut_in_writing_builds_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail while the file is written: all blocks are there, and the file of an earlier run is still whole."""
    rows, out = source(tmp_path), tmp_path / "out.h5"
    Work().prepare(out, rows, shares=Shares(limit=70))
    before = contents(out)
    load = Spool.load

    def broken(self: Spool, number: int, *, graphs: bool = True) -> Built:
        if graphs and number == 2:
            raise KeyboardInterrupt
        return load(self, number, graphs=graphs)

    monkeypatch.setattr(Spool, "load", broken)
    with pytest.raises(KeyboardInterrupt):
        Work().prepare(out, rows)
    assert contents(out) == before and not (tmp_path / "out.h5.partial").exists()
    monkeypatch.undo()
    again = Work()
    again.prepare(out, rows)
    assert again.first == []
    Work().prepare(tmp_path / "whole.h5", rows)
    assert contents(out) == contents(tmp_path / "whole.h5")


CHANGES: dict[str, dict[str, Any]] = {
    "neighbours": {"neighbours": 8},
    "radius": {"radius": 5.0},
    "group": {"group": "id"},
    "labels": {"labels": replace(BAND_GAP, regression=True)},
    "limit": {"shares": Shares(limit=200)},
}


@pytest.mark.parametrize("change", [*CHANGES, "source", "nothing that rows depend on"])
def test_what_the_rows_depend_on_decides(tmp_path: Path, change: str) -> None:
    """Build all blocks again after another option or source; none after another seed of the splits."""
    rows, out = source(tmp_path), tmp_path / "out.h5"
    with pytest.raises(KeyboardInterrupt):
        Work(KeyboardInterrupt(), block=2).prepare(out, rows)
    if change == "source":
        source(tmp_path, metal=12)
    given = CHANGES.get(change, {"shares": Shares(seed=3)} if change.startswith("nothing") else {})
    again, whole = Work(), Work()
    report = again.prepare(out, rows, **given)
    whole.prepare(tmp_path / "whole.h5", rows, **given)
    done = 2 if change.startswith("nothing") else 0
    assert again.first == whole.first[done:]
    assert len(report.notes) == (1 if done else 0)
    assert contents(out) == contents(tmp_path / "whole.h5")


def test_a_cif_file_that_was_mended_is_read_again(tmp_path: Path) -> None:
    """Cut a run on a folder, mend one of its files in place, and see the new text; a file of results is no source."""
    folder = tmp_path / "cifs"
    folder.mkdir()
    cell = "".join(f"_cell_length_{axis} 4.{place}\n" for place, axis in enumerate("abc"))
    cell += "".join(f"_cell_angle_{name} 90\n" for name in ("alpha", "beta", "gamma"))
    atoms = (
        "loop_\n_atom_site_label\n_atom_site_type_symbol\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n"
    )
    for number in range(2 * BLOCK):
        (folder / f"{number}.cif").write_text(f"data_{number}\n{cell}{atoms}A Na 0 0 0\nB Cl 0.5 0.5 0.5\n")
    (folder / "7.cif").write_text("data_7\nloop_\n")
    (folder / "id_prop.csv").write_text("".join(f"{number},1.0\n" for number in range(2 * BLOCK)))
    out = folder / "out.h5"  # in the folder that is read: what is written there must not count as a change
    with pytest.raises(KeyboardInterrupt):
        Work(KeyboardInterrupt(), block=1).prepare(out, folder)
    (folder / "out.skipped.csv").write_text("row,reason\n")
    again = Work(KeyboardInterrupt(), block=0)
    with pytest.raises(KeyboardInterrupt):
        again.prepare(out, folder)
    assert again.first == [str(BLOCK)]
    (folder / "7.cif").write_text(f"data_7\n{cell}{atoms}A K 0 0 0\nB Cl 0.5 0.5 0.5\n")
    report = Work().prepare(out, folder)
    assert sum(report.split_counts) == 2 * BLOCK and not report.skipped and not report.notes


def test_an_error_of_the_source_leaves_nothing_behind(tmp_path: Path) -> None:
    """Tear a line-wise file in its last block, or find no row of use: no blocks, no file."""
    import gzip

    packed = tmp_path / "rows.jsonl.gz"
    data = bytearray(gzip.compress(source(tmp_path).read_bytes()))
    packed.write_bytes(data[:-40])
    for damage in ("cut", "flipped"):
        with pytest.raises(DataError, match="cannot be read to its end"):
            Work().prepare(tmp_path / "out.h5", packed)
        assert not list(tmp_path.glob("out*")), damage
        data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
        packed.write_bytes(data)
    with pytest.raises(DataError, match=rf"none of its {COUNT} rows can be used"):
        Work().prepare(tmp_path / "out.h5", source(tmp_path), Labelling("absent", regression=True))
    assert not list(tmp_path.glob("out*"))


def test_a_full_disk_keeps_the_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail to write the third block: say so, keep two, and go on from there."""
    rows, out = source(tmp_path), tmp_path / "out.h5"
    savez, calls = np.savez, []

    def full(*arguments: Any, **arrays: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        savez(*arguments, **arrays)

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DataError, match="000002.npz: .*No space left on device; the blocks before it are kept"):
        Work().prepare(out, rows)
    again = Work()
    again.prepare(out, rows)
    assert again.first == lines_of_blocks([2, 3, 4])
    assert not list(tmp_path.glob("*.blocks"))


def test_a_damaged_block_is_refused_once(tmp_path: Path) -> None:
    """Name the block, delete all, and work when asked again."""
    rows, out = source(tmp_path), tmp_path / "out.h5"
    with pytest.raises(KeyboardInterrupt):
        Work(KeyboardInterrupt(), block=2).prepare(out, rows)
    block = tmp_path / "out.h5.blocks" / "000001.npz"
    block.write_bytes(block.read_bytes()[:300])
    with pytest.raises(DataError, match="000001.npz: damaged .*type the same command again"):
        Work().prepare(out, rows)
    again = Work()
    again.prepare(out, rows)
    assert len(again.first) == BLOCKS


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    """Refuse to work in a folder of the same name that holds other things."""
    other = tmp_path / "out.h5.blocks"
    other.mkdir()
    (other / "thesis.tex").write_text("all of it")
    with pytest.raises(DataError, match="out.h5.blocks is in the way"):
        Work().prepare(tmp_path / "out.h5", source(tmp_path))
    assert (other / "thesis.tex").read_text() == "all of it"


def test_a_block_comes_back_as_it_was(tmp_path: Path) -> None:
    """Save and load names of classes, numbers, texts that are not ASCII, and a block without samples."""
    spool = Spool(tmp_path / "blocks", {"of": 1})
    named = Built(["α-quartz", "b "], ["metal", "glass, amorphous"], ["", "test"], ["Ω", "2"], no_graphs(), [])
    empty = Built([], [], [], [], no_graphs(), [])
    for number, built in enumerate((named, empty)):
        spool.save(number, built)
        back = spool.load(number, graphs=False)
        for name in ("ids", "values", "splits", "groups", "skipped"):
            assert list(getattr(back, name)) == list(getattr(built, name))
            assert all(type(value) in (str, float) for value in getattr(back, name))
    assert len(spool.load(1).graphs) == 0
    assert Spool(tmp_path / "blocks", {"of": 1}).found == 2
    assert Spool(tmp_path / "blocks", {"of": 2}).found == 0


KILLED = """
import os, signal, sys
from hpcdeq.builders.spool import Spool
from hpcdeq.prepare import main

replace, calls = Spool._path, []

def path(self, number):  # called to look for a block and, after its part is written, to name it: there the process dies
    if list(self.folder.glob("*.part")) and len(list(self.folder.glob("*.npz"))) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(self, number)

if __name__ == "__main__":
    Spool._path = path
    main(sys.argv[1:])
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_command_goes_on(tmp_path: Path, processes: int) -> None:
    """Kill a command outright between writing its third block and naming it, and type it again.

    Workers that outlived it would keep its output open, and this test waiting.
    """
    from hpcdeq.prepare import main

    rows, out = source(tmp_path), tmp_path / "out.h5"
    (tmp_path / "killed.py").write_text(KILLED)
    arguments = ["crystals", str(rows), "--out", str(out), "--quiet", "--processes"]
    killed = subprocess.run(
        [sys.executable, str(tmp_path / "killed.py"), *arguments, str(processes)],
        env=clean_environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = tmp_path / "out.h5.blocks"
    assert sorted(path.name for path in left.iterdir()) == ["000000.npz", "000001.npz", "2.part", "made_of.json"]
    times = {path.name: path.stat().st_mtime_ns for path in left.glob("*.npz")}
    seen: dict[str, int] = {}
    save = Spool.save

    def watched(self: Spool, number: int, built: Built) -> None:
        seen.update({path.name: path.stat().st_mtime_ns for path in self.folder.glob("*.npz")})
        save(self, number, built)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Spool, "save", watched)
        main([*arguments, "1"])
    assert {name: seen[name] for name in times} == times
    assert not left.exists()
    prepare_crystals(tmp_path / "whole.h5", rows, comm=parallel.SELF)
    found, expected = contents(out), contents(tmp_path / "whole.h5")
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in found if name != "/")
    skipped = (tmp_path / "out.skipped.csv").read_text().splitlines()
    assert len(skipped) == 2 + sum(number % 9 == 4 for number in range(COUNT))


@pytest.mark.parallel([1, 2, 3])
def test_ranks_go_on_where_others_stopped(shared_tmp_path: Path) -> None:
    """Fail on all ranks together while rank 0 reads; the next run on these ranks uses what is there."""
    rows, out = shared_tmp_path / "rows.jsonl", shared_tmp_path / "out.h5"
    with parallel.agreement(parallel.WORLD):
        if parallel.WORLD.rank == 0:
            source(shared_tmp_path)

    def cut(items: Iterable[Any], label: str, total: int | None) -> Iterable[Any]:
        for number, item in enumerate(items):
            if label == "writing" and number == 1:
                raise OSError("the file system went away")
            yield item

    with pytest.raises((HpcdeqError, OSError), match="went away"):
        prepare_crystals(out, rows, progress=cut)
    report = prepare_crystals(out, rows)
    assert report.notes == [f"{BLOCKS} blocks of an earlier run that was cut were used"]
    with parallel.agreement(parallel.WORLD):
        if parallel.WORLD.rank == 0:
            prepare_crystals(shared_tmp_path / "whole.h5", rows, comm=parallel.SELF)
            assert contents(out) == contents(shared_tmp_path / "whole.h5")
            assert not os.path.exists(f"{out}.blocks")
