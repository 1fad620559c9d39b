"""Images as samples: what a source may look like, how it is split and normalised, and what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import DATA, Run
from PIL import Image

from hpcdeq import parallel
from hpcdeq.builders.images import channel_statistics, first_of_each_split, prepare_images
from hpcdeq.builders.pictures import Picture, decode, read_source
from hpcdeq.builders.samples import Shares, Skipped
from hpcdeq.data import Dataset
from hpcdeq.data.schema import open_dataset, read_schema
from hpcdeq.errors import DataError, OptionError

CIFAR = DATA / "images" / "cifar10_jpeg.npz"
RANDOM = np.random.default_rng(0)


def encoded(pixels: np.ndarray, kind: str = "png") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def colours(count: int, side: int = 6) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, side, side + 1, 3), dtype=np.uint8)


def encoded_arrays(name: str, images: list[bytes], labels: list[int]) -> dict[str, np.ndarray]:
    return {
        f"{name}_png": np.frombuffer(b"".join(images), np.uint8),
        f"{name}_offset": np.cumsum([0, *map(len, images)]),
        f"{name}_label": np.array(labels, np.uint8),
    }


def written(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "source.npz", **arrays)
    return folder / "source.npz"


def contents(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Return inputs, labels, splits and ids."""
    with h5py.File(path) as file:
        ids = file["sample/id"].asstr()[:].tolist()
        return file["array/x"][:], file["sample/target"][:], file["sample/split"][:], ids


# --------------------------------------------------------------------------------------------------------- what is read


def test_pixels_are_normalised_by_the_training_images(tmp_path: Path) -> None:
    train, test = colours(60), colours(20)
    labels = np.arange(80) % 4
    source = written(tmp_path, x_train=train, y_train=labels[:60], x_test=test, y_test=labels[60:])
    report = prepare_images(tmp_path / "i.h5", source, Shares(validation_fraction=0.25))
    x, y, split, ids = contents(tmp_path / "i.h5")
    assert x.shape == (80, 3, 6, 7) and x.dtype == np.float32
    assert split.tolist() == sorted(split.tolist()) and (split == 2).sum() == 20 and 5 <= (split == 1).sum() <= 25
    assert report.split_counts == np.bincount(split).tolist() and not report.skipped
    given = {f"train-{row:06d}": train[row] for row in range(60)} | {f"test-{row:06d}": test[row] for row in range(20)}
    raw = np.stack([given[name] for name in ids]).astype(float)
    mean, deviation = raw[split == 0].mean(axis=(0, 1, 2)), raw[split == 0].std(axis=(0, 1, 2))
    np.testing.assert_allclose(x, np.moveaxis((raw - mean) / deviation, -1, 1), rtol=1e-5, atol=1e-6)
    assert y.tolist() == [int(name[-6:]) % 4 for name in ids]  # 60 is a multiple of 4
    with open_dataset(tmp_path / "i.h5") as file:
        schema = read_schema(tmp_path / "i.h5", file)
        np.testing.assert_allclose(file["array/x"].attrs["channel_mean"], mean)
    np.testing.assert_allclose(schema.provenance["settings"]["channel_std"], deviation)
    assert (schema.task, schema.representation, schema.classes) == ("classification", "array", ("0", "1", "2", "3"))


@pytest.mark.parametrize("names", [("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("{}_x", "{}_y")])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3), (3, 5, 6), (5, 6, 1), (1, 5, 6)])
def test_names_and_layouts_of_pixels(tmp_path: Path, names: tuple[str, str], shape: tuple[int, ...]) -> None:
    pixels, labels = RANDOM.random((9, *shape)), np.arange(9)[:, None] % 2
    arrays = {}
    for split in ("train", "val", "test"):
        arrays |= {names[0].format(split): pixels, names[1].format(split): labels}
    classes, found = read_source(written(tmp_path, **arrays, classes=np.array(["cat", "dog"])), 0)
    assert classes == ("cat", "dog")
    assert [p.split for p in found] == ["train"] * 9 + ["validation"] * 9 + ["test"] * 9
    answer = decode(found[3])
    assert not isinstance(answer, Skipped)
    channels = 3 if 3 in shape else 1
    assert answer[0].shape == (channels, 5, 6)
    expected = pixels[3] if shape[-1] not in (1, 3) else np.moveaxis(pixels[3], -1, 0)
    np.testing.assert_array_equal(answer[0], expected.reshape(channels, 5, 6))


def test_pixels_without_splits_are_shared_out(tmp_path: Path) -> None:
    prepare_images(tmp_path / "i.h5", written(tmp_path, x=colours(300), y=np.arange(300) % 3))
    counts = np.bincount(contents(tmp_path / "i.h5")[2], minlength=3)
    assert counts.sum() == 300 and 200 < counts[0] and 10 < counts[1] and 10 < counts[2]


def test_encoded_images(tmp_path: Path) -> None:
    train, test = colours(12), colours(4)
    arrays = encoded_arrays("train", [encoded(p) for p in train], [0, 1] * 6)
    arrays |= encoded_arrays("test", [encoded(p) for p in test], [1] * 4)
    source = written(tmp_path, **arrays, classes=np.array(["a", "b"]))
    classes, found = read_source(source, 0)
    assert classes == ("a", "b") and [p.label for p in found] == [0, 1] * 6 + [1] * 4
    for picture, pixels in zip(found, [*train, *test], strict=True):
        answer = decode(picture)
        assert not isinstance(answer, Skipped)
        np.testing.assert_array_equal(answer[0], np.moveaxis(pixels, -1, 0))


@pytest.mark.parametrize("divided", [False, True])
def test_a_folder_of_class_folders(tmp_path: Path, divided: bool) -> None:
    source = tmp_path / "pictures"
    pixels = colours(20)
    for row, image in enumerate(pixels):
        part = ("test" if row < 5 else "train") if divided else ""
        folder = source / part / ("ant", "bee")[row % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row}.png").write_bytes(encoded(image))
    (source / ".hidden").write_text("no image")
    report = prepare_images(tmp_path / "i.h5", source)
    x, y, split, ids = contents(tmp_path / "i.h5")
    assert report.classes == ("ant", "bee") and sorted(int(Path(name).stem) for name in ids) == list(range(20))
    assert y.tolist() == [int(Path(name).stem) % 2 for name in ids]
    if divided:
        assert {Path(name).parts[0] == "test" for name, s in zip(ids, split, strict=True) if s == 2} == {True}
        assert (split == 2).sum() == 5
    with h5py.File(tmp_path / "i.h5") as file:
        mean, deviation = (file["array/x"].attrs[f"channel_{name}"] for name in ("mean", "std"))
    raw = np.round(np.moveaxis(x, 1, -1) * deviation + mean).astype(np.uint8)
    for name, image in zip(ids, raw, strict=True):
        np.testing.assert_array_equal(image, pixels[int(Path(name).stem)])


def test_the_first_images_of_a_folder_are_of_all_classes(tmp_path: Path) -> None:
    """Though its files come class by class."""
    for label in ("a", "b", "c"):
        (tmp_path / "p" / label).mkdir(parents=True)
        for row in range(40):
            (tmp_path / "p" / label / f"{row}.png").touch()
    orders = [[p.label for p in read_source(tmp_path / "p", seed)[1]] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert min(np.bincount(orders[0][:30], minlength=3)) > 3


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("I;16", 1)]
)
def test_modes_of_images(mode: str, channels: int) -> None:
    pixels = np.full((4, 5), 40000, np.uint16) if mode == "I;16" else colours(1, 4)[0, :, :5]
    image = Image.fromarray(pixels) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    stream = io.BytesIO()
    image.save(stream, "png")
    answer = decode(Picture("p", 0, None, stream.getvalue()))
    assert not isinstance(answer, Skipped)
    assert answer[0].shape == (channels, 4, 5)
    if mode == "I;16":
        assert int(answer[0].max()) == 40000  # sixteen bits are not cut to eight


def test_greys_among_colours_get_three_channels(tmp_path: Path) -> None:
    grey = encoded(RANDOM.integers(0, 256, (6, 7), dtype=np.uint8))
    images = [encoded(p) for p in colours(9)]
    prepare_images(tmp_path / "i.h5", written(tmp_path, **encoded_arrays("train", [*images, grey], [0] * 10)))
    assert contents(tmp_path / "i.h5")[0].shape == (10, 3, 6, 7)


# ------------------------------------------------------------------------------------------------------ limits, splits


def pictures(**counts: int) -> list[Picture]:
    return [Picture(f"{s}-{n}", 0, s, b"") for s, count in counts.items() for n in range(count)]


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, (70, 30)), (100, (70, 30)), (10, (7, 3)), (1, (1, 0)), (5, (4, 1)), (99, (69, 30))]
)
def test_a_limit_is_shared_out_over_the_splits(limit: int | None, expected: tuple[int, int]) -> None:
    chosen = first_of_each_split(pictures(train=70, test=30), limit)
    assert tuple(sum(p.split == s for p in chosen) for s in ("train", "test")) == expected
    assert [p.id for p in chosen if p.split == "test"] == [f"test-{n}" for n in range(expected[1])]


def test_a_longer_file_has_the_samples_of_a_shorter_one_in_the_same_splits(tmp_path: Path) -> None:
    source = written(
        tmp_path, x_train=colours(80), y_train=np.zeros(80, int), x_test=colours(20), y_test=np.zeros(20, int)
    )
    for limit in (50, 100):
        prepare_images(tmp_path / f"{limit}.h5", source, Shares(limit=limit))
    short, long = (dict(zip(*(contents(tmp_path / f"{n}.h5")[k] for k in (3, 2)), strict=True)) for n in (50, 100))
    assert len(short) == 50 and len(long) == 100 and short.items() <= long.items()
    prepare_images(tmp_path / "other.h5", source, Shares(seed=5))
    other = dict(zip(*(contents(tmp_path / "other.h5")[k] for k in (3, 2)), strict=True))
    assert other.keys() == long.keys() and other != long
    assert all(other[name] == 2 for name in long if name.startswith("test"))  # the source's own split is kept


def test_a_copy_of_an_image_is_never_in_training_and_validation_both(tmp_path: Path) -> None:
    once = colours(40)
    source = written(
        tmp_path,
        x_train=np.concatenate([once, once]),
        y_train=np.zeros(80, int),
        x_test=once[:3],
        y_test=np.zeros(3, int),
    )
    report = prepare_images(tmp_path / "i.h5", source, Shares(validation_fraction=0.5))
    _, _, split, ids = contents(tmp_path / "i.h5")
    homes = {name: s for name, s in zip(ids, split, strict=True)}
    assert all(homes[f"train-{n:06d}"] == homes[f"train-{n + 40:06d}"] for n in range(40))
    assert report.notes == ["3 images are in more than one split of the source, and so here"]


def test_statistics_of_channels() -> None:
    images = [RANDOM.normal(1e6, 1.0, (2, 3, 4)) for _ in range(1100)]
    mean, deviation = channel_statistics(images)
    np.testing.assert_allclose(mean, np.mean(images, axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(deviation, np.std(images, axis=(0, 2, 3)), rtol=1e-9)


def test_a_constant_channel_is_not_scaled(tmp_path: Path) -> None:
    pixels = colours(20)
    pixels[..., 1] = 7
    report = prepare_images(tmp_path / "i.h5", written(tmp_path, x=pixels, y=np.zeros(20, int)))
    assert report.notes == ["channel 1 is the same everywhere: it is shifted to zero and not scaled"]
    assert not contents(tmp_path / "i.h5")[0][:, 1].any()


@pytest.mark.parallel([2, 3])
def test_every_rank_gets_the_report_and_its_rows(comm: parallel.Comm, shared_tmp_path: Path) -> None:
    if comm.rank == 0:
        written(shared_tmp_path, x=colours(30), y=np.arange(30) % 2)
    parallel.any_rank(comm, False)
    report = prepare_images(shared_tmp_path / "i.h5", shared_tmp_path / "source.npz", comm=comm)
    data = Dataset(shared_tmp_path / "i.h5", "train", comm)
    assert sum(report.split_counts) == 30 and data.count == report.split_counts[0]
    assert data.input_shape == (3, 6, 7)


# ------------------------------------------------------------------------------------------------------- what is refused


def spoilt(**changes: object) -> dict[str, np.ndarray]:
    arrays = encoded_arrays("train", [encoded(p) for p in colours(3)], [0, 1, 0])
    arrays.update({name: np.asarray(value) for name, value in changes.items()})
    return {name: value for name, value in arrays.items() if value.ndim or value.item() is not None}


CUT = "train_offset does not cut the .* bytes of train_png into 3 images"


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        (lambda: {"photos": np.zeros(3)}, r"no images among its arrays \(photos\); give train_jpeg"),
        (lambda: spoilt(train_label=None), r"array train_label is missing \(it has train_offset, train_png\)"),
        (lambda: spoilt(train_offset=[0, 5, 3, 9]), CUT),
        (lambda: spoilt(train_offset=[0, 5, 6, 10**9]), CUT),
        (lambda: spoilt(train_offset=[0, 5, 6]), CUT),
        (
            lambda: spoilt(train_label=[0.5, 1, 2]),
            r"train_label holds float64 of shape \(3,\); give one integer an image",
        ),
        (lambda: spoilt(train_label=[0, -2, 0]), "train_label row 1: label -2"),
        (lambda: spoilt(classes=["one"]), "label 1 is out of range: classes has 1 names"),
        (lambda: {"x": np.zeros((2, 5)), "y": np.zeros(2, int)}, r"x holds float64 of shape \(2, 5\); give numbers"),
        (lambda: {"x": np.zeros((2, 5, 5)), "y": np.zeros(3, int)}, "x has 2 images, y 3 labels"),
        (lambda: {"x": np.zeros((2, 5, 5, 7)), "y": np.zeros(2, int)}, "has no axis of 1, 3 or 4 channels"),
        (lambda: {"x": np.full((2, 5, 5), np.nan), "y": np.zeros(2, int)}, "none of its 2 rows can be used"),
        (lambda: {"x": np.array([{}] * 2, object), "y": np.zeros(2, int)}, "no .npz file of plain arrays"),
        (lambda: {"x_test": np.zeros((2, 5, 5)), "y_test": np.zeros(2, int)}, "none of its 2 images is for training"),
    ],
)
def test_a_damaged_source_is_refused(arrays: Callable[[], dict[str, np.ndarray]], told: str, tmp_path: Path) -> None:
    source = written(tmp_path, **arrays())
    with pytest.raises(DataError, match=f"source.npz: {told}|{told}"):
        prepare_images(tmp_path / "i.h5", source)
    assert not list(tmp_path.glob("i.h5*"))


def test_images_of_different_sizes_are_refused(tmp_path: Path) -> None:
    images = [encoded(colours(1, side)[0]) for side in (6, 6, 8)]
    source = written(tmp_path, **encoded_arrays("train", images, [0, 0, 0]))
    with pytest.raises(DataError, match="train-000000 has 3 x 6 x 7 .*, train-000002 3 x 8 x 9; bring all to one size"):
        prepare_images(tmp_path / "i.h5", source, Shares(validation_fraction=0))


def test_a_damaged_image_is_skipped_with_its_reason(tmp_path: Path) -> None:
    images = [encoded(p) for p in colours(6)]
    images[2] = images[2][: len(images[2]) // 2]
    images[4] = b"no image at all"
    report = prepare_images(tmp_path / "i.h5", written(tmp_path, **encoded_arrays("train", images, [0] * 6)))
    assert [skipped.row for skipped in report.skipped] == ["train-000002", "train-000004"]
    assert all("Pillow" in skipped.reason for skipped in report.skipped)
    assert sum(report.split_counts) == 4


def test_a_folder_without_class_folders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match="no subfolders of images; put the images of each class in .*CLASS"):
        prepare_images(tmp_path / "i.h5", tmp_path / "pictures")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"limit": 0}, "--limit 0: at least 1"),
        ({"validation_fraction": 0.7}, "--validation-fraction 0.7: from 0 to 0.5"),
    ],
)
def test_wrong_options_are_refused(settings: dict[str, float], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        Shares(**settings)


# ----------------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_a_file_that_the_next_command_takes(run: Run, tmp_path: Path) -> None:
    written(tmp_path, x=colours(40, 8), y=np.arange(40) % 2, classes=np.array(["even", "odd"]))
    done = run("-m", "hpcdeq.prepare", "images", "source.npz", "--out", "i.h5", "--limit", "30", "--seed", "1")
    assert done.returncode == 0, done.stderr
    assert "i.h5: 30 samples in" in done.stdout and "even" in done.stdout
    assert done.stdout.rstrip().endswith("python -m hpcdeq.train --data i.h5 --model conv_deq --optimizer adam")
    words = "-m hpcdeq.train --data i.h5 --model conv_deq --optimizer adam --max-iterations 1 --out r".split()
    done = run(*words, ranks=2)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("absent.npz", "DataError: absent.npz: no such file or folder"),
        ("text.npz", "DataError: text.npz: no .npz file of plain arrays"),
        ("one.npy", "DataError: one.npy: one array without labels"),
    ],
)
def test_a_wrong_source_ends_with_code_2(run: Run, tmp_path: Path, source: str, told: str) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "one.npy", np.zeros(3))
    done = run("-m", "hpcdeq.prepare", "images", source, "--out", "i.h5")
    assert done.returncode == 2 and done.stderr.startswith(told) and "Traceback" not in done.stderr
    assert not (tmp_path / "i.h5").exists()


@pytest.mark.real_data
def test_the_real_images(tmp_path: Path) -> None:
    report = prepare_images(tmp_path / "i.h5", CIFAR, Shares(limit=1100))
    assert report.classes[0] == "airplane" and len(report.classes) == 10 and not report.skipped
    assert report.split_counts[2] == 100 and 60 < report.split_counts[1] < 140
    x, y, split, _ = contents(tmp_path / "i.h5")
    assert x.shape == (1100, 3, 32, 32) and min(np.bincount(y)) > 60
    np.testing.assert_allclose(x[split == 0].mean(axis=(0, 2, 3)), 0.0, atol=1e-5)
    np.testing.assert_allclose(x[split == 0].std(axis=(0, 2, 3)), 1.0, rtol=1e-5)
