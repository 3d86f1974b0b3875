#!/usr/bin/env bash
# LARP-L-Long's frame prediction on Kinetics-600 as its authors trained it, on eight GPUs. Published: FVD 5.1. Flags you
# append win; --compile is faster.
source "$(dirname "$0")/setup.sh"
GPUS=${GPUS:-8}
torchrun --nnodes=1 --nproc_per_node="$GPUS" train_ar.py \
    --config scripts/configs/larp_ar_fp_reproduce.yaml --num_workers 16 --resume auto "$@"
