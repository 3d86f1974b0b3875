#!/usr/bin/env bash
# A LARP tokenizer of the published size on one GPU. Flags you append win:
#   bash scripts/train_larp_tokenizer.sh --compile --batch_size 16
source "$(dirname "$0")/setup.sh"
GPUS=${GPUS:-1}
torchrun --nnodes=1 --nproc_per_node="$GPUS" train_larp_tokenizer.py --config scripts/configs/larp_tokenizer.yaml \
    --batch_size 8 --num_workers 4 --resume auto "$@"
