"""What all builders share: skipped rows, splits by group, work in blocks, and the report of what was written."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hpcdeq.data.schema import SPLITS
from hpcdeq.errors import DataError, OptionError

BLOCK = 64  # rows a task: large enough to hide the cost of sending it, small enough to share out evenly
TEST_FRACTION = 0.1
SKIPPED_LIST = ".skipped.csv"  # end of the name of the list of skipped rows, which lies beside a dataset

Item = TypeVar("Item")
Answer = TypeVar("Answer")

Progress = Callable[[Iterable[Any], str, int | None], Iterable[Any]]


@dataclass(frozen=True)
class Skipped:
    """A source row that cannot be used: its id or place in the source, and why."""

    row: str
    reason: str


@dataclass
class Report:
    """What a builder wrote.

    Attributes
    ----------
    classes
        Names of the classes; empty for regression.
    split_counts
        Samples of each split, in the order of `hpcdeq.data.schema.SPLITS`.
    class_counts
        ``(3, classes)`` samples of each split and class.
    skipped
        Every source row that was not used.
    notes
        Sentences a user should read.
    """

    classes: tuple[str, ...] = ()
    split_counts: list[int] = field(default_factory=lambda: [0] * len(SPLITS))
    class_counts: list[list[int]] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, splits: np.ndarray, targets: np.ndarray) -> None:
        """Count some written samples: ``(b,)`` splits, and ``(b,)`` labels where there are classes. Not collective."""
        for split in range(len(SPLITS)):
            own = splits == split
            self.split_counts[split] += int(own.sum())
            if self.classes:
                if not self.class_counts:
                    self.class_counts = [[0] * len(self.classes) for _ in SPLITS]
                found = np.bincount(targets[own], minlength=len(self.classes))
                self.class_counts[split] = [a + int(b) for a, b in zip(self.class_counts[split], found, strict=True)]


def silent(items: Iterable[Any], label: str, total: int | None) -> Iterable[Any]:
    """Show no progress. Not collective."""
    return items


@dataclass(frozen=True)
class Shares:
    """Which rows are used, and how they are shared out.

    Attributes
    ----------
    validation_fraction
        Of the train groups of a source with splits but without validation samples, else of all groups.
    seed
        Of the hash that shares groups out, and of the order of a folder's images.
    limit
        Use so many rows only, the first of the source (images: of each of its splits, in proportion to their numbers);
        None for all.
    """

    validation_fraction: float = 0.1
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        """Refuse values that make no sense."""
        if not 0 <= self.validation_fraction <= 0.5:
            raise OptionError(f"--validation-fraction {self.validation_fraction}: from 0 to 0.5")
        if self.limit is not None and self.limit < 1:
            raise OptionError(f"--limit {self.limit}: at least 1")


def list_skipped(out: Path, skipped: Sequence[Skipped]) -> Path:
    """Write all skipped rows next to a file, remove the list of an earlier run where there are none, and return its name.

    Not collective.

    Raises
    ------
    DataError
        The list cannot be written.
    """
    listing = out.with_suffix(SKIPPED_LIST)
    try:
        if not skipped:
            listing.unlink(missing_ok=True)
            return listing
        with listing.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(["row", "reason"])
            table.writerows([row.row, row.reason] for row in skipped)
    except OSError as error:
        raise DataError(f"{out} is written, but not the list of skipped rows: {error}") from error
    return listing


def refuse_if_none(source: object, usable: int, skipped: Sequence[Skipped]) -> None:
    """Raise `DataError` with the first reasons where no row of a source can be used. Not collective."""
    if usable:
        return
    if not skipped:
        raise DataError(f"{source}: no rows; give a source that has some")
    reasons = "".join(f"\n  {row.row}: {row.reason}" for row in skipped[:5])
    more = f"\n  and {len(skipped) - 5} more" if len(skipped) > 5 else ""
    raise DataError(f"{source}: none of its {len(skipped)} rows can be used:{reasons}{more}")


def blocks(items: Iterable[Item], size: int = BLOCK) -> Iterator[list[Item]]:
    """Cut a stream into lists of ``size``. Not collective."""
    stream = iter(items)
    while block := list(itertools.islice(stream, size)):
        yield block


def in_order(
    executor: Executor | None,
    work: Callable[..., Answer],
    stream: Iterable[list[Item]],
    *common: Any,
    ahead: int = 16,
) -> Iterator[tuple[list[Item], Answer]]:
    """Yield each block of a stream with ``work(block, *common)``, in the stream's order.

    Not collective: rank 0 calls. At most ``ahead`` blocks are under way, which bounds the memory of blocks and
    answers. Without an executor the work is done here.
    """
    if executor is None:
        for block in stream:
            yield block, work(block, *common)
        return
    pending: deque[tuple[list[Item], Future[Answer]]] = deque()
    for block in stream:
        pending.append((block, executor.submit(work, block, *common)))
        if len(pending) >= ahead:
            first, future = pending.popleft()
            yield first, future.result()
    for first, future in pending:
        yield first, future.result()


def fraction_of(group: str, seed: int) -> float:
    """Return a number in [0, 1) that depends on group and seed only, on any machine. Not collective."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56  # 56 bits: a float64 holds any such fraction below 1


def assign_splits(
    groups: Sequence[str], given: Sequence[str | None], validation_fraction: float, seed: int
) -> np.ndarray:
    """Share samples out to train, validation and test, whole groups at a time.

    Not collective. A split given by the source is kept, except that a fraction of the groups of its train rows
    becomes validation unless the source has validation rows. Rows without one follow their group's other rows, else
    the group's hash: 10 % test, ``validation_fraction`` validation, the rest train.

    Returns
    -------
    numpy.ndarray
        ``(b,)`` uint8: 0 train, 1 validation, 2 test.
    """
    known: dict[str, str] = {}
    for group, split in zip(groups, given, strict=True):
        if split is not None:
            known.setdefault(group, split)
    own_validation = "validation" in known.values()
    splits = np.empty(len(groups), np.uint8)
    for row, (group, split) in enumerate(zip(groups, given, strict=True)):
        place = fraction_of(group, seed)
        named = split or known.get(group)
        if named is None:
            bounds = (1 - TEST_FRACTION - validation_fraction, 1 - TEST_FRACTION)
            named = SPLITS[int(np.searchsorted(bounds, place, side="right"))]
        elif named == "train" and not own_validation and place < validation_fraction:
            named = "validation"
        splits[row] = SPLITS.index(named)
    return splits


def straddling(groups: Sequence[str], splits: np.ndarray) -> int:
    """Return the number of groups with samples in more than one split. Not collective."""
    homes: dict[str, set[int]] = {}
    for group, split in zip(groups, splits.tolist(), strict=True):
        homes.setdefault(group, set()).add(split)
    return sum(len(found) > 1 for found in homes.values())


def provenance(source: str, command: str, packages: Sequence[str]) -> dict[str, Any]:
    """Return where a dataset comes from: source, command, and versions of hpcdeq and of the packages used.

    Not collective.
    """
    versions = {}
    for package in ("hpcdeq", "numpy", "h5py", *packages):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"  # run from a source tree
    return {"source": source, "command": command, "versions": versions}
