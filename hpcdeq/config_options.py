"""The options of `hpcdeq.train` and `hpcdeq.compare` that decide a run whatever its optimizer and seed are."""

from __future__ import annotations

import argparse
import dataclasses
import tomllib
from collections.abc import Mapping
from typing import Any

from hpcdeq.commands import CommandParser
from hpcdeq.config import TrainConfig
from hpcdeq.methods import MINIBATCH, SCHEDULES
from hpcdeq.watchdog import HANG_SECONDS, VARIABLE

KEEPING = ("checkpoint_every", "checkpoint_cache", "wall_seconds", "hang_seconds")  # the options of `add_keeping`


def add_settings(parser: CommandParser) -> None:
    """Add the options that decide a run whatever its optimizer and seed are. Not collective."""
    parser.add_argument("--data", metavar="FILE.h5", help="dataset of hpcdeq.prepare (default: the embedded problem)")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="mlp, deeponet, fno, mlp_deq, deeponet_deq, fno_deq, monotone_deq, conv_deq, of graphs: graph_deq, graph_image_deq, "
        "graph_unrolled, graph_image_unrolled, cgcnn (default: by the data)",
    )
    parser.add_argument(
        "--model-settings",
        type=_model_settings,
        metavar="NAME=VALUE,...",
        help="of the model, e.g. width=32,contraction=0.5 (a wrong name lists them)",
    )
    parser.add_argument("--max-iterations", type=int, metavar="N", help="steps; of adam, epochs (default 100)")
    parser.add_argument("--max-seconds", type=float, metavar="S", help="of the optimisation (default: no bound)")
    minibatch = "of " + ", ".join(MINIBATCH)
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help=f"{minibatch}, over all ranks (default 64); of trgn and lbfgs, the first iteration's (default all)",
    )
    parser.add_argument(
        "--batch-growth",
        type=float,
        metavar="G",
        help="of trgn and lbfgs: factor from an iteration to the next (default 1.1)",
    )
    parser.add_argument(
        "--hessian-fraction", type=float, metavar="F", help="samples that curvature products are taken on (default 1)"
    )
    parser.add_argument(
        "--curvature", metavar="KIND", help="gauss_newton or hessian, for tao:TYPE (default: hessian, brgn's its own)"
    )
    parser.add_argument("--learning-rate", type=float, metavar="R", help=f"{minibatch}: the largest (default 0.001)")
    parser.add_argument("--schedule", metavar="|".join(SCHEDULES), help="of the learning rate (default cosine)")
    parser.add_argument(
        "--warmup",
        type=float,
        metavar="W",
        help="learning rate rises over a fraction of the run, or steps if W >= 1 (default 0.05; constant: 0)",
    )
    parser.add_argument(
        "--learning-rate-floor", type=float, metavar="F", help="fraction of the learning rate to end with (default 0)"
    )
    parser.add_argument(
        "--average",
        type=float,
        metavar="B",
        help=f"{minibatch}: memory of a running average of the weights, which is then the result, e.g. 0.998 (default: none)",
    )
    parser.add_argument(
        "--weight-decay",
        type=float,
        metavar="R",
        help="L2 penalty R/2 |weights|^2 (default 0); of adamw, its decay outside the loss (default 0.01)",
    )
    parser.add_argument(
        "--l1", type=float, metavar="R", help="penalty R sum |weights|, smoothed within 0.001 of 0 (default 0)"
    )
    parser.add_argument(
        "--auxiliary-weight",
        type=float,
        metavar="W",
        help="of the numbers that the data have beside the targets, hpcdeq.prepare --auxiliary (default 0.3; 0: ignore them)",
    )
    parser.add_argument(
        "--label-smoothing",
        type=float,
        metavar="P",
        help="part of every class label shared out over all classes (default 0)",
    )
    parser.add_argument(
        "--jacobian-penalty",
        type=float,
        metavar="R",
        help="R/2 mean |df/dz|^2/n at the fixed points (default 0). Losses in the history hold all penalties; the final"
        " losses and all metrics are of the data alone",
    )
    parser.add_argument("--chunk-size", type=int, metavar="N", help="samples worked on together (default by the data)")
    parser.add_argument(
        "--memory-per-rank",
        type=float,
        metavar="GIB",
        help="a rank holds no more: samples worked on together become fewer where they need more (default: no bound)",
    )
    parser.add_argument(
        "--rebalance",
        type=int,
        metavar="N",
        help="every N iterations, move samples from ranks that are slower than their cost says to others (default: they stay)."
        " The run follows the clock then: a repeat of it is equal to rounding only, not bit for bit",
    )
    parser.add_argument("--dtype", metavar="float32|float64", help="default float64")
    parser.add_argument("--device", metavar="cpu|cuda", help="default cpu")
    parser.add_argument(
        "--on-failure",
        metavar="POLICY",
        help="samples without fixed point: raise (default), warn, mask (leave them out)",
    )
    for name, told in (
        ("warm-start", "begin fixed points at the last ones"),
        ("adaptive", "solve as progress asks for"),
    ):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=f"{told} (default)")


def add_keeping(parser: CommandParser) -> None:
    """Add the options that say when a run's state is kept, and when it ends; they change nothing of what it computes.

    Not collective.
    """
    parser.add_argument(
        "--checkpoint-every",
        type=_positive,
        metavar="N",
        help="iterations; the clock keeps a state in any case, at least every 10 minutes",
    )
    parser.add_argument(
        "--checkpoint-cache",
        type=_not_negative,
        default=1024.0,
        metavar="MIB",
        help="fixed points to begin solves from that a checkpoint may hold (default 1024); with more, none",
    )
    parser.add_argument(
        "--wall-seconds",
        type=_not_negative,
        metavar="S",
        help="limit of the whole job, from its start: stops before it and can be resumed (default: Slurm's, if there is one)",
    )
    parser.add_argument(
        "--hang-seconds",
        type=_not_negative,
        metavar="S",
        help=f"a rank without any progress for so long writes where it is and ends the job (default {HANG_SECONDS:.0f}; 0: never;"
        f" the environment's {VARIABLE} is the same, for scripts too)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give 1 or more")
    return int(text)


def _not_negative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: give a number that is not negative")
    return value


def _model_settings(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads("\n".join(text.split(",")))
    except tomllib.TOMLDecodeError:
        raise argparse.ArgumentTypeError(f"'{text}': give NAME=VALUE,... such as width=32,contraction=0.5") from None


def with_options(settings: Mapping[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return settings with what was typed on the command line over them, settings of the model one by one. Not collective."""
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in names and value is not None}
    if "model_settings" in given:
        given["model_settings"] = {**settings.get("model_settings", {}), **given["model_settings"]}
    return {**settings, **given}
