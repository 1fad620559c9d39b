"""Stands in for hpcdeq.compare: each part is one run of the program in train.py; a report names the runs that it is of."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

words = sys.argv[1:]
if "--part" in words:
    number = words[words.index("--part") + 1].partition("/")[0]
    run = Path(words[words.index("--out") + 1]) / "parts" / number / "runs" / f"adam-{number}"
    sys.argv[1:] = ["--out", str(run), "--resume"]
    runpy.run_module("hpcdeq.train")
    (run / "summary.json").write_text('{\n  "status": "budget"\n}\n')
else:
    print("report of", *sorted(path.name for path in Path(words[0], "runs").iterdir()), words[1:], flush=True)
