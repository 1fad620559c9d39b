"""Oxidation states of compositions: textbook compounds, intermetallics, and what they say of real crystals."""

from __future__ import annotations

import gzip
import itertools
import json

import numpy as np
import pytest
from conftest import DATA
from pymatgen.core import Composition, Element

from hpcdeq.builders.oxidation import oxidation_states


def atoms(formula: str) -> np.ndarray:
    counts = Composition(formula).get_el_amt_dict()
    return np.array([Element(symbol).Z for symbol, count in counts.items() for _ in range(int(count))])


def states(formula: str) -> dict[str, int]:
    number = atoms(formula)
    found = oxidation_states(number)
    return {Element.from_Z(int(z)).symbol: int(q) for z, q in zip(number, found, strict=True)}


KNOWN = {
    "NaCl": {"Na": 1, "Cl": -1},
    "Fe2O3": {"Fe": 3, "O": -2},
    "SrTiO3": {"Sr": 2, "Ti": 4, "O": -2},
    "GaAs": {"Ga": 3, "As": -3},
    "KMnO4": {"K": 1, "Mn": 7, "O": -2},
    "CaCO3": {"Ca": 2, "C": 4, "O": -2},
    "NaAlCu2": {"Na": 0, "Al": 0, "Cu": 0},  # without an anion
    "NiAl": {"Ni": 0, "Al": 0},
    "NaO": {"Na": 0, "O": 0},  # a peroxide's formula is not balanced by common states
    "Si": {"Si": 0},
}


@pytest.mark.parametrize("formula", sorted(KNOWN))
def test_states_are_those_of_the_textbook(formula: str) -> None:
    assert states(formula) == KNOWN[formula]


def test_a_cell_of_several_formulas_in_any_order_has_the_same_states() -> None:
    number = atoms("Fe4O6")
    shuffled = np.random.default_rng(0).permutation(number)
    found = oxidation_states(shuffled)
    assert found.dtype == np.int8 and found.sum() == 0
    assert set(zip(shuffled.tolist(), found.tolist(), strict=True)) == {(26, 3), (8, -2)}


def test_charges_always_balance_and_every_element_has_data() -> None:
    random = np.random.default_rng(1)
    for _ in range(300):
        found = oxidation_states(random.choice(np.arange(1, 104), random.integers(1, 4)).repeat(random.integers(1, 5)))
        assert found.sum() == 0
    for number in range(1, 119):
        assert oxidation_states(np.array([number])).tolist() == [0]


@pytest.mark.real_data
def test_a_balanced_crystal_is_seldom_a_metal() -> None:
    metals: dict[bool, list[bool]] = {False: [], True: []}
    with gzip.open(DATA / "crystals" / "crystals.jsonl.gz", "rt") as file:
        for line in itertools.islice(file, 0, None, 20):
            row = json.loads(line)
            metals[bool(oxidation_states(np.array(row["Z"])).any())].append(row["band_gap"] < 0.01)
    assert np.mean(metals[True]) < 0.2 and np.mean(metals[False]) > 0.65
