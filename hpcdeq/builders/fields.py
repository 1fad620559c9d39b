"""Solutions of partial differential equations as samples: initial condition in, solution at a later time out.

Viscous Burgers, ``u_t + u u_x = nu u_xx``, periodic on [0, 1). In space it is pseudo-spectral with 2/3 of the modes
kept, so that the product is free of aliasing; in time, the fourth-order Runge-Kutta method on the integrating-factor
form (Trefethen, Spectral Methods in Matlab, chapter 10), where diffusion is exact.
"""

from __future__ import annotations

import math
import os

import numpy as np

from hpcdeq import parallel
from hpcdeq.builders.samples import Report, provenance
from hpcdeq.data.rows import SampleRows
from hpcdeq.data.schema import SPLITS, Schema
from hpcdeq.data.writer import DatasetWriter
from hpcdeq.errors import DataError, OptionError

MODES = 16  # of the initial condition, whatever the grid: a sample is one function, sampled more or less finely
FINE_POINTS = 128  # least grid of the solver
STEP = 0.32  # time step times fine points: 0.0025 at 128, a quarter of the stability limit at |u| = 1
TAIL = 1e-3  # largest last kept mode, against the largest mode, of a solution that counts as resolved
BATCH = 100  # samples solved at a time: their spectra stay in the cache
SPLIT_OF_DIGIT = (0, 0, 0, 0, 0, 0, 0, 0, 1, 2)  # by the last digit of a sample's number: 80 / 10 / 10 %


def random_initial(indices: np.ndarray, points: int, seed: int) -> np.ndarray:
    """Draw initial conditions from a Gaussian random field.

    Not collective. Covariance ``625 (-d^2/dx^2 + 25)^-2`` on the modes 1 to 16, zero mean (Li et al., Fourier Neural
    Operator, arXiv 2010.08895, has the same on all modes): ``u = sum_k s_k sqrt(2) (a_k cos 2 pi k x + b_k sin 2 pi
    k x)``, ``s_k = 25 / ((2 pi k)^2 + 25)``, ``a_k`` and ``b_k`` standard normal. Sample ``i`` depends on seed and
    ``i`` only.

    Returns
    -------
    numpy.ndarray
        ``(b, points)``, standard deviation 0.6.
    """
    draws = np.stack([np.random.default_rng([seed, int(index)]).standard_normal((2, MODES)) for index in indices])
    deviation = 25 / ((2 * np.pi * np.arange(1, MODES + 1)) ** 2 + 25)
    spectrum = np.zeros((len(indices), points // 2 + 1), complex)
    spectrum[:, 1 : MODES + 1] = points / math.sqrt(2) * deviation * (draws[:, 0] - 1j * draws[:, 1])
    return np.fft.irfft(spectrum, points)


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
    indices: np.ndarray, points: int = 64, viscosity: float = 0.02, time: float = 0.5, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw initial conditions and solve for the solution at the end time.

    Not collective. Sample ``i`` depends on the seed and ``i``, not on the other samples. The solver's grid is finer
    than ``points``, a multiple of it.

    Parameters
    ----------
    indices
        ``(b,)`` numbers of the samples.
    points
        Grid points, even and at least 34.
    viscosity, time
        ``nu`` and the end time.
    seed
        Of the family of samples.

    Returns
    -------
    tuple
        Initial conditions and solutions, each ``(b, points)``.

    Raises
    ------
    OptionError, DataError
        A value makes no sense, or the solution is not resolved.
    """
    if points <= 2 * MODES or points % 2:
        raise OptionError(f"--points {points}: an even number, at least {2 * MODES + 2}")
    if not (viscosity > 0 and math.isfinite(viscosity)):
        raise OptionError(f"--viscosity {viscosity}: above 0")
    if not (time > 0 and math.isfinite(time)):
        raise OptionError(f"--time {time}: above 0")
    if seed < 0:
        raise OptionError(f"--seed {seed}: at least 0")
    stride = max(2, -(-FINE_POINTS // points))
    fine = stride * points
    steps = math.ceil(time * fine / STEP)
    inputs, solutions = np.empty((len(indices), points)), np.empty((len(indices), points))
    for start in range(0, len(indices), BATCH):
        part = slice(start, start + BATCH)
        initial = random_initial(indices[part], fine, seed)
        inputs[part] = initial[:, ::stride]
        solutions[part] = solve_burgers(initial, viscosity, time, steps)[:, ::stride]
    return inputs, solutions


def prepare_burgers(
    path: str | os.PathLike[str],
    count: int = 1000,
    points: int = 64,
    viscosity: float = 0.02,
    time: float = 0.5,
    seed: int = 0,
    *,
    comm: parallel.Comm = parallel.WORLD,
    command: str = "",
) -> Report:
    """Write a dataset of Burgers solutions: 80 % train, 10 % validation, 10 % test.

    Collective on comm. Rank 0 computes and writes: 1,000 samples take about a second. The split of a sample hangs on
    its number alone, so that a longer file holds the samples of a shorter one in the same splits.

    Parameters
    ----------
    path
        The file to make; replaced on success only.
    count
        Number of samples.
    points, viscosity, time, seed
        See `burgers_samples`.

    Returns
    -------
    Report
        The same on all ranks.

    Raises
    ------
    OptionError, DataError
        A value makes no sense, the solution is not resolved, or the file cannot be written.
    """
    report = Report()
    with parallel.agreement(comm):
        if comm.rank == 0:
            if count < 1:
                raise OptionError(f"--limit {count}: at least 1")
            grid = np.arange(points) / points
            schema = Schema(
                "regression",
                "array",
                target_names=tuple(f"u(x={x:g},T)" for x in grid),
                target_units=("1",) * points,
                sample_shape=(points,),
                provenance=provenance(
                    f"viscous Burgers on [0, 1), viscosity {viscosity:g}, time {time:g}, seed {seed}", command, []
                ),
            )
            indices = np.arange(count)
            splits = np.array(SPLIT_OF_DIGIT, np.uint8)[indices % 10]
            with DatasetWriter(path, schema, array_attributes={"grid": grid, "quantity": "u(x, 0)"}) as writer:
                for split in range(len(SPLITS)):
                    own = indices[splits == split]
                    for start in range(0, own.size, 10 * BATCH):
                        part = own[start : start + 10 * BATCH]
                        initial, solution = burgers_samples(part, points, viscosity, time, seed)
                        names = [f"burgers-{seed}-{index}" for index in part]
                        writer.append(SampleRows(names, solution, initial), splits[part])
                        report.add(splits[part], solution)
    return parallel.from_root(comm, report)
