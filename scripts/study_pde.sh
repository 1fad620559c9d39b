#!/usr/bin/env bash
# Compare optimizers on four differential equations: bash scripts/study_pde.sh [OUT] [SECONDS a run] [SEEDS]
#
# Prepares the data (under a minute), then scans Adam's learning rate with one seed and runs every optimizer with every seed,
# 90 s each on 2 ranks: about 80 minutes in all. What is finished is not run again. RANKS=64 takes more ranks. Long runs of some:
#   CASES="burgers reaction" OPTIMIZERS=trgn,adam RATES=0.001,0.003 bash scripts/study_pde.sh runs/study_long 600 1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
source scripts/activate.sh
out=${1:-runs/study_pde}
seconds=${2:-90}
seeds=${3:-3}
mkdir -p "$out"

compare() { # NAME MODEL SETTINGS OF THE MODEL (TOML) OPTIONS OF PREPARE...
    [[ " ${CASES:-burgers advection darcy reaction} " == *" $1 "* ]] || return 0
    [ -e "$out/$1.h5" ] || python -m hpcdeq.prepare "$1" "${@:4}" --out "$out/$1.h5" --quiet
    printf 'model = "%s"\ndtype = "float32"\nchunk_size = 1024\n\n[model_settings]\n%s\n' "$2" "$3" > "$out/$1.toml"
    mpirun -n "${RANKS:-2}" python -m hpcdeq.compare "$out/$1.toml" --data "$out/$1.h5" \
        --optimizers "${OPTIMIZERS:-trgn,lbfgs,adam}" --learning-rates "${RATES:-grid}" \
        --seeds "$seeds" --max-seconds "$seconds" --out "$out/$1"
}

compare burgers deeponet "" --modes 5 --limit 5000
compare advection deeponet "" --modes 3 --limit 5000
compare darcy fno $'width = 8\nmodes = 4\nlayers = 2' --points 16 --modes 3 --limit 750
compare reaction mlp "" --limit 5000
