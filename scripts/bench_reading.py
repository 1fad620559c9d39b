"""How fast a dataset is read beside `numpy.load` of the same bytes.

    python scripts/bench_reading.py --out reading.csv

Files of random samples: graphs (of 360 edges in the mean) in one file and in eight parts, and arrays of 1,024 numbers. What
is timed is all of `hpcdeq.Dataset`: headers, splits, offsets, the rows as hyperslabs, and the checks of every value; and
the same without the checks of values. Beside it `numpy.load` of the same arrays, a file each, which checks nothing. They take
turns; a ratio is that of two turns next to each other, and what is told are medians. Caches of the system cannot be dropped
without being root: after the first turn, which does not count, all files come from memory, so that this is the speed of the
software and not of a disk. The ratio of processor times is what a machine that is busy with other work would show by itself.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from bench_table import write_table

from hpcdeq.data.dataset import Dataset
from hpcdeq.data.graphs import GraphArrays
from hpcdeq.data.rows import SampleRows
from hpcdeq.data.schema import Schema
from hpcdeq.data.writer import DatasetWriter
from hpcdeq.parallel import SELF

NODES, NEIGHBOURS, NUMBERS, BATCH = 30, 12, 1024, 1000
GRAPH_BYTES = NODES * (NEIGHBOURS * 33 + 6) + 24
PARTS = 8
CHECKED, UNCHECKED, NUMPY = "checked", "unchecked", "numpy"


def graphs(random: np.random.Generator, count: int) -> SampleRows:
    """Return graphs of 1 to 59 nodes with 12 edges each."""
    nodes = random.integers(1, 2 * NODES, count)
    offset = np.concatenate([[0], np.cumsum(nodes)])
    target = np.concatenate([np.repeat(np.arange(n, dtype=np.int32), NEIGHBOURS) for n in nodes])
    made = GraphArrays(
        offset,
        random.integers(1, 90, offset[-1]).astype(np.uint8),
        NEIGHBOURS * offset,
        (random.random(len(target)) * np.repeat(nodes, NEIGHBOURS * nodes)).astype(np.int32),
        target,
        random.standard_normal((len(target), 3)),
    )
    return SampleRows([f"sample-{k}" for k in range(count)], random.integers(0, 3, count), made)


def arrays(random: np.random.Generator, count: int) -> SampleRows:
    """Return arrays of 1,024 numbers."""
    inputs = random.standard_normal((count, NUMBERS))
    return SampleRows([f"sample-{k}" for k in range(count)], random.integers(0, 3, count), inputs)


def write(path: Path, kind: str, count: int, seed: int) -> None:
    """Write a file of random samples."""
    random = np.random.default_rng(seed)
    shape = () if kind == "graph" else (NUMBERS,)
    schema = Schema("classification", kind, classes=("a", "b", "c"), sample_shape=shape)
    with DatasetWriter(path, schema) as writer:
        for start in range(0, count, BATCH):
            size = min(BATCH, count - start)
            writer.append((graphs if kind == "graph" else arrays)(random, size), np.zeros(size, np.uint8))


def arrays_of(data: Dataset) -> list[np.ndarray]:
    """Return all that a dataset has read for its samples."""
    inputs = data._inputs
    found = list(vars(inputs).values()) if isinstance(inputs, GraphArrays) else [inputs.numpy()]
    return [values for values in (*found, data.targets.numpy()) if values.size]


def measure(path: Path, folder: Path, turns: int) -> dict[str, float]:
    """Return bytes, rates in GB/s and their ratio, medians over the turns."""
    plain = []
    for number, values in enumerate(arrays_of(Dataset(path, "train", SELF))):
        plain.append(folder / f"{number}.npy")
        np.save(plain[-1], values)
    size = sum(os.path.getsize(file) for file in plain)
    readers = {
        CHECKED: lambda: Dataset(path, "train", SELF),
        UNCHECKED: lambda: without_checks(path),
        NUMPY: lambda: [np.load(file) for file in plain],
    }
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    processor: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(turns + 1):
        for name, read in readers.items():
            began, busy = time.perf_counter(), time.process_time()
            held = read()
            if turn:
                seconds[name].append(time.perf_counter() - began)
                processor[name].append(time.process_time() - busy)
            del held
    for file in plain:
        file.unlink()
    found = {"megabytes": size / 1e6}
    for name in readers:
        found[f"{name}, GB/s"] = size / 1e9 / statistics.median(seconds[name])
    for name in (UNCHECKED, CHECKED):
        for kind, spent in (("ratio", seconds), ("processor ratio", processor)):
            of_turns = [n / h for n, h in zip(spent[NUMPY], spent[name], strict=True)]
            found[f"{name}, {kind}"] = statistics.median(of_turns)
    return found


def without_checks(path: Path) -> Dataset:
    """Return a dataset whose values nobody has looked at."""
    with mock.patch("hpcdeq.data.shards.check_rows"), mock.patch("hpcdeq.data.rows._are_finite", return_value=True):
        return Dataset(path, "train", SELF)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500, metavar="M", help="of each file (default 500)")
    parser.add_argument("--turns", type=int, default=9, metavar="N", help="of each reader (default 9)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where files are made (default: a temporary one)")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="write the table there")
    options = parser.parse_args()
    table = []
    print("                                GB/s                          ratio to numpy (of processor time)")
    print("                    megabytes  checked  unchecked    numpy   unchecked (aim 0.8)        checked")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        samples = options.megabytes * 10**6 // GRAPH_BYTES
        write(folder / "graphs.h5", "graph", samples, 0)
        (folder / "parts").mkdir()
        for part in range(PARTS):
            write(folder / "parts" / f"part-{part:05d}.h5", "graph", samples // PARTS, part)
        write(folder / "arrays.h5", "array", options.megabytes * 10**6 // (8 * NUMBERS), 0)
        cases = {"graphs, one file": "graphs.h5", f"graphs, {PARTS} parts": "parts", "arrays, one file": "arrays.h5"}
        for case, file in cases.items():
            found = measure(folder / file, folder, options.turns)
            rates = [found[f"{name}, GB/s"] for name in (CHECKED, UNCHECKED, NUMPY)]
            ratios = [
                f"{found[f'{name}, ratio']:.2f} ({found[f'{name}, processor ratio']:.2f})"
                for name in (UNCHECKED, CHECKED)
            ]
            print(
                f"{case:<20}{found['megabytes']:9.0f}{rates[0]:9.2f}{rates[1]:11.2f}{rates[2]:9.2f}{ratios[0]:>22}{ratios[1]:>15}",
                flush=True,
            )
            table.append({"case": case, "turns": options.turns} | found)
    write_table(options.out, table)


if __name__ == "__main__":
    main()
