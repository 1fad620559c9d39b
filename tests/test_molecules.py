"""Molecules: the same graph from every kind of source, bonds and lengths as chemistry has them, bad rows by name."""

from __future__ import annotations

import csv
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from hpcdeq import parallel
from hpcdeq.builders.labelling import Labelling
from hpcdeq.builders.molecular import MoleculeSettings, build_molecules
from hpcdeq.builders.molecule_sources import source_rows
from hpcdeq.builders.molecules import DIPOLE, prepare_molecules
from hpcdeq.builders.samples import Shares
from hpcdeq.builders.spool import Built
from hpcdeq.data.batches import graph_batch
from hpcdeq.data.graphs import BONDS, GraphArrays
from hpcdeq.data.shards import Shards
from hpcdeq.data.writer import DatasetWriter
from hpcdeq.errors import DataError, OptionError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "molecules"
FLAT = MoleculeSettings(geometry="none")


def built(text: str, path: Path, settings: MoleculeSettings = FLAT, labels: Labelling | None = None) -> Built:
    """Return what becomes of all rows of a source."""
    path.write_text(text)
    return build_molecules(list(source_rows(path)), settings, labels)


def of_smiles(smiles: str, tmp_path: Path, settings: MoleculeSettings = FLAT) -> GraphArrays:
    """Return the graph of one molecule."""
    done = built(f"smiles\n{smiles}\n", tmp_path / "one.csv", settings)
    assert not done.skipped, done.skipped
    return done.graphs


def counted(graph: GraphArrays) -> dict[tuple[int, int, str], int]:
    """Return how many edges go between which elements, by what bond."""
    ends = zip(graph.atomic_number[graph.edge_source], graph.atomic_number[graph.edge_target], strict=True)
    found: dict[tuple[int, int, str], int] = {}
    for (a, b), bond in zip(ends, graph.edge_bond, strict=True):
        key = (int(min(a, b)), int(max(a, b)), BONDS[bond])
        found[key] = found.get(key, 0) + 1
    return found


@pytest.mark.parametrize(
    ("smiles", "atoms", "edges", "charge"),
    [
        ("O", 3, {(1, 8, "single"): 4}, 0),
        ("c1ccccc1", 12, {(6, 6, "aromatic"): 12, (1, 6, "single"): 12}, 0),
        ("CC=O", 7, {(6, 6, "single"): 2, (6, 8, "double"): 2, (1, 6, "single"): 8}, 0),
        ("C#N", 3, {(6, 7, "triple"): 2, (1, 6, "single"): 2}, 0),
        ("[NH3+]CC(=O)[O-]", 10, None, 2),
        ("[Na+].[Cl-]", 2, {}, 2),
    ],
)
def test_bonds_of_known_molecules(smiles: str, atoms: int, edges: dict | None, charge: int, tmp_path: Path) -> None:
    """Count atoms, bonds of each order in both directions, and charges."""
    graph = of_smiles(smiles, tmp_path)
    assert len(graph.atomic_number) == atoms
    assert edges is None or counted(graph) == edges
    assert np.abs(graph.formal_charge).sum() == charge and graph.formal_charge.sum() == 0
    assert not graph.edge_vector.any()


def test_one_graph_however_the_smiles_is_written(tmp_path: Path) -> None:
    """Write toluene in three ways: the same atoms in the same order, also as conformers."""
    settings = MoleculeSettings(geometry="conformers")
    graphs = [of_smiles(text, tmp_path, settings) for text in ("Cc1ccccc1", "c1ccccc1C", "C1=CC=CC=C1C")]
    for graph in graphs[1:]:
        for name in ("atomic_number", "edge_source", "edge_target", "edge_bond", "edge_vector"):
            assert np.array_equal(getattr(graph, name), getattr(graphs[0], name))
    other = of_smiles("Cc1ccccc1", tmp_path, replace(settings, seed=1))
    assert not np.array_equal(other.edge_vector, graphs[0].edge_vector)


def test_lengths_of_conformers_are_those_of_chemistry(tmp_path: Path) -> None:
    """Find C-C 1.39 Å and C-H 1.09 Å in benzene, every pair within the radius, and vectors that oppose each other."""
    graph = of_smiles("c1ccccc1", tmp_path, MoleculeSettings(geometry="conformers", radius=2.6))
    length = np.linalg.norm(graph.edge_vector, axis=1)
    assert np.abs(length[graph.edge_bond == BONDS.index("aromatic")] - 1.39).max() < 0.02
    assert np.abs(length[graph.edge_bond == BONDS.index("single")] - 1.09).max() < 0.02
    # Each carbon sees two others along the ring at 1.39 and two across at 2.41 Å; no pair is between 2.48 and 2.6.
    through_space = (graph.edge_bond == 0) & (graph.atomic_number[graph.edge_source] == 6)
    assert (through_space & (graph.atomic_number[graph.edge_target] == 6)).sum() == 12
    back = {(t, s): v for s, t, v in zip(graph.edge_source, graph.edge_target, graph.edge_vector, strict=True)}
    for s, t, v in zip(graph.edge_source, graph.edge_target, graph.edge_vector, strict=True):
        assert np.allclose(back[s, t], -v)


def test_every_atom_knows_its_places_in_all_conformers(tmp_path: Path) -> None:
    """Butane's conformers differ, edges are the first one's, and bonds are as long in all of them; a cage has fewer, repeated."""
    graph = of_smiles("CCCC", tmp_path, MoleculeSettings(geometry="conformers", conformers=5))
    assert graph.conformers.shape == (14, 5, 3)
    between = graph.conformers[graph.edge_source] - graph.conformers[graph.edge_target]
    assert np.allclose(between[:, 0], graph.edge_vector, atol=1e-5)
    length = np.linalg.norm(between, axis=2)
    assert np.ptp(length[graph.edge_bond > 0], axis=1).max() < 0.02 and np.ptp(length, axis=1).max() > 0.5
    assert np.abs(graph.conformers.mean(axis=0)).max() < 1e-5
    alone = of_smiles("CCCC", tmp_path, MoleculeSettings(geometry="conformers"))
    assert alone.conformers.shape == (14, 1, 3) and np.allclose(alone.edge_vector, graph.edge_vector)
    cage = of_smiles("OC1C2CC11CCC1C2", tmp_path, MoleculeSettings(geometry="conformers", conformers=3))
    assert cage.conformers.shape == (21, 3, 3)


@pytest.mark.parametrize(
    ("smiles", "charges"), [("O", [-0.86, 0.43, 0.43]), ("c1ccccc1", [-0.15] * 6 + [0.15] * 6), ("[He]", [0.0])]
)
def test_partial_charges_are_those_of_mmff94(smiles: str, charges: list[float], tmp_path: Path) -> None:
    """Water's and benzene's, as published (Halgren 1996); none of helium, which has no parameters."""
    assert np.allclose(of_smiles(smiles, tmp_path).partial_charge, charges, atol=1e-6)


def test_conformers_reach_the_model(tmp_path: Path) -> None:
    """Through the file, in batches, in another order; what has other numbers of conformers is refused."""
    (tmp_path / "m.csv").write_text("id,smiles,mu\n" + "".join(f"{k},CC{'C' * k}O,{k}\n" for k in range(6)))
    settings = MoleculeSettings(geometry="conformers", conformers=2)
    prepare_molecules(tmp_path / "m.h5", tmp_path / "m.csv", settings=settings, comm=parallel.SELF)
    shards = Shards(tmp_path / "m.h5")
    assert shards.schema.conformers == 2
    rows = shards.read(np.arange(6))
    assert isinstance(rows.inputs, GraphArrays)
    for place, name in enumerate(rows.ids):
        alone = of_smiles(f"CC{'C' * int(name)}O", tmp_path, settings)
        found = rows.inputs.take(np.array([place]))
        assert np.array_equal(found.conformers, alone.conformers)
        assert np.array_equal(found.partial_charge, alone.partial_charge) and alone.partial_charge.any()
    batch = graph_batch(rows.inputs, np.array([4, 1]))
    assert batch.conformers.shape == (len(batch.atomic_number), 2, 3) and batch.conformers.dtype == torch.float64
    with DatasetWriter(tmp_path / "n.h5", replace(shards.schema, conformers=3)) as writer:
        with pytest.raises(DataError, match="atoms of 2 conformers, expected 3"):
            writer.append(rows, np.zeros(6, np.uint8))
        more = replace(rows.inputs, conformers=rows.inputs.conformers[:, [0, 1, 0]])
        writer.append(replace(rows, inputs=more), np.zeros(6, np.uint8))
    (tmp_path / "both").mkdir()
    for part, name in enumerate(("m.h5", "n.h5")):
        (tmp_path / name).rename(tmp_path / "both" / f"part-{part:05d}.h5")
    with pytest.raises(DataError, match="conformers is 3, but 2"):
        Shards(tmp_path / "both")


@pytest.mark.parametrize(("conformers", "geometry"), [(0, "conformers"), (2, "source")])
def test_conformers_that_there_cannot_be_are_refused(conformers: int, geometry: str) -> None:
    with pytest.raises(OptionError, match=f"--conformers {conformers}"):
        MoleculeSettings(geometry=geometry, conformers=conformers)


def test_a_cage_without_room_for_what_is_known_has_a_conformer(tmp_path: Path) -> None:
    """ETKDG finds no place for the hydrogen atoms of this spiro cage: bonds are as long as bonds are, and no atoms meet."""
    graph = of_smiles("OC1C2CC11CCC1C2", tmp_path, MoleculeSettings(geometry="conformers"))
    length = np.linalg.norm(graph.edge_vector, axis=1)
    carbons = (graph.atomic_number[graph.edge_source] == 6) & (graph.atomic_number[graph.edge_target] == 6)
    hydrogens = graph.atomic_number[graph.edge_source] == 1
    bonded = graph.edge_bond > 0
    assert (graph.atomic_number == 1).sum() == 12 and length.min() > 0.9
    assert 1.4 < length[bonded & carbons].min() and length[bonded & carbons].max() < 1.7
    assert length[bonded & hydrogens].max() < 1.2


def molecule() -> Chem.Mol:
    """Return acetamide with coordinates."""
    made = Chem.AddHs(Chem.MolFromSmiles("CC(N)=O"))
    rdDistGeom.EmbedMolecule(made, randomSeed=7)
    made.SetProp("_Name", "acetamide")
    made.SetProp("mu", "3.7")
    return made


def described(graph: GraphArrays) -> tuple[np.ndarray, ...]:
    """Return what does not depend on the order of atoms."""
    z, length = graph.atomic_number, np.linalg.norm(graph.edge_vector, axis=1)
    table = np.stack(
        [z[graph.edge_source], z[graph.edge_target], graph.edge_bond, np.round(1e3 * length).astype(int)], axis=1
    )
    return np.sort(z), table[np.lexsort(table.T)]


def test_sdf_xyz_and_json_lines_give_one_graph(tmp_path: Path) -> None:
    """Write one molecule in four forms: bonds perceived from coordinates are those that SDF states."""
    made = molecule()
    numbers = [atom.GetAtomicNum() for atom in made.GetAtoms()]
    places = made.GetConformer().GetPositions().round(4)
    writer = Chem.SDWriter(str(tmp_path / "a.sdf"))
    writer.write(made)
    writer.close()
    xyz = Chem.MolToXYZBlock(made).splitlines()
    folder = tmp_path / "xyz"
    folder.mkdir()
    (folder / "acetamide.xyz").write_text("\n".join(xyz))
    (folder / "id_prop.csv").write_text("id,mu\nacetamide,3.7\n")
    (tmp_path / "a.xyz").write_text("\n".join([xyz[0], 'id=acetamide mu="3.7"', *xyz[2:]]))
    entry = {"id": "acetamide", "mu": 3.7, "Z": numbers, "xyz": places.ravel().tolist()}
    (tmp_path / "a.jsonl").write_text(json.dumps(entry))
    found = []
    for name in ("a.sdf", "xyz", "a.xyz", "a.jsonl"):
        done = build_molecules(list(source_rows(tmp_path / name)), MoleculeSettings(), DIPOLE)
        assert not done.skipped, (name, done.skipped)
        assert (list(done.ids), list(done.values), list(done.groups)) == (["acetamide"], [3.7], ["CC(N)=O"]), name
        found.append(described(done.graphs))
    for other in found[1:]:
        assert np.array_equal(other[0], found[0][0])
        assert np.abs(other[1] - found[0][1]).max() <= 1


def test_bad_rows_are_named(tmp_path: Path) -> None:
    """Put every kind of bad row between two good ones."""
    rows = {
        "good,CCO,1.0": "",
        "rings,C1CC,1.0": "RDKit",
        "valence,C(C)(C)(C)(C)C,1.0": "RDKit rejects it: .*valence",
        "nothing,,1.0": r"no smiles \(say its column with --smiles-column\)",
        "star,C*,1.0": "an atom without a chemical element",
        "missing,CC,": "no mu",
        "nan,CC,nan": "mu is nan, not finite",
        "word,CC,polar": "mu is 'polar', not a number",
        "last,CCC,3.0": "",
    }
    done = built("id,smiles,mu\n" + "\n".join(rows), tmp_path / "rows.csv", FLAT, DIPOLE)
    assert list(done.ids) == ["good", "last"]
    for skipped, (row, reason) in zip(done.skipped, [item for item in rows.items() if item[1]], strict=True):
        assert skipped.row.startswith(row.split(",")[0] + " (line "), skipped
        assert re.search(reason, skipped.reason), skipped
    near = '{"Z": [6, 6], "xyz": [0, 0, 0, 0, 0, 0.01]}'
    lines = built(
        f'{{oops\n[1]\n{{"Z": [6], "xyz": [0, 0, 1, 2, 3, 4]}}\n{near}', tmp_path / "r.jsonl", MoleculeSettings()
    )
    expected = ["JSONDecodeError", "no JSON object", "not three finite numbers", "overlap"]
    for skipped, reason in zip(lines.skipped, expected, strict=True):
        assert re.search(reason, skipped.reason), skipped


def test_relatives_stay_together(tmp_path: Path) -> None:
    """Give one scaffold to benzene's derivatives, and none of the acyclic ones a common one."""
    text = "id,smiles\n" + "\n".join(f"{i},{s}" for i, s in enumerate(["c1ccccc1C", "c1ccccc1O", "CCO", "CCN", "OCC"]))
    by_scaffold = built(text, tmp_path / "a.csv", replace(FLAT, group="scaffold")).groups
    assert by_scaffold[0] == by_scaffold[1] == "c1ccccc1" and len(set(by_scaffold)) == 3
    by_smiles = built(text, tmp_path / "a.csv").groups
    assert len(set(by_smiles)) == 4 and by_smiles[2] == by_smiles[4] == "CCO"


def test_sources_as_a_whole_are_checked(tmp_path: Path) -> None:
    """Refuse what is missing, of no known kind, or damaged."""
    (tmp_path / "a.pdb").write_text("")
    (tmp_path / "a.xyz").write_text("three\natoms\n")
    with gzip.open(tmp_path / "cut.csv.gz", "wt") as file:
        file.write("id,smiles\n" + "\n".join(f"{i},CC{'C' * (i % 7)}" for i in range(3000)))
    (tmp_path / "cut.csv.gz").write_bytes((tmp_path / "cut.csv.gz").read_bytes()[:-300])
    (tmp_path / "empty").mkdir()
    for name, message in {
        "none.csv": "no such file or folder; SOURCE is a table with SMILES",
        "a.pdb": "unknown kind of source",
        "a.xyz": "line 1 is not a number of atoms",
        "cut.csv.gz": "cannot be read to its end",
        "empty": "no xyz files and no id_prop.csv",
    }.items():
        with pytest.raises(DataError, match=message):
            prepare_molecules(tmp_path / "out.h5", tmp_path / name, comm=parallel.SELF)
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(OptionError, match="--geometry 3d: choose one of source, conformers, none"):
        MoleculeSettings(geometry="3d")


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.skipif(not DATA.is_dir(), reason="../shared/data/molecules is not there")
def test_real_molecules_do_not_depend_on_the_workers(shared_tmp_path: Path) -> None:
    """Prepare 200 of QM9 with all ranks, and alone; their dipole classes are the published ones."""
    source, shares = DATA / "molecules.csv.gz", Shares(limit=200)
    report = prepare_molecules(shared_tmp_path / "many.h5", source, settings=FLAT, shares=shares)
    assert sum(report.split_counts) == 200 and not report.skipped
    with parallel.agreement(parallel.WORLD):
        if parallel.WORLD.rank == 0:
            prepare_molecules(shared_tmp_path / "alone.h5", source, settings=FLAT, shares=shares, comm=parallel.SELF)
    many, alone = Shards(shared_tmp_path / "many.h5"), Shards(shared_tmp_path / "alone.h5")
    rows = np.arange(200)
    one, other = many.read(rows), alone.read(rows)
    assert list(one.ids) == list(other.ids) and np.array_equal(one.targets, other.targets)
    assert isinstance(one.inputs, GraphArrays) and isinstance(other.inputs, GraphArrays)
    assert np.array_equal(one.inputs.edge_bond, other.inputs.edge_bond)
    with gzip.open(source, "rt") as file:
        published = {row["id"]: float(row["mu"]) for row in csv.DictReader(file)}
    assert one.targets.tolist() == [int(published[name] >= 2.5) for name in one.ids]
