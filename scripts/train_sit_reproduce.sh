#!/usr/bin/env bash
# The published CoordTok-SiT-L/2 of UCF-101, every setting written out: 600K steps in float32 with TF32, unconditional;
# 2,048 samples of 128 frames by SDE Euler-Maruyama, 250 points, last step 0.04. Published: FVD 369.3.
# CKPT=CoordTok_UCF101_1M_50K.pth DATA_ROOT=DATA GPUS=8 bash scripts/train_sit_reproduce.sh
source "$(dirname "$0")/setup.sh"
: "${CKPT:?give CKPT=..., the checkpoint of CoordTok, ours or the authors\'}"
DATA_ROOT=${DATA_ROOT:-/data}
GPUS=${GPUS:-8}
run_flags results sit_reproduce "$@"
SAMPLES=samples/${RUN_FOLDER##*/}
sampling_needs "$SAMPLES"
torchrun --nnodes=1 --nproc_per_node="$GPUS" train_sit.py --data_root "$DATA_ROOT" --first_model_ckpt "$CKPT" \
    --model SiT-L/2 --global_batch_size 64 --num_iters 600000 --lr 1e-4 --ema_decay 0.9999 --stat_clips 2048 \
    --path-type Linear --prediction velocity --loss-weight none --num_classes 1 --class_dropout_prob 0 \
    --precision fp32 --allow_tf32 --exp_name sit_reproduce --resume auto "$@"
torchrun --nnodes=1 --nproc_per_node="$GPUS" sample.py --sit_model "$RUN_FOLDER" --first_model_ckpt "$CKPT" \
    --data_root "$DATA_ROOT" --output_dir "$SAMPLES" --protocol styleganv_fvd2048_128f --num_samples 2048 \
    --mode SDE --sampling_method Euler --num_sampling_steps 250 --diffusion_form sigma --diffusion_norm 1.0 \
    --last_step Mean --last_step_size 0.04 --dtype float32 --allow_tf32 \
    "${SHARED_FLAGS[@]}"
