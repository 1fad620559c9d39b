"""Which runs are seeds of one method, and what else differs between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hpcdeq.report.comparison import Method
from hpcdeq.report.runs import Run

# What a sceptic wants to be the same in all runs.
SHARED_SETTINGS = ("data", "model", "model_settings", "dtype", "device", "max_seconds", "weight_decay")
SHARED_FACTS = ("ranks", "threads")
SHARED_ENVIRONMENT = ("host", "commit", "versions")


def group_runs(runs: Iterable[Run]) -> list[Method]:
    """Return runs as methods: those that differ in nothing but the seed are one, in the order of their first runs.

    Not collective. A method is named by its optimizer, and where several have the same one, by the settings in which
    they differ too.
    """
    groups: list[tuple[dict[str, Any], list[Run]]] = []
    for run in runs:
        key = {name: value for name, value in flat(run.settings).items() if name != "seed"}
        key["ranks"] = run.summary.get("ranks")
        found = next((members for known, members in groups if known == key), None)
        if found is None:
            groups.append((key, [run]))
        else:
            found.append(run)
    return [Method(_name(key, [k for k, _ in groups]), members) for key, members in groups]


def _name(key: Mapping[str, Any], keys: Sequence[Mapping[str, Any]]) -> str:
    same = [other for other in keys if other.get("optimizer") == key.get("optimizer")]
    differing = [name for name in sorted({n for k in same for n in k}) if len({str(k.get(name)) for k in same}) > 1]
    told = [f"{name.split('.')[-1]}={key[name]}" for name in differing if name in key]
    return " ".join([str(key.get("optimizer")), *(told or (["plain"] if differing else []))])


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with names like ``petsc.tao_gatol``. Not collective."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def uneven(runs: Sequence[Run]) -> list[str]:
    """Return in which respects, other than their methods and seeds, runs differ, a line each. Not collective."""
    lines = []
    looks = [
        *((name, [run.settings.get(name) for run in runs]) for name in SHARED_SETTINGS),
        *((name, [run.summary.get(name) for run in runs]) for name in SHARED_FACTS),
        *((name, [run.environment.get(name) for run in runs]) for name in SHARED_ENVIRONMENT),
    ]
    for name, values in looks:
        distinct = list(dict.fromkeys(str(value) for value in values))
        if len(distinct) > 1:
            shown = "; ".join(distinct) if max(map(len, distinct)) < 60 else f"{len(distinct)} different ones"
            lines.append(f"The runs differ in {name}: {shown}.")
    seeds: dict[Any, set[str]] = {}
    for run in runs:
        if "initial_weights" in run.summary:
            seeds.setdefault(run.summary.get("seed"), set()).add(run.summary["initial_weights"])
    lines += [f"The runs of seed {seed} began at different weights." for seed, found in seeds.items() if len(found) > 1]
    return lines
