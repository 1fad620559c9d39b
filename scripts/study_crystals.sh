#!/usr/bin/env bash
# Crystals as metal, semiconductor or insulator: bash scripts/study_crystals.sh [--full] SOURCE [OUT] [SECONDS a model]
#
# SOURCE is what `hpcdeq.prepare crystals` takes; AUXILIARY names numbers of it that are learned beside the classes. Trains the graph
# DEQ, its unrolled twin of equal weights and a CGCNN of as many for the same time each, evaluates them on the test
# rows beside a majority class and gradient boosting, and predicts from raw files.
source "$(dirname "${BASH_SOURCE[0]}")/study_application.sh" crystals 1200 "$@"

prepare band_gap,e_form,magmom,e_fermi
for model in graph_deq:encoder=2 graph_unrolled:encoder=2 cgcnn:depth=5; do
    train ${model%:*} --learning-rate 0.002 --batch-size 128 --weight-decay 0.2 --average 0.998 \
        --model-settings width=96,head=192,descriptors=64,dropout=0.4,${model#*:}
done
finish
