"""Make a dataset file: `python -m hpcdeq.prepare KIND [SOURCE] --out FILE.h5`.

Another kind of data is another entry of `KINDS`. Nothing heavy is imported before the command line is understood.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcdeq.builders.field_settings import EQUATIONS, FieldSettings
from hpcdeq.commands import CommandParser
from hpcdeq.errors import EXIT_DONE, OptionError
from hpcdeq.label_options import add_label_options, given, labels_of

if TYPE_CHECKING:
    from hpcdeq.builders.samples import Progress, Report, Shares

PROGRAM = "python -m hpcdeq.prepare"
SAMPLES = 1000  # of a field, without --limit


@dataclass(frozen=True)
class Kind:
    """One kind of data: a line of help, its options, and how to build the file (collective on all ranks).

    ``description`` heads the help of this kind alone, where the line says too little. ``limit_help`` and ``seed_help``
    say what these options, which all kinds have, mean for this one. ``advice`` is what a first training command on such
    a file should say besides ``--data``.
    """

    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    build: Callable[[argparse.Namespace, str], Report]
    description: str = ""
    limit_help: str = "first N rows of the source"
    seed_help: str = "of the splits (default 0)"
    advice: str = ""


STRUCTURE_OPTIONS = ("neighbours", "radius", "voids", "oxidation", "group", "least_distance")


def _structure_kind(name: str, summary: str, learned: str, group: str, voids: int, least_distance: float) -> Kind:
    """Return a kind of periodic structures; what the arguments after the summary say are its defaults."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "source",
            metavar="SOURCE",
            help="folder of .cif with id_prop.csv (or one other .csv: a line of column names, the first id or filename),"
            " .jsonl[.gz], pymatgen's .json[.gz], or .xyz, .extxyz, .traj, .db, .vasp through ASE",
        )
        add_label_options(parser, learned)
        parser.add_argument(
            "--neighbours", type=int, metavar="K", help="nearest neighbours of an atom (default 12; 0: all within R)"
        )
        parser.add_argument(
            "--radius", type=float, metavar="R", help="no neighbour is farther away, angstrom (default: no limit)"
        )
        parser.add_argument(
            "--voids", type=int, metavar="N", help=f"the N largest empty spheres become nodes, too (default {voids})"
        )
        parser.add_argument(
            "--oxidation",
            action=argparse.BooleanOptionalAction,
            help=f"atoms know likely oxidation states, of charges that balance (default {'yes' if name == 'crystals' else 'no'})",
        )
        parser.add_argument(
            "--group",
            metavar="KEY",
            help=f"rows that share it never straddle splits: formula, family (a field, or CSD refcode), or the name of"
            f" another field (default {group})",
        )
        parser.add_argument(
            "--least-distance",
            type=float,
            metavar="D",
            help=f"leave out structures with two atoms nearer than this, angstrom (default {least_distance:g})",
        )

    def build(options: argparse.Namespace, command: str) -> Report:
        from hpcdeq.builders import crystals, frameworks

        presets = {
            "crystals": (crystals.BAND_GAP, crystals.SETTINGS),
            "frameworks": (frameworks.CAVITY, frameworks.SETTINGS),
        }
        preset, settings = presets[name]
        return crystals.prepare_crystals(
            options.out,
            options.source,
            labels_of(options, preset),
            dataclasses.replace(settings, **given(options, *STRUCTURE_OPTIONS)),
            _shares(options),
            kind=name,
            processes=_processes(options),
            command=command,
            progress=_progress(options),
        )

    return Kind(summary, add_options, build)


def _molecule_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="table with SMILES (.csv[.gz], .tsv), .sdf[.gz], .xyz (or a folder), .jsonl[.gz]",
    )
    add_label_options(parser, "default mu, at 2.5 debye: weakly polar, strongly polar")
    parser.add_argument("--smiles-column", metavar="NAME", help="of a table (default smiles)")
    parser.add_argument(
        "--geometry",
        metavar="KIND",
        help="source: its coordinates where it has them (default); conformers: ETKDG's where not; none: bonds alone",
    )
    parser.add_argument(
        "--conformers", type=int, metavar="C", help="with --geometry conformers: atoms know of C of them (default 1)"
    )
    parser.add_argument(
        "--radius", type=float, metavar="R", help="pairs up to this distance are edges (default 5 angstrom)"
    )
    parser.add_argument("--group", metavar="KEY", help="smiles, scaffold or a field: never straddles (default smiles)")


def _build_molecules(options: argparse.Namespace, command: str) -> Report:
    from hpcdeq.builders.molecular import MoleculeSettings
    from hpcdeq.builders.molecules import DIPOLE, prepare_molecules

    return prepare_molecules(
        options.out,
        options.source,
        labels_of(options, DIPOLE),
        MoleculeSettings(
            seed=options.seed, **given(options, "geometry", "conformers", "radius", "group", "smiles_column")
        ),
        _shares(options),
        processes=_processes(options),
        command=command,
        progress=_progress(options),
    )


def _shares(options: argparse.Namespace) -> Shares:
    from hpcdeq.builders.samples import Shares

    return Shares(options.validation_fraction, options.seed, options.limit)


def _processes(options: argparse.Namespace) -> int:
    if options.processes is not None and options.processes < 1:
        raise OptionError(f"--processes {options.processes}: at least 1")
    return options.processes or len(os.sched_getaffinity(0))


def _progress(options: argparse.Namespace) -> Progress:
    from hpcdeq.builders.samples import silent

    return silent if options.quiet or not sys.stderr.isatty() else _bar


def _bar(blocks: Iterable[Any], label: str, total: int | None) -> Iterable[Any]:
    from tqdm import tqdm

    return tqdm(blocks, desc=label, total=total, unit="block", leave=False)


def _field_kind(equation: type[FieldSettings]) -> Kind:
    """Return the kind of data that an equation makes: its settings are its options."""

    def add_options(parser: argparse.ArgumentParser) -> None:
        for item in dataclasses.fields(equation):
            name, text = f"--{item.name.replace('_', '-')}", item.metadata["help"]
            if isinstance(item.default, bool):
                parser.add_argument(name, action="store_true", help=text)
            else:
                parser.add_argument(
                    name,
                    type=type(item.default),
                    default=item.default,
                    metavar=item.metadata["metavar"],
                    help=f"{text} (default {item.default})",
                )

    def build(options: argparse.Namespace, command: str) -> Report:
        from hpcdeq.builders.fields import prepare_field

        return prepare_field(
            options.out,
            equation(**{item.name: getattr(options, item.name) for item in dataclasses.fields(equation)}),
            SAMPLES if options.limit is None else options.limit,
            options.seed,
            command=command,
            progress=_progress(options),
        )

    return Kind(
        equation.summary,
        add_options,
        build,
        description=inspect.getdoc(equation) or "",
        limit_help=f"number of samples (default {SAMPLES})",
        seed_help="of the samples (default 0)",
    )


def _image_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help=".npz of images and labels, or folder [SPLIT/]CLASS/IMAGE")
    parser.add_argument("--validation-fraction", type=float, default=0.1, metavar="F", help="default 0.1")


def _build_images(options: argparse.Namespace, command: str) -> Report:
    from hpcdeq.builders.images import prepare_images

    return prepare_images(
        options.out,
        options.source,
        _shares(options),
        command=command,
        progress=_progress(options),
    )


KINDS = {
    "crystals": _structure_kind(
        "crystals",
        "structures with a property, as graphs of neighbours",
        "default band_gap, at 0.01 and 3 eV: metal, semiconductor, insulator",
        "formula",
        0,
        0.1,
    ),
    "frameworks": _structure_kind(
        "frameworks",
        "metal-organic frameworks by pore size, as graphs of neighbours",
        "default LCD, at 5 and 7 angstrom: small, medium, large",
        "family",
        16,
        0.5,
    ),
    "molecules": Kind("molecules with a property, as graphs of atoms", _molecule_options, _build_molecules),
    "images": Kind(
        "images with a class, as arrays", _image_options, _build_images, advice="--model conv_deq --optimizer adam"
    ),
    **{equation.kind: _field_kind(equation) for equation in EQUATIONS},
}


def build_parser() -> CommandParser:
    """Return the parser of this command. Not collective."""
    parser = CommandParser(prog=PROGRAM, description=(__doc__ or "").split("\n")[0])
    chosen = parser.add_subparsers(dest="kind", metavar="KIND", required=True, help="one of:")
    for name, kind in KINDS.items():
        own = chosen.add_parser(name, help=kind.summary, description=kind.description or kind.summary)
        kind.add_options(own)
        own.add_argument("--out", required=True, type=Path, metavar="FILE.h5", help="replaced on success only")
        own.add_argument("--limit", type=int, metavar="N", help=kind.limit_help)
        own.add_argument("--seed", type=int, default=0, metavar="S", help=kind.seed_help)
        own.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def main(arguments: list[str]) -> int:
    """Make a dataset file and say what is in it.

    Collective on MPI.COMM_WORLD.

    Raises
    ------
    HpcdeqError
        The source, an option or the output folder is no good; raised on all ranks.
    """
    options = build_parser().parse_args(arguments)
    from hpcdeq import parallel
    from hpcdeq.builders.samples import list_skipped

    begin = time.perf_counter()
    report = KINDS[options.kind].build(options, shlex.join([*PROGRAM.split(), *arguments]))
    with parallel.agreement(parallel.WORLD):
        if parallel.WORLD.rank == 0:
            listing = list_skipped(options.out, report.skipped)
            seconds = time.perf_counter() - begin
            print(summary(options.out, report, listing, seconds, KINDS[options.kind].advice), flush=True)
    return EXIT_DONE


def summary(out: Path, report: Report, listing: Path, seconds: float, advice: str = "") -> str:
    """Return what a user wants to know about a file that was just written.

    Not collective.
    """
    from hpcdeq.data.schema import SPLITS

    lines = [f"{out}: {sum(report.split_counts)} samples in {seconds:.1f} s"]
    for split, name in enumerate(SPLITS):
        kinds = report.class_counts[split] if report.class_counts else []
        parts = ", ".join(f"{label} {number}" for label, number in zip(report.classes, kinds, strict=False))
        lines.append(f"  {name:<10} {report.split_counts[split]:>7}" + (f"  ({parts})" if parts else ""))
    if report.skipped:
        lines.append(f"  skipped    {len(report.skipped):>7}  (all in {listing})")
        lines += [f"    {row.row}: {row.reason}" for row in report.skipped[:5]]
        if len(report.skipped) > 5:
            lines.append(f"    and {len(report.skipped) - 5} more")
    lines += [f"  note: {note}" for note in report.notes]
    lines.append(f"next: mpirun -n 2 python -m hpcdeq.train --data {shlex.quote(str(out))} {advice}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    build_parser().parse_args(sys.argv[1:])  # a wrong command line ends here, before MPI starts
    from hpcdeq.parallel import launch

    launch(main, sys.argv[1:])
