#!/usr/bin/env bash
# Set up and run the main job: real crystals, from a source file to a trained model and its summary, on 2 ranks.
#
#   bash scripts/demo.sh [SOURCE]
#
# SOURCE is what `python -m hpcdeq.prepare crystals` takes: a folder of CIF files with id_prop.csv, JSON lines with
# cell, Z, frac and band_gap, or pymatgen's JSON. Without it HPCDEQ_CRYSTALS, then ../shared/data is looked for, and
# where there is none the embedded problem (Burgers' equation) is trained instead.
# DEMO_SECONDS bounds the training (default 120), DEMO_OUT names the folder (default runs/demo, made anew).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
source scripts/activate.sh

out=${DEMO_OUT:-runs/demo}
rm -rf "$out"
mkdir -p "$(dirname "$out")"
source=${1:-${HPCDEQ_CRYSTALS:-../shared/data/crystals/crystals_small.jsonl.gz}}
if [ -e "$source" ]; then
    echo "== prepare: graphs of 12 neighbours from $source"
    python -m hpcdeq.prepare crystals "$source" --out "$out.h5"
    echo "== train: graph DEQ by trust-region Gauss-Newton, 2 ranks, ${DEMO_SECONDS:-120} s"
    mpirun -n 2 python -m hpcdeq.train --data "$out.h5" --optimizer trgn --max-seconds "${DEMO_SECONDS:-120}" --out "$out"
elif [ $# -gt 0 ]; then
    echo "demo: $source does not exist" >&2
    exit 2
else
    echo "== no crystals at $source: training the embedded problem (pass a SOURCE for crystals)"
    mpirun -n 2 python -m hpcdeq.train --out "$out"
fi
