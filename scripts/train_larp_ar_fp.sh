#!/usr/bin/env bash
# LARP's generator that continues 5 given frames, of the published size, on one GPU. Flags you append win:
#   bash scripts/train_larp_ar_fp.sh --compile --cache_codes 2 --tokenizer logs/larp_tokenizer/checkpoints
source "$(dirname "$0")/setup.sh"
GPUS=${GPUS:-1}
torchrun --nnodes=1 --nproc_per_node="$GPUS" train_ar.py --config scripts/configs/larp_ar_fp.yaml \
    --batch_size 4 --num_workers 4 --resume auto "$@"
