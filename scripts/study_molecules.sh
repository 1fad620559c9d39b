#!/usr/bin/env bash
# Molecules as weakly or strongly polar: bash scripts/study_molecules.sh SOURCE [OUT] [SECONDS a model]
#
# SOURCE is what `hpcdeq.prepare molecules` takes. As study_crystals.sh, on conformers by ETKDG, with vectors that the atoms add
# up to: a dipole moment.
source "$(dirname "${BASH_SOURCE[0]}")/study_application.sh"
source_=${1:?say where the molecules are: bash scripts/study_molecules.sh SOURCE}
out=${2:-runs/study_molecules}
seconds=${3:-1200}

prepare molecules "$source_" --geometry conformers
for model in graph_deq graph_unrolled cgcnn; do
    train $model "$seconds" --learning-rate 0.002 --batch-size 128 --model-settings dipole=16
done
finish "$source_"
