#!/usr/bin/env bash
# Forward iteration against Anderson mixing in training: bash scripts/study_images.sh SOURCE [OUT] [SECONDS a run] [SEEDS]
#
# SOURCE is what `hpcdeq.prepare images` takes, such as CIFAR-10. The same convolutional DEQ is trained by Adam twice, on fixed
# points and adjoints to the same tolerance: by forward iteration (a window of 0), and by Anderson mixing (the default). Then the
# window is varied on the trained model: where forward iteration is overtaken. LIMIT=0 takes all images, DEVICE=cuda a GPU.
set -euo pipefail
[ $# -ge 1 ] || { echo "say where the images are: bash scripts/study_images.sh SOURCE" >&2; exit 2; }
raw=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
source scripts/activate.sh
out=${2:-runs/study_images}
seconds=${3:-600}
seeds=${4:-3}
limit=${LIMIT:-11000}
mkdir -p "$out"

[ -e "$out/data.h5" ] || python -m hpcdeq.prepare images "$raw" --out "$out/data.h5" $([ "$limit" = 0 ] || echo --limit "$limit")
mpirun -n "${RANKS:-2}" python -m hpcdeq.compare --data "$out/data.h5" --model conv_deq --dtype float32 --device "${DEVICE:-cpu}" \
    --optimizers anderson,forward --reference forward --seeds "$seeds" --max-seconds "$seconds" --learning-rate 0.002 \
    --set anderson:optimizer=adam --set forward:optimizer=adam \
    --set forward:deq_snes_anderson_m=0 --set forward:deq_ksp_type=batched_anderson --set forward:deq_ksp_anderson_m=0 \
    --set anderson:deq_snes_max_it=1000 --set forward:deq_snes_max_it=1000 --out "$out/comparison"
python -m hpcdeq.study crossover "$out/comparison/runs/anderson-0" --out "$out/crossover"
