#!/usr/bin/env bash
# Crystals as metal, semiconductor or insulator: bash scripts/study_crystals.sh SOURCE [OUT] [SECONDS a model]
#
# SOURCE is what `hpcdeq.prepare crystals` takes, with band_gap and e_form, which are learned beside the classes (AUXILIARY names
# others). Trains the graph DEQ, its unrolled twin of equal weights and a CGCNN for the same time each, evaluates them on the test
# rows beside a majority class and gradient boosting, and predicts from raw files.
[ $# -ge 1 ] || { echo "say where the crystals are: bash scripts/study_crystals.sh SOURCE" >&2; exit 2; }
raw=$(realpath "$1")
source "$(dirname "${BASH_SOURCE[0]}")/study_application.sh"
out=${2:-runs/study_crystals}
seconds=${3:-1500}

prepare crystals "$raw" band_gap,e_form
for model in graph_deq graph_unrolled cgcnn; do
    train $model "$seconds" --learning-rate 0.002 --batch-size 128 --weight-decay 0.05 \
        --average 0.998 --model-settings dropout=0.2,descriptors=64
done
finish "$raw"
