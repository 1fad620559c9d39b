"""Oxidation states of a composition that balance its charges: what tells most metals from most insulators."""

from __future__ import annotations

import itertools
import math
import warnings
from functools import cache, lru_cache

import numpy as np

MOST = 300_000  # combinations that are tried


def oxidation_states(atomic_number: np.ndarray) -> np.ndarray:
    """Return a likely oxidation state of every atom, ``(n,)`` int8; zeros where common states do not add up to nothing.

    Not collective. Every element takes one of its common states (pymatgen's tables), the same at all its atoms. Of the choices
    without charge in all, the one with the most electronegative elements the most negative is returned: the least Σ q X, X
    Pauling's electronegativity.

    Parameters
    ----------
    atomic_number
        ``(n,)`` of a whole cell.
    """
    elements, place, counts = np.unique(atomic_number, return_inverse=True, return_counts=True)
    formula = counts // math.gcd(*counts.tolist())
    states = _of_formula(tuple(elements.tolist()), tuple(formula.tolist()))
    return np.array(states, np.int8)[place]


@lru_cache(maxsize=100_000)
def _of_formula(elements: tuple[int, ...], counts: tuple[int, ...]) -> tuple[int, ...]:
    """Return the states of the elements of a formula."""
    neutral = (0,) * len(elements)
    known = [_of_element(number) for number in elements]
    if len(elements) == 1 or math.prod(len(states) for states, _ in known) > MOST:
        return neutral
    choices = np.array(list(itertools.product(*(states for states, _ in known))))
    charges = choices * np.array(counts)
    balanced = charges.sum(axis=1) == 0
    if not balanced.any():
        return neutral
    electronegativity = np.array([x for _, x in known])
    return tuple(choices[balanced][np.argmin(charges[balanced] @ electronegativity)].tolist())


@cache
def _of_element(number: int) -> tuple[tuple[int, ...], float]:
    """Return the common oxidation states of an element (all known ones without any), and its electronegativity."""
    from pymatgen.core import Element

    element = Element.from_Z(number)
    states = element.common_oxidation_states or element.oxidation_states or (0,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns of what is not known
        x = float(element.X)
    return tuple(sorted({int(state) for state in states})), 1.5 if math.isnan(x) else x
