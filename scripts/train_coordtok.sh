#!/usr/bin/env bash
# Both steps of CoordTok at the published size. Flags you append go to both: bash scripts/train_coordtok.sh --num_views 64
source "$(dirname "$0")/setup.sh"
DATA_ROOT=${DATA_ROOT:-/data}
GPUS=${GPUS:-8}
ACCUM=${ACCUM:-4}
RUN=${RUN:-coordtok_large}
run_flags logs "${RUN}_step1_1M" "$@"
TRAIN=(train_coordtok.py --data_root "$DATA_ROOT" --num_views 256
    --accum_iter "$ACCUM" --enc_embed_dim 1024 --enc_num_layers 24 --enc_num_heads 16 --enc_patch_num_layers 8
    --dec_embed_dim 1024 --dec_num_layers 24 --dec_num_heads 16 --allow_tf32 --resume auto)
SECOND=("${TRAIN[@]}" --exp_name "${RUN}_step1_1M" --num_iters 50001 --point_per_vid 4096 --lpips_loss_scale 1.0
    --is_second_step --first_step_ckpt "$RUN_FOLDER/checkpoints" "$@")
python "${SECOND[@]}" --check  # LPIPS's weights and step 2's flags, before step 1 takes days
torchrun --nnodes=1 --nproc_per_node="$GPUS" "${TRAIN[@]}" --exp_name "${RUN}_step1_1M" --num_iters 1000001 \
    --point_per_vid 1024 --lpips_loss_scale 0.0 "$@"
torchrun --nnodes=1 --nproc_per_node="$GPUS" "${SECOND[@]}"
