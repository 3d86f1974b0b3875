#!/usr/bin/env bash
# LARP-L-Long's generator of UCF-101 as its authors trained it, on eight GPUs. Published: FVD 57. Flags you append win;
# --compile and --cache_codes 8 are faster; the cache has eight windows a video, where the authors draw one each epoch.
source "$(dirname "$0")/setup.sh"
GPUS=${GPUS:-8}
torchrun --nnodes=1 --nproc_per_node="$GPUS" train_ar.py \
    --config scripts/configs/larp_ar_reproduce.yaml --num_workers 16 --resume auto "$@"
