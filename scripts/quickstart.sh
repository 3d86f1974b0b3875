#!/usr/bin/env bash
# The whole product at a small size on the demo data: CoordTok and SiT on its planes; beside them a LARP tokenizer and
# its generators, for classes and for frame prediction; each trained and measured; then one page of results. Fifteen
# minutes on two idle CPU cores after the install. Run again, it goes on where it stopped. STEPS=6 CLIPS=4 only looks
# whether everything runs.
source "$(dirname "$0")/setup.sh"
OUT=${OUT:-results/quickstart}
DEMO=data/cache/demo
CLIPS=${CLIPS:-24}
if ! [[ ${STEPS:-1} =~ ^[1-9][0-9]*$ && $CLIPS =~ ^[1-9][0-9]*$ && $CLIPS -ge 2 ]]; then
    echo "error: STEPS is ${STEPS:-not set} and CLIPS $CLIPS, expected whole numbers, at least 1 and 2 (an FVD needs two clips)" >&2
    exit 1
fi
CONFIGS=scripts/configs
TRAIN=(--data_root "$DEMO" --video_name UCF-101_train --save_dir "$OUT" --resume auto ${STEPS:+--num_iters "$STEPS"})
TEST=(--data_root "$DEMO" --video_name UCF-101_test --num_workers 1)
SAMPLE=("${TEST[@]}" --num_samples "$CLIPS" --sample_batch_size 16)

# finished PID LOG: waits for a process in the background; where it failed, shows the end of its log and leaves.
finished() {
    if ! wait "$1"; then
        tail -n 3 "$2" >&2
        exit 1
    fi
}
# stop SIGNAL: ends both halves, with all that they have started, and waits for them; training saves first.
stop() {
    trap - EXIT
    for half in ${COORDTOK_HALF:-} ${LARP_HALF:-}; do
        kill -"$1" -- "-$half" 2>/dev/null || true
    done
    wait
}
say() { printf '\n== %s  [%dm%02ds]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

coordtok_and_sit() {
    say "2 CoordTok: pixels of random patches first, then whole frames and a perceptual loss"
    COORDTOK=(python train_coordtok.py --config "$CONFIGS/coordtok_quickstart.yaml" --perceptual "$PERCEPTUAL" "${TRAIN[@]}")
    "${COORDTOK[@]}" --lpips_loss_scale 0.0
    "${COORDTOK[@]}" --is_second_step --first_step_ckpt "$OUT/coordtok/checkpoints" --num_iters "${STEPS:-20}" \
        --num_views 4 --lr 1e-4 --warmup_iters 0 --lpips_loss_scale 0.01
    # Beside the training that follows: LARP's half ends first and leaves its core.
    python eval/eval_coordtok.py --tokenizer "$OUT/coordtok_second/checkpoints" --protocol larp_rfvd \
        --num_clips "$CLIPS" --perceptual "$PERCEPTUAL" "${TEST[@]}" --output_dir "$OUT/coordtok_evaluation" \
        >"$OUT/coordtok_evaluation.log" 2>&1 &
    EVALUATION=$!
    say "3 SiT on CoordTok's planes: clips of a class, and their FVD"
    python train_sit.py --config $CONFIGS/sit_quickstart.yaml --first_model_ckpt "$OUT/coordtok_second/checkpoints" \
        "${TRAIN[@]}"
    python sample.py --sit_model "$OUT/sit" --first_model_ckpt "$OUT/coordtok_second/checkpoints" \
        --num_sampling_steps 50 --cfg_scale 2 "${SAMPLE[@]}" --output_dir "$OUT/sit_samples"
    say "4 CoordTok's reconstruction of test clips: rFVD, PSNR, SSIM, $PERCEPTUAL"
    finished $EVALUATION "$OUT/coordtok_evaluation.log"
    cat "$OUT/coordtok_evaluation.log"
}

larp() {
    say "5 LARP tokenizer, with its prior and discriminator"
    python train_larp_tokenizer.py --config $CONFIGS/larp_tokenizer_quickstart.yaml --perceptual "$PERCEPTUAL" "${TRAIN[@]}"
    say "6 LARP's reconstruction of test clips: rFVD, PSNR, SSIM, $PERCEPTUAL, use of the codes"
    python eval/eval_larp_tokenizer.py --tokenizer "$OUT/larp_tokenizer" --det --num_clips "$CLIPS" \
        --perceptual "$PERCEPTUAL" "${TEST[@]}" --output_dir "$OUT/larp_evaluation"
    say "7 LARP generator: clips of a class, and their FVD"
    python train_ar.py --config $CONFIGS/larp_ar_quickstart.yaml --tokenizer "$OUT/larp_tokenizer" "${TRAIN[@]}"
    LARP=(python sample.py --tokenizer "$OUT/larp_tokenizer" --version ema_0.99 --dtype float32
        --tokenizer_dtype float32 "${SAMPLE[@]}")
    "${LARP[@]}" --ar_model "$OUT/larp_ar" --output_dir "$OUT/larp_ar_samples"
    say "8 LARP generator: 16 frames from 5 given ones, and their FVD"
    python train_ar.py --config $CONFIGS/larp_ar_fp_quickstart.yaml --tokenizer "$OUT/larp_tokenizer" "${TRAIN[@]}"
    "${LARP[@]}" --ar_model "$OUT/larp_ar_fp" --fp --num_cond_frames 5 --det --output_dir "$OUT/larp_ar_fp_samples"
}

say "1 Demo data: photographs moved by a camera, under UCF-101's names and split"
python data/demo.py --root $DEMO --size 96x72
(cd data && python split_ucf.py --data_root cache/demo --data_name UCF-101 2>/dev/null)
# All weights that the steps need are fetched now, so that none of them is missed after minutes of training.
PERCEPTUAL=$(python - <<'END'
import contextlib
import sys

from eval.i3d import I3D
from models.stlpips import perceptual_metric
from common.cli import one_line_errors

with one_line_errors(), contextlib.redirect_stdout(sys.stderr):
    I3D.from_weights()
    try:
        name = perceptual_metric("lpips").name
    except OSError:
        name = perceptual_metric("stlpips").name
        print("torchvision's VGG16 cannot be downloaded here: ST-LPIPS takes the place of LPIPS")
print(name)
END
)

# Both halves at once, each on half of the cores: models this small gain little from more threads. Each is a process
# group of its own, so that it can be stopped whole; its shell's empty trap makes it wait for what it runs.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
mkdir -p "$OUT"
echo "LARP's half (5 to 8) runs beside CoordTok's, and writes $OUT/larp.log"
trap 'stop TERM' EXIT
trap 'stop INT; exit 130' INT
trap 'stop TERM; exit 143' TERM
set -m
{ trap : INT TERM; larp; } >"$OUT/larp.log" 2>&1 &
LARP_HALF=$!
{ trap : INT TERM; coordtok_and_sit; } &
COORDTOK_HALF=$!
set +m
wait $COORDTOK_HALF || exit $?
say "Waiting for LARP's half"
finished $LARP_HALF "$OUT/larp.log"
trap - EXIT INT TERM
grep -E "^== |psnr_clip|fvd  |nll|psnr_given" "$OUT/larp.log"

say "9 All of it on one page"
python scripts/report.py "$OUT"

say "Done"
cat <<END
Open $OUT/index.html: the numbers, each with the protocol that made it, and the pictures.
Next: the same on your own videos (a folder of CLASS/VIDEO files), at the published sizes on GPUs:
  (cd data && python split_ucf.py --data_root DATA --data_name UCF-101)
  DATA_ROOT=DATA GPUS=8 bash scripts/train_coordtok.sh
END
