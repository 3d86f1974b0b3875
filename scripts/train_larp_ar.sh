#!/usr/bin/env bash
# LARP's class-conditional generator of the published size on one GPU. Flags you append win:
#   bash scripts/train_larp_ar.sh --compile --cache_codes 8 --tokenizer logs/larp_tokenizer/checkpoints
source "$(dirname "$0")/setup.sh"
GPUS=${GPUS:-1}
torchrun --nnodes=1 --nproc_per_node="$GPUS" train_ar.py --config scripts/configs/larp_ar.yaml \
    --batch_size 4 --num_workers 4 --resume auto "$@"
