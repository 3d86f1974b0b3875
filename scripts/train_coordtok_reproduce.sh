#!/usr/bin/env bash
# Both steps of CoordTok as its authors trained it: padding, half precision with TF32 and LPIPS's dropout as released.
# Published: rFVD 102.9, PSNR 28.6, SSIM 0.892, LPIPS 0.066. Flags you append go to both steps.
# DATA_ROOT=DATA GPUS=8 bash scripts/train_coordtok_reproduce.sh
source "$(dirname "$0")/setup.sh"
DATA_ROOT=${DATA_ROOT:-/data}
GPUS=${GPUS:-8}
ACCUM=${ACCUM:-4}
RUN=${RUN:-coordtok_reproduce}
run_flags logs "$RUN" "$@"
TRAIN=(train_coordtok.py --data_root "$DATA_ROOT" --num_views 256
    --accum_iter "$ACCUM" --enc_embed_dim 1024 --enc_num_layers 24 --enc_num_heads 16 --enc_patch_num_layers 8
    --dec_embed_dim 1024 --dec_num_layers 24 --dec_num_heads 16 --padding released --lr 1e-4 --precision fp16
    --allow_tf32 --exp_name "$RUN" --resume auto)
SECOND=("${TRAIN[@]}" --num_iters 50001 --point_per_vid 4096 --lpips_loss_scale 1.0 --lpips_dropout
    --is_second_step --first_step_ckpt "$RUN_FOLDER/checkpoints" "$@")
python "${SECOND[@]}" --check  # LPIPS's weights and step 2's flags, before step 1 takes days
torchrun --nnodes=1 --nproc_per_node="$GPUS" "${TRAIN[@]}" --num_iters 1000001 --point_per_vid 1024 \
    --lpips_loss_scale 0.0 "$@"
torchrun --nnodes=1 --nproc_per_node="$GPUS" "${SECOND[@]}"
