"""Reading a CIF file: pymatgen's parser, past its search for equal sites where there are none to be found."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pymatgen.core import Structure
    from pymatgen.io.cif import CifBlock, CifParser

SYMBOL = re.compile(r"([A-Z][a-z]?)(?:\d*[+-])?")  # an element, with or without its charge
FRACTIONS = ("_atom_site_fract_x", "_atom_site_fract_y", "_atom_site_fract_z")

Atoms = tuple[Any, Any, Any]  # lattice (3, 3) Å, atomic numbers (n,), coordinates (n, 3) in its vectors


def read_cif(path: Path) -> Atoms:
    """Return lattice, atomic numbers and fractional coordinates of the first structure of a file.

    Not collective.

    Raises
    ------
    ValueError
        The file is missing, empty or damaged, holds no structure, or a disordered one; pymatgen raises others.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    if not path.stat().st_size:
        raise ValueError(f"{path.name} is empty")
    from pymatgen.io.cif import CifFile, CifParser

    # Names of authors come in any encoding; what is read here is plain.
    text = path.read_text(encoding="utf-8", errors="replace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about rounding and formula remarks; what matters is checked by the callers
        try:
            file = CifFile.from_str(text)
        except Exception as error:  # of any kind: the parser counts on a good file
            raise ValueError(f"{path.name} is damaged: {type(error).__name__}: {error}") from error
        blocks = [block for block in file.data.values() if FRACTIONS[0] in block.data]
        if not blocks:
            raise ValueError(f"{path.name} has no atoms with fractional coordinates")
        # Journals put a block without atoms first, which pymatgen's parser refuses.
        parser = CifParser.from_str(text if len(file.data) == 1 else str(blocks[0]))
        listed = _all_listed(parser, blocks[0])
        return listed or ordered_atoms(parser.parse_structures(primitive=False, on_error="raise")[0])


def ordered_atoms(structure: Structure) -> Atoms:
    """Return lattice, atomic numbers and coordinates of a structure.

    Not collective.

    Raises
    ------
    ValueError
        It is disordered, or a site has no chemical element.
    """
    from pymatgen.core import DummySpecies

    if not structure.is_ordered:
        raise ValueError("disordered: sites with partial occupancy")
    if any(isinstance(site.specie, DummySpecies) for site in structure):
        raise ValueError("a site without a chemical element")
    return structure.lattice.matrix, [site.specie.Z for site in structure], structure.frac_coords


def _all_listed(parser: CifParser, block: CifBlock) -> Atoms | None:
    """Return the atoms of a block that lists each of them, whole; None for any other.

    pymatgen compares every site with all others, to merge those that share a place: minutes for 10,000 atoms. Without
    symmetry and partial occupancy, atoms that share a place are an error, which the search for neighbours finds.
    """
    from pymatgen.core import Element
    from pymatgen.io.cif import str2float

    names = block.data.get("_atom_site_type_symbol")
    found = [SYMBOL.fullmatch(name) for name in names] if isinstance(names, list) else []
    symbols = [match.group(1) for match in found if match]
    if not symbols or len(symbols) < len(found) or not all(map(Element.is_valid_symbol, symbols)):
        return None
    try:
        places = np.array([[str2float(text) for text in block.data[name]] for name in FRACTIONS]).T
        whole = all(str2float(share) == 1 for share in block.data.get("_atom_site_occupancy", ()))
        hydrogens = any(str2float(count) for count in block.data.get("_atom_site_attached_hydrogens", ()))
        operations = parser.get_symops(block)
        lattice = parser.get_lattice(block)
    except (ValueError, KeyError, TypeError):  # pymatgen knows what to make of it, or what to say
        return None
    alone = len(operations) == 1 and np.array_equal(operations[0].affine_matrix, np.eye(4))
    if hydrogens or not whole or not alone or lattice is None or places.shape != (len(symbols), 3):
        return None
    return lattice.matrix, [Element(symbol).Z for symbol in symbols], places
