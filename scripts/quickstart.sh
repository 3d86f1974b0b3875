#!/usr/bin/env bash
# The whole of CoordTok at a small size on the demo data: train both steps, evaluate, draw. Ten minutes on two CPU cores
# after the install; run again, it goes on where it stopped.
source "$(dirname "$0")/setup.sh"
# Threads that wait must sleep: spinning, they would take the cores from the loader's workers.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
DATA=data/cache/demo
OUT=results/quickstart

echo "== 1/4 Demo data: photographs moved by a camera, under UCF-101's names and split"
python data/demo.py --root $DATA --size 160x120
(cd data && python split_ucf.py --data_root cache/demo --data_name UCF-101 2>/dev/null)

# LPIPS stands on torchvision's VGG16. Without network there is none, and a random backbone is taken, by name.
LPIPS=auto
if ! python -c "from models.losses import Perceptual; Perceptual()" 2>/dev/null; then
    LPIPS=random
    echo "NOTE: torchvision's VGG16 cannot be downloaded here; LPIPS is computed on a RANDOM backbone. Its values mean nothing."
fi
TRAIN="python train_coordtok.py --config scripts/configs/coordtok_quickstart.yaml --data_root $DATA --save_dir $OUT
    --lpips_weights $LPIPS --resume auto"

echo "== 2/4 CoordTok, step 1: pixels of random patches"
$TRAIN --lpips_loss_scale 0.0 "$@"
echo "== 3/4 CoordTok, step 2: whole frames and LPIPS"
$TRAIN --is_second_step --first_step_ckpt $OUT/coordtok/checkpoints --num_iters 30 --lr 2e-4 \
    --lpips_loss_scale 0.01 "$@"
echo "== 4/4 Evaluation on the test clips: rFVD, PSNR, SSIM, LPIPS"
python eval/eval_coordtok.py --tokenizer $OUT/coordtok_second/checkpoints --data_root $DATA --video_name UCF-101_test \
    --protocol larp_rfvd --num_clips 32 --lpips_weights $LPIPS --num_workers 1 --output_dir $OUT/evaluation

cat <<END

Done. Look at
  $OUT/evaluation/sheet.png                 test clips above their reconstructions
  $OUT/evaluation/report.json               the numbers, with the protocol that made them
  $OUT/coordtok_second/samples/             validation pictures and clips during training
  $OUT/coordtok/metrics.jsonl               the losses
Next: the same on your own videos (a folder of CLASS/VIDEO files), at the published size on GPUs:
  (cd data && python split_ucf.py --data_root DATA --data_name UCF-101)
  DATA_ROOT=DATA GPUS=8 bash scripts/train_coordtok.sh
END
