#!/usr/bin/env bash
# Metal-organic frameworks by pore size: bash scripts/study_frameworks.sh [--full] SOURCE [OUT] [SECONDS a model]
#
# SOURCE is what `hpcdeq.prepare frameworks` takes. As study_crystals.sh; distances reach farther, for the voids are wide.
source "$(dirname "${BASH_SOURCE[0]}")/study_application.sh" frameworks 900 "$@"

prepare PLD,density,AV_VF
for model in graph_deq:encoder=1 graph_unrolled:encoder=1 cgcnn:depth=3; do
    train ${model%:*} --learning-rate 0.002 --batch-size 64 --weight-decay 0.05 --average 0.998 \
        --model-settings cutoff=10.0,radial=40,dropout=0.1,${model#*:}
done
finish
