"""What the README and the page on choosing show runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT, Run

from hpcdeq.optim.presets import preset_of

README = (ROOT / "README.md").read_text() + (ROOT / "docs" / "choosing.md").read_text()


def test_the_python_example_runs(run: Run, tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "example.py").write_text(block)
    done = run("example.py")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("CONVERGED_")
    assert re.match(r"(budget|converged) \S+ 0\.\d+ Counts", second)


def test_the_options_that_it_names_exist(run: Run) -> None:
    kinds = ("crystals", "frameworks", "molecules", "images", "burgers")
    commands = (
        ["train"],
        ["compare"],
        ["predict"],
        ["evaluate"],
        ["study", "crossover"],
        *(["prepare", k] for k in kinds),
    )
    known = "".join(run("-m", f"hpcdeq.{name}", *kind, "--help").stdout for name, *kind in commands)
    known += "".join((ROOT / "scripts" / f"bench_{name}.py").read_text() for name in ("solves", "lbfgs"))
    for option in sorted(set(re.findall(r"--[a-z][a-z-]+", README))):
        assert option in known, option


@pytest.mark.parametrize("name", ["trgn", "lbfgs", "newton", "adam", *re.findall(r"tao:([a-z]+)\b", README)])
def test_the_optimizers_that_it_names_exist(name: str) -> None:
    preset_of(name if name in ("trgn", "lbfgs", "newton", "adam") else f"tao:{name}")


def test_the_files_that_it_names_exist() -> None:
    for name in re.findall(r"`((?:hpcdeq|scripts|slurm|tests|docs)/[\w./]+)`", README):
        assert (ROOT / name).exists(), name
