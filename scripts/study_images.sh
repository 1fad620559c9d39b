#!/usr/bin/env bash
# Forward iteration against Anderson mixing in training: bash scripts/study_images.sh [--full] SOURCE [OUT] [SECONDS a run] [SEEDS]
#
# SOURCE is what `hpcdeq.prepare images` takes, such as CIFAR-10. The same convolutional DEQ is trained by Adam twice, on fixed
# points and adjoints to the layer's own tolerance and within its number of iterations: by forward iteration (a window of 0), and by
# Anderson mixing (the default). The cell is not bounded to contract, as DEQs that people train are not: within a bound of 0.95 it
# needs three iterations, and there is nothing to accelerate. Samples whose fixed point or adjoint is not found are left out of the
# loss, counted, and wrong. Then the window is varied on the trained model: where forward iteration is overtaken.
# LIMIT: images that are taken, MODEL_SETTINGS: other bounds; --full takes all images, and DEVICE=cuda a GPU.
source "$(dirname "${BASH_SOURCE[0]}")/study_application.sh" images 300 "$@"
limit=${LIMIT:-6000}
[ -z "$full" ] || limit=${LIMIT:-}

[ -e "$out/data.h5" ] || python -m hpcdeq.prepare images "$raw" --out "$out/data.h5" ${limit:+--limit "$limit"}
mpirun -n "$ranks" python -m hpcdeq.compare --data "$out/data.h5" --model conv_deq --dtype float32 --device "${DEVICE:-cpu}" \
    --model-settings "${MODEL_SETTINGS:-bound=17,contraction=13}" --on-failure mask --no-adaptive \
    --optimizers anderson,forward --reference forward --seeds "${more[0]:-2}" --max-seconds "$seconds" --max-iterations 100000 \
    --learning-rate 0.002 --set anderson:optimizer=adam --set forward:optimizer=adam --set forward:deq_snes_anderson_m=0 \
    --set forward:deq_ksp_type=batched_anderson --set forward:deq_ksp_anderson_m=0 --out "$out/comparison"
python -m hpcdeq.study crossover "$out/comparison/runs/anderson-0" --out "$out/crossover"
