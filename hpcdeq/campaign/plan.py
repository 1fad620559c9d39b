"""What a comparison is to run: methods with their settings, seeds, learning rates, and the name of each run."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpcdeq.config import TrainConfig, check_settings, complete
from hpcdeq.errors import OptionError, suggestion
from hpcdeq.methods import METHODS, MINIBATCH

TABLE = "optimizers"
# What is the same for all methods of a comparison.
COMMON = ("data", "seed")
UNBOUNDED = 1_000_000  # iterations, where time is what ends a run
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9:_.+-]*")


@dataclass(frozen=True)
class Variant:
    """A method with its settings.

    Attributes
    ----------
    label
        What it is called.
    config
        Of its run with the first seed.
    rates
        Learning rates to try; empty: that of the configuration.
    """

    label: str
    config: TrainConfig
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Planned:
    """A run that a comparison needs.

    Attributes
    ----------
    name
        Of its directory.
    label
        Of its method.
    config
        All that decides it.
    """

    name: str
    label: str
    config: TrainConfig


def run_of(variant: Variant, seed: int, rate: float | None = None) -> Planned:
    """Return the run of a method with a seed, and with one of its learning rates. Not collective."""
    config = dataclasses.replace(variant.config, seed=seed)
    label = variant.label.replace(":", "-")
    if rate is None:
        return Planned(f"{label}-{seed}", variant.label, config)
    return Planned(f"{label}-lr{rate:g}-{seed}", variant.label, dataclasses.replace(config, learning_rate=rate))


def parts_of(variants: Sequence[Variant], seeds: range) -> list[tuple[Variant, range]]:
    """Return what a comparison consists of that can be done beside each other.

    Not collective. A part is a method with a seed, seed by seed; the seeds of a method that scans learning rates wait for
    the scan, and are one part with it.
    """
    scans = [(variant, seeds) for variant in variants if variant.rates]
    return scans + [(variant, range(s, s + 1)) for s in seeds for variant in variants if not variant.rates]


def split_base(settings: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the settings of a TOML file for all methods, and those in tables ``[optimizers.NAME]``.

    Not collective.

    Parameters
    ----------
    where
        Which file; begins the message.

    Raises
    ------
    OptionError
        A setting that does not exist, or of the wrong type.
    """
    base = {name: value for name, value in settings.items() if name != TABLE}
    check_settings(base, where)
    tables = settings.get(TABLE, {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise OptionError(f"{where}: {TABLE} holds a table for each method, e.g. [{TABLE}.adam]")
    for name, table in tables.items():
        check_settings(table, f"{where} [{TABLE}.{name}]")
    return base, tables


def read_set(words: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what ``--set METHOD:SETTING=VALUE`` says, by method.

    Not collective.

    Raises
    ------
    OptionError
        It is not of this form, or the setting does not exist or is of the wrong type.
    """
    found: dict[str, dict[str, Any]] = {}
    for word in words:
        left, equals, text = word.partition("=")
        method, colon, setting = left.rpartition(":")
        if not (equals and colon and method and setting):
            raise OptionError(f"--set {word}: give METHOD:SETTING=VALUE, e.g. --set trgn:tao_trust0=0.5")
        own = found.setdefault(method, {})
        setting = setting.lstrip("-")
        if setting.startswith(("tao_", "deq_")):
            own.setdefault("petsc", {})[setting] = text
            continue
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        name = setting.replace("-", "_")
        check_settings({name: value}, f"--set {word}")
        own[name] = value
    return found


def plan_variants(
    names: Sequence[str],
    base: Mapping[str, Any],
    own: Sequence[Mapping[str, Mapping[str, Any]]],
    rates: tuple[float, ...],
) -> list[Variant]:
    """Return the methods of a comparison with their settings.

    Not collective.

    Parameters
    ----------
    names
        Of the methods: an optimizer, or any name for which its own settings name the ``optimizer``.
    base
        Settings for all of them. One that is not for a method (a batch size for trgn) is left out there.
    own
        Settings by method; the last one wins.
    rates
        Learning rates to try with those on minibatches that do not set their own.

    Raises
    ------
    OptionError
        A name or a setting that does not exist or does not fit.
    """
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise OptionError(f"--optimizers has {twice[0]} twice: leave one out, or name a variant in [{TABLE}.NAME]")
    for given in own:
        for name in given:
            if name not in names:
                hint = suggestion(name, names, f"the methods are {', '.join(names)}")
                raise OptionError(f"settings for {name}, which is not compared: {hint}")
    found = [_variant(name, base, [given.get(name, {}) for given in own], rates) for name in names]
    kinds = {variant.label: variant.config.optimizer for variant in found}
    for setting, value in base.items():
        if not any(_takes(kind, setting, value) for kind in kinds.values()):
            kind = next(iter(kinds.values()))
            TrainConfig(**{setting: value, "optimizer": kind})  # raises, saying why
            raise OptionError(
                f"--{setting.replace('_', '-')} is an option of {', '.join(MINIBATCH)} when it is given to all: for the first,"
                f" growing batch of a method say --set {kind}:{setting}={value}"
            )
    if rates and not any(variant.rates for variant in found):
        told = ", ".join(MINIBATCH)
        raise OptionError(f"--learning-rates is for {told}, and none of them is compared without a rate of its own")
    return found


def _variant(name: str, base: Mapping[str, Any], own: Sequence[Mapping[str, Any]], rates: tuple[float, ...]) -> Variant:
    if not _PLAIN.fullmatch(name):
        raise OptionError(f"{name!r} cannot be the name of a method: use letters, digits and . _ + - :")
    given: dict[str, Any] = {}
    for table in own:
        given = _merged(given, table)
    fixed = next((setting for setting in COMMON if setting in given), None)
    if fixed:
        raise OptionError(f"{fixed} is the same for all methods: give it for all, not for {name}")
    kind = given.get("optimizer", name)
    if kind == name and name not in METHODS and not name.startswith("tao:"):
        hint = suggestion(name, METHODS, f"choose one of {', '.join(METHODS)} or tao:TYPE")
        raise OptionError(f"unknown optimizer {name!r}: {hint}; a name of your own needs --set {name}:optimizer=...")
    common = {setting: value for setting, value in base.items() if _takes(kind, setting, value)}
    settings = _merged(common, given)
    config = complete({**settings, "optimizer": kind})
    tried = rates if kind in MINIBATCH and "learning_rate" not in given else ()
    for rate in tried:
        dataclasses.replace(config, learning_rate=rate)
    return Variant(name, config, tried)


def _merged(settings: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    tables = {
        name: {**settings[name], **value}
        for name, value in more.items()
        if isinstance(value, Mapping) and isinstance(settings.get(name), Mapping)
    }
    return {**settings, **more, **tables}


def _takes(kind: str, setting: str, value: Any) -> bool:
    """Say whether an optimizer takes a setting that is given to all, with this value.

    A common batch size is meant for minibatches; that of a growing batch is given to its method.
    """
    if setting == "batch_size" and kind not in MINIBATCH:
        return False
    try:
        TrainConfig(**{"optimizer": kind, setting: value})
    except OptionError:
        return False
    return True
