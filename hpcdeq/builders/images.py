"""Images with a class: pixels of any source in, normalised arrays ``(C, H, W)`` in one dataset file out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hpcdeq import parallel
from hpcdeq.builders.pictures import Picture, decode, read_source
from hpcdeq.builders.samples import (
    Progress,
    Report,
    Shares,
    Skipped,
    assign_splits,
    blocks,
    provenance,
    refuse_if_none,
    silent,
    straddling,
)
from hpcdeq.data.rows import SampleRows
from hpcdeq.data.schema import Schema
from hpcdeq.data.writer import DatasetWriter
from hpcdeq.errors import DataError

WRITTEN = 512  # images normalised and written at a time


def prepare_images(
    path: str | os.PathLike[str],
    source: str | os.PathLike[str],
    shares: Shares | None = None,
    *,
    comm: parallel.Comm = parallel.WORLD,
    command: str = "",
    progress: Progress = silent,
) -> Report:
    """Write the images of a source to a dataset file, ordered train, validation, test.

    Collective on comm. Rank 0 reads and writes: 55,000 images of 32 x 32 take about 15 seconds. Each channel is shifted
    and scaled by its mean and standard deviation over the training images; the file says them. The same image twice is
    never in train and validation both.

    Parameters
    ----------
    path
        The file to make; replaced on success only.
    source
        See `hpcdeq.builders.pictures`.
    shares
        Which images are used, and how they are shared out.
    progress
        Wraps a stream of blocks to show how far it is; called with stream, label and number of blocks if known.

    Returns
    -------
    Report
        The same on all ranks.

    Raises
    ------
    DataError
        The source is missing or damaged, its images differ in size, or the file cannot be written.
    """
    shares = shares or Shares()
    report = Report()
    with parallel.agreement(comm):
        if comm.rank == 0:
            report = _build(Path(path), Path(source), shares, command, progress)
    return parallel.from_root(comm, report)


def first_of_each_split(pictures: Sequence[Picture], limit: int | None) -> list[Picture]:
    """Return the first images of each split of the source, ``limit`` in all, shared out in proportion. Not collective."""
    if limit is None or limit >= len(pictures):
        return list(pictures)
    counts = Counter(picture.split for picture in pictures)
    exact = {split: limit * number / len(pictures) for split, number in counts.items()}
    shares = {split: int(share) for split, share in exact.items()}
    # What rounding down leaves over goes to the largest remainders.
    for split in sorted(exact, key=lambda s: shares[s] - exact[s])[: limit - sum(shares.values())]:
        shares[split] += 1
    taken: list[Picture] = []
    for picture in pictures:
        if shares[picture.split]:
            shares[picture.split] -= 1
            taken.append(picture)
    return taken


def channel_statistics(images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each channel over images ``(C, H, W)``, ``(C,)`` each. Not collective."""
    pixels = sum(image[0].size for image in images)
    mean = sum(_channel_sums(block) for block in blocks(images, WRITTEN)) / pixels
    squares = sum(_channel_sums(block, mean) for block in blocks(images, WRITTEN))
    return mean, np.sqrt(squares / pixels)


def _channel_sums(images: Sequence[np.ndarray], mean: np.ndarray | None = None) -> np.ndarray:
    values = np.stack(images).astype(np.float64)
    if mean is not None:
        values = (values - mean[:, None, None]) ** 2
    return values.sum(axis=(0, 2, 3))


def normalised(images: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return images ``(b, C, H, W)`` with each channel shifted and scaled, in single precision. Not collective."""
    values = images.astype(np.float64)
    return ((values - mean[:, None, None]) / scale[:, None, None]).astype(np.float32)


def _build(path: Path, source: Path, shares: Shares, command: str, progress: Progress) -> Report:
    classes, found = read_source(source, shares.seed)
    report = Report(classes=classes)
    pictures, images, digests = _decoded(first_of_each_split(found, shares.limit), report, progress)
    refuse_if_none(source, len(images), report.skipped)
    images = _alike(source, pictures, images)
    splits = assign_splits(digests, [p.split for p in pictures], shares.validation_fraction, shares.seed)
    training = [image for image, split in zip(images, splits, strict=True) if split == 0]
    if not training:
        raise DataError(f"{source}: none of its {len(images)} images is for training; give a larger source or --limit")
    mean, deviation = channel_statistics(training)
    constant = np.flatnonzero(deviation == 0).tolist()
    if constant:
        report.notes.append(f"channel {constant[0]} is the same everywhere: it is shifted to zero and not scaled")
    scale = np.where(deviation == 0, 1.0, deviation)
    torn = straddling(digests, splits)
    if torn:
        report.notes.append(f"{torn} images are in more than one split of the source, and so here")
    normalisation = {"channel_mean": mean.tolist(), "channel_std": scale.tolist()}
    schema = Schema(
        "classification",
        "array",
        classes=classes,
        sample_shape=images[0].shape,
        provenance={
            **provenance(str(source), command, ["pillow"]),
            "kind": "images",
            "settings": {**normalisation, "shape": list(images[0].shape)},
        },
    )
    facts = {"quantity": "(value - channel_mean) / channel_std", "axes": "channel, row, column", **normalisation}
    order = np.argsort(splits, kind="stable")
    with DatasetWriter(path, schema, array_attributes=facts, input_type=np.float32) as writer:
        parts = list(blocks(order.tolist(), WRITTEN))
        for part in progress(parts, "writing", len(parts)):
            inputs = normalised(np.stack([images[row] for row in part]), mean, scale)
            targets = np.array([pictures[row].label for row in part], np.int64)
            writer.append(SampleRows([pictures[row].id for row in part], targets, inputs), splits[part])
            report.add(splits[part], targets)
    return report


def _decoded(
    chosen: Sequence[Picture], report: Report, progress: Progress
) -> tuple[list[Picture], list[np.ndarray], list[str]]:
    """Read the images; what cannot be read goes to the report."""
    pictures, images, digests = [], [], []
    parts = list(blocks(chosen, WRITTEN))
    for picture, answer in _answers(progress(parts, "reading", len(parts))):
        if isinstance(answer, Skipped):
            report.skipped.append(answer)
            continue
        pictures.append(picture)
        images.append(answer[0])
        digests.append(answer[1])
    return pictures, images, digests


def _answers(parts: Iterable[list[Picture]]) -> Iterator[tuple[Picture, tuple[np.ndarray, str] | Skipped]]:
    for part in parts:
        for picture in part:
            yield picture, decode(picture)


def _alike(source: Path, pictures: Sequence[Picture], images: list[np.ndarray]) -> list[np.ndarray]:
    """Return images of one shape: greys among colours get three equal channels; other differences are refused."""
    channels = max(len(image) for image in images)
    images = [np.repeat(image, channels, axis=0) if len(image) == 1 else image for image in images]
    for picture, image in zip(pictures, images, strict=True):
        if image.shape != images[0].shape:
            first, other = ("{} x {} x {}".format(*shape) for shape in (images[0].shape, image.shape))
            raise DataError(
                f"{source}: images differ in size: {pictures[0].id} has {first} (channels x rows x columns), {picture.id}"
                f" {other}; bring all to one size first"
            )
    return images
