#!/usr/bin/env bash
# CoordTok-SiT at the published size, unconditional, then samples and their FVD.
# CKPT=CoordTok_checkpoint DATA_ROOT=DATA GPUS=8 bash scripts/train_sit.sh [flags of train_sit.py]
# The flags that name the run, the data, the tokenizer's architecture and the device go to sampling too.
# Quicker, as videos are encoded once and not at every step: ... bash scripts/train_sit.sh --cache_latents 8
source "$(dirname "$0")/setup.sh"
: "${CKPT:?give CKPT=..., the checkpoint of CoordTok, ours or the authors\'}"
DATA_ROOT=${DATA_ROOT:-/data}
GPUS=${GPUS:-8}
RUN=${RUN:-coordtok_large}
run_flags results "$RUN" "$@"
SAMPLES=samples/${RUN_FOLDER##*/}
sampling_needs "$SAMPLES"
torchrun --nnodes=1 --nproc_per_node="$GPUS" train_sit.py --data_root "$DATA_ROOT" --first_model_ckpt "$CKPT" \
    --model SiT-L/2 --global_batch_size 64 --allow_tf32 --exp_name "$RUN" --resume auto "$@"
torchrun --nnodes=1 --nproc_per_node="$GPUS" sample.py --sit_model "$RUN_FOLDER" --first_model_ckpt "$CKPT" \
    --data_root "$DATA_ROOT" --output_dir "$SAMPLES" --allow_tf32 "${SHARED_FLAGS[@]}"
