"""What can be chosen about datasets of fields: one class for each differential equation, each default written once.

Nothing heavy is imported: a command line is understood, and its help printed, without numpy.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from hpcdeq.errors import OptionError

T = TypeVar("T")


def setting(default: T, metavar: str, text: str) -> T:
    """Return a dataclass field that the command line shows with its meaning. Not collective."""
    made: Any = dataclasses.field(default=default, metadata={"metavar": metavar, "help": text})
    return made  # a dataclass field stands for its default in the eyes of a type checker


@dataclass(frozen=True)
class FieldSettings:
    """What the settings of every equation have in common; the docstring of each is its help.

    Attributes
    ----------
    kind
        Its name on the command line.
    summary
        One line for the help: what is given, and what is to be found.
    """

    kind: ClassVar[str] = ""
    summary: ClassVar[str] = ""

    def check(self) -> None:
        """Raise `OptionError` for a value that makes no sense. Not collective."""
        raise NotImplementedError

    def refuse(self, name: str, legal: str) -> None:
        """Raise `OptionError`: the value of a setting, and what it has to be. Not collective."""
        raise OptionError(f"--{name} {getattr(self, name)}: {legal}")

    def check_positive(self, *names: str) -> None:
        """Refuse numbers that are not finite or not above 0. Not collective."""
        for name in names:
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                self.refuse(name, "above 0")

    def check_modes(self, least: int = 1) -> None:
        """Refuse fewer modes than ``least``. Not collective."""
        if getattr(self, "modes", least) < least:
            self.refuse("modes", f"at least {least}")


@dataclass(frozen=True)
class Burgers(FieldSettings):
    """Viscous Burgers, u_t + u u_x = nu u_xx, periodic on [0, 1).

    Input: u(x, 0), a random field. Target: u(x, T). Solved pseudo-spectrally on
    a finer grid; refused where the solution is not resolved.
    """

    kind: ClassVar[str] = "burgers"
    summary: ClassVar[str] = "viscous Burgers: initial condition to solution at time T"

    points: int = setting(64, "N", "grid points")
    viscosity: float = setting(0.02, "NU", "viscosity")
    time: float = setting(0.5, "T", "end time")
    modes: int = setting(
        16, "K", "Fourier modes of the initial condition; 4 to 6 for a smooth family of few parameters"
    )

    def check(self) -> None:
        """Raise `OptionError` for a value that makes no sense. Not collective."""
        self.check_modes()
        _check_line(self, self.points, self.modes)
        self.check_positive("viscosity", "time")


@dataclass(frozen=True)
class Advection(FieldSettings):
    """Advection with a speed that varies, u_t + a(x) u_x = 0, periodic on [0, 1).

    Input: the speed a(x) > 0, whose logarithm is a random field; the initial
    condition is sin 2 pi x. Target: u(x, T), which is not linear in a. Solved
    along characteristics, to rounding.
    """

    kind: ClassVar[str] = "advection"
    summary: ClassVar[str] = "advection: speed a(x) to solution at time T"

    points: int = setting(64, "N", "grid points")
    time: float = setting(0.5, "T", "end time; the speed is about 1 on average")
    modes: int = setting(5, "K", "Fourier modes of log a(x)")
    variation: float = setting(0.3, "S", "standard deviation of log a(x)")

    def check(self) -> None:
        """Raise `OptionError` for a value that makes no sense. Not collective."""
        self.check_modes()
        _check_line(self, self.points, self.modes)
        self.check_positive("time", "variation")


@dataclass(frozen=True)
class Darcy(FieldSettings):
    """Darcy flow, -div(k grad u) = F on the unit square, u = 0 on its boundary.

    Input: log k on N x N cells, a smooth random field or one of two values.
    Target: the pressure u at the middles of the same cells, N * N numbers.
    Solved by finite volumes on at least 64 x 64 cells.
    """

    kind: ClassVar[str] = "darcy"
    summary: ClassVar[str] = "Darcy flow in a square: log-permeability to pressure"

    points: int = setting(24, "N", "points in each direction")
    modes: int = setting(4, "K", "cosine modes of the random field in each direction")
    variation: float = setting(1.0, "S", "standard deviation of log k")
    binary: bool = setting(False, "", "k = 12 where the random field is positive, and 3 elsewhere")
    source: float = setting(20.0, "F", "right-hand side; with 20, u is of order one")

    def check(self) -> None:
        """Raise `OptionError` for a value that makes no sense. Not collective."""
        self.check_modes(2)
        if self.points < 2 * self.modes:
            self.refuse("points", f"at least {2 * self.modes}, for --modes {self.modes}")
        self.check_positive("variation")
        self.check_positive("source")
        if self.binary and self.variation != Darcy.variation:
            self.refuse("variation", "--binary has two given permeabilities; leave out one of the two options")


@dataclass(frozen=True)
class Reaction(FieldSettings):
    """Reaction and diffusion, -D laplacian(u) + r u^3 = f on the unit square,
    u = 0 on its boundary; f is a sum of Gaussian sources.

    Input: 3 J + 2 numbers from -1 to 1 for D, r / D, and each source's strength,
    x and y. Target: u at the middles of N x N cells, N * N numbers. Solved by
    finite volumes on at least 48 x 48 cells with Newton's method.
    """

    kind: ClassVar[str] = "reaction"
    summary: ClassVar[str] = "reaction-diffusion in a square: 3 J + 2 numbers to field"

    points: int = setting(10, "N", "points in each direction")
    sources: int = setting(2, "J", "number of sources")
    reaction: float = setting(10.0, "R", "largest r / D; the smallest is a tenth of it")

    def check(self) -> None:
        """Raise `OptionError` for a value that makes no sense. Not collective."""
        if self.points < 4:
            self.refuse("points", "at least 4")
        if self.sources < 1:
            self.refuse("sources", "at least 1")
        self.check_positive("reaction")


def _check_line(settings: FieldSettings, points: int, modes: int) -> None:
    """Refuse a grid on which the random field's modes are not distinct."""
    if points <= 2 * modes or points % 2:
        settings.refuse("points", f"an even number, at least {2 * modes + 2}")


EQUATIONS: tuple[type[FieldSettings], ...] = (Burgers, Advection, Darcy, Reaction)
