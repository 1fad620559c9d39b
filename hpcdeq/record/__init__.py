"""What a run leaves behind: its folder, its history, the progress on the terminal, the energy, the best weights."""

from hpcdeq.record.best import SavedModel, load_model, save_model
from hpcdeq.record.energy import EnergyMeter, host_meter, job_joules
from hpcdeq.record.evaluations import EVALUATION_COLUMNS, EvaluationWriter, Spacing
from hpcdeq.record.monitor import HISTORY_COLUMNS, HistoryWriter, RunDirectory, over_run, summary
from hpcdeq.record.progress import Progress
from hpcdeq.record.provenance import environment, fingerprint

__all__ = [
    "EVALUATION_COLUMNS",
    "HISTORY_COLUMNS",
    "EnergyMeter",
    "EvaluationWriter",
    "HistoryWriter",
    "Progress",
    "RunDirectory",
    "SavedModel",
    "Spacing",
    "environment",
    "fingerprint",
    "host_meter",
    "job_joules",
    "load_model",
    "over_run",
    "save_model",
    "summary",
]
