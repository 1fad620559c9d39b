#!/usr/bin/env bash
# Compare optimizers on four differential equations: bash scripts/study_pde.sh [OUT] [SECONDS a run] [SEEDS]
#
# Prepares the data (under a minute), then scans Adam's learning rate with one seed and runs every optimizer with every seed,
# 90 s each on 2 ranks: about 80 minutes in all. What is finished is not run again. RANKS=64 takes more ranks.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
source scripts/activate.sh
out=${1:-runs/study_pde}
seconds=${2:-90}
seeds=${3:-3}
mkdir -p "$out"

data() { # NAME KIND OPTIONS...: made once
    [ -e "$out/$1.h5" ] || python -m hpcdeq.prepare "${@:2}" --out "$out/$1.h5" --quiet
}
compare() { # NAME MODEL [SETTINGS OF THE MODEL, TOML]
    printf 'model = "%s"\ndtype = "float32"\nchunk_size = 1024\n\n[model_settings]\n%s\n' "$2" "${3:-}" > "$out/$1.toml"
    mpirun -n "${RANKS:-2}" python -m hpcdeq.compare "$out/$1.toml" --data "$out/$1.h5" --optimizers trgn,lbfgs,adam \
        --learning-rates grid --seeds "$seeds" --max-seconds "$seconds" --out "$out/$1"
}

data burgers burgers --modes 5 --limit 5000
data advection advection --modes 3 --limit 5000
data darcy darcy --points 16 --modes 3 --limit 750
data reaction reaction --limit 5000

compare burgers deeponet
compare advection deeponet
compare darcy fno $'width = 8\nmodes = 4\nlayers = 2'
compare reaction mlp
