"""Builders: neighbour lists, the three kinds of source, and splits."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pymatgen.core import DummySpecies, Lattice, Structure
from pymatgen.io.cif import CifWriter

from hpcdeq import parallel
from hpcdeq.builders.crystals import BAND_GAP, prepare_crystals
from hpcdeq.builders.neighbours import neighbours_of
from hpcdeq.builders.periodic import StructureSettings
from hpcdeq.builders.samples import Shares, assign_splits, fraction_of, in_order, straddling
from hpcdeq.data.graphs import GraphArrays
from hpcdeq.data.shards import Shards
from hpcdeq.errors import DataError, OptionError

CRYSTALS = Path(__file__).resolve().parents[2] / "shared" / "data" / "crystals"
TRICLINIC = Lattice.from_parameters(3.1, 4.3, 5.9, 71, 98, 112)
# The last two atoms lie outside of the cell, as sources are free to write.
SITES = np.array([[0.05, 0.1, 0.2], [0.4, 0.55, 0.9], [1.7, -0.25, 0.5], [-0.3, 0.8, 2.35]])


def brute_force(lattice: np.ndarray, frac: np.ndarray, atom: int, count: int) -> tuple[list[int], np.ndarray]:
    """Find the nearest neighbours of an atom among 13 x 13 x 13 images, by plain enumeration."""
    found = []
    for image in itertools.product(range(-6, 7), repeat=3):
        for other in range(len(frac)):
            vector = (frac[other] + image - frac[atom]) @ lattice
            if other != atom or any(image):
                found.append((round(float(np.linalg.norm(vector)), 8), other, image, vector))
    found.sort(key=lambda item: item[:3])
    return [other for _, other, _, _ in found[:count]], np.array([vector for *_, vector in found[:count]])


@pytest.mark.parametrize("count", [1, 12, 30])
def test_neighbours_equal_brute_force_in_a_triclinic_cell(count: int) -> None:
    """Compare atoms and vectors with an enumeration of all images."""
    graph = neighbours_of(TRICLINIC.matrix, np.array([8, 26, 8, 14]), SITES, count)
    assert graph.edge_target.tolist() == np.repeat(np.arange(4), count).tolist()
    for atom in range(4):
        others, vectors = brute_force(TRICLINIC.matrix, SITES, atom, count)
        own = slice(atom * count, (atom + 1) * count)
        assert graph.edge_source[own].tolist() == others
        assert np.abs(graph.edge_vector[own] - vectors).max() < 1e-9


@pytest.mark.parametrize(
    ("name", "cell", "frac", "count", "distances"),
    [
        ("rock salt", 5.64, [[0, 0, 0], [0.5, 0.5, 0.5]], 6, [5.64 / 2] * 6),
        ("diamond", 3.567, [[0, 0, 0], [0.25, 0.25, 0.25]], 16, [3.567 * 3**0.5 / 4] * 4 + [3.567 / 2**0.5] * 12),
    ],
)
def test_coordination_of_known_crystals(
    name: str, cell: float, frac: list[list[float]], count: int, distances: list[float]
) -> None:
    """Find 6 neighbours at a/2 in rock salt; 4 at sqrt(3)a/4 and 12 at a/sqrt(2) in diamond."""
    primitive = cell / 2 * np.array([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]])
    graph = neighbours_of(primitive, np.array([11, 17]), np.array(frac), count)
    lengths = np.linalg.norm(graph.edge_vector, axis=1).reshape(2, count)
    assert np.abs(lengths - distances).max() < 1e-9
    if name == "rock salt":
        assert (graph.edge_source != graph.edge_target).all()


def test_cut_shells_and_far_atoms_are_deterministic() -> None:
    """Cut a shell of twelve equal neighbours in the same place after a shift, and reach across a vacuum."""
    fcc = 2.0 * np.array([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]])
    one = neighbours_of(fcc, np.array([29]), np.zeros((1, 3)), 7)
    other = neighbours_of(fcc, np.array([29]), np.array([[0.123, 0.456, 0.789]]), 7)
    assert np.abs(one.edge_vector - other.edge_vector).max() < 1e-9
    layer = neighbours_of(np.diag([2.5, 2.5, 60.0]), np.array([6]), np.zeros((1, 3)), 12)
    assert np.abs(np.linalg.norm(layer.edge_vector, axis=1).max() - 5.0) < 1e-9


def test_a_lone_atom_finds_the_far_cluster() -> None:
    """Enlarge the sphere where the mean density promises nearer neighbours than there are."""
    corners = np.array(list(itertools.product((0.0, 0.15), repeat=3)))
    frac = np.vstack([corners * [1, 0.9, 0.8], [[0.57, 0.58, 0.59]]])
    graph = neighbours_of(12 * np.eye(3), np.ones(9), frac, 8)
    others, vectors = brute_force(12 * np.eye(3), frac, 8, 8)
    assert np.linalg.norm(vectors[-1]) > 9  # the first sphere has a radius of 8.7 A
    assert graph.edge_source[64:].tolist() == others
    assert np.abs(graph.edge_vector[64:] - vectors).max() < 1e-9


def test_overlapping_atoms_are_refused() -> None:
    """Name the pair and the distance."""
    sites = np.array([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.501]])
    with pytest.raises(ValueError, match=r"atoms [12] and [12] are 0\.00[56]\d* A apart: they overlap"):
        neighbours_of(TRICLINIC.matrix, np.ones(3), sites, 4)


def plain_row(name: str, value: Any, structure: Structure, **more: Any) -> dict[str, Any]:
    """Return a row with cell, Z and frac."""
    cell = [*structure.lattice.abc, *structure.lattice.angles]
    frac = structure.frac_coords.ravel().tolist()
    return {"id": name, "band_gap": value, "cell": cell, "Z": list(structure.atomic_numbers), "frac": frac, **more}


def crystals() -> dict[str, tuple[Structure, float]]:
    """Return five crystals without symmetry, of four formulas, and their band gaps in eV."""
    found = {}
    names = [("one", "Na"), ("two", "Na"), ("three", "K"), ("four", "Rb"), ("five", "Cs")]
    for number, (name, metal) in enumerate(names):
        lattice = Lattice.from_parameters(4.1 + number / 10, 4.7, 5.3, 83, 97, 106)
        frac = np.random.default_rng(number).permutation(12).reshape(4, 3) / 12 + 0.013 * SITES
        found[name] = Structure(lattice, [metal, "Cl", "O", "O"], frac % 1), [0.0, 0.01, 1.5, 3.0, 8.2][number]
    return found


def cif_source(folder: Path) -> Path:
    """Write the crystals as CIF files with an id_prop.csv."""
    folder.mkdir()
    with (folder / "id_prop.csv").open("w", newline="") as file:
        csv.writer(file).writerows([name, value] for name, (_, value) in crystals().items())
    for name, (structure, _) in crystals().items():
        CifWriter(structure, significant_figures=14).write_file(folder / f"{name}.cif")
    return folder


def lines_source(path: Path) -> Path:
    """Write the crystals as JSON lines, compressed where the name says so."""
    lines = [json.dumps(plain_row(name, value, structure)) for name, (structure, value) in crystals().items()]
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def document_source(path: Path) -> Path:
    """Write the crystals in pymatgen's JSON, each with its property in another place."""
    entries = []
    for number, (name, (structure, value)) in enumerate(crystals().items()):
        own = structure.copy(properties={"band_gap": value} if number == 0 else None)
        entry: dict[str, Any] = {"material_id": name, "structure": own.as_dict()}
        if number == 0:
            entry = {**own.as_dict(), "id": name}
        elif number == 1:
            entry["band_gap"] = value
        elif number == 2:
            entry["properties"] = {"band_gap": value}
        else:
            entry |= {"entry_id": name, "energy": -1.0, "data": {"band_gap": value}, "parameters": {}}
        entries.append(entry)
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(entry) for entry in entries))
    else:
        path.write_text(json.dumps(entries))
    return path


SOURCES = {
    "cif": lambda folder: cif_source(folder / "cifs"),
    "lines": lambda folder: lines_source(folder / "rows.jsonl"),
    "gzip": lambda folder: lines_source(folder / "rows.jsonl.gz"),
    "document": lambda folder: document_source(folder / "entries.json"),
    "entries": lambda folder: document_source(folder / "entries.jsonl"),
}


def by_name(path: Path) -> dict[str, tuple[int, int, GraphArrays]]:
    """Return split, target and graph of every sample of a file."""
    shards = Shards(path)
    rows = shards.read(np.arange(shards.schema.count))
    assert isinstance(rows.inputs, GraphArrays)
    return {
        name: (int(shards.splits[row]), rows.targets[row].tolist(), rows.inputs.take(slice(row, row + 1)))
        for row, name in enumerate(rows.ids)
    }


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_give_the_same_graphs(tmp_path: Path, kind: str) -> None:
    """Compare each kind of source with the structures themselves; lattices may differ by a rotation."""
    out = tmp_path / "out.h5"
    report = prepare_crystals(out, SOURCES[kind](tmp_path), comm=parallel.SELF)
    assert not report.skipped and sum(report.split_counts) == 5
    found = by_name(out)
    labels = dict(zip(crystals(), [0, 1, 1, 2, 2], strict=True))
    assert found.keys() == labels.keys()
    for name, (structure, _) in crystals().items():
        _, label, graph = found[name]
        numbers = np.array(structure.atomic_numbers)
        expected = neighbours_of(structure.lattice.matrix, numbers, structure.frac_coords, 12)
        assert label == labels[name]
        assert np.array_equal(graph.atomic_number, numbers)
        assert np.array_equal(graph.edge_source, expected.edge_source)
        scalar = graph.edge_vector @ graph.edge_vector.T - expected.edge_vector @ expected.edge_vector.T
        assert np.abs(scalar).max() < 1e-9


def test_regression_keeps_the_value(tmp_path: Path) -> None:
    """Write the band gap itself, with its name and unit."""
    out = tmp_path / "out.h5"
    prepare_crystals(out, lines_source(tmp_path / "a.jsonl"), replace(BAND_GAP, regression=True), comm=parallel.SELF)
    assert {name: target for name, (_, target, _) in by_name(out).items()} == {
        name: [value] for name, (_, value) in crystals().items()
    }
    schema = Shards(out).schema
    assert (schema.target_names, schema.target_units, schema.output_size) == (("band_gap",), ("eV",), 1)


def bad_rows() -> list[tuple[Any, str]]:
    """Return rows that cannot be used, with the reasons expected."""
    structure, _ = next(iter(crystals().values()))
    good = plain_row("x", 1.0, structure)
    partial = Structure(TRICLINIC, [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]])
    dummy = Structure(TRICLINIC, [DummySpecies("X")], [[0, 0, 0]])
    return [
        ("{oops", "JSONDecodeError"),
        ([1, 2], "no JSON object"),
        ({"id": "x", "band_gap": 1}, "neither cell, Z and frac, nor a pymatgen structure"),
        (good | {"band_gap": None}, "no band_gap"),
        (good | {"band_gap": "wide"}, "band_gap is 'wide', not a number"),
        (good | {"band_gap": float("nan")}, "band_gap is nan, not finite"),
        (good | {"cell": [1, 2, 3]}, "cell is not six finite numbers"),
        (good | {"cell": [4, 4, 4, 10, 10, 150]}, "lengths or angles are impossible"),
        (good | {"Z": [11, 17, 8, 0]}, "atomic numbers are not integers from 1 to 118"),
        (good | {"Z": [11]}, "1 atoms, but 12 coordinates"),
        (good | {"frac": [0.0] * 12}, "they overlap"),
        (good | {"frac": [float("inf")] * 12}, "cell or coordinates are not finite"),
        (good | {"split": "dev"}, "split 'dev' is not train, validation or test"),
        ({"structure": partial.as_dict(), "band_gap": 1}, "disordered: sites with partial occupancy"),
        ({"structure": dummy.as_dict(), "band_gap": 1}, "a site without a chemical element"),
        ({"structure": {"lattice": 3, "sites": []}, "band_gap": 1}, "Error"),
    ]


def test_unreadable_rows_are_listed_and_skipped(tmp_path: Path) -> None:
    """Put every kind of bad row between two good ones."""
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.h5"
    structure, _ = crystals()["three"]
    bad = [row if isinstance(row, str) else json.dumps(row) for row, _ in bad_rows()]
    first, last = (json.dumps(plain_row(name, 1.0, structure)) for name in ("first", "last"))
    source.write_text("\n".join([first, *bad, "", last]))
    report = prepare_crystals(out, source, comm=parallel.SELF)
    assert sorted(by_name(out)) == ["first", "last"]
    assert len(report.skipped) == len(bad)
    for skipped, (_, reason) in zip(report.skipped, bad_rows(), strict=True):
        assert reason in skipped.reason
    assert (report.skipped[0].row, report.skipped[3].row) == ("line 2", "x (line 5)")


def test_rows_keep_their_split_and_value_past_skipped_ones(tmp_path: Path) -> None:
    """Skip some of 200 rows, in all blocks, after the splits are given out."""
    structure, _ = crystals()["three"]
    names = ("train", "validation", "test")
    rows = [plain_row(str(row), float(row), structure, split=names[row % 3]) for row in range(200)]
    for row in range(0, 200, 7):
        rows[row]["frac"] = [0.25] * 12
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out.h5"
    report = prepare_crystals(out, tmp_path / "rows.jsonl", replace(BAND_GAP, regression=True), comm=parallel.SELF)
    found = by_name(out)
    assert len(report.skipped) == 29 and len(found) == 171
    assert all((split, value) == (int(name) % 3, [float(name)]) for name, (split, value, _) in found.items())
    assert report.notes == ["1 groups of relatives are in more than one split of the source, and so here"]


def test_unreadable_cif_files_are_listed(tmp_path: Path) -> None:
    """Skip a CIF file that is missing, one that is empty, one that is no CIF, and a property that is none."""
    folder = cif_source(tmp_path / "cifs")
    (folder / "one.cif").unlink()
    (folder / "two.cif").write_text("")
    (folder / "three.cif").write_text("<html>not found</html>")
    table = folder / "id_prop.csv"
    table.write_text(table.read_text().replace("four,3.0", "four,"))
    report = prepare_crystals(tmp_path / "out.h5", folder, comm=parallel.SELF)
    assert [row.row for row in report.skipped] == ["one", "two", "three", "four"]
    assert report.skipped[0].reason == "one.cif is missing"
    assert report.skipped[3].reason == "no band_gap"
    assert list(by_name(tmp_path / "out.h5")) == ["five"]


@pytest.mark.parallel([1, 2, 3])
def test_source_without_a_good_row_is_an_error(shared_tmp_path: Path) -> None:
    """Say on all ranks how many rows failed, and the first reasons; leave nothing behind."""
    source = shared_tmp_path / "rows.jsonl"
    with parallel.agreement(parallel.WORLD):
        if parallel.WORLD.rank == 0:
            source.write_text("oops\n" * 7)
    message = r"none of its 7 rows can be used:\n  line 1: JSONDecodeError.*(\n.*){4}\n  and 2 more"
    with pytest.raises(DataError, match=message):
        prepare_crystals(shared_tmp_path / "out.h5", source)
    assert not list(shared_tmp_path.glob("out*"))


def test_sources_as_a_whole_are_checked(tmp_path: Path) -> None:
    """Refuse what is missing, of no known kind, empty, damaged, or no list of structures."""
    out = tmp_path / "out.h5"
    packed = lines_source(tmp_path / "cut.jsonl.gz")
    packed.write_bytes(packed.read_bytes()[:-200])
    files = {
        "rows.foo": ("", "unknown kind of source; SOURCE is a folder of CIF"),
        "empty.jsonl": ("\n", "no rows; give a source"),
        "torn.json": ("[1, 2", "not JSON"),
        "lines.json": ("{}\n{}", r"not JSON .*name it \.jsonl if it has one object a line"),
        "number.json": ("3", "neither a list nor an object"),
        "plain.jsonl.gz": ("{}", "cannot be read to its end"),
    }
    for name, (text, message) in files.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=message):
            prepare_crystals(out, tmp_path / name, comm=parallel.SELF)
    for name, message in {
        "absent.jsonl": "no such file or folder",
        "cut.jsonl.gz": "cannot be read to its end",
        "": "2 tables|neither CIF files nor id_prop.csv",
    }.items():
        with pytest.raises(DataError, match=message):
            prepare_crystals(out, tmp_path / name, comm=parallel.SELF)
    assert not list(tmp_path.glob("out*"))


def test_options_that_make_no_sense_are_refused() -> None:
    """Name the option and what to say instead."""
    with pytest.raises(OptionError, match="are not increasing"):
        replace(BAND_GAP, thresholds=(3.0, 0.01))
    with pytest.raises(OptionError, match="3 class names for 2 classes; say --classes with 2"):
        replace(BAND_GAP, thresholds=(1.0,))
    with pytest.raises(OptionError, match="--neighbours 0"):
        StructureSettings(neighbours=0)


def test_groups_never_straddle() -> None:
    """Share 4,000 rows of 1,000 groups out: whole groups, near 80 / 10 / 10 %, differently by seed."""
    groups = [f"group {row % 1000}" for row in range(4000)]
    nothing: list[str | None] = [None] * 4000
    splits = assign_splits(groups, nothing, 0.1, 0)
    assert straddling(groups, splits) == 0
    assert np.abs(np.bincount(splits) / 4000 - [0.8, 0.1, 0.1]).max() < 0.03
    assert (splits != assign_splits(groups, nothing, 0.1, 1)).mean() > 0.2
    assert np.array_equal(splits[:1000], assign_splits(groups[:1000], nothing[:1000], 0.1, 0))


def test_split_of_the_source_is_kept() -> None:
    """Keep test rows, take validation from train by groups, and let a row without split follow its group."""
    groups = [f"group {row % 200}" for row in range(1000)]
    given: list[str | None] = ["test" if row % 200 < 40 else "train" for row in range(1000)]
    given[20], given[100] = None, None
    splits = assign_splits(groups, given, 0.1, 0)
    assert straddling(groups, splits) == 0
    assert [bool(split == 2) for split in splits] == [row % 200 < 40 for row in range(1000)]
    assert 0.04 < (splits == 1).mean() < 0.14
    own = ["validation" if row % 200 == 50 else split for row, split in enumerate(given)]
    assert set(np.flatnonzero(assign_splits(groups, own, 0.1, 0) == 1) % 200) == {50}


def test_fraction_is_the_same_everywhere() -> None:
    """Compare with `printf '0:1:1 8:2' | sha256sum`: files made on different machines have to agree."""
    assert fraction_of("1:1 8:2", 0) == int("94db679bb8ddea", 16) / 2**56


def test_formula_of_a_supercell_is_that_of_the_cell(tmp_path: Path) -> None:
    """Give a cell, its double and its triple one group, and so one split."""
    structure, _ = crystals()["one"]
    out = tmp_path / "out.h5"
    for seed in range(4):
        cells = [structure.make_supercell([copies, 1, 1], in_place=False) for copies in (1, 2, 3)]
        lines = [json.dumps(plain_row(str(row), 1.0, cell)) for row, cell in enumerate(cells)]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
        prepare_crystals(out, tmp_path / "rows.jsonl", shares=Shares(seed=seed), comm=parallel.SELF)
        assert len(set(Shards(out).splits.tolist())) == 1


def test_workers_start_neither_torch_nor_mpi() -> None:
    """Import what a worker process imports: MPI must not start in a child of an MPI process."""
    code = "import hpcdeq.builders.periodic, sys\n"
    code += "sys.exit(', '.join(name for name in ('torch', 'mpi4py') if name in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr.strip() == ""


def test_blocks_come_back_in_order() -> None:
    """Yield answers in the order of the stream, with few blocks under way at a time."""
    from concurrent.futures import ThreadPoolExecutor

    taken: list[int] = []

    def stream() -> Any:
        for number in range(20):
            taken.append(number)
            yield [number]

    with ThreadPoolExecutor(3) as executor:
        for place, (block, answer) in enumerate(in_order(executor, sum, stream(), 100, ahead=4)):
            assert block == [place] and answer == 100 + place
            assert len(taken) <= place + 4


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.skipif(not CRYSTALS.is_dir(), reason="../shared/data/crystals is not there")
def test_real_crystals_do_not_depend_on_the_workers(shared_tmp_path: Path) -> None:
    """Prepare 300 real crystals with all ranks (two processes on one rank), and alone: the same samples."""
    source, shares = CRYSTALS / "crystals_small.jsonl.gz", Shares(limit=300)
    report = prepare_crystals(shared_tmp_path / "many.h5", source, shares=shares, processes=2)
    with parallel.agreement(parallel.WORLD):
        if parallel.WORLD.rank == 0:
            prepare_crystals(shared_tmp_path / "alone.h5", source, shares=shares, comm=parallel.SELF)
    assert sum(report.split_counts) == 300 and not report.skipped and not report.notes
    many, alone = by_name(shared_tmp_path / "many.h5"), by_name(shared_tmp_path / "alone.h5")
    assert list(many) == list(alone)
    assert [split for split, _, _ in many.values()] == sorted(split for split, _, _ in many.values())
    for (split, label, graph), expected in zip(many.values(), alone.values(), strict=True):
        assert (split, label) == expected[:2]
        assert np.array_equal(graph.edge_source, expected[2].edge_source)
        assert np.array_equal(graph.edge_vector, expected[2].edge_vector)


@pytest.mark.skipif(not CRYSTALS.is_dir(), reason="../shared/data/crystals is not there")
def test_real_labels_equal_the_published_ones(tmp_path: Path) -> None:
    """Compare classes and test split with labels.csv.gz."""
    out = tmp_path / "out.h5"
    prepare_crystals(out, CRYSTALS / "crystals_small.jsonl.gz", shares=Shares(limit=500), comm=parallel.SELF)
    with gzip.open(CRYSTALS / "labels.csv.gz", "rt") as file:
        published = {row["id"]: row for row in csv.DictReader(file)}
    classes = Shards(out).schema.classes
    for name, (split, label, _) in by_name(out).items():
        assert classes[label] == published[name]["class_3eV"]
        assert (split == 2) == (published[name]["split"] == "test")
