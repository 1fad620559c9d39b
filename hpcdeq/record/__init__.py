"""What a run leaves behind: its folder, its history, the progress on the terminal, the energy, the best weights."""

from hpcdeq.record.best import SavedModel, load_model, save_model
from hpcdeq.record.checkpoint import CheckpointWarning, read_checkpoint, write_checkpoint
from hpcdeq.record.energy import EnergyMeter, host_meter, job_joules
from hpcdeq.record.evaluations import EVALUATION_COLUMNS, EvaluationWriter, Spacing
from hpcdeq.record.interruption import Signals, seconds_left
from hpcdeq.record.keeper import CheckpointKeeper
from hpcdeq.record.lock import FolderLock, locked
from hpcdeq.record.monitor import HISTORY_COLUMNS, HistoryWriter, RunDirectory, over_run, summary
from hpcdeq.record.progress import Progress
from hpcdeq.record.provenance import environment, fingerprint

__all__ = [
    "EVALUATION_COLUMNS",
    "HISTORY_COLUMNS",
    "CheckpointKeeper",
    "CheckpointWarning",
    "EnergyMeter",
    "EvaluationWriter",
    "FolderLock",
    "HistoryWriter",
    "Progress",
    "RunDirectory",
    "SavedModel",
    "Signals",
    "Spacing",
    "environment",
    "fingerprint",
    "host_meter",
    "job_joules",
    "load_model",
    "locked",
    "over_run",
    "read_checkpoint",
    "save_model",
    "seconds_left",
    "summary",
    "write_checkpoint",
]
