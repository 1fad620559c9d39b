"""Blocks of rows of molecules to graphs, by RDKit: the part of preparing molecules that workers do."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hpcdeq.builders.labelling import Labelling, Value
from hpcdeq.builders.molecule_sources import SDF, SMILES, XYZ, MoleculeRow
from hpcdeq.builders.neighbours import SAME_DISTANCE
from hpcdeq.builders.samples import Skipped
from hpcdeq.builders.spool import Built
from hpcdeq.builders.structures import ID_KEYS, reason_of, split_named
from hpcdeq.data.graphs import BONDS, NODE_FIELDS, GraphArrays, join_graphs
from hpcdeq.data.rows import HEAVIEST
from hpcdeq.errors import OptionError

if TYPE_CHECKING:
    from rdkit.Chem import Mol

TRIES = 30  # of each way to embed a molecule
GEOMETRIES = SOURCE, CONFORMERS, NONE = "source", "conformers", "none"
SMILES_COLUMNS = ("smiles", "canonical_smiles", "SMILES", "Smiles")


@dataclass(frozen=True)
class MoleculeSettings:
    """How a molecule becomes a graph; hydrogen atoms are nodes of their own.

    Attributes
    ----------
    geometry
        ``source``: coordinates of the source, where it has them. ``conformers``: and ETKDG's where it has none. ``none``:
        bonds alone, without lengths.
    conformers
        ETKDG conformers that the atoms have places in; edges are those of the first. Of a SMILES without stereochemistry each is
        of an isomer of its own.
    radius
        Å: with coordinates, pairs of atoms up to this distance are edges as well as bonds.
    group
        What relatives share, which are never in two splits: ``smiles`` (canonical), ``scaffold`` (Bemis and Murcko 1996), or
        a field of the source.
    smiles_column
        Column of a table; empty: the one that is called so.
    seed
        Of conformers.
    """

    geometry: str = SOURCE
    conformers: int = 1
    radius: float = 5.0
    group: str = SMILES
    smiles_column: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        if self.geometry not in GEOMETRIES:
            raise OptionError(f"--geometry {self.geometry}: choose one of {', '.join(GEOMETRIES)}")
        if self.conformers < 1 or (self.conformers > 1 and self.geometry != CONFORMERS):
            raise OptionError(f"--conformers {self.conformers}: give 1, or more together with --geometry {CONFORMERS}")
        if not self.radius > 0:
            raise OptionError(f"--radius {self.radius}: a length in angstrom")

    @property
    def places(self) -> int:
        """Positions of every atom; zeros where a source has no coordinates."""
        return 0 if self.geometry == NONE else self.conformers


def build_molecules(rows: list[MoleculeRow], settings: MoleculeSettings, labels: Labelling | None) -> Built:
    """Read some rows of a source of molecules and build their graphs.

    Not collective: runs in workers.
    """
    from rdkit import rdBase

    graphs: list[GraphArrays] = []
    ids: list[str] = []
    values: list[Value] = []
    splits: list[str] = []
    groups: list[str] = []
    auxiliary: list[tuple[float, ...]] = []
    skipped: list[Skipped] = []
    with rdBase.BlockLogs():  # reasons are told row by row
        for row in rows:
            name = _named(row, row.fields)
            try:
                molecule, fields = _molecule(row, settings)
                name = _named(row, fields)
                value: Value = float("nan")
                beside: tuple[float, ...] = ()
                if labels is not None:
                    value = labels.value(fields.get(labels.property_name))
                    beside = labels.auxiliary_values(fields.get)
                split = split_named(fields.get("split")) or ""
                group = _group(molecule, fields, settings.group)
                graphs.append(graph_of(molecule, settings))
            except (
                Exception
            ) as error:  # foreign parsers on foreign input raise anything; one bad row must not end the job
                skipped.append(Skipped(name, reason_of(error)))
                continue
            ids.append(_identity(fields) or row.name)
            values.append(value)
            splits.append(split)
            groups.append(group)
            auxiliary.append(beside)
    return Built(ids, values, splits, groups, join_graphs(graphs), skipped, auxiliary)


def _identity(fields: Mapping[str, Any]) -> str:
    return next((str(fields[key]) for key in ID_KEYS if fields.get(key)), "")


def _named(row: MoleculeRow, fields: Mapping[str, Any]) -> str:
    identity = _identity(fields)
    return f"{identity} ({row.name})" if identity and identity != row.name else row.name


def _molecule(row: MoleculeRow, settings: MoleculeSettings) -> tuple[Mol, Mapping[str, Any]]:
    """Return a sanitised molecule with all its hydrogen atoms, and the row's fields."""
    from rdkit import Chem

    fields = row.fields
    if row.form == SMILES:
        molecule = _from_smiles(_smiles_of(fields, settings.smiles_column))
    elif row.form == SDF:
        found = next(Chem.ForwardSDMolSupplier(io.BytesIO(row.text.encode()), sanitize=False, removeHs=False), None)
        if found is None:
            raise ValueError("RDKit cannot read this record")
        molecule = found
        fields = {"id": molecule.GetProp("_Name") if molecule.HasProp("_Name") else "", **molecule.GetPropsAsDict()}
        molecule = _sanitised(molecule)
        if molecule.GetNumConformers() and not molecule.GetConformer().Is3D():
            molecule.RemoveAllConformers()
    elif row.form == XYZ:
        molecule = _from_xyz(row.text)
    else:
        fields = json.loads(row.text)
        if not isinstance(fields, Mapping):
            raise ValueError("no JSON object")
        if {"Z", "xyz"} <= fields.keys():
            molecule = _from_coordinates(fields["Z"], fields["xyz"])
        else:
            molecule = _from_smiles(_smiles_of(fields, settings.smiles_column))
    if molecule.GetNumAtoms() == 0:
        raise ValueError("no atoms")
    if any(not 1 <= atom.GetAtomicNum() <= HEAVIEST for atom in molecule.GetAtoms()):
        raise ValueError("an atom without a chemical element")
    coordinates = molecule.GetNumConformers() > 0
    return Chem.AddHs(molecule, addCoords=coordinates), fields


def _smiles_of(fields: Mapping[str, Any], column: str) -> str:
    names = (column,) if column else SMILES_COLUMNS
    found = next((fields[name] for name in names if fields.get(name)), None)
    if found is None:
        hint = "" if column else " (say its column with --smiles-column)"
        raise ValueError(f"no {column or 'smiles'}{hint}")
    return str(found).strip()


def _from_smiles(text: str) -> Mol:
    from rdkit import Chem

    molecule = Chem.MolFromSmiles(text, sanitize=False)
    if molecule is None:
        raise ValueError(f"RDKit cannot read the SMILES '{text}'")
    # From its canonical SMILES, so that atoms are in the same order however it was written.
    return Chem.MolFromSmiles(Chem.MolToSmiles(_sanitised(molecule)))


def _sanitised(molecule: Mol) -> Mol:
    from rdkit import Chem

    try:
        Chem.SanitizeMol(molecule)
    except Exception as error:  # RDKit's own exceptions, of many kinds
        raise ValueError(f"RDKit rejects it: {error}") from error
    return molecule


def _from_xyz(text: str) -> Mol:
    from rdkit import Chem

    if not text.strip():
        raise ValueError("the xyz file is missing or empty")
    # RDKit's own reader takes what is cut off for blanks.
    lines = text.splitlines()
    numbers, places = [], []
    for line in lines[2 : 2 + int(lines[0])]:
        kind, *cells = line.split()
        numbers.append(int(kind) if kind.isdigit() else Chem.GetPeriodicTable().GetAtomicNumber(kind))
        places.append([float(cell.replace("*^", "e")) for cell in cells[:3]])
    if len(numbers) != int(lines[0]):
        raise ValueError(f"{lines[0]} atoms announced, {len(numbers)} there")
    return _from_coordinates(numbers, places)


def _from_coordinates(numbers: Any, places: Any) -> Mol:
    """Return a molecule of atoms at places, with bonds as RDKit perceives them for a neutral one; none where it cannot."""
    from rdkit import Chem
    from rdkit.Chem import rdDetermineBonds

    xyz = np.asarray(places, float).reshape(-1, 3)
    if len(xyz) != len(numbers) or not np.isfinite(xyz).all():
        raise ValueError(f"{len(numbers)} atoms, and coordinates that are not three finite numbers for each")
    molecule = Chem.RWMol()
    for number in numbers:
        molecule.AddAtom(Chem.Atom(int(number)))
    conformer = Chem.Conformer(len(xyz))
    conformer.SetPositions(np.ascontiguousarray(xyz))
    conformer.Set3D(True)
    molecule.AddConformer(conformer)
    bonded = Chem.RWMol(molecule)
    try:
        rdDetermineBonds.DetermineBonds(bonded, charge=0)
        Chem.SanitizeMol(bonded)
        if len(Chem.GetMolFrags(bonded)) == 1:
            return bonded.GetMol()
    except Exception:  # perceived bonds are a help, no more: ions, radicals and metals have none by these rules
        pass
    for atom in molecule.GetAtoms():
        atom.SetNoImplicit(True)
    molecule.UpdatePropertyCache(strict=False)
    return molecule.GetMol()


def _group(molecule: Mol, fields: Mapping[str, Any], kind: str) -> str:
    from rdkit import Chem
    from rdkit.Chem.Scaffolds import MurckoScaffold

    if kind not in (SMILES, "scaffold"):
        if not fields.get(kind):
            raise ValueError(f"no {kind}, which is to name its relatives (--group)")
        return str(fields[kind])
    bare = Chem.RemoveHs(molecule)
    scaffold = MurckoScaffold.MurckoScaffoldSmiles(mol=bare) if kind == "scaffold" else ""
    return scaffold or Chem.MolToSmiles(bare)


def graph_of(molecule: Mol, settings: MoleculeSettings) -> GraphArrays:
    """Return the graph of a molecule with all its hydrogen atoms.

    Not collective.

    Raises
    ------
    ValueError
        No conformer was found.
    """
    from rdkit.Chem import BondType

    kinds = {BondType.DOUBLE: "double", BondType.TRIPLE: "triple", BondType.AROMATIC: "aromatic"}
    atoms = molecule.GetNumAtoms()
    bond = np.zeros((atoms, atoms), np.uint8)
    for found in molecule.GetBonds():
        i, j = found.GetBeginAtomIdx(), found.GetEndAtomIdx()
        bond[i, j] = bond[j, i] = BONDS.index(kinds.get(found.GetBondType(), "single"))
    positions = _positions(molecule, settings)
    linked = bond > 0
    vectors = np.zeros((atoms, atoms, 3))
    if positions is not None:
        vectors = positions[0][None, :] - positions[0][:, None]
        distance = np.linalg.norm(vectors, axis=2)
        linked |= (distance <= settings.radius) & ~np.eye(atoms, dtype=bool)
        if linked.any() and distance[linked].min() < 0.1:
            raise ValueError(f"two atoms are {distance[linked].min():.3g} A apart: they overlap")
    target, source = np.nonzero(linked)
    vector = vectors[target, source]
    order = np.lexsort((source, np.rint(np.linalg.norm(vector, axis=1) / SAME_DISTANCE), target))
    target, source, vector = target[order], source[order], vector[order]
    return GraphArrays(
        np.array([0, atoms]),
        np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()], np.uint8),
        np.array([0, len(source)]),
        source.astype(np.int32),
        target.astype(np.int32),
        vector,
        bond[target, source],
        np.array([atom.GetFormalCharge() for atom in molecule.GetAtoms()], np.int8),
        _partial_charges(molecule),
        _centred(np.zeros((settings.places, atoms, 3)) if positions is None else positions),
    )


def _partial_charges(molecule: Mol) -> np.ndarray:
    """Return ``(n,)`` charges of MMFF94 (Halgren 1996), or zeros where it does not know the atoms and their bonds."""
    from rdkit.Chem import rdForceFieldHelpers

    found = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule)
    charges = [0.0 if found is None else found.GetMMFFPartialCharge(k) for k in range(molecule.GetNumAtoms())]
    return np.array(charges, NODE_FIELDS["partial_charge"])


def _positions(molecule: Mol, settings: MoleculeSettings) -> np.ndarray | None:
    """Return ``(C, n, 3)`` Å: the source's, or of conformers (Riniker and Landrum 2015, refined by MMFF94), or None."""
    if settings.geometry == NONE:
        return None
    if not molecule.GetNumConformers():
        if settings.geometry != CONFORMERS:
            return None
        from rdkit.Chem import rdForceFieldHelpers

        molecule = _embedded(molecule, settings)
        if rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule):
            rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(molecule)
    found = [conformer.GetPositions() for conformer in molecule.GetConformers()]
    return np.array([found[k % len(found)] for k in range(settings.conformers)], float)


def _centred(positions: np.ndarray) -> np.ndarray:
    """Return ``(n, C, 3)``, every conformer about its own centre."""
    return (positions - positions.mean(axis=1, keepdims=True)).transpose(1, 0, 2).astype(NODE_FIELDS["conformers"])


def _embedded(molecule: Mol, settings: MoleculeSettings) -> Mol:
    """Return a molecule, all hydrogen atoms included, with as many conformers as asked for, or at least one.

    Cages find no place by what is known of open molecules. Some do without that knowledge, and more without their hydrogen
    atoms, which are then added where there is room. Who finds none in the first tries seldom does later.

    Raises
    ------
    ValueError
        None of this finds a conformer.
    """
    from rdkit import Chem
    from rdkit.Chem import rdDistGeom

    def finds(whom: Mol, make: Any, *, random: bool) -> bool:
        parameters = make()
        parameters.randomSeed = settings.seed + 1  # -1 would be another every time
        parameters.useRandomCoords = random
        parameters.maxIterations = TRIES
        return len(rdDistGeom.EmbedMultipleConfs(whom, settings.conformers, parameters)) > 0

    informed, plain = rdDistGeom.ETKDGv3, rdDistGeom.EmbedParameters
    if any(
        finds(molecule, make, random=random) for make, random in ((informed, False), (informed, True), (plain, True))
    ):
        return molecule
    bare = Chem.RemoveHs(molecule)
    if finds(bare, plain, random=True):
        whole = Chem.AddHs(bare, addCoords=True)
        numbers = [[atom.GetAtomicNum() for atom in each.GetAtoms()] for each in (whole, molecule)]
        if numbers[0] == numbers[1]:
            return whole
    raise ValueError("ETKDG finds no conformer")
