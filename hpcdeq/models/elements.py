"""What tables say of the chemical elements, as features of an atom."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from hpcdeq.data import GraphBatch

HEAVIEST = 118
HIGHEST = 8  # charge of an atom that is told from higher ones
BLOCKS = ("s", "p", "d", "f")
# Attributes of pymatgen's Element, and whether their logarithm is nearer to a normal distribution.
TABULATED = (
    ("X", False),
    ("atomic_radius", False),
    ("ionization_energy", True),
    ("electron_affinity", False),
    ("atomic_mass", True),
    ("mendeleev_no", False),
    ("melting_point", True),
    ("molar_volume", True),
)


@lru_cache(maxsize=1)
def element_table() -> Tensor:
    """Return features of every atomic number from 0 (no element: zeros) to 118, ``(119, F)``, of mean 0 and deviation 1.

    Not collective. Period, group as a place on a circle of 18, block, electrons in open s, p, d and f shells, and what pymatgen
    tabulates: electronegativity (Pauling), atomic radius, first ionisation energy, electron affinity, mass, Mendeleev number
    (Pettifor 1984), melting point, molar volume. What is not known of an element is the mean.
    """
    from pymatgen.core import Element

    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns of what is not known
        for number in range(1, HEAVIEST + 1):
            element = Element.from_Z(number)
            angle = 2 * math.pi * element.group / 18
            found = [float(element.row), math.cos(angle), math.sin(angle)]
            found += [float(element.block == block) for block in BLOCKS]
            found += _open_shells(element)
            found += [_tabulated(element, name, logarithm=logarithm) for name, logarithm in TABULATED]
            rows.append(found)
    table = torch.tensor(rows, dtype=torch.float64)
    known = table.isfinite()
    count = known.sum(dim=0)
    mean = table.nan_to_num(0.0).sum(dim=0) / count
    centred = torch.where(known, table - mean, 0.0)
    deviation = (centred.square().sum(dim=0) / count).sqrt()
    return torch.cat([torch.zeros(1, table.shape[1]), centred / deviation]).float()


def _open_shells(element: Any) -> list[float]:
    """Return the electrons in open s, p, d and f shells; NaN where the structure is not known."""
    try:
        shells = element.full_electronic_structure
    except KeyError:
        return [math.nan] * len(BLOCKS)
    room = {block: 2 * (2 * place + 1) for place, block in enumerate(BLOCKS)}
    return [float(sum(n for _, kind, n in shells if kind == block and n < room[block])) for block in BLOCKS]


def _tabulated(element: Any, name: str, *, logarithm: bool) -> float:
    try:
        value = float(getattr(element, name))
    except (TypeError, ValueError, AttributeError, KeyError):  # what pymatgen says of what is not known
        return math.nan
    if not logarithm:
        return value
    return math.log(value) if value > 0 else math.nan


class ElementEmbedding(nn.Module):
    """A vector of each atom: one learned for its element, one for its formal charge, and linear maps of tabulated features of the
    element and of the atom's partial charge.

    The features tell a model of elements that it has seldom or never seen what they resemble.

    Parameters
    ----------
    width
        Numbers of a vector.
    """

    table: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        table = element_table()
        self.register_buffer("table", table)
        self.own = nn.Embedding(len(table), width)
        self.tabulated = nn.Linear(table.shape[1], width)
        self.charge = nn.Embedding(2 * HIGHEST + 1, width)
        self.partial = nn.Linear(1, width, bias=False)
        with torch.no_grad():
            self.own.weight.mul_(0.5)
            self.charge.weight.mul_(0.1)

    def forward(self, batch: GraphBatch) -> Tensor:
        """Return ``(n, width)`` for the nodes of a batch."""
        number = batch.atomic_number
        charge = batch.formal_charge.clamp(-HIGHEST, HIGHEST) + HIGHEST
        atoms: Tensor = self.own(number) + self.tabulated(self.table.index_select(0, number)) + self.charge(charge)
        return atoms + self.partial(batch.partial_charge[:, None])
