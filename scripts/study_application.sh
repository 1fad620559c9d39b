# What the studies of applications share; sourced by study_crystals.sh, study_frameworks.sh and study_molecules.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
source scripts/activate.sh

# RANKS: of mpirun. AUXILIARY: numbers of the source that are learned beside the classes, none if it is empty.
ranks=${RANKS:-2}
models=()

# prepare KIND SOURCE AUXILIARY OPTIONS...: the dataset, once
prepare() {
    local beside=${AUXILIARY-$3}
    mkdir -p "$out"
    [ -e "$out/data.h5" ] ||
        python -m hpcdeq.prepare "$1" "$2" ${beside:+--auxiliary "$beside"} "${@:4}" --out "$out/data.h5"
}

# train MODEL SECONDS OPTIONS...: a run and its evaluation, once
train() {
    local run="$out/$1"
    models+=("$1")
    [ -e "$run/summary.json" ] || mpirun -n "$ranks" python -m hpcdeq.train --data "$out/data.h5" --model "$1" \
        --optimizer adamw --dtype float32 --max-iterations 100000 --max-seconds "$2" "${@:3}" --out "$run"
    local baselines=--no-baselines
    [ "$1" = "${models[0]}" ] && baselines=
    [ -e "$run/evaluation/evaluation.json" ] || mpirun -n "$ranks" python -m hpcdeq.evaluate "$run" $baselines
}

# finish SOURCE OPTIONS...: predictions on raw files, and a table of all models
finish() {
    mpirun -n "$ranks" python -m hpcdeq.predict "$out/${models[0]}" "$1" --limit 1000 --out "$out/predictions.csv"
    python scripts/study_table.py "${models[@]/#/$out/}" "${@:2}" | tee "$out/table.md"
}
