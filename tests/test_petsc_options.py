"""PETSc options: a prefix always, the command line first, alive inside a ``with``, misspelt ones refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import Run

from hpcdeq.errors import OptionError
from hpcdeq.petsc import PETSc
from hpcdeq.petsc.options import Options, as_text, check_types, database_options, number, unused_options
from hpcdeq.petsc.python_types import SHORT_NAMES
from hpcdeq.petsc.vocabulary import check_options, vocabulary

PREFIXES = ("tao_", "deq_")


@pytest.fixture
def database() -> Iterator[PETSc.Options]:
    """PETSc's options database, left as it was found."""
    found = PETSc.Options()
    before = found.getAll()
    yield found
    for name in found.getAll().keys() - before.keys():
        found.delValue(name)


# ----------------------------------------------------------------------------------------------------------- prefix


@pytest.mark.parametrize("prefix", ["", "deq", "_", "-deq_", "deq snes_", "_deq", "deq.x_"])
def test_a_prefix_is_mandatory(prefix: str) -> None:
    with pytest.raises(OptionError, match=r"prefix is letters and digits with an underscore last \(deq_\), not "):
        Options(prefix)


@pytest.mark.parametrize("prefix", ["deq_", "deq2_", "outer_deq_", "x_"])
def test_a_prefix_is_a_word_and_an_underscore(prefix: str) -> None:
    assert Options(prefix, {"snes_type": "anderson"}).prefix == prefix


def test_names_may_have_their_dash() -> None:
    assert Options("deq_", {"-snes_rtol": 1e-3}).given == {"snes_rtol": 1e-3}


# --------------------------------------------------------------------------------------------------------- lifetime


def test_options_live_inside_the_block(database: PETSc.Options) -> None:
    options = Options("opt_", {"snes_rtol": 1e-3, "snes_monitor": None, "snes_mf": True, "pc_mg_galerkin": False})
    before = database_options()
    with options.inserted():
        assert database_options() == before | {
            "opt_snes_rtol": "0.001",
            "opt_snes_monitor": "",
            "opt_snes_mf": "",
            "opt_pc_mg_galerkin": "false",
        }
        assert database.getBool("opt_snes_mf") and not database.getBool("opt_pc_mg_galerkin")
    assert database_options() == before


def test_options_go_after_an_exception_too(database: PETSc.Options) -> None:
    with pytest.raises(ZeroDivisionError), Options("opt_", {"snes_rtol": 1e-3}).inserted():
        _ = 1 / 0
    assert not database.hasName("opt_snes_rtol")


def test_the_command_line_wins_and_stays(database: PETSc.Options) -> None:
    database.setValue("opt_snes_rtol", "1e-7")
    options = Options("opt_", {"snes_rtol": 1e-3, "snes_max_it": 4})
    with options.inserted():
        assert database.getReal("opt_snes_rtol") == 1e-7
        assert database.getInt("opt_snes_max_it") == 4
    assert database.getReal("opt_snes_rtol") == 1e-7
    assert not database.hasName("opt_snes_max_it")


def test_a_block_inside_itself_leaves_the_options_to_the_outer_one(database: PETSc.Options) -> None:
    options = Options("opt_", {"snes_max_it": 4})
    with options.inserted():
        with options.inserted():
            assert database.getInt("opt_snes_max_it") == 4
        assert database.getInt("opt_snes_max_it") == 4
    assert not database.hasName("opt_snes_max_it")


def test_two_prefixes_keep_apart() -> None:
    solver = PETSc.KSP().create(PETSc.COMM_SELF)
    solver.setOptionsPrefix("one_")
    with Options("one_", {"ksp_rtol": 0.25}).inserted(), Options("two_", {"ksp_rtol": 0.5}).inserted():
        solver.setFromOptions()
    assert solver.getTolerances()[0] == 0.25
    solver.destroy()


def test_what_a_solver_reads_when_it_ends_is_still_there(capfd: pytest.CaptureFixture[str]) -> None:
    """A view is printed at the end of a solve: options that are gone after set-up would never show it."""
    solver = PETSc.KSP().create(PETSc.COMM_SELF)
    solver.setOptionsPrefix("opt_")
    matrix = PETSc.Mat().createDense((1, 1), array=[2.0], comm=PETSc.COMM_SELF)
    b, x = matrix.createVecs()
    solver.setOperators(matrix)
    with Options("opt_", {"ksp_view": None, "ksp_type": "cg"}).inserted():
        solver.setFromOptions()
        solver.solve(b, x)
    assert "type: cg" in capfd.readouterr().out
    solver.destroy()


@pytest.mark.parametrize(
    ("value", "text"), [(None, None), (True, None), (False, "false"), (1e-8, "1e-08"), (3, "3"), ("lu", "lu")]
)
def test_as_text(value: object, text: str | None) -> None:
    assert as_text(value) == text


def test_unused_options_are_those_that_no_object_has_read(database: PETSc.Options) -> None:
    for name, value in {"opt_ksp_rtol": "0.25", "opt_ksp_gmres_restart": "7", "other_ksp_rtol": "0.5"}.items():
        database.setValue(name, value)
    assert set(unused_options(("opt_",))) == {"-opt_ksp_rtol", "-opt_ksp_gmres_restart"}
    solver = PETSc.KSP().create(PETSc.COMM_SELF)
    solver.setOptionsPrefix("opt_")
    solver.setType("cg")  # which has no restart
    solver.setFromOptions()
    assert unused_options(("opt_",)) == ["-opt_ksp_gmres_restart"]
    assert set(unused_options(("opt_", "other_"))) == {"-opt_ksp_gmres_restart", "-other_ksp_rtol"}
    solver.destroy()


def test_the_words_of_a_command_line_reach_the_database(run: Run) -> None:
    program = (
        "from hpcdeq.startup import PETSC_ARGUMENTS, split_arguments\n"
        "import sys\n"
        "PETSC_ARGUMENTS[:] = split_arguments(sys.argv[1:])[1]\n"
        "from hpcdeq.petsc.options import Options, database_options\n"
        "def typed():\n"
        "    return [pair for pair in sorted(database_options().items()) if not pair[0].startswith('vec_')]\n"
        "with Options('deq_', {'snes_rtol': 1e-3, 'snes_max_it': 5}).inserted():\n"
        "    print(typed())\n"
        "print(typed())\n"
    )
    done = run("-c", program, "--seed", "3", "-deq_snes_rtol", "1e-9", "-deq_snes_monitor")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "[('deq_snes_max_it', '5'), ('deq_snes_monitor', ''), ('deq_snes_rtol', '1e-9')]",
        "[('deq_snes_monitor', ''), ('deq_snes_rtol', '1e-9')]",
    ]


# ------------------------------------------------------------------------------------------------------- vocabulary


def test_the_vocabulary_is_petsc_s() -> None:
    names = vocabulary()
    assert len(names) > 1000
    assert names >= {"-snes_rtol", "-snes_anderson_m", "-ksp_type", "-ksp_gmres_restart", "-pc_type", "-tao_gatol"}
    assert names >= {"-tao_type", "-snes_monitor", "-snes_converged_reason", "-log_view", "-options_left"}
    assert "-snes_rtoll" not in names


@pytest.mark.parametrize(
    "name",
    [
        "-deq_snes_rtol",
        "-deq_ksp_gmres_restart",
        "-deq_pc_type",
        "-deq_npc_snes_type",
        "-deq_npc_ksp_rtol",
        "-deq_sub_pc_factor_levels",
        "-tao_gatol",
        "-tao_bnk_ksp_max_it",
        "-tao_nls_ksp_rtol",
        "-tao_brgn_subsolver_tao_type",
        "-log_view",
        "-options_left",
    ],
)
def test_names_that_exist_are_accepted_those_of_inner_solvers_too(name: str) -> None:
    check_options([name], PREFIXES)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("-deq_snes_rtoll", "-deq_snes_rtol"),
        ("-deq_snes_anderson_n", "-deq_snes_anderson_m"),
        ("-deq_ksp_typ", "-deq_ksp_type"),
        ("-deq_pc_tipe", "-deq_pc_type"),
        ("-deqq_snes_type", "-deq_snes_type"),
        ("-tao_gatoll", "-tao_gatol"),
        ("-log_vieww", "-log_view"),
        ("-deq_npc_snes_typ", "-deq_npc_snes_type"),
        ("-tao_bnk_ksp_max_its", "-tao_bnk_ksp_max_it"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(OptionError, match=f"^unknown PETSc option {name}: did you mean {near}\\?$"):
        check_options([name], PREFIXES)


@pytest.mark.parametrize("name", ["-snes_rtol", "-ksp_type", "-pc_type"])
def test_a_name_without_prefix_is_refused_with_the_prefixed_one(name: str) -> None:
    with pytest.raises(OptionError, match=f"^unknown PETSc option {name}: did you mean -deq_{name[1:]}\\?$"):
        check_options([name], PREFIXES)


def test_a_name_like_none_is_refused_with_the_prefixes() -> None:
    with pytest.raises(OptionError, match="-qqqqqqqq: PETSc options here begin with -tao_, -deq_$"):
        check_options(["-qqqqqqqq"], PREFIXES)


def test_every_wrong_name_is_told_at_once() -> None:
    with pytest.raises(OptionError, match="-deq_snes_rtoll: .*; unknown PETSc option -tao_gatoll: "):
        check_options(["-deq_snes_rtoll", "-deq_snes_atol", "-tao_gatoll"], PREFIXES)


def test_a_solver_s_own_options_are_checked_too() -> None:
    with pytest.raises(OptionError, match="-deq_snes_rtoll: did you mean -deq_snes_rtol"):
        Options("deq_", {"snes_rtoll": 1e-3})
    with pytest.raises(OptionError, match="unknown PETSc option -deq_deq_snes_rtol"):
        Options("deq_", {"deq_snes_rtol": 1e-3})  # the prefix is not part of the name


def test_without_a_readable_library_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcdeq.petsc.vocabulary.vocabulary", lambda: frozenset())
    check_options(["-deq_snes_rtoll"], PREFIXES)


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("snes_type", "batched_andersn", "batched_anderson"),
        ("ksp_type", "gmrs", "gmres"),
        ("pc_type", "bached_lu", "batched_lu"),
        ("npc_snes_type", "nrichardsen", "nrichardson"),
    ],
)
def test_a_type_that_does_not_exist_is_refused_with_the_nearest(name: str, value: str, meant: str) -> None:
    with pytest.raises(OptionError, match=rf"{name} {value}: PETSc has no such type: did you mean {meant}"):
        Options("deq_", {name: value})


def test_every_type_that_exists_is_taken() -> None:
    for name in ("snes_type", "ksp_type", "pc_type"):
        theirs = [v for k, v in vars(getattr(PETSc, name[:-5].upper()).Type).items() if k.isupper()]
        assert len(theirs) > 10
        for kind in (*theirs, *SHORT_NAMES[name]):
            check_types({f"deq_{name}": kind})
    check_types({"tao_type": "bntr", "deq_snes_rtol": "1e-3"})


def test_an_option_that_is_no_number_is_refused_by_name(database: PETSc.Options) -> None:
    database.setValue("opt_snes_anderson_period", "abc")
    options = PETSc.Options("opt_")
    with pytest.raises(OptionError, match="-opt_snes_anderson_period is 'abc': give a whole number"):
        number(options, "snes_anderson_period", 8)
    with pytest.raises(OptionError, match="-opt_snes_anderson_period is 'abc': give a number"):
        number(options, "snes_anderson_period", 1.5)
    assert number(options, "snes_anderson_m", 8) == 8 and number(options, "snes_anderson_beta", 0.5) == 0.5
