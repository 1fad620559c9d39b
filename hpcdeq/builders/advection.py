"""Advection with a speed that varies, ``u_t + a(x) u_x = 0``, periodic on [0, 1): speed to solution at the end time.

The initial condition is ``sin 2 pi x`` for all samples and the speed is the input, ``log a`` a random field: in its
speed the solution is not linear, whereas in its initial condition it would be (Wang, Wang and Perdikaris, arXiv
2103.10974, learn the same map with an inflow boundary).

The solution is constant along characteristics ``dx/dt = a(x)``, along which the travel time ``tau(x)``, the integral of
``1 / a`` from 0 to x, grows like t. So ``u(x, T) = u(X, 0)`` with ``tau(X) = tau(x) - T``. The Fourier series of
``1 / a`` gives tau, and Newton's method X, both to rounding: neither space nor time is discretised.
"""

from __future__ import annotations

import math

import numpy as np

from hpcdeq.builders.family import FieldFamily, line, names_on_line
from hpcdeq.builders.field_settings import Advection
from hpcdeq.builders.random_fields import periodic_deviations, periodic_field
from hpcdeq.errors import DataError

FINE_POINTS = 256  # least number of points that the Fourier series of 1 / a comes from
TAIL = 1e-12  # largest of the last modes of 1 / a, against its mean, of a series that counts as complete
STEPS = 4  # of Newton's method: linear interpolation is good to about 1e-4, the next steps to 1e-8, 1e-16
MISSED = 1e-10  # distance, in periods, that may be missing after them


def departure_points(slowness: np.ndarray, time: float, points: int) -> np.ndarray:
    """Return where the characteristics that arrive at the end time have begun.

    Not collective.

    Parameters
    ----------
    slowness
        ``(b, m)`` of ``1 / a`` > 0 at x = 0, 1 / m, ..., with m even: enough for its Fourier series.
    time
        How long they travel.
    points
        They arrive at x = 0, 1 / points, ...

    Returns
    -------
    numpy.ndarray
        ``(b, points)``, below 0 where they have come around.

    Raises
    ------
    DataError
        The series does not decay, or the speed varies too much for double precision.
    """
    fine = slowness.shape[1]
    series = np.fft.rfft(slowness)[:, :-1] / fine
    mean = series[:, 0].real
    tail = float((np.abs(series[:, -4:]).max(axis=1) / mean).max(initial=0.0))
    if not tail <= TAIL:
        raise DataError(
            f"advection: the series of 1 / speed on {fine} points is not complete: its last modes hold {tail:.2g} of the"
            f" mean (at most {TAIL:g}); lower --variation or --modes"
        )
    modes = np.arange(1, series.shape[1])
    integral = series[:, 1:] / (2j * np.pi * modes)

    def travel_time(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tau up to a constant, and its derivative 1 / a, by Horner's rule in exp(2 pi i x)."""
        turn = np.exp(2j * np.pi * x)
        tau, slope = np.zeros_like(turn), np.zeros_like(turn)
        for mode in modes[::-1] - 1:
            tau = (tau + integral[:, mode, None]) * turn
            slope = (slope + series[:, mode + 1, None]) * turn
        return mean[:, None] * x + 2 * tau.real, mean[:, None] + 2 * slope.real

    arrival = np.broadcast_to(line(points), (len(slowness), points))
    wanted = travel_time(arrival)[0] - time
    grid = np.arange(fine + 1) / fine
    known = travel_time(np.broadcast_to(grid, (len(slowness), fine + 1)))[0]
    around = np.floor((wanted - known[:, :1]) / mean[:, None])
    rest = wanted - around * mean[:, None]
    start = around + np.stack([np.interp(r, k, grid) for r, k in zip(rest, known, strict=True)])
    for _ in range(STEPS):
        tau, slope = travel_time(start)
        start = start - (tau - wanted) / slope
    tau, slope = travel_time(start)
    missed = float(np.abs((tau - wanted) / slope).max(initial=0.0))
    if not missed <= MISSED:
        raise DataError(
            f"advection: the characteristics' beginnings are off by {missed:.2g} of a period (at most {MISSED:g}): the speed"
            " varies too much; lower --variation"
        )
    return start


def advection_samples(
    indices: np.ndarray, settings: Advection | None = None, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw speeds and solve for the solution at the end time.

    Not collective. ``log a`` has the covariance of Burgers' initial conditions, scaled to ``settings.variation``.

    Parameters
    ----------
    indices
        ``(b,)`` numbers of the samples.
    settings
        Grid, end time and speeds.
    seed
        Of the family of samples.

    Returns
    -------
    tuple
        Speeds and solutions, each ``(b, points)``.

    Raises
    ------
    DataError
        The speed varies too much.
    """
    settings = settings or Advection()
    scale = settings.variation / math.sqrt(2 * (periodic_deviations(settings.modes) ** 2).sum())
    fine = max(FINE_POINTS, 32 * settings.modes)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # what comes of it is refused
        slowness = np.exp(-scale * periodic_field(indices, fine, seed, settings.modes))
        start = departure_points(slowness, settings.time, settings.points)
    speed = np.exp(scale * periodic_field(indices, settings.points, seed, settings.modes))
    return speed, np.sin(2 * np.pi * start)


def advection_family(settings: Advection, seed: int) -> FieldFamily:
    """Return the samples of a seed and their description. Not collective."""
    return FieldFamily(
        f"advection u_t + a(x) u_x = 0 on [0, 1), u(x, 0) = sin 2 pi x, time {settings.time:g}, log a of deviation"
        f" {settings.variation:g} with {settings.modes} modes, seed {seed}",
        lambda indices: advection_samples(indices, settings, seed),
        (settings.points,),
        names_on_line("u", settings.points),
        {
            "grid": line(settings.points),
            "quantity": "a(x)",
            "target_grid": line(settings.points),
            "target_axes": "x",
        },
    )
