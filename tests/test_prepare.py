"""The prepare command as a user types it."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from hpcdeq.builders.field_settings import EQUATIONS, Advection, Burgers, Darcy, FieldSettings, Reaction
from hpcdeq.commands import CommandParser
from hpcdeq.data.schema import open_dataset, read_schema
from hpcdeq.prepare import KINDS, build_parser, main

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_")


def prepare(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, outside of any MPI job that runs this test."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
    environment = {**outside, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "hpcdeq.prepare", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def rows(path: Path, bad: int = 0) -> Path:
    """Write six rock salts of different metals, and some rows that cannot be read."""
    lines = []
    for number, metal in enumerate((3, 11, 19, 37, 55, 12)):
        cell, frac = [4 + number / 5] * 3 + [90] * 3, [0, 0, 0, 0.5, 0.5, 0.5]
        lines.append(
            json.dumps({"id": f"salt-{metal}", "band_gap": number, "cell": cell, "Z": [metal, 17], "frac": frac})
        )
    path.write_text("\n".join(lines + ["oops"] * bad))
    return path


def test_crystals_end_to_end(tmp_path: Path) -> None:
    """Say what was written and skipped, list the skipped rows, and name the next command."""
    out = tmp_path / "salts.h5"
    done = prepare("crystals", rows(tmp_path / "rows.jsonl", bad=7), "--out", out, "--processes", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"{out}: 6 samples in" in done.stdout
    assert "skipped          7  (all in" in done.stdout
    assert "line 7: JSONDecodeError" in done.stdout and "and 2 more" in done.stdout
    assert f"next: mpirun -n 2 python -m hpcdeq.train --data {out}" in done.stdout
    assert (tmp_path / "salts.skipped.csv").read_text().count("\nline ") == 7
    with open_dataset(out) as file:
        schema = read_schema(out, file)
    assert (schema.count, schema.classes) == (6, ("metal", "semiconductor", "insulator"))
    assert schema.provenance["command"].startswith("python -m hpcdeq.prepare crystals ")
    assert schema.provenance["versions"]["pymatgen"][:2] == "20"
    done = prepare(
        "crystals", rows(tmp_path / "rows.jsonl"), "--out", out, "--limit", 4, "--thresholds", "0.5,2", "--processes", 1
    )
    assert done.returncode == 0, done.stderr
    assert "below 0.5" in done.stdout and "from 2" in done.stdout and ": 4 samples" in done.stdout
    assert not (tmp_path / "salts.skipped.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "settings", "shape", "targets"),
    [
        (["burgers", "--points", "48", "--modes", "4", "--time", "0.3"], Burgers(48, time=0.3, modes=4), (48,), 48),
        (["advection", "--points", "32", "--variation", "0.2"], Advection(32, variation=0.2), (32,), 32),
        (["darcy", "--points", "8", "--binary"], Darcy(8, binary=True), (8, 8), 64),
        (["reaction", "--points", "8", "--sources", "1", "--reaction=3"], Reaction(8, 1, 3.0), (5,), 64),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_fields_end_to_end(
    tmp_path: Path, arguments: list[str], settings: FieldSettings, shape: tuple[int, ...], targets: int
) -> None:
    """Write the samples asked for, with the settings asked for."""
    out = tmp_path / "f.h5"
    done = prepare(*arguments, "--out", out, "--limit", 20, "--seed", 3, "--quiet")
    assert done.returncode == 0, done.stderr
    assert ": 20 samples in" in done.stdout and "train           16" in done.stdout
    assert f"next: mpirun -n 2 python -m hpcdeq.train --data {out}" in done.stdout
    with open_dataset(out) as file:
        schema = read_schema(out, file)
    assert (schema.count, schema.sample_shape, schema.output_size) == (20, shape, targets)
    assert schema.provenance["settings"] == {**asdict(settings), "seed": 3}
    assert schema.provenance["command"].startswith(f"python -m hpcdeq.prepare {arguments[0]} --points")


def test_the_help_of_an_equation_says_all_settings(capsys: pytest.CaptureFixture[str]) -> None:
    """Head the help with the equation, and name every setting with its default."""
    for equation in EQUATIONS:
        with pytest.raises(SystemExit) as left:
            build_parser().parse_args([equation.kind, "--help"])
        text = capsys.readouterr().out
        assert left.value.code == 0 and (inspect.getdoc(equation) or "none") in text
        flat = " ".join(text.split())
        for item in fields(equation):
            assert f"--{item.name}" in flat and item.metadata["help"] in flat
            assert isinstance(item.default, bool) or f"{item.metadata['help']} (default {item.default})" in flat
        assert "number of samples (default 1000)" in flat
        assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["crystals", "x", "--outt", "f.h5"], "error: unknown option --outt: did you mean --out?"),
        (["crystals", "x", "--out", "f.h5", "--neighbors=8"], "unknown option --neighbors: did you mean --neighbours?"),
        (["burgers", "--out", "f.h5", "--neighbours", "8"], "unknown option --neighbours: "),
        (["burgers", "--ou", "f.h5"], "unknown option --ou: did you mean --out?"),
        (["burgers", "--qqqqqqqq"], "unknown option --qqqqqqqq: see --help"),
        (["spheres", "--out", "f.h5"], "invalid choice: 'spheres' (choose from 'crystals', 'frameworks', "),
        (["burgers"], "the following arguments are required: --out"),
        (["crystals", "--out", "f.h5"], "the following arguments are required: SOURCE"),
        (["darcy", "--out", "f.h5", "--variance", "1"], "unknown option --variance: did you mean --variation?"),
        (["reaction", "--out", "f.h5", "--sources", "1.5"], "argument --sources: invalid int value: '1.5'"),
        (["burgers", "--out", "f.h5", "extra"], "unrecognized arguments: extra"),
        (["burgers", "--out", "f.h5", "--limit", "many"], "argument --limit: invalid int value: 'many'"),
    ],
)
def test_wrong_command_lines(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Leave with code 2 and say what is wrong."""
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    text = capsys.readouterr()
    assert message.replace("'", "") in text.err.replace("'", "")  # Python 3.12 and later quote choices differently
    assert text.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["crystals", "absent.jsonl", "--out", "f.h5"], "DataError: absent.jsonl: no such file or folder"),
        (["crystals", "bad.jsonl", "--out", "f.h5"], "DataError: bad.jsonl: none of its 1 rows can be used:\n  line 1"),
        (["burgers", "--out", "no/f.h5"], "DataError: folder no does not exist; make it with: mkdir -p no"),
        (["burgers", "--out", "."], "DataError: . is a folder; give --out a file name"),
        (["burgers", "--out", "f.h5", "--limit", "0"], "OptionError: --limit 0: at least 1"),
        (["burgers", "--out", "f.h5", "--modes", "40"], "OptionError: --points 64: an even number, at least 82"),
        (["darcy", "--out", "f.h5", "--binary", "--variation", "2"], "OptionError: --variation 2.0: --binary has two"),
        (["darcy", "--out", "f.h5", "--variation", "9"], "DataError: Darcy on 72 x 72 cells is not resolved: log k"),
        (["crystals", "bad.jsonl", "--out", "f.h5", "--property", "e_form"], "OptionError: --property e_form: say"),
        (
            ["crystals", "bad.jsonl", "--out", "f.h5", "--property", "e_form", "--regression"],
            "OptionError: --regression of e_form: say its unit with --units",
        ),
    ],
)
def test_bad_input(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave with code 2, one message, no traceback and no file."""
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text("oops")
    done = prepare(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert not list(tmp_path.glob("f.h5*"))


def test_help_is_quick_and_light() -> None:
    """Answer in a second, with nothing heavy imported, also for a mistyped option."""
    heavy = "torch", "mpi4py", "petsc4py", "pymatgen", "h5py", "numpy"
    code = "import runpy, sys; sys.argv = ['prepare', *sys.argv[1:]]\n"
    code += "try: runpy.run_module('hpcdeq.prepare', run_name='__main__')\n"
    code += f"except SystemExit: print('heavy:', [name for name in {heavy} if name in sys.modules])"
    for arguments in (["--help"], ["crystals", "--help"], ["crystals", "--oops"]):
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert time.perf_counter() - begin < 1
        assert "heavy: []" in done.stdout, done.stderr


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"])
def test_one_rank_of_a_job_speaks(variable: str) -> None:
    """Print a wrong command line once: every rank leaves with code 2, rank 0 says why."""
    first = prepare("burgers", "--outt", "x", **{variable: "0"})
    other = prepare("burgers", "--outt", "x", **{variable: "3"})
    assert first.returncode == other.returncode == 2
    assert "did you mean --out?" in first.stderr and other.stderr == other.stdout == ""


def test_every_kind_has_the_common_options() -> None:
    """Parse the same options for each kind."""
    for name in KINDS:
        source = [] if name in {equation.kind for equation in EQUATIONS} else ["source"]
        options = build_parser().parse_args([name, *source, "--out", "f.h5", "--limit", "3", "--seed", "5", "--quiet"])
        assert (options.kind, options.out, options.limit, options.seed) == (name, Path("f.h5"), 3, 5)


def test_parser_has_no_abbreviations_and_stops_at_two_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    """Take what follows `--` as it is, and a value after `=` as well."""
    parser = CommandParser(prog="p")
    parser.add_argument("--optimizer")
    parser.add_argument("rest", nargs="*")
    assert parser.parse_args(["--optimizer=--x", "--", "--y"]).rest == ["--y"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--optim", "adam"])
    assert "unknown option --optim: did you mean --optimizer?" in capsys.readouterr().err
