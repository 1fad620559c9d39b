"""Frameworks and other periodic structures: what is learned, neighbours by radius, sources, groups, and hard rows."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DATA
from pymatgen.core import Lattice, Structure

from hpcdeq import parallel
from hpcdeq.builders.cif import read_cif
from hpcdeq.builders.crystals import BAND_GAP, prepare_crystals
from hpcdeq.builders.frameworks import CAVITY, SETTINGS
from hpcdeq.builders.labelling import Labelling
from hpcdeq.builders.neighbours import neighbours_of
from hpcdeq.builders.periodic import StructureSettings
from hpcdeq.builders.samples import Shares
from hpcdeq.builders.structures import read_structure, source_rows
from hpcdeq.data.dataset import Dataset
from hpcdeq.data.graphs import GraphArrays, atoms_only
from hpcdeq.data.shards import Shards
from hpcdeq.errors import DataError, OptionError
from hpcdeq.models import build_model, model_config
from hpcdeq.prepare import build_parser, main

VALUE = Labelling("LCD", units="angstrom", regression=True)


def row(name: str, value: Any = 6.0, **more: Any) -> dict[str, Any]:
    """Return a distorted rock salt with a cavity diameter."""
    frac = [0, 0, 0, 0.52, 0.47, 0.5]
    return {"id": name, "LCD": value, "cell": [4, 4.1, 4.2, 90, 95, 90], "Z": [11, 17], "frac": frac, **more}


def lines(path: Path, rows: list[Any]) -> Path:
    """Write one JSON object a line."""
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in rows))
    return path


def by_name(path: Path) -> dict[str, tuple[int, Any, GraphArrays]]:
    """Return split, target and graph of every sample of a file."""
    shards = Shards(path)
    rows = shards.read(np.arange(shards.schema.count))
    assert isinstance(rows.inputs, GraphArrays)
    return {
        name: (int(shards.splits[place]), rows.targets[place].tolist(), rows.inputs.take(slice(place, place + 1)))
        for place, name in enumerate(rows.ids)
    }


# What is learned.


@pytest.mark.parametrize("labels", [BAND_GAP, CAVITY, Labelling("x", (0.1, 0.2, 0.3), ("a", "b", "c", "d"))])
def test_a_value_on_a_threshold_belongs_to_the_class_above(labels: Labelling) -> None:
    """Label the numbers next to every threshold, and the threshold, by counting those passed."""
    values = [float(np.nextafter(t, t + s)) if s else t for t in labels.thresholds for s in (-1, 0, 1)]
    values += [-1e9, 1e9]
    expected = [sum(value >= threshold for threshold in labels.thresholds) for value in values]
    classes = labels.class_names(values)
    assert labels.targets(values, classes).tolist() == expected
    assert classes == labels.classes and len(classes) == len(labels.thresholds) + 1


def test_thresholds_given_as_text_count_the_same(tmp_path: Path) -> None:
    """Put 5 and 7 angstrom, written in four ways, above the bounds of `frameworks`."""
    values = [4.999999, 5, "5.0", " 5 ", 6.9999, 7, "7.00", 1e1]
    source = lines(tmp_path / "rows.jsonl", [row(str(place), value) for place, value in enumerate(values)])
    main(["frameworks", str(source), "--out", str(tmp_path / "out.h5"), "--processes", "1", "--quiet"])
    found = by_name(tmp_path / "out.h5")
    assert [found[str(place)][1] for place in range(8)] == [0, 1, 1, 1, 1, 2, 2, 2]
    schema = Shards(tmp_path / "out.h5").schema
    assert schema.classes == ("small", "medium", "large")
    assert schema.provenance["kind"] == "frameworks" and schema.provenance["labels"] == "LCD at 5.0, 7.0 angstrom"
    assert schema.provenance["settings"] == {
        "neighbours": 12,
        "radius": 0.0,
        "voids": 16,
        "group": "family",
        "oxidation": False,
        "least_distance": 0.5,
    }


def test_named_classes(tmp_path: Path) -> None:
    """Number given classes in their order and others alphabetically; name what is no class and what is missing."""
    names = ["zinc", " copper ", "zinc", "gold", "", None, float("nan"), "NaN", 7]
    source = lines(tmp_path / "rows.jsonl", [row(str(place), metal=name) for place, name in enumerate(names)])
    out = tmp_path / "out.h5"
    command = ["frameworks", str(source), "--out", str(out), "--class-column", "metal", "--processes", "1", "--quiet"]
    main(command)
    found = by_name(out)
    assert Shards(out).schema.classes == ("7", "copper", "gold", "zinc")
    assert {name: target for name, (_, target, _) in found.items()} == {"0": 3, "1": 1, "2": 3, "3": 2, "8": 0}
    main([*command, "--classes", "zinc,silver,copper"])
    assert Shards(out).schema.classes == ("zinc", "silver", "copper")
    assert {name: target for name, (_, target, _) in by_name(out).items()} == {"0": 0, "1": 2, "2": 0}
    with (tmp_path / "out.skipped.csv").open(newline="") as file:
        told = {entry["row"][0]: entry["reason"] for entry in csv.DictReader(file)}
    assert told == {
        "3": "metal is 'gold', not one of zinc, silver, copper",
        **dict.fromkeys("4567", "no metal"),
        "8": "metal is '7', not one of zinc, silver, copper",
    }


def test_regression_keeps_value_and_unit(tmp_path: Path) -> None:
    """Learn the cavity's diameter in its own unit, and another property in the one given."""
    rows = [row(str(place), 1 / 3 + place, density=0.1 * place) for place in range(3)]
    source, out = str(lines(tmp_path / "rows.jsonl", rows)), tmp_path / "out.h5"
    command = ["frameworks", source, "--out", str(out), "--regression", "--processes", "1", "--quiet"]
    for more, name, unit in (
        ([], "LCD", "angstrom"),
        (["--property", "density", "--units", "g/cm3"], "density", "g/cm3"),
    ):
        main([*command, *more])
        schema = Shards(out).schema
        assert (schema.target_names, schema.target_units, schema.classes) == ((name,), (unit,), ())
        assert {key: target for key, (_, target, _) in by_name(out).items()} == {e["id"]: [e[name]] for e in rows}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--thresholds 7,5", r"--thresholds \(7.0, 5.0\) are not increasing numbers"),
        ("--thresholds nan", "are not increasing numbers"),
        ("--thresholds 5,inf", "are not increasing numbers"),
        ("--thresholds 5 --classes a,b,c", "3 class names for 2 classes; say --classes with 2"),
        ("--thresholds 5 --classes a,a", "--classes a,a: every class has a name of its own"),
        ("--class-column c --classes a,,b", "--classes a,,b: every class has a name of its own"),
        ("--class-column c --thresholds 5", "--class-column c: drop --thresholds"),
        ("--class-column c --regression", "names of classes are no numbers; drop --regression"),
        ("--regression --classes a,b,c", "--regression learns the value itself: drop --classes"),
        ("--regression --thresholds 4", "--regression learns the value itself: drop --thresholds"),
        ("--property PLD", "--property PLD: say --thresholds A,B,... for classes, or --regression"),
        ("--neighbours 0", "--neighbours 0: at least 1, or 0 with a --radius"),
        ("--radius inf", "--radius inf: a length in angstrom"),
        ("--radius -1", "--radius -1.0: a length in angstrom"),
        ("--least-distance nan", "--least-distance nan: a length in angstrom"),
        ("--processes 0", "--processes 0: at least 1"),
        ("--validation-fraction 0.7", "--validation-fraction 0.7: from 0 to 0.5"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, options: str, message: str) -> None:
    """Say which option and what instead, before anything is written."""
    source = lines(tmp_path / "rows.jsonl", [row("a")])
    with pytest.raises(OptionError, match=message):
        main(["frameworks", str(source), "--out", str(tmp_path / "out.h5"), *options.split()])
    assert not list(tmp_path.glob("out*"))


def test_thresholds_that_are_no_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """Explain how they are written."""
    with pytest.raises(SystemExit):
        main(["frameworks", "x", "--out", "y.h5", "--thresholds", "5;7"])
    assert "argument --thresholds: '5;7' are not numbers with commas between them" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "settings"), [("crystals", StructureSettings()), ("frameworks", SETTINGS)])
def test_the_help_says_the_defaults(kind: str, settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Compare the help's defaults with those in use."""
    with pytest.raises(SystemExit):
        build_parser().parse_args([kind, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"--neighbours K nearest neighbours of an atom (default {settings.neighbours};" in text
    assert f"another field (default {settings.group})" in text
    assert f"nearer than this, angstrom (default {settings.least_distance:g})" in text
    labels = {"crystals": BAND_GAP, "frameworks": CAVITY}[kind]
    assert f"default {labels.property_name}, at {' and '.join(f'{t:g}' for t in labels.thresholds)}" in text
    assert ", ".join(labels.classes) in text


# Neighbours by radius.

SKEW = Lattice.from_parameters(5.1, 6.3, 7.9, 71, 98, 112)
PLACES = np.array([[0.05, 0.1, 0.2], [0.4, 0.55, 0.9], [1.7, -0.25, 0.5], [-0.3, 0.8, 2.35]])


def within(lattice: np.ndarray, frac: np.ndarray, radius: float) -> list[list[tuple[float, int, tuple[int, ...]]]]:
    """List distance, number and image of all neighbours of each atom, nearest first, among 9 x 9 x 9 images."""
    found = []
    for atom in range(len(frac)):
        own = []
        for image in itertools.product(range(-4, 5), repeat=3):
            for other in range(len(frac)):
                length = float(np.linalg.norm((frac[other] + image - frac[atom]) @ lattice))
                if (other != atom or any(image)) and length <= radius:
                    own.append((round(length, 8), other, image))
        found.append(sorted(own))
    return found


@pytest.mark.parametrize(("neighbours", "radius"), [(0, 3.0), (0, 5.5), (3, 5.5), (12, 4.0), (12, 6.0)])
def test_neighbours_within_a_radius_equal_an_enumeration(neighbours: int, radius: float) -> None:
    """Find all within the radius, or the nearest of them, in the same order."""
    graph = neighbours_of(SKEW.matrix, np.array([8, 26, 8, 14]), PLACES, neighbours, radius)
    expected = [own[: neighbours or None] for own in within(SKEW.matrix, PLACES, radius)]
    counts = [len(own) for own in expected]
    assert len(set(counts)) > 1 or neighbours == 3  # else the radius decides nothing
    assert graph.edge_target.tolist() == np.repeat(np.arange(4), counts).tolist()
    assert graph.edge_source.tolist() == [other for own in expected for _, other, _ in own]
    vectors = [
        (PLACES[other] + image - PLACES[atom]) @ SKEW.matrix
        for atom, own in enumerate(expected)
        for _, other, image in own
    ]
    assert np.abs(graph.edge_vector - np.array(vectors)).max() < 1e-9


def test_a_neighbour_on_the_rim_counts() -> None:
    """Find the six at exactly the radius in a simple cubic crystal, and none just below it."""
    for radius, number in (3.0, 6), (2.9999, 0), (3 * 2**0.5, 18):
        assert neighbours_of(3 * np.eye(3), np.ones(1), np.zeros((1, 3)), 0, radius).edge_source.size == number


def test_atoms_without_neighbours_pass_through(tmp_path: Path) -> None:
    """Write, read and evaluate a structure without any edge, one with a lone atom, and one that is whole."""
    lone = row("lone", cell=[30, 30, 30, 90, 90, 90], Z=[2, 1, 1], frac=[0, 0, 0, 0.5, 0.5, 0.5, 0.525, 0.5, 0.5])
    gas = row("gas", cell=[20, 20, 20, 90, 90, 90], Z=[18], frac=[0.1, 0.2, 0.3])
    rows = [dict(entry, split="train") for entry in (gas, lone, row("whole"))]
    out = tmp_path / "out.h5"
    settings = StructureSettings(neighbours=0, radius=3.0)
    report = prepare_crystals(out, lines(tmp_path / "rows.jsonl", rows), VALUE, settings, Shares(0.0))
    assert not report.skipped
    graphs = {name: graph for name, (_, _, graph) in by_name(out).items()}
    assert (graphs["gas"].edge_source.size, graphs["lone"].edge_target.tolist()) == (0, [1, 2])
    data = Dataset(out, comm=parallel.SELF)
    model = build_model("graph_deq", model_config("graph_deq", {"width": 6}), "graph", (), 1, seed=3)
    with torch.no_grad():
        together = model(data.batch(slice(0, 3))[0])
        alone = torch.cat([model(data.batch(slice(place, place + 1))[0]) for place in range(3)])
    assert together.shape == (3, 1) and together.isfinite().all()
    assert (together - alone).abs().max() < 1e-4
    assert len({round(float(score), 6) for score in together}) == 3


# Sources.


def cif(path: Path, symbols: tuple[str, ...] = ("Na", "Cl"), cell: float = 4.2, more: str = "") -> None:
    """Write a CIF file with all atoms listed, evenly on a diagonal."""
    text = "data_x\n" + "".join(f"_cell_length_{axis} {cell}\n" for axis in "abc")
    text += "".join(f"_cell_angle_{name} 90\n" for name in ("alpha", "beta", "gamma"))
    text += (
        "loop_\n_atom_site_label\n_atom_site_type_symbol\n_atom_site_fract_x\n_atom_site_fract_y\n_atom_site_fract_z\n"
    )
    for place, symbol in enumerate(symbols):
        text += f"{symbol[0]}{place} {symbol} " + " ".join([f"{place / len(symbols):.6f}"] * 3) + "\n"
    path.write_text(more + text)


TABLES = {
    "header": "id,LCD,PLD,split,paper\nABCDEF,4.5,1,train,p\nABCDEF01,5.5,2,train,p\nGHIJKL,7.5,3,test,q\n",
    "filename": "filename,PLD,LCD,split,paper\nABCDEF.cif,1,4.5,train,p\nABCDEF01.cif,2,5.5,train,p\nGHIJKL.cif,3,7.5,test,q\n",
    "index": ",Name,LCD,split,paper\n0,ABCDEF,4.5,train,p\n1,ABCDEF01,5.5,train,p\n\n2,GHIJKL,7.5,test,q\n",
    "both": "name,filename,LCD,split,paper\nA,ABCDEF,4.5,train,p\nB,ABCDEF01,5.5,train,p\nC,GHIJKL,7.5,test,q\n",
    "marked": "\ufeffid,LCD,split,paper\r\nABCDEF,4.5,train,p\r\nABCDEF01,5.5,train,p\r\nGHIJKL,7.5,test,q\r\n",
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("name", ["id_prop.csv", "2019-CoRE-MOF.csv"])
def test_a_folder_with_a_table(tmp_path: Path, table: str, name: str) -> None:
    """Take id, property, split and group from the columns, wherever they stand and whatever the file is called."""
    for stem in ("ABCDEF", "ABCDEF01", "GHIJKL"):
        cif(tmp_path / f"{stem}.cif", cell=4.2 if stem < "G" else 5.0)
    (tmp_path / name).write_text(TABLES[table])
    (tmp_path / "old.skipped.csv").write_text("row,reason\n")  # of an earlier run: no table of properties
    out = tmp_path / "out.h5"
    report = prepare_crystals(out, tmp_path, VALUE, replace(SETTINGS, group="paper"), Shares(0.0))
    assert not report.skipped and not report.notes
    found = by_name(out)
    told = {key: (split, target) for key, (split, target, _) in found.items()}
    assert told == {"ABCDEF": (0, [4.5]), "ABCDEF01": (0, [5.5]), "GHIJKL": (2, [7.5])}
    near = np.linalg.norm(atoms_only(found["GHIJKL"][2]).edge_vector, axis=1).min()
    assert abs(near - 5.0 * 3**0.5 / 2) < 1e-9


def test_folders_that_do_not_say_what_to_learn(tmp_path: Path) -> None:
    """Refuse two tables; without one say that there is no property, but read the structures for prediction."""
    cif(tmp_path / "a.cif")
    with pytest.raises(DataError, match="a: no LCD: a CIF file has none, and there is no id_prop.csv beside it"):
        prepare_crystals(tmp_path / "out.h5", tmp_path, CAVITY)
    with pytest.raises(DataError, match="a: no LCD: a CIF file has none"):
        prepare_crystals(tmp_path / "out.h5", tmp_path / "a.cif", CAVITY)
    for source in (tmp_path, tmp_path / "a.cif"):
        (found,) = source_rows(source)
        name, record, reason = read_structure(found, None, "family")
        assert (name, reason) == ("a", "") and record is not None
        assert record.atomic_number.tolist() == [11, 17] and np.isnan(float(record.value))
    for name in ("one.csv", "two.csv"):
        (tmp_path / name).write_text("id,LCD\na,5\n")
    with pytest.raises(DataError, match="2 tables of properties and no id_prop.csv"):
        prepare_crystals(tmp_path / "out.h5", tmp_path, CAVITY)
    (tmp_path / "two.csv").unlink()
    (tmp_path / "one.csv").write_text("id,LCD\na," + "9" * 200_000 + "\n")
    with pytest.raises(DataError, match="one.csv: cannot be read to its end"):
        prepare_crystals(tmp_path / "out.h5", tmp_path, CAVITY)
    assert not list(tmp_path.glob("out*"))


def test_pymatgen_documents(tmp_path: Path) -> None:
    """Read a single structure, a single plain row, and structures by name."""
    own = Structure(SKEW, ["Na", "Cl", "O", "O"], PLACES)
    documents = {
        "one": {**own.as_dict(), "id": "one", "LCD": 1.0},
        "held": {"structure": own.as_dict(), "material_id": "held", "data": {"LCD": 2.0}},
        "plain": row("plain", 3.0),
        "named": {"a": {"structure": own.as_dict(), "LCD": 4.0}},
    }
    expected = {"one": {"one": [1.0]}, "held": {"held": [2.0]}, "plain": {"plain": [3.0]}, "named": {"a": [4.0]}}
    for name, document in documents.items():
        with gzip.open(tmp_path / f"{name}.json.gz", "wt") as file:
            json.dump(document, file)
        prepare_crystals(tmp_path / "out.h5", tmp_path / f"{name}.json.gz", VALUE)
        assert {key: target for key, (_, target, _) in by_name(tmp_path / "out.h5").items()} == expected[name]


@pytest.mark.parametrize("ending", ["extxyz", "traj", "db"])
def test_what_ase_reads(tmp_path: Path, ending: str) -> None:
    """Read names, properties and cells that ASE wrote, and leave a molecule without a cell out."""
    pytest.importorskip("ase", reason="ASE is not installed: pip install ase")
    import ase.db
    import ase.io

    salt = ase.Atoms("NaCl", cell=3 * np.eye(3) + 0.2, pbc=True, scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]])
    gas = ase.Atoms("H2", [[0, 0, 0], [0, 0, 0.74]])
    source = tmp_path / f"rows.{ending}"
    told = {"name": "salt", "LCD": 5.5}
    if ending == "db":
        with ase.db.connect(source) as base:
            base.write(salt, **told)
            base.write(gas, LCD=1.0)
    else:
        salt.info.update(told)
        gas.info["LCD"] = 1.0
        ase.io.write(source, [salt, gas])
    report = prepare_crystals(tmp_path / "out.h5", source, VALUE)
    ((name, (_, target, graph)),) = by_name(tmp_path / "out.h5").items()
    assert (name, target, graph.atomic_number.tolist()) == ("salt", [5.5], [11, 17])
    expected = neighbours_of(salt.cell[:], salt.numbers, salt.get_scaled_positions(), 12)
    assert np.abs(graph.edge_vector - expected.edge_vector).max() < 1e-7
    assert [(left.row, left.reason[:9]) for left in report.skipped] == [("rows-1", "cell of 0")]


def test_without_ase_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the package; and let what it raises on a damaged file be an error of the source."""
    source = tmp_path / "rows.extxyz"
    source.write_text("2\nnonsense\n")
    monkeypatch.setitem(sys.modules, "ase", None)
    with pytest.raises(DataError, match="only ASE reads this; install it with: pip install ase"):
        prepare_crystals(tmp_path / "out.h5", source, VALUE)
    package, db, io = (types.ModuleType(name) for name in ("ase", "ase.db", "ase.io"))
    vars(package).update(db=db, io=io)
    vars(io)["iread"] = lambda *_, **__: (_ for _ in ()).throw(IndexError("list index out of range"))
    for module in (package, db, io):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(DataError, match=r"ASE cannot read it \(list index out of range\)"):
        prepare_crystals(tmp_path / "out.h5", source, VALUE)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("group", "entry", "expected"),
    [
        ("formula", row("ABCDEF01"), "11:1 17:1"),
        ("formula", row("a", Z=[17, 17]), "17:1"),
        ("family", row("ABCDEF01"), "ABCDEF"),
        ("family", row("ABCDEF_clean"), "ABCDEF"),
        ("family", row("ABCDEF01", family="zif"), "zif"),
        ("family", row("ABCDEF01", family=""), "ABCDEF"),
        ("family", row("abcdef01"), "11:1 17:1"),
        ("family", row("ABCDEFG"), "11:1 17:1"),
        ("family", row("acs.cgd.6b0"), "11:1 17:1"),
        ("topology", row("a", topology="sod"), "sod"),
        ("topology", row("a", topology=0), "0"),
        ("topology", row("a"), None),
        ("topology", row("a", topology=""), None),
    ],
)
def test_groups(tmp_path: Path, group: str, entry: dict[str, Any], expected: str | None) -> None:
    """Name the relatives by formula, refcode or field, or say that the field is missing."""
    (found,) = source_rows(lines(tmp_path / "rows.jsonl", [entry]))
    _, record, reason = read_structure(found, None, group)
    assert (record.group if record else None) == expected
    assert (reason == "") == (expected is not None)
    if expected is None:
        assert reason == "no topology, which is to name its relatives (--group)"


# CIF files.


def test_a_file_that_lists_all_atoms_is_what_pymatgen_reads(tmp_path: Path) -> None:
    """Compare with pymatgen's own structure, site by site, and see symmetry and partial occupancy go the long way."""
    from pymatgen.io.cif import CifWriter

    own = Structure(SKEW, ["Zn", "C", "H", "O"], PLACES, to_unit_cell=True)
    CifWriter(own, significant_figures=12).write_file(tmp_path / "listed.cif")
    lattice, numbers, frac = read_cif(tmp_path / "listed.cif")
    assert list(numbers) == list(own.atomic_numbers)
    back = Structure(Lattice(lattice), list(numbers), frac)
    assert np.abs(back.distance_matrix - own.distance_matrix).max() < 1e-9
    cif(tmp_path / "symmetric.cif", cell=5.64)
    text = (tmp_path / "symmetric.cif").read_text().replace("loop_", "_symmetry_space_group_name_H-M 'F m -3 m'\nloop_")
    (tmp_path / "symmetric.cif").write_text(text)
    assert sorted(read_cif(tmp_path / "symmetric.cif")[1]) == [11] * 4 + [17] * 4
    partial = Structure(SKEW, [{"Na": 0.5, "K": 0.5}, "Cl"], PLACES[:2])
    CifWriter(partial).write_file(tmp_path / "partial.cif")
    with pytest.raises(ValueError, match="disordered: sites with partial occupancy"):
        read_cif(tmp_path / "partial.cif")


def test_files_as_journals_and_databases_write_them(tmp_path: Path) -> None:
    """Read charges, uncertainties, deuterium, a block without atoms before the structure, and Latin letters."""
    cif(tmp_path / "charged.cif", ("Zn2+", "O2-", "D"))
    assert read_cif(tmp_path / "charged.cif")[1] == [30, 8, 1]
    cif(tmp_path / "journal.cif", more="data_global\n_journal_name_full 'Acta'\n\n")
    assert list(read_cif(tmp_path / "journal.cif")[1]) == [11, 17]
    text = (tmp_path / "journal.cif").read_text().replace("loop_", "_symmetry_space_group_name_H-M 'I m -3 m'\nloop_")
    (tmp_path / "symmetric.cif").write_text(text.replace("C1 Cl", "# "))
    assert list(read_cif(tmp_path / "symmetric.cif")[1]) == [11, 11]
    cif(tmp_path / "latin.cif")
    text = (tmp_path / "latin.cif").read_bytes()
    (tmp_path / "latin.cif").write_bytes(text.replace(b"data_x", b"data_x\n_publ_author_name 'M\xfcller'", 1))
    assert list(read_cif(tmp_path / "latin.cif")[1]) == [11, 17]
    cif(tmp_path / "loose.cif")
    text = (tmp_path / "loose.cif").read_bytes().replace(b"0.500000 ", b"0.5000(12) ")
    (tmp_path / "loose.cif").write_bytes(text.replace(b"4.2", b"4.2000(3)"))
    assert np.abs(read_cif(tmp_path / "loose.cif")[2] - [[0, 0, 0], [0.5, 0.5, 0.5]]).max() < 1e-12


# Hard rows.


def test_hard_rows_are_named_and_the_others_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prepare a folder of every kind of bad file and row: all are in the report and the list, the good ones in the file."""
    folder = tmp_path / "cifs"
    folder.mkdir()
    for name in ("good", "gas", "unlabelled", "nan", "text", "twice", "last"):
        cif(folder / f"{name}.cif")
    cif(folder / "gas.cif", ("Ar",))
    cif(folder / "overlap.cif", ("Na",) * 20, cell=4.0)  # 0.35 angstrom apart
    cif(folder / "image.cif", ("Na",), cell=0.3)
    (folder / "empty.cif").write_text("")
    (folder / "torn.cif").write_text((folder / "good.cif").read_text()[:150])
    (folder / "html.cif").write_text("<html>404</html>")
    (folder / "binary.cif").write_bytes(bytes(range(256)) * 20)
    rows = ["good,5", "gas,6", "overlap,5", "image,5", "empty,5", "torn,5", "html,5", "binary,5", "absent,5"]
    rows += ["unlabelled,", "nan,NaN", "text,wide", "twice,7.5", "twice,1", "last,8"]
    (folder / "id_prop.csv").write_text("id,LCD\n" + "\n".join(rows))
    out = tmp_path / "out.h5"
    assert main(["frameworks", str(folder), "--out", str(out), "--processes", "1", "--quiet"]) == 0
    targets = {name: target for name, (_, target, _) in by_name(out).items()}
    assert targets == {"good": 1, "gas": 1, "twice": 2, "last": 2}
    with (tmp_path / "out.skipped.csv").open(newline="") as file:
        told = [(entry["row"], entry["reason"]) for entry in csv.DictReader(file)]
    reasons = {
        "overlap": "they overlap",
        "image": "a lattice vector of 0.3 A: atoms overlap with their own images",
        "empty": "empty.cif is empty",
        "torn": "torn.cif is damaged: ZeroDivisionError",
        "html": "html.cif has no atoms with fractional coordinates",
        "binary": "",
        "absent": "absent.cif is missing",
        "unlabelled": "no LCD",
        "nan": "LCD is nan, not finite",
        "text": "LCD is 'wide', not a number",
        "twice": "duplicate id: an earlier row has it",
    }
    assert [name for name, _ in told] == list(reasons)
    for name, reason in told:
        assert reasons[name] in reason and reason and "\n" not in reason
    assert "skipped         11  (all in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (row("x", frac=[0, 0, 0, 1e300, 0, 0]), "an atom 1e+300 cells away"),
        ({"id": "x", "LCD": 5, "matrix": [[4, 0], [0, 4]], "Z": [11], "frac": [0, 0, 0]}, "a cell of shape (2, 2)"),
        (row("x", cell=[1e-6, 1e5, 1e5, 90, 90, 90]), "a lattice vector of 1e-06 A"),
        (row("x", cell=[0, 0, 0, 90, 90, 90]), "cell"),
        (row("x", Z=[], frac=[]), "no atoms"),
        (row("x", Z=[10**30, 1]), "atomic numbers are not integers from 1 to 118"),
    ],
)
def test_numbers_no_structure_has(tmp_path: Path, entry: dict[str, Any], reason: str) -> None:
    """Leave a row out whose numbers would fill the memory or have no meaning."""
    report = prepare_crystals(tmp_path / "out.h5", lines(tmp_path / "rows.jsonl", [entry, row("good")]), VALUE)
    assert [left.row for left in report.skipped] == ["x" if "lattice vector" in reason else "x (line 1)"]
    assert reason in report.skipped[0].reason
    assert list(by_name(tmp_path / "out.h5")) == ["good"]


def test_ten_thousand_atoms(tmp_path: Path) -> None:
    """Read one large cell from JSON and from CIF; twelve neighbours of some atoms equal an enumeration."""
    side, cell = 22, 55.0
    grid = np.array(list(itertools.product(range(side), repeat=3)))[:10_000]
    frac = ((grid + 0.3 * np.random.default_rng(0).random(grid.shape)) / side).round(6)
    symbols = ["Zn", "O", "C", "H"] * 2500
    cif(tmp_path / "large.cif", ("Na",), cell)
    head = (tmp_path / "large.cif").read_text().rsplit("N0", 1)[0]
    sites = "\n".join(f"X {symbol} {x:.6f} {y:.6f} {z:.6f}" for symbol, (x, y, z) in zip(symbols, frac, strict=True))
    (tmp_path / "large.cif").write_text(head + sites + "\n")
    (tmp_path / "id_prop.csv").write_text("large,9.0\n")
    numbers = [30, 8, 6, 1] * 2500
    plain = row("large", 9.0, cell=[cell] * 3 + [90] * 3, Z=numbers, frac=frac.ravel().tolist())
    found = []
    for source in (tmp_path, lines(tmp_path / "rows.jsonl", [plain])):
        report = prepare_crystals(tmp_path / "out.h5", source, CAVITY, SETTINGS)
        assert not report.skipped
        found.append(atoms_only(by_name(tmp_path / "out.h5")["large"][2]))
    assert all(graph.atomic_number.tolist() == numbers and graph.edge_source.size == 120_000 for graph in found)
    assert np.array_equal(found[0].edge_source, found[1].edge_source)
    for atom in (0, 4321, 9999):
        away = frac - frac[atom]
        length = np.linalg.norm((away - away.round()) * cell, axis=1)  # the nearest image: neighbours are much nearer
        expected = np.sort(length)[1:13]
        own = found[1].edge_vector[found[1].edge_target == atom]
        assert np.abs(np.linalg.norm(own, axis=1) - expected).max() < 1e-9


# Real frameworks.


@pytest.mark.real_data
def test_real_frameworks(tmp_path: Path) -> None:
    """Compare classes with the published ones, keep the published test set, and let no family straddle."""
    out = tmp_path / "out.h5"
    source = DATA / "mofs" / "mofs_small.jsonl.gz"
    main(["frameworks", str(source), "--out", str(out), "--limit", "150", "--processes", "1", "--quiet"])
    with gzip.open(DATA / "mofs" / "labels.csv.gz", "rt") as file:
        published = {entry["id"]: entry for entry in csv.DictReader(file)}
    found = by_name(out)
    classes = Shards(out).schema.classes
    homes: dict[str, set[int]] = {}
    for name, (split, label, graph) in found.items():
        assert classes[label] == published[name]["class_LCD"]
        assert (split == 2) == (published[name]["split"] == "test")
        assert atoms_only(graph).atomic_number.size == int(published[name]["nsites"])
        assert 0 < (graph.atomic_number == 0).sum() <= 16
        homes.setdefault(published[name]["family"], set()).add(split)
    assert all(len(splits) == 1 for splits in homes.values()) and len(set.union(*homes.values())) == 3
    skipped = {}
    if (tmp_path / "out.skipped.csv").exists():
        with (tmp_path / "out.skipped.csv").open(newline="") as file:
            skipped = {entry["row"]: entry["reason"] for entry in csv.DictReader(file)}
    with gzip.open(source, "rt") as file:
        names = [json.loads(line)["id"] for line in itertools.islice(file, 150)]
    assert sorted([*found, *skipped]) == sorted(names)
    near = {name for name in names if float(published[name]["dmin"]) < 0.5}
    assert set(skipped) == near and all("they overlap" in reason for reason in skipped.values())
