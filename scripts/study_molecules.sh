#!/usr/bin/env bash
# Molecules as weakly or strongly polar: bash scripts/study_molecules.sh SOURCE [OUT] [SECONDS a model]
#
# SOURCE is what `hpcdeq.prepare molecules` takes; BY names a column of it whose values are scored by themselves, too. As study_crystals.sh, on conformers by ETKDG, with vectors that the atoms add
# up to: a dipole moment. A SMILES without stereochemistry stands for several isomers: conformers are of any of them.
[ $# -ge 1 ] || { echo "say where the molecules are: bash scripts/study_molecules.sh SOURCE" >&2; exit 2; }
raw=$(realpath "$1")
source "$(dirname "${BASH_SOURCE[0]}")/study_application.sh"
out=${2:-runs/study_molecules}
seconds=${3:-1200}

prepare molecules "$raw" mu,alpha,homo,lumo,gap --geometry conformers --conformers 4
for model in graph_deq graph_unrolled cgcnn; do
    train $model "$seconds" --learning-rate 0.002 --batch-size 128 --average 0.998 \
        --model-settings dipole=16,dropout=0.1
done
finish "$raw" ${BY:+--by "$BY" --source "$raw"}
