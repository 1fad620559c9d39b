"""Energy of the processor packages, from the counters that Linux shows of Intel's and AMD's RAPL.

The counters wrap around: after 262 kJ on many processors, 65 kJ on some servers, which is minutes at full power. An
iteration may take longer than that, so that a thread reads them in between.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from hpcdeq import parallel

POWERCAP = Path("/sys/class/powercap")
READING_SECONDS = 30.0  # 65 kJ would take a package 2.2 kW to use up between two readings


class EnergyMeter:
    """Measures the energy of this host's processor packages.

    The whole host's: what others run on it is measured too. On a job of several ranks a host one rank measures
    (`host_meter`), and `job_joules` sums the hosts.

    Parameters
    ----------
    root
        Folder of the counters.
    """

    def __init__(self, root: Path = POWERCAP) -> None:
        self._packages = _packages(root)
        self._last: dict[Path, int] | None = None
        self._microjoules = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Begin to count, from zero. Not collective."""
        self.stop()
        self._stopped = threading.Event()
        self._microjoules = 0
        self._last = self._readings()
        if self._last:
            threading.Thread(target=self._follow, args=(self._stopped,), daemon=True, name="energy").start()

    def stop(self) -> None:
        """End the readings in between; what was counted is still told by `joules`. Not collective."""
        self._stopped.set()

    def joules(self) -> float | None:
        """Return the energy since `start` in J; None where the counters cannot be read. Not collective."""
        with self._lock:
            now = self._readings() if self._last else None
            if not now or not self._last:
                self._last = None
                return None
            for path, value in now.items():
                used = value - self._last[path]
                self._microjoules += used if used >= 0 else used + self._packages[path]
            self._last = now
            return self._microjoules * 1e-6

    def _follow(self, stopped: threading.Event) -> None:
        while not stopped.wait(READING_SECONDS):
            self.joules()

    def _readings(self) -> dict[Path, int] | None:
        """Return the packages' counters in µJ; None if one of them cannot be read (root only, on most systems)."""
        try:
            return {path: int(path.read_text()) for path in self._packages}
        except (OSError, ValueError):
            return None


def _packages(root: Path) -> dict[Path, int]:
    """Return the counter files of the packages and where each wraps around, in µJ.

    Not those of their parts (intel-rapl:0:1) or of the platform around them (psys): they count the same energy again.
    """
    found = {}
    try:
        for folder in sorted(root.glob("intel-rapl:*")):
            if folder.name.count(":") == 1 and (folder / "name").read_text().startswith("package"):
                found[folder / "energy_uj"] = int((folder / "max_energy_range_uj").read_text())
    except (OSError, ValueError):
        return {}
    return found


def host_meter(comm: parallel.Comm) -> EnergyMeter | None:
    """Return a meter on one rank of each host, None on the others. Collective on comm."""
    return EnergyMeter() if parallel.first_on_this_host(comm) else None


def job_joules(comm: parallel.Comm, meter: EnergyMeter | None) -> float | None:
    """Return the energy of all hosts in J, the same on all ranks.

    Collective on comm. None unless every host could be measured: part of a sum would pass for the whole.

    Parameters
    ----------
    meter
        This rank's share of `host_meter`.
    """
    own = None if meter is None else meter.joules()
    joules, meters, measured = parallel.sum_over_ranks(
        comm, np.array([own or 0.0, float(meter is not None), float(own is not None)])
    )
    return float(joules) if meters and meters == measured else None
