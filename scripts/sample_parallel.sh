#!/usr/bin/env bash
# sample.py on all GPUs of this machine, one process each; without GPUs, one process. Arguments are those of sample.py:
#   bash scripts/sample_parallel.sh --ar_model hywang66/LARP-L-long-AR --tokenizer hywang66/LARP-L-long-tokenizer \
#       --output_dir samples/ucf_reproduce --num_samples 10000 --sample_batch_size 64 --cfg_scale 1.25
# GPUS=N takes fewer. Several machines that share a file system: scripts/slurm/sample.sbatch.
source "$(dirname "$0")/setup.sh"
GPUS=${GPUS:-$(gpu_count)}
torchrun --standalone --nproc_per_node="$((GPUS > 0 ? GPUS : 1))" sample.py "$@"
