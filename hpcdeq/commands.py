"""The parser of every hpcdeq command: names the nearest option for one that does not exist, and speaks once a job."""

from __future__ import annotations

import argparse
import difflib
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from hpcdeq.errors import EXIT_USAGE

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")


# Seconds that the process which prints has to start and print before the others leave. The launcher ends them at once when
# it leaves, so that the time is only spent where a launcher does not.
HEAD_START = 5.0


def speaks() -> bool:
    """Say whether this process is the one of an MPI job that prints.

    Not collective. The launcher's environment answers, so that a wrong command line need not start MPI.
    """
    return rank_of_environment() in (None, "0")


def rank_of_environment() -> str | None:
    """Return this process's rank as its launcher says it; None outside of a job. Not collective."""
    return next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), None)


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """Return the valid option that a mistyped one comes nearest to; None where nothing is near.

    Not collective.
    """
    found = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return found[0] if found else None


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` without abbreviations, for one process or for all ranks of a job.

    An unknown ``--option`` ends the command with exit code 2 and the nearest valid option, before anything else about
    the command line is judged. One process of a job prints; all leave with the same code.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*arguments, **options)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Return the options of a command line; leave with code 2 if it is wrong. Not collective."""
        if args is not None:
            self._refuse_unknown(args)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print usage and message once a job, and leave with code 2. Not collective."""
        self.exit(EXIT_USAGE, f"{self.format_usage()}{self.prog}: error: {message}\n")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Leave; a silent process of a job that fails leaves last. Not collective.

        A launcher ends the whole job at the first process that fails, and with it the one that was about to say why.
        """
        if status and not speaks():
            time.sleep(HEAD_START)
        super().exit(status, message)

    def _refuse_unknown(self, arguments: Sequence[str]) -> None:
        """End the command at the first ``--option`` that neither this parser nor the chosen sub-command has."""
        parser = self
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                named = next((argument for argument in arguments if argument in action.choices), None)
                if named is None:
                    return
                parser = action.choices[named]
        valid = {option for owner in (self, parser) for action in owner._actions for option in action.option_strings}
        for argument in arguments:
            name = argument.partition("=")[0]
            if name == "--":
                return
            if name.startswith("--") and name not in valid:
                near = nearest(name, sorted(valid))
                hint = f"did you mean {near}?" if near else "see --help"
                parser.error(f"unknown option {name}: {hint}")

    def _print_message(self, message: str, file: Any = None) -> None:
        if speaks():
            super()._print_message(message, file)
