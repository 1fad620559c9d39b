"""Viscous Burgers, ``u_t + u u_x = nu u_xx``, periodic on [0, 1): initial condition to solution at the end time.

In space it is pseudo-spectral with 2/3 of the modes kept, so that the product is free of aliasing; in time, the
fourth-order Runge-Kutta method on the integrating-factor form (Trefethen, Spectral Methods in Matlab, chapter 10), where
diffusion is exact.
"""

from __future__ import annotations

import math

import numpy as np

from hpcdeq.builders.family import FieldFamily, line, names_on_line
from hpcdeq.builders.field_settings import Burgers
from hpcdeq.builders.random_fields import periodic_field
from hpcdeq.errors import DataError

FINE_POINTS = 128  # least grid of the solver
STEP = 0.32  # time step times fine points: 0.0025 at 128, a quarter of the stability limit at |u| = 1
TAIL = 1e-3  # largest last kept mode, against the largest mode, of a solution that counts as resolved


def solve_burgers(initial: np.ndarray, viscosity: float, time: float, steps: int) -> np.ndarray:
    """Integrate viscous Burgers, periodic on [0, 1).

    Not collective.

    Parameters
    ----------
    initial
        ``(b, points)`` at x = 0, 1 / points, ...
    viscosity, time
        ``nu`` and the end time.
    steps
        Number of time steps; the error falls with their fourth power.

    Returns
    -------
    numpy.ndarray
        ``(b, points)`` at the end time.

    Raises
    ------
    DataError
        The solution is not finite, or has more than 1e-3 of its largest mode in the last mode kept.
    """
    points = initial.shape[1]
    wave = 2 * np.pi * np.arange(points // 2 + 1)
    kept = np.arange(points // 2 + 1) < points / 3
    step = time / steps
    half = np.exp(-viscosity * wave**2 * step / 2)
    full = half**2
    advection = -0.5j * wave * kept * step

    def change(spectrum: np.ndarray) -> np.ndarray:
        return advection * np.fft.rfft(np.fft.irfft(spectrum, points) ** 2)

    spectrum = np.fft.rfft(initial) * kept
    with np.errstate(over="ignore", invalid="ignore"):  # a blow-up is reported below, with what to do
        for _ in range(steps):
            first = change(spectrum)
            second = change(half * (spectrum + first / 2))
            third = change(half * spectrum + second / 2)
            fourth = change(full * spectrum + half * third)
            spectrum = full * spectrum + (full * first + 2 * half * (second + third) + fourth) / 6
    magnitude = np.abs(spectrum)
    # A state of rest has no spectrum to judge; any number of the size of rounding is as good as zero.
    tail = float((magnitude[:, kept][:, -1] / np.maximum(magnitude.max(axis=1), 1e-12 * points)).max(initial=0.0))
    if not tail <= TAIL:
        raise DataError(
            f"Burgers on {points} points is not resolved: its last mode holds {tail:.2g} of the largest"
            f" (at most {TAIL:g}); raise --points or --viscosity {viscosity:g}"
        )
    return np.fft.irfft(spectrum, points)


def burgers_samples(
    indices: np.ndarray, settings: Burgers | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw initial conditions and solve for the solution at the end time.

    Not collective. The solver's grid is finer than ``settings.points``, a multiple of it.

    Parameters
    ----------
    indices
        ``(b,)`` numbers of the samples.
    settings
        Grid, equation and initial conditions.
    seed
        Of the family of samples.

    Returns
    -------
    tuple
        Initial conditions and solutions, each ``(b, points)``.

    Raises
    ------
    DataError
        The solution is not resolved.
    """
    settings = settings or Burgers()
    stride = max(2, -(-FINE_POINTS // settings.points))
    fine = stride * settings.points
    initial = periodic_field(indices, fine, seed, settings.modes)
    steps = math.ceil(settings.time * fine / STEP)
    solution = solve_burgers(initial, settings.viscosity, settings.time, steps)
    return initial[:, ::stride], solution[:, ::stride]


def burgers_family(settings: Burgers, seed: int) -> FieldFamily:
    """Return the samples of a seed and their description. Not collective."""
    return FieldFamily(
        f"viscous Burgers on [0, 1), viscosity {settings.viscosity:g}, time {settings.time:g},"
        f" {settings.modes} modes, seed {seed}",
        lambda indices: burgers_samples(indices, settings, seed),
        (settings.points,),
        names_on_line("u", settings.points),
        {
            "grid": line(settings.points),
            "quantity": "u(x, 0)",
            "target_grid": line(settings.points),
            "target_axes": "x",
        },
    )
