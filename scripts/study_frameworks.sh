#!/usr/bin/env bash
# Metal-organic frameworks by pore size: bash scripts/study_frameworks.sh SOURCE [OUT] [SECONDS a model]
#
# SOURCE is what `hpcdeq.prepare frameworks` takes. As study_crystals.sh; distances reach farther, for the voids are wide.
[ $# -ge 1 ] || { echo "say where the frameworks are: bash scripts/study_frameworks.sh SOURCE" >&2; exit 2; }
raw=$(realpath "$1")
source "$(dirname "${BASH_SOURCE[0]}")/study_application.sh"
out=${2:-runs/study_frameworks}
seconds=${3:-1200}

prepare frameworks "$raw" ""
for model in graph_deq graph_unrolled cgcnn; do
    train $model "$seconds" --learning-rate 0.002 --batch-size 64 --average 0.998 \
        --model-settings cutoff=10.0,radial=40
done
finish "$raw"
