#!/usr/bin/env bash
# Molecules as weakly or strongly polar: bash scripts/study_molecules.sh [--full] SOURCE [OUT] [SECONDS a model]
#
# SOURCE is what `hpcdeq.prepare molecules` takes; BY names a column of it whose values are scored by themselves, too. As
# study_crystals.sh, on conformers by ETKDG, with vectors that the atoms add up to: a dipole moment, a mean of conformers with
# weights that are learned, as a SMILES does not tell the one that the property is of.
source "$(dirname "${BASH_SOURCE[0]}")/study_application.sh" molecules 900 "$@"

prepare mu,alpha,homo,lumo,gap --geometry conformers --conformers 12
for model in graph_deq:encoder=2 graph_unrolled:encoder=2 cgcnn:depth=5; do
    train ${model%:*} --learning-rate 0.002 --batch-size 128 --weight-decay 0.1 --average 0.998 \
        --model-settings dipole=16,conformer_radial=12,descriptors=32,dropout=0.05,${model#*:}
done
finish ${BY:+--by "$BY" --source "$raw"}
