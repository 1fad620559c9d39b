"""Images out of a source: an .npz file of encoded images or of pixels, or a folder of class subfolders.

In an .npz file each split (``train``, ``test``, and ``validation`` or ``val``) has either encoded images laid end to end,
``train_jpeg`` (bytes) with ``train_offset`` and ``train_label``, or pixels: ``x_train`` with ``y_train``,
``train_images`` with ``train_labels``, or ``train_x`` with ``train_y``. Pixels without splits are ``x`` with ``y``, or
``images`` with ``labels``. An array ``classes`` names the labels. Pixels are (N, H, W), (N, H, W, C) or (N, C, H, W); a
last length of 1, 3 or 4 is taken for the channels.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from hpcdeq.builders.samples import Skipped, fraction_of
from hpcdeq.errors import DataError

SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}
ENCODINGS = ("jpeg", "png")
PIXEL_NAMES = (("x_{}", "y_{}"), ("{}_images", "{}_labels"), ("{}_x", "{}_y"))
UNSPLIT_NAMES = (("x", "y"), ("images", "labels"))
CHANNELS = (1, 3, 4)
ACCEPTED = (
    "give train_jpeg + train_offset + train_label, x_train + y_train, train_images + train_labels (and likewise test,"
    " validation), or x + y"
)


@dataclass(frozen=True)
class Picture:
    """One image of a source, not read yet.

    Attributes
    ----------
    id
        Its place in the source.
    label
        Number of its class.
    split
        The split that the source puts it in; None where it has no splits.
    content
        Encoded image, or its pixels, or the file that it is in.
    """

    id: str
    label: int
    split: str | None
    content: bytes | np.ndarray | Path


def read_source(source: Path, seed: int) -> tuple[tuple[str, ...], list[Picture]]:
    """Find the classes and the images of a source.

    Not collective.

    Parameters
    ----------
    source
        An .npz file, or a folder.
    seed
        Of the order of a folder's images, whose own order is class by class.

    Returns
    -------
    tuple
        Names of the classes, and the images in order.

    Raises
    ------
    DataError
        The source is missing, damaged or holds no images.
    """
    if source.is_dir():
        return _read_folder(source, seed)
    with _opened(source) as file:
        return _read_arrays(source, {name: file[name] for name in file})


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[Mapping[str, np.ndarray]]:
    """Open an .npz file, and say what is wrong with it, also when an array is read."""
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    try:
        file = np.load(source, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(f"{source}: one array without labels; give an .npz file with images and labels")
        with file:
            yield file
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(
            f"{source}: no .npz file of plain arrays ({error}); images come from an .npz file, or a folder with one"
            " subfolder a class"
        ) from error


def pictures_of(source: Path) -> Iterator[Picture]:
    """Yield the images of a source in its order, whether or not it says their classes.

    Not collective.

    Raises
    ------
    DataError
        The source is missing, damaged or holds no images.
    """
    if source.is_dir():
        files = sorted(file for file in source.rglob("*") if file.is_file() and not file.name.startswith("."))
        if not files:
            raise DataError(f"{source}: no images")
        for file in files:
            yield Picture(file.relative_to(source).as_posix(), 0, None, file)
        return
    if source.suffix.lower() != ".npz":
        yield Picture(source.name, 0, None, source)
        return
    with _opened(source) as packed:
        arrays = {name: packed[name] for name in packed}
        for images, labels in UNSPLIT_NAMES:
            if images in arrays:
                arrays.setdefault(labels, np.zeros(len(arrays[images]), np.int64))
        yield from _read_arrays(source, arrays)[1]


def _read_arrays(source: Path, file: Mapping[str, np.ndarray]) -> tuple[tuple[str, ...], list[Picture]]:
    pictures: list[Picture] = []
    for name, split in SPLIT_NAMES.items():
        encoding = next((e for e in ENCODINGS if f"{name}_{e}" in file), None)
        pixels = next((p for p in PIXEL_NAMES if p[0].format(name) in file), None)
        if encoding is not None:
            pictures += _encoded(source, file, name, encoding, split)
        elif pixels is not None:
            pictures += _plain(source, file, pixels[0].format(name), pixels[1].format(name), name, split)
    if not pictures:
        unsplit = next((p for p in UNSPLIT_NAMES if p[0] in file), None)
        if unsplit is None:
            held = ", ".join(sorted(file)) or "none"
            raise DataError(f"{source}: no images among its arrays ({held}); {ACCEPTED}")
        pictures += _plain(source, file, *unsplit, "image", None)
    largest = max((picture.label for picture in pictures), default=-1)
    if "classes" not in file:
        return tuple(str(label) for label in range(largest + 1)), pictures
    classes = tuple(str(name) for name in np.atleast_1d(file["classes"]))
    if largest >= len(classes):
        raise DataError(f"{source}: label {largest} is out of range: classes has {len(classes)} names, labels from 0")
    return classes, pictures


def _encoded(source: Path, file: Mapping[str, np.ndarray], name: str, encoding: str, split: str) -> Iterator[Picture]:
    stream, labels = file[f"{name}_{encoding}"], _labels(source, file, f"{name}_label")
    offset = _array(source, file, f"{name}_offset")
    fits = (
        stream.dtype == np.uint8
        and stream.ndim == 1
        and offset.dtype.kind in "iu"
        and offset.shape == (len(labels) + 1,)
        and (len(labels) == 0 or bool((np.diff(offset.astype(np.int64)) >= 0).all()))
        and 0 <= offset[0]
        and offset[-1] <= stream.size
    )
    if not fits:
        raise DataError(
            f"{source}: {name}_offset does not cut the {stream.size} bytes of {name}_{encoding} into {len(labels)} images:"
            f" image i is bytes offset[i] to offset[i+1] of an array of uint8, {len(labels) + 1} integers that never decrease"
        )
    for row, label in enumerate(labels.tolist()):
        yield Picture(f"{name}-{row:06d}", label, split, stream[offset[row] : offset[row + 1]].tobytes())


def _plain(
    source: Path, file: Mapping[str, np.ndarray], values: str, names: str, prefix: str, split: str | None
) -> Iterator[Picture]:
    pixels, labels = file[values], _labels(source, file, names)
    if pixels.ndim not in (3, 4) or pixels.dtype.kind not in "uif":
        raise DataError(
            f"{source}: {values} holds {pixels.dtype} of shape {pixels.shape}; give numbers of shape (N, H, W),"
            " (N, H, W, C) or (N, C, H, W)"
        )
    if len(pixels) != len(labels):
        raise DataError(f"{source}: {values} has {len(pixels)} images, {names} {len(labels)} labels")
    if pixels.ndim == 4 and not {pixels.shape[1], pixels.shape[3]} & set(CHANNELS):
        raise DataError(f"{source}: {values} of shape {pixels.shape} has no axis of 1, 3 or 4 channels, second or last")
    for row, label in enumerate(labels.tolist()):
        yield Picture(f"{prefix}-{row:06d}", label, split, pixels[row])


def _labels(source: Path, file: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    labels = _array(source, file, name)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{source}: {name} holds {labels.dtype} of shape {labels.shape}; give one integer an image")
    if labels.size and labels.min() < 0:
        raise DataError(f"{source}: {name} row {int(labels.argmin())}: label {labels.min()}; labels are 0, 1, ...")
    return labels.astype(np.int64)


def _array(source: Path, file: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    if name not in file:
        raise DataError(f"{source}: array {name} is missing (it has {', '.join(sorted(file))}); {ACCEPTED}")
    return file[name]


def _read_folder(source: Path, seed: int) -> tuple[tuple[str, ...], list[Picture]]:
    folders = _subfolders(source)
    divided = bool(folders) and all(folder.name in SPLIT_NAMES for folder in folders)
    parts = [(SPLIT_NAMES[f.name], f) for f in folders] if divided else [(None, source)]
    classes = tuple(sorted({folder.name for _, part in parts for folder in _subfolders(part)}))
    if not classes:
        raise DataError(
            f"{source}: no subfolders of images; put the images of each class in {source / 'CLASS'}, or in"
            f" {source / 'train' / 'CLASS'} and {source / 'test' / 'CLASS'}"
        )
    pictures = [
        Picture(file.relative_to(source).as_posix(), classes.index(folder.name), split, file)
        for split, part in parts
        for folder in _subfolders(part)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    ]
    return classes, sorted(pictures, key=lambda picture: fraction_of(picture.id, seed))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def decode(picture: Picture) -> tuple[np.ndarray, str] | Skipped:
    """Read the pixels of an image, and a digest that is the same for the same content only.

    Not collective. Palettes become colours and an alpha channel is left out.

    Returns
    -------
    tuple or Skipped
        ``(C, H, W)`` numbers as they are in the source, and the digest; or why the image cannot be used.
    """
    content = picture.content
    try:
        if isinstance(content, np.ndarray):
            if content.dtype.kind == "f" and not np.isfinite(content).all():
                return Skipped(picture.id, "a pixel is not finite")
            return _channels_first(content), hashlib.sha256(content.tobytes()).hexdigest()
        data = content.read_bytes() if isinstance(content, Path) else content
        return _channels_first(_decompress(data)), hashlib.sha256(data).hexdigest()
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for damaged files
        told = str(error) if not isinstance(content, bytes) else "not an image that Pillow can read, or damaged"
        return Skipped(picture.id, told.splitlines()[0] if told else type(error).__name__)


def _decompress(data: bytes) -> np.ndarray:
    # Pillow comes with matplotlib.
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        deep = image.mode[0] in "IF"  # 16-bit and floating greys keep their depth
        grey = image.mode in ("1", "L", "LA")
        return np.asarray(image if deep else image.convert("L" if grey else "RGB"))


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    if pixels.ndim == 2:
        return pixels[None]
    return np.moveaxis(pixels, -1, 0) if pixels.shape[-1] in CHANNELS else pixels
