"""The options of `hpcdeq.prepare` that say what is learned of each row, and how rows are shared out and worked on."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from hpcdeq.errors import OptionError

if TYPE_CHECKING:
    from hpcdeq.builders.labelling import Labelling


def add_label_options(parser: argparse.ArgumentParser, learned: str) -> None:
    """Add the options; ``learned`` says what the kind learns by itself. Not collective."""
    parser.add_argument("--property", metavar="NAME", help=f"what to learn ({learned})")
    parser.add_argument(
        "--thresholds", type=_numbers, metavar="A,B,...", help="bounds of classes; a value on one is above it"
    )
    parser.add_argument("--classes", type=_names, metavar="A,B,...", help="their names, one more than bounds")
    parser.add_argument("--class-column", metavar="NAME", help="learn the classes named in this column or field")
    parser.add_argument("--regression", action="store_true", help="learn the value instead of a class")
    parser.add_argument("--units", help="unit of the property")
    parser.add_argument(
        "--auxiliary",
        type=_names,
        default=(),
        metavar="A,B,...",
        help="numbers of the source that hpcdeq.train learns beside it, and predictions leave out (default none)",
    )
    parser.add_argument("--validation-fraction", type=float, default=0.1, metavar="F", help="default 0.1")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="local processes (default: all cores; under MPI its ranks)"
    )


def labels_of(options: argparse.Namespace, preset: Labelling) -> Labelling:
    """Return what is learned: the kind's own property unless another is named.

    Not collective.

    Raises
    ------
    OptionError
        Options that do not go together.
    """
    from hpcdeq.builders.labelling import Labelling

    if options.class_column is not None:
        wrong = given(options, "property", "thresholds", "units")
        if wrong:
            raise OptionError(f"--class-column {options.class_column}: drop --{next(iter(wrong))}, names need none")
        return Labelling(
            options.class_column,
            classes=options.classes or (),
            named=True,
            regression=options.regression,
            auxiliary=options.auxiliary,
        )
    name = options.property or preset.property_name
    usual = name == preset.property_name
    if options.regression:
        wrong = given(options, "thresholds", "classes")
        if wrong:
            raise OptionError(f"--regression learns the value itself: drop --{next(iter(wrong))}")
    if not options.regression and not usual and options.thresholds is None:
        raise OptionError(f"--property {name}: say --thresholds A,B,... for classes, or --regression")
    if options.regression and not usual and options.units is None:
        raise OptionError(f"--regression of {name}: say its unit with --units (1 where it has none)")
    thresholds = options.thresholds or preset.thresholds
    classes = options.classes or (preset.classes if options.thresholds is None else _range_names(thresholds))
    return Labelling(
        name,
        thresholds,
        classes,
        options.units or (preset.units if usual else ""),
        regression=options.regression,
        auxiliary=options.auxiliary,
    )


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return those of some options that were given. Not collective."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' are not numbers with commas between them; e.g. 0.01,3.0") from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))


def _range_names(thresholds: tuple[float, ...]) -> tuple[str, ...]:
    middle = [f"{low:g} to {high:g}" for low, high in zip(thresholds, thresholds[1:], strict=False)]
    return (f"below {thresholds[0]:g}", *middle, f"from {thresholds[-1]:g}")
