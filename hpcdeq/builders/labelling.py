"""What is learned of each source row: a number, or a class that a number or a name stands for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpcdeq.errors import OptionError

Value = float | str


@dataclass(frozen=True)
class Labelling:
    """How a property of the source becomes a target.

    Attributes
    ----------
    property_name
        The property, or the column of class names.
    thresholds
        ``t`` increasing numbers: a value below the first is class 0, one from the last on is class ``t``.
    classes
        ``t + 1`` names; of named classes, those that may occur, in their order (empty: all that occur, sorted).
    units
        Unit of the property.
    regression
        Keep the value itself instead of a class.
    named
        The property is the name of a class.
    auxiliary
        Properties that are numbers, to be learned beside it.
    """

    property_name: str
    thresholds: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()
    units: str = ""
    regression: bool = False
    named: bool = False
    auxiliary: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if len(set(self.auxiliary)) < len(self.auxiliary) or not all(self.auxiliary):
            raise OptionError(f"--auxiliary {','.join(self.auxiliary)}: name every property once")
        if len(set(self.classes)) < len(self.classes) or not all(self.classes):
            raise OptionError(f"--classes {','.join(self.classes)}: every class has a name of its own")
        if self.regression or self.named:
            if self.regression and self.named:
                raise OptionError(f"{self.property_name}: names of classes are no numbers; drop --regression")
            return
        if not self.thresholds or any(np.diff(self.thresholds) <= 0) or not np.isfinite(self.thresholds).all():
            raise OptionError(f"--thresholds {self.thresholds} are not increasing numbers; e.g. --thresholds 0.01,3.0")
        if len(self.classes) != len(self.thresholds) + 1:
            wanted = len(self.thresholds) + 1
            raise OptionError(f"{len(self.classes)} class names for {wanted} classes; say --classes with {wanted}")

    def value(self, found: Any) -> Value:
        """Return a value as it stands in a row, checked.

        Not collective.

        Raises
        ------
        ValueError
            It is missing, no finite number, or no known class.
        """
        if not self.named:
            return number(self.property_name, found)
        name = "" if found is None else str(found).strip()
        # What numpy and pandas write for a missing value is no name of a class, unless it is said to be one.
        if not name or (name.lower() == "nan" and name not in self.classes):
            raise ValueError(f"no {self.property_name}")
        if self.classes and name not in self.classes:
            raise ValueError(f"{self.property_name} is '{name}', not one of {', '.join(self.classes)}")
        return name

    def auxiliary_values(self, find: Callable[[str], Any]) -> tuple[float, ...]:
        """Return the auxiliary properties of a row, NaN for those that it has not.

        Not collective.

        Parameters
        ----------
        find
            ``find(name)`` returns a property as it stands in the row, None if it has none.

        Raises
        ------
        ValueError
            One is there, but no number.
        """
        return tuple(_number_or_nan(name, find(name)) for name in self.auxiliary)

    def class_names(self, values: Sequence[Value]) -> tuple[str, ...]:
        """Return the names of the classes, given all values. Not collective."""
        if self.regression:
            return ()
        return self.classes or tuple(sorted({str(value) for value in values}))

    def targets(self, values: Sequence[Value], classes: Sequence[str]) -> np.ndarray:
        """Return ``(b,)`` labels, or ``(b, 1)`` numbers of a regression. Not collective."""
        if self.named:
            place = {name: label for label, name in enumerate(classes)}
            return np.array([place[str(value)] for value in values], np.int64)
        numbers = np.array(values, dtype=np.float64)
        if self.regression:
            return numbers[:, None]
        return np.searchsorted(np.array(self.thresholds), numbers, side="right").astype(np.int64)

    def schema_fields(self, classes: tuple[str, ...]) -> Mapping[str, Any]:
        """Return the keywords of `hpcdeq.data.schema.Schema` that labels decide. Not collective."""
        beside = {"auxiliary": self.auxiliary}
        if self.regression:
            names, units = (self.property_name,), (self.units or "1",)
            return beside | {"task": "regression", "target_names": names, "target_units": units}
        return beside | {"task": "classification", "classes": classes}

    @property
    def meaning(self) -> str:
        """What the classes are, for the file's provenance."""
        if self.named or self.regression:
            return self.property_name
        return f"{self.property_name} at {', '.join(map(str, self.thresholds))} {self.units}".strip()


def _number_or_nan(name: str, found: Any) -> float:
    try:
        value = number(name, found)
    except ValueError:
        # What is missing, in any of the ways in which tables and JSON say so.
        if found is None or str(found).strip().lower() in ("", "nan", "none", "null"):
            return math.nan
        raise
    return value


def number(name: str, found: Any) -> float:
    """Return a finite number.

    Not collective.

    Raises
    ------
    ValueError
        It is missing, no number, or not finite.
    """
    if found is None or isinstance(found, bool) or (isinstance(found, str) and not found.strip()):
        raise ValueError(f"no {name}")
    try:
        value = float(found)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is '{found}', not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}, not finite")
    return value
