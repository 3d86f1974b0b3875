#!/usr/bin/env bash
# LARP-L-Long's tokenizer as its authors trained it, on eight GPUs. Flags you append win; --compile is
# faster and trains the same.
source "$(dirname "$0")/setup.sh"
GPUS=${GPUS:-8}
torchrun --nnodes=1 --nproc_per_node="$GPUS" train_larp_tokenizer.py \
    --config scripts/configs/larp_tokenizer_reproduce.yaml --num_workers 16 --resume auto "$@"
