# What the studies of applications share; sourced as: source study_application.sh KIND SECONDS "$@"
#
# "$@" is [--full] SOURCE [OUT] [SECONDS] MORE...; what is more, the study takes for itself. --full is for a cluster's node or a
# GPU: six times the seconds, on all cores.
# RANKS: of mpirun. AUXILIARY: numbers of the source that are learned beside the classes, none if it is empty.
set -euo pipefail
kind=$1 seconds=$2 full=
shift 2
[ "${1:-}" != --full ] || { full=1; shift; }
[ $# -ge 1 ] || { echo "say where the $kind are: bash scripts/study_$kind.sh [--full] SOURCE" >&2; exit 2; }
raw=$(realpath "$1") || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
source scripts/activate.sh
ranks=${RANKS:-2}
[ -z "$full" ] || { seconds=$((6 * seconds)) ranks=${RANKS:-$(nproc)}; }
out=${2:-runs/study_$kind}
seconds=${3:-$seconds}
more=("${@:4}")
models=()
mkdir -p "$out"

# prepare AUXILIARY OPTIONS...: the dataset, once
prepare() {
    local beside=${AUXILIARY-$1}
    [ -e "$out/data.h5" ] ||
        python -m hpcdeq.prepare "$kind" "$raw" ${beside:+--auxiliary "$beside"} "${@:2}" --out "$out/data.h5"
}

# train MODEL OPTIONS...: a run and its evaluation, once
train() {
    local run="$out/$1"
    models+=("$1")
    [ -e "$run/summary.json" ] || mpirun -n "$ranks" python -m hpcdeq.train --data "$out/data.h5" --model "$1" \
        --optimizer adamw --dtype float32 --max-iterations 100000 --max-seconds "$seconds" "${@:2}" --out "$run"
    local baselines=--no-baselines
    [ "$1" = "${models[0]}" ] && baselines=
    [ -e "$run/evaluation/evaluation.json" ] || mpirun -n "$ranks" python -m hpcdeq.evaluate "$run" $baselines
}

# finish OPTIONS...: predictions on raw files, and a table of all models
finish() {
    mpirun -n "$ranks" python -m hpcdeq.predict "$out/${models[0]}" "$raw" --limit 1000 --out "$out/predictions.csv"
    python scripts/study_table.py "${models[@]/#/$out/}" "$@" | tee "$out/table.md"
}
