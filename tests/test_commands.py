"""What every command shares: splitting the command line, its parser, and the configuration of a training run."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest
from conftest import Run

from hpcdeq import train
from hpcdeq.commands import RANK_VARIABLES, CommandParser, nearest, speaks
from hpcdeq.config import EMBEDDED_SETTINGS, NO_FALLBACK, TRAINING_OPTIONS, TrainConfig, as_toml, read_config
from hpcdeq.errors import EXIT_USAGE, OptionError
from hpcdeq.startup import split_arguments

# ---------------------------------------------------------------------------------------------------------- startup


@pytest.mark.parametrize(
    ("line", "own", "petsc"),
    [
        ("", "", ""),
        ("--data a.h5 c.toml", "--data a.h5 c.toml", ""),
        ("-tao_gatol 1e-8", "", "-tao_gatol 1e-8"),
        ("-deq_snes_monitor", "", "-deq_snes_monitor"),
        ("-deq_snes_monitor --quiet", "--quiet", "-deq_snes_monitor"),
        ("-deq_snes_monitor -tao_view", "", "-deq_snes_monitor -tao_view"),
        ("-tao_fmin -5 --seed 3", "--seed 3", "-tao_fmin -5"),
        ("-tao_fmin -.5e-3", "", "-tao_fmin -.5e-3"),
        ("c.toml -tao_type lmvm --out d", "c.toml --out d", "-tao_type lmvm"),
        ("--seed -3 -tao_view", "--seed -3", "-tao_view"),
        ("-deq_mg_levels_esteig 0,0.5,0,1.1", "", "-deq_mg_levels_esteig 0,0.5,0,1.1"),
        ("-h", "-h", ""),
        ("--max-seconds=3 -log_view :a.txt", "--max-seconds=3", "-log_view :a.txt"),
    ],
)
def test_a_command_line_is_split(line: str, own: str, petsc: str) -> None:
    words = line.split()
    assert split_arguments(words) == (own.split(), petsc.split())
    assert words == line.split()


# ----------------------------------------------------------------------------------------------------------- parser


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No trace of a launcher, so that this process speaks."""
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def parser() -> CommandParser:
    made = CommandParser(prog="cook")
    made.add_argument("source", nargs="?")
    made.add_argument("--max-iterations", type=int)
    made.add_argument("--quiet", action="store_true")
    return made


def stopped(made: CommandParser, line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the parser says as it refuses a command line."""
    with pytest.raises(SystemExit) as caught:
        made.parse_args(line.split())
    assert caught.value.code == EXIT_USAGE == 2
    told = capsys.readouterr()
    assert told.out == ""
    return told.err


def test_a_right_command_line_is_parsed() -> None:
    found = parser().parse_args(["a", "--max-iterations=3", "--quiet"])
    assert (found.source, found.max_iterations, found.quiet) == ("a", 3, True)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--max-iteration 3", "unknown option --max-iteration: did you mean --max-iterations?"),
        ("--quite", "unknown option --quite: did you mean --quiet?"),
        ("--max_iterations=3", "unknown option --max_iterations: did you mean --max-iterations?"),
        ("--zzz", "unknown option --zzz: see --help"),
        ("--max-iterations x --quite", "unknown option --quite: did you mean --quiet?"),
        ("--max-iterations x", "invalid int value: 'x'"),
        ("a b", "unrecognized arguments: b"),
    ],
)
def test_a_wrong_command_line_ends_with_code_2(line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = stopped(parser(), line, capsys)
    assert text.startswith("usage: cook ") and f"cook: error: {told}" in text or told in text
    assert text.endswith(told + "\n")


def test_what_follows_two_dashes_is_no_option() -> None:
    assert parser().parse_args(["--quiet", "--", "--source"]).source == "--source"


def test_a_sub_command_s_options_are_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    made = CommandParser(prog="cook")
    kinds = made.add_subparsers(dest="kind")
    kinds.add_parser("soup").add_argument("--salt")
    kinds.add_parser("cake").add_argument("--sugar")
    assert made.parse_args(["soup", "--salt", "1"]).salt == "1"
    assert "unknown option --sugar" in stopped(made, "soup --sugar 1", capsys)
    assert "cook cake: error: unknown option --suger: did you mean --sugar?" in stopped(made, "cake --suger 1", capsys)


@pytest.mark.parametrize("variable", RANK_VARIABLES)
def test_one_process_of_a_job_prints(
    variable: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "0")
    assert speaks() and "did you mean" in stopped(parser(), "--quite", capsys)
    monkeypatch.setenv(variable, "1")
    assert not speaks() and stopped(parser(), "--quite", capsys) == ""


def test_nearest_is_none_where_nothing_is_near() -> None:
    assert nearest("--quite", ["--quiet", "--out"]) == "--quiet"
    assert nearest("--quite", ["--zzz"]) is None


def test_a_wrong_command_line_of_a_job_is_told_once(run: Run) -> None:
    done = run("-m", "hpcdeq.train", "--optimiser", "trgn", ranks=2, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("unknown option --optimiser: did you mean --optimizer?") == 1


def test_a_wrong_option_of_petsc_ends_with_code_2(run: Run) -> None:
    done = run("-m", "hpcdeq.train", "-deq_snes_rtoll", "1e-3")
    assert done.returncode == 2
    assert done.stderr == "OptionError: unknown PETSc option -deq_snes_rtoll: did you mean -deq_snes_rtol?\n"


# ---------------------------------------------------------------------------------------------------- configuration


def resolved(line: str) -> TrainConfig:
    own, petsc = split_arguments(line.split())
    return train.resolve(train.build_parser().parse_args(own), petsc)[1]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_a_default_is_written_once() -> None:
    assert resolved("--data a.h5") == TrainConfig(data="a.h5", petsc={**NO_FALLBACK, **TRAINING_OPTIONS})


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(file: Path) -> None:
    file.write_text(
        'data = "file.h5"\nseed = 3\noptimizer = "lbfgs"\nweight_decay = 0.5\n'
        '[model_settings]\nwidth = 7\n[petsc]\ntao_gatol = "1e-3"\ndeq_snes_rtol = "1e-4"\n'
    )
    found = resolved(f"{file} --seed 5 --optimizer newton -tao_gatol 1e-9 -deq_snes_monitor")
    assert found == TrainConfig(
        data="file.h5",
        model_settings={"width": 7},
        optimizer="newton",
        weight_decay=0.5,
        seed=5,
        petsc={
            **NO_FALLBACK,
            **TRAINING_OPTIONS,
            "tao_gatol": "1e-9",
            "deq_snes_rtol": "1e-4",
            "deq_snes_monitor": "",
        },
    )


def test_settings_of_the_model_are_taken_one_by_one(file: Path) -> None:
    file.write_text("[model_settings]\nwidth = 7\ndepth = 2\n")
    found = resolved(f"{file} --data a.h5 --model-settings width=9,bound=0.5,name='x'")
    assert found.model_settings == {"width": 9, "depth": 2, "bound": 0.5, "name": "x"}
    assert type(found.model_settings["width"]) is int
    with pytest.raises(SystemExit) as end:
        resolved("--model-settings width:9")
    assert end.value.code == 2


def test_a_zero_on_the_command_line_wins_too(file: Path) -> None:
    file.write_text("seed = 3\nweight_decay = 0.5\nmax_iterations = 7\n")
    found = resolved(f"{file} --seed 0 --weight-decay 0 --max-iterations 0")
    assert (found.seed, found.weight_decay, found.max_iterations) == (0, 0.0, 0)


def test_the_embedded_problem_is_short_unless_told_otherwise(file: Path) -> None:
    assert resolved("").max_iterations == EMBEDDED_SETTINGS["max_iterations"] < TrainConfig().max_iterations
    assert resolved("--max-iterations 40").max_iterations == 40
    file.write_text("max_iterations = 30\n")
    assert resolved(str(file)).max_iterations == 30
    assert resolved("--data a.h5").max_iterations == TrainConfig().max_iterations


def test_single_precision_keeps_the_layers_tolerances() -> None:
    assert resolved("--dtype float32").petsc == NO_FALLBACK
    assert resolved("--dtype float32 -deq_snes_rtol 1e-4").petsc == {**NO_FALLBACK, "deq_snes_rtol": "1e-4"}


def test_petsc_s_words_are_names_and_values() -> None:
    found = resolved("-tao_view -tao_fmin -5 -deq_snes_type anderson -tao_view").petsc
    assert found == {
        **NO_FALLBACK,
        **TRAINING_OPTIONS,
        "tao_view": "",
        "tao_fmin": "-5",
        "deq_snes_type": "anderson",
    }


def test_petsc_s_options_of_a_file_are_text_as_on_the_command_line(file: Path) -> None:
    """A number or a truth value is what TOML's users write; a zero must not turn into a flag."""
    file.write_text(
        "[petsc]\ntao_gatol = 0\ndeq_snes_max_it = 20\ntao_gttol = 1e-3\n"
        "deq_snes_monitor = true\ntao_bnk_pc_mg_galerkin = false\n"
    )
    assert resolved(str(file)).petsc == {
        **NO_FALLBACK,
        **TRAINING_OPTIONS,
        "tao_gatol": "0",
        "deq_snes_max_it": "20",
        "tao_gttol": "0.001",
        "deq_snes_monitor": "",
        "tao_bnk_pc_mg_galerkin": "false",
    }


FULL = TrainConfig(
    data='a "b" \\ c\né.h5',
    model="mlp_deq",
    model_settings={"width": 3, "contraction": 0.1, "name": "x", "deep": True},
    optimizer="adam",
    max_iterations=7,
    max_seconds=3.5,
    batch_size=5,
    learning_rate=1e-3,
    schedule="constant",
    warmup=0.25,
    learning_rate_floor=0.125,
    average=0.875,
    auxiliary_weight=0.0625,
    memory_per_rank=1.5,
    rebalance=3,
    weight_decay=1e-300,
    l1=0.5,
    label_smoothing=0.125,
    jacobian_penalty=0.75,
    seed=11,
    dtype="float32",
    device="cuda",
    chunk_size=13,
    on_failure="mask",
    warm_start=False,
    adaptive=False,
    petsc={"deq_snes_monitor": "", "tao_gatol": "1e-8"},
)

# What goes with methods on all samples only.
SAMPLED = TrainConfig(
    optimizer="lbfgs", batch_size=5, batch_growth=1.25, hessian_fraction=0.5, curvature="gauss_newton", adaptive=False
)


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        FULL,
        SAMPLED,
        TrainConfig(max_seconds=float("inf")),
        TrainConfig(weight_decay=1 / 3),
        TrainConfig(data="odd \x7f\t name"),
    ],
    ids=["default", "full", "sampled", "infinite", "third", "odd"],
)
def test_a_configuration_survives_its_file(config: TrainConfig, file: Path) -> None:
    file.write_text(as_toml(config), encoding="utf-8")
    assert TrainConfig(**read_config(file)) == config
    assert as_toml(TrainConfig(**read_config(file))) == as_toml(config)


def test_the_full_example_has_no_default_left() -> None:
    default = TrainConfig()
    names = [f.name for f in dataclasses.fields(FULL)]
    assert [n for n in names if getattr(FULL, n) == getattr(SAMPLED, n) == getattr(default, n)] == []


def test_a_saved_run_is_resolved_to_itself(file: Path) -> None:
    config = resolved("--data a.h5 --seed 4 --optimizer lbfgs -deq_snes_monitor -tao_gatol 1e-9")
    file.write_text(as_toml(config))
    assert resolved(str(file)) == config


def test_what_is_not_set_is_not_written() -> None:
    assert {"max_seconds", "batch_size", "learning_rate"}.isdisjoint(tomllib.loads(as_toml(TrainConfig())))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("optimiser = 'trgn'", "config.toml: unknown setting 'optimiser': did you mean optimizer?"),
        ("qqq = 1", "config.toml: unknown setting 'qqq': settings: data, model, "),
        ("seed = 'one'", "config.toml: seed is 'one', which is no int"),
        ("seed = 1.5", "config.toml: seed is 1.5, which is no int"),
        ("seed = true", "config.toml: seed is True, which is no int"),
        ("weight_decay = '1'", "config.toml: weight_decay is '1', which is no float"),
        ("max_seconds = 'long'", "config.toml: max_seconds is 'long', which is no float"),
        ("batch_size = 1.5", "config.toml: batch_size is 1.5, which is no int"),
        ("data = 3", "config.toml: data is 3, which is no str"),
        ("petsc = '-tao_view'", "config.toml: petsc is '-tao_view', which is no "),
        ("model_settings = [1]", "config.toml: model_settings is [1], which is no "),
        ("seed = ", "config.toml is no TOML: Invalid value"),
        ("seed = 1\nseed = 2", "config.toml is no TOML: Cannot overwrite a value"),
    ],
)
def test_a_wrong_file_is_refused(text: str, told: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(OptionError) as caught:
        read_config(file)
    assert told in str(caught.value) and str(file) in str(caught.value)


def test_a_file_that_is_not_there_or_no_text_is_refused(file: Path) -> None:
    with pytest.raises(OptionError, match="config.toml cannot be read: No such file or directory"):
        read_config(file)
    with pytest.raises(OptionError, match="cannot be read: Is a directory"):
        read_config(file.parent)
    file.write_bytes(b"data = '\xff'\n")
    with pytest.raises(OptionError, match="config.toml is no TOML: .*utf-8"):
        read_config(file)


def test_whole_numbers_are_numbers_too(file: Path) -> None:
    file.write_text("weight_decay = 1\nmax_seconds = 3\n")
    assert TrainConfig(**read_config(file)) == TrainConfig(weight_decay=1.0, max_seconds=3.0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dtype": "float16"}, "^dtype is 'float16': choose float32 or float64$"),
        ({"device": "tpu"}, "^device is 'tpu': choose cpu or cuda$"),
        ({"max_iterations": -1}, "^max_iterations is -1: give 0 or more$"),
        ({"chunk_size": 0}, "^chunk_size is 0: give 1 or more$"),
        ({"batch_size": 0, "optimizer": "adam"}, "^batch_size is 0: give 1 or more$"),
        ({"seed": -1}, "^seed is -1: give 0 or more$"),
        ({"max_seconds": 0.0}, "^max_seconds is 0.0: give a number above 0$"),
        ({"max_seconds": float("nan")}, "^max_seconds is nan: give a number above 0$"),
        ({"learning_rate": -1.0, "optimizer": "adam"}, "^learning_rate is -1.0: give a number above 0$"),
        ({"weight_decay": -0.5}, "^weight_decay is -0.5: give a number that is not negative$"),
        ({"weight_decay": float("nan")}, "^weight_decay is nan: give a number that is not negative$"),
        (
            {"batch_size": 8, "optimizer": "newton"},
            "^--batch-size is an option of adam, adamw, rmsprop; newton works on all samples at once: .*--optimizer adam$",
        ),
        (
            {"learning_rate": 0.1, "optimizer": "lbfgs"},
            "^--learning-rate is an option of adam, adamw, rmsprop; lbfgs works on all",
        ),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        TrainConfig(**settings)


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().seed = 3  # type: ignore[misc]
