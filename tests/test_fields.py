"""Datasets of fields: what all equations share, random fields, and Burgers against its exact solution."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpcdeq import parallel
from hpcdeq.builders.burgers import burgers_samples, solve_burgers
from hpcdeq.builders.field_settings import EQUATIONS, Advection, Burgers, Darcy, FieldSettings, Reaction
from hpcdeq.builders.fields import FAMILIES, family_of, prepare_burgers, prepare_field
from hpcdeq.builders.random_fields import periodic_deviations, periodic_field, square_field
from hpcdeq.data.dataset import Dataset
from hpcdeq.data.rows import SampleRows
from hpcdeq.data.shards import Shards
from hpcdeq.errors import DataError, OptionError

# Small enough to be quick, with every setting off its default.
SMALL: list[FieldSettings] = [
    Burgers(points=18, viscosity=0.05, time=0.3, modes=5),
    Advection(points=10, time=0.7, modes=3, variation=0.2),
    Darcy(points=6, modes=3, variation=0.7, source=2.0),
    Darcy(points=6, modes=3, binary=True),
    Reaction(points=5, sources=1, reaction=4.0),
]
NAMES = ["burgers", "advection", "darcy", "binary", "reaction"]


def test_every_equation_has_a_family_and_a_test() -> None:
    assert set(EQUATIONS) == FAMILIES.keys() == {type(settings) for settings in SMALL}
    for settings in SMALL:
        changed = {name for name, value in asdict(settings).items() if value != asdict(type(settings)())[name]}
        assert changed | {"variation", "binary", "source"} >= asdict(settings).keys()


@pytest.mark.parametrize("settings", SMALL, ids=NAMES)
def test_a_sample_depends_on_seed_and_number_only(settings: FieldSettings) -> None:
    """Find the same bits alone, in a batch, in another order and with another object; others with another seed."""
    family = family_of(settings, 3)
    inputs, targets = family.sample(np.arange(12))
    assert inputs.shape == (12, *family.sample_shape) and targets.shape == (12, len(family.target_names))
    for numbers in ([7], [11, 7, 0]):
        some_inputs, some_targets = family_of(settings, 3).sample(np.array(numbers))
        assert np.array_equal(some_inputs, inputs[numbers]) and np.array_equal(some_targets, targets[numbers])
    assert len(np.unique(targets[:, 0])) == 12
    assert not np.isclose(family_of(settings, 4).sample(np.arange(12))[1], targets).all(axis=1).any()


@pytest.mark.parametrize("settings", SMALL, ids=NAMES)
def test_files_of_all_equations(tmp_path: Path, settings: FieldSettings) -> None:
    """Find the samples of a short file, in the same splits, in a longer one; the file says what it holds."""
    for name, count, seed in (("short", 10, 0), ("long", 30, 0)):
        report = prepare_field(tmp_path / name, settings, count, seed, comm=parallel.SELF, command="typed")
        assert report.split_counts == [count * 8 // 10, count // 10, count // 10]
    short, long = samples(tmp_path / "short"), samples(tmp_path / "long")
    assert all(long[key] == value for key, value in short.items()) and len(short) == 10
    family = family_of(settings, 0)
    inputs, targets = family.sample(np.array([9]))
    assert short["9"][1:] == (2, inputs[0].tobytes(), targets[0].tobytes())
    schema = Shards(tmp_path / "short").schema
    assert (schema.task, schema.representation, schema.sample_shape) == ("regression", "array", family.sample_shape)
    assert schema.provenance["settings"] == {**asdict(settings), "seed": 0}
    assert (schema.provenance["source"], schema.provenance["command"]) == (family.source, "typed")
    assert (tmp_path / "short").exists() and not list(tmp_path.glob("*.partial"))


def samples(path: Path) -> dict[str, tuple[str, int, bytes, bytes]]:
    """Return name, split and bytes of every sample of a file, by its number."""
    shards = Shards(path)
    rows: SampleRows = shards.read(np.arange(shards.schema.count))
    inputs = np.asarray(rows.inputs)
    return {
        key.rpartition("-")[2]: (key, int(shards.splits[row]), inputs[row].tobytes(), rows.targets[row].tobytes())
        for row, key in enumerate(rows.ids)
    }


@pytest.mark.parametrize("settings", SMALL, ids=NAMES)
def test_target_grid_is_where_the_names_say(tmp_path: Path, settings: FieldSettings) -> None:
    """Name the targets after their places, x first and y running fastest; the attributes say the same in numbers."""
    prepare_field(tmp_path / "f.h5", settings, 1, comm=parallel.SELF)
    with h5py.File(tmp_path / "f.h5") as file:
        grid, axes = file["/array/x"].attrs["target_grid"], file["/array/x"].attrs["target_axes"]
        names = list(file.attrs["target_names"])
    if axes == "x":
        assert names == [f"u(x={x:g},T)" for x in grid] and grid[0] == 0
        assert np.allclose(np.diff(grid, append=1.0), 1 / settings.points)
    else:
        assert axes == "x, y" and names == [f"u(x={x:g},y={y:g})" for x in grid for y in grid]
        assert np.allclose(grid, [(2 * cell + 1) / (2 * settings.points) for cell in range(settings.points)])


@pytest.mark.parametrize(
    "settings",
    [Burgers(), Burgers(modes=5), Advection(), Darcy(points=12), Darcy(points=12, binary=True), Reaction()],
    ids=["burgers", "burgers of 5 modes", "advection", "darcy", "binary", "reaction"],
)
def test_a_linear_map_is_not_enough(settings: FieldSettings) -> None:
    """Fit an affine map to 300 samples: on 30 others it errs by more than 5 %, so that there is something to learn."""
    inputs, targets = family_of(settings, 0).sample(np.arange(330))
    flat = np.hstack([inputs.reshape(330, -1), np.ones((330, 1))])
    weights = np.linalg.lstsq(flat[:300], targets[:300], rcond=1e-6)[0]
    errors = np.linalg.norm(flat[300:] @ weights - targets[300:], axis=1) / np.linalg.norm(targets[300:], axis=1)
    assert errors.mean() > 0.05


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("settings", [SMALL[1], SMALL[2], SMALL[4]], ids=["advection", "darcy", "reaction"])
def test_files_feed_all_ranks(shared_tmp_path: Path, settings: FieldSettings) -> None:
    """Solve on rank 0, with PETSc too, and read on all; report and errors are the same everywhere."""
    path = shared_tmp_path / "field.h5"
    report = prepare_field(path, settings, 30)
    train = Dataset(path)
    family = family_of(settings, 0)
    assert (report.split_counts, train.count, train.input_shape) == ([24, 3, 3], 24, family.sample_shape)
    assert sum(parallel.counts_of_ranks(parallel.WORLD, len(train))) == 24
    with pytest.raises(OptionError, match="--points 2: "):
        prepare_field(path, replace(settings, points=2), 30)  # type: ignore[call-arg]
    assert Dataset(path).count == 24


LEGAL = {
    "--points 33: an even number, at least 34": Burgers(points=33),
    "--points 10: an even number, at least 12": Burgers(points=10, modes=5),
    "--modes 0: at least 1": Burgers(modes=0),
    "--viscosity 0.0: above 0": Burgers(viscosity=0.0),
    "--time nan: above 0": Burgers(time=math.nan),
    "--points 9: an even number, at least 12": Advection(points=9),
    "--variation inf: above 0": Advection(variation=math.inf),
    "--time -1.0: above 0": Advection(time=-1.0),
    "--modes 1: at least 2": Darcy(modes=1),
    "--points 7: at least 8, for --modes 4": Darcy(points=7),
    "--variation 0.0: above 0": Darcy(variation=0.0),
    "--variation 2.0: --binary has two given permeabilities": Darcy(variation=2.0, binary=True),
    "--points 3: at least 4": Reaction(points=3),
    "--sources 0: at least 1": Reaction(sources=0),
    "--reaction -2.0: above 0": Reaction(reaction=-2.0),
}


@pytest.mark.parametrize("message", LEGAL)
def test_settings_that_make_no_sense(tmp_path: Path, message: str) -> None:
    """Name the option, its value and what it has to be, and write nothing."""
    with pytest.raises(OptionError) as told:
        prepare_field(tmp_path / "f.h5", LEGAL[message], 5, comm=parallel.SELF)
    assert str(told.value).startswith(message)
    assert not list(tmp_path.iterdir())


def test_counts_and_seeds_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--limit 0: at least 1"):
        prepare_field(tmp_path / "f.h5", Burgers(), 0, comm=parallel.SELF)
    with pytest.raises(OptionError, match="--seed -1: at least 0"):
        prepare_field(tmp_path / "f.h5", Burgers(), 3, -1, comm=parallel.SELF)


RESOLUTION: dict[str, FieldSettings] = {
    r"its last mode holds .* raise --points or --viscosity 0\.0001": Burgers(viscosity=1e-4),
    r"series of 1 / speed on 256 points is not complete.* lower --variation or --modes": Advection(variation=200.0),
    r"beginnings are off by .* of a period \(at most 1e-10\).* lower --variation": Advection(variation=20.0),
    r"Darcy on 72 x 72 cells is not resolved: log k changes by .* --variation 5": Darcy(variation=5.0),
    r"on 50 x 50 cells is not resolved: reaction balances diffusion within .* --reaction 1e\+06": Reaction(
        reaction=1e6
    ),
    r"reaction-diffusion, sample 0: DIVERGED_FUNCTION_NANORINF .* lower --reaction 1e\+300": Reaction(reaction=1e300),
}


@pytest.mark.parametrize("message", RESOLUTION, ids=["burgers", "series", "speed", "darcy", "layers", "newton"])
def test_what_is_not_resolved_is_refused(tmp_path: Path, message: str) -> None:
    """Say what to type, and leave nothing behind."""
    with pytest.raises(DataError, match=message):
        prepare_field(tmp_path / "f.h5", RESOLUTION[message], 20, comm=parallel.SELF)
    assert not list(tmp_path.iterdir())


def test_more_targets_than_old_files_could_name(tmp_path: Path) -> None:
    """Write and read a list of 4,232 names of targets."""
    prepare_field(tmp_path / "f.h5", Burgers(points=4232, modes=2, time=1e-3), 2, comm=parallel.SELF)
    assert Dataset(tmp_path / "f.h5", comm=parallel.SELF).output_size == 4232


def test_periodic_field_has_its_spectrum() -> None:
    """Compare the mean square of every mode of 4,000 fields with the covariance operator's; find no other mode."""
    fields = periodic_field(np.arange(4000), 32, 5, 6)
    spectrum = np.fft.rfft(fields) / 32
    power = 2 * (np.abs(spectrum) ** 2).mean(axis=0)[1:7]  # a mode's share of the variance
    operator = 625 / ((2 * np.pi * np.arange(1, 7)) ** 2 + 25) ** 2
    assert np.abs(power / (2 * operator) - 1).max() < 0.06
    assert np.allclose(operator, periodic_deviations(6) ** 2)
    assert np.abs(np.delete(spectrum, range(1, 7), axis=1)).max() < 1e-15
    assert np.allclose(periodic_field(np.arange(3), 64, 5, 6)[:, ::2], fields[:3], atol=1e-14)


def cosine_sum(number: int, seed: int, modes: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Evaluate a random field on the square, mode by mode, from its definition."""
    draws = np.random.default_rng([seed, number]).standard_normal((modes, modes))
    total, variance = np.zeros(np.broadcast(x, y).shape), 0.0
    for k in range(modes):
        for m in range(modes):
            if k or m:
                deviation = 1 / (np.pi**2 * (k**2 + m**2) + 9)
                scale = (math.sqrt(2) if k else 1) * (math.sqrt(2) if m else 1)
                total = total + deviation * scale * draws[k, m] * np.cos(np.pi * k * x) * np.cos(np.pi * m * y)
                variance += deviation**2
    return total / math.sqrt(variance)


def test_square_field_equals_its_definition() -> None:
    """Sum the modes one by one, and measure the variance over 2,000 fields."""
    centres = (np.arange(9) + 0.5) / 9
    fields = square_field(np.arange(2000), 9, 2, 4)
    for number in (0, 17):
        assert np.allclose(fields[number], cosine_sum(number, 2, 4, centres[:, None], centres), atol=1e-13)
    assert abs((fields**2).mean() - 1) < 0.05
    assert np.abs(fields.mean(axis=(1, 2))).max() < 1e-14


def cole_hopf(initial: np.ndarray, viscosity: float, time: float) -> np.ndarray:
    """Solve viscous Burgers exactly: u = -2 nu phi_x / phi, with phi from the heat equation.

    ``initial`` ``(points,)`` of zero mean, on a grid fine enough for exp of its integral.
    """
    points = len(initial)
    wave = 2 * np.pi * np.arange(points // 2 + 1)
    spectrum = np.fft.rfft(initial)
    integral = np.zeros_like(spectrum)
    integral[1:] = spectrum[1:] / (1j * wave[1:])
    heat = np.fft.rfft(np.exp(-np.fft.irfft(integral, points) / (2 * viscosity))) * np.exp(-viscosity * wave**2 * time)
    return -2 * viscosity * np.fft.irfft(1j * wave * heat, points) / np.fft.irfft(heat, points)


@pytest.mark.parametrize("modes", [16, 5])
def test_burgers_equals_cole_hopf(modes: int) -> None:
    """Compare the default samples, and those of few modes, with the exact solution, on 1,024 points."""
    indices = np.arange(20)
    inputs, solutions = burgers_samples(indices, Burgers(modes=modes), seed=3)
    fine = periodic_field(indices, 1024, 3, modes)
    assert np.abs(fine[:, ::16] - inputs).max() < 1e-12
    assert np.abs(np.fft.rfft(inputs)[:, modes + 1 :]).max() < 1e-12
    exact = np.array([cole_hopf(initial, 0.02, 0.5)[::16] for initial in fine])
    assert np.abs(exact - inputs).max() > 0.5
    assert np.abs(exact - solutions).max() < 1e-5
    assert np.median(np.abs(exact - solutions).max(axis=1)) < 1e-7


def test_burgers_is_of_fourth_order_in_time() -> None:
    """Halve the time step: the error falls by about 16."""
    initial = periodic_field(np.arange(5), 256, 0, 16)
    exact = np.array([cole_hopf(row, 0.05, 0.5) for row in initial])
    errors = [np.abs(solve_burgers(initial, 0.05, 0.5, steps) - exact).max() for steps in (160, 320, 640)]
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.all((rates > 3.8) & (rates < 4.1)), (errors, rates)


@pytest.mark.parallel([1, 2, 3])
def test_burgers_file_feeds_all_ranks(shared_tmp_path: Path) -> None:
    """Write on rank 0 and read on all; both the report and its error are the same everywhere."""
    path = shared_tmp_path / "burgers.h5"
    report = prepare_burgers(path, 30)
    train = Dataset(path)
    assert (report.split_counts[0], train.count, train.input_shape, train.output_size) == (24, 24, (64,), 64)
    assert sum(parallel.counts_of_ranks(parallel.WORLD, len(train))) == 24
    with pytest.raises(OptionError, match="--points 33: an even number, at least 34"):
        prepare_burgers(path, 30, points=33)
    with pytest.raises(DataError, match=r"not resolved: its last mode holds .* raise --points or --viscosity 0\.0001"):
        prepare_burgers(path, 30, viscosity=1e-4)
    assert Dataset(path).count == 24


def test_prepare_burgers_is_prepare_field(tmp_path: Path) -> None:
    """Write the same samples with and without the short way, every setting given."""
    prepare_burgers(tmp_path / "a.h5", 10, 18, 0.05, 0.3, 2, 5, comm=parallel.SELF)
    prepare_field(tmp_path / "b.h5", SMALL[0], 10, 2, comm=parallel.SELF)
    assert samples(tmp_path / "a.h5") == samples(tmp_path / "b.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        told: dict[str, Any] = json.loads(file.attrs["provenance"])
    assert told["settings"] == {**asdict(SMALL[0]), "seed": 2}
