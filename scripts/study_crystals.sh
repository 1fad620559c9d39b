#!/usr/bin/env bash
# Crystals as metal, semiconductor or insulator: bash scripts/study_crystals.sh SOURCE [OUT] [SECONDS a model]
#
# SOURCE is what `hpcdeq.prepare crystals` takes. Trains the graph DEQ, its unrolled twin of equal weights and a CGCNN for the
# same time each, evaluates them on the test rows beside a majority class and gradient boosting, and predicts from raw files.
[ $# -ge 1 ] || { echo "say where the crystals are: bash scripts/study_crystals.sh SOURCE" >&2; exit 2; }
raw=$(realpath "$1")
source "$(dirname "${BASH_SOURCE[0]}")/study_application.sh"
out=${2:-runs/study_crystals}
seconds=${3:-1500}

prepare crystals "$raw"
for model in graph_deq graph_unrolled cgcnn; do
    train $model "$seconds" --learning-rate 0.002 --batch-size 128 --weight-decay 0.05
done
finish "$raw"
