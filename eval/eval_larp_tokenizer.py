"""Evaluate how well a LARP tokenizer reconstructs clips, under a named protocol: rFVD, MSE, PSNR,
SSIM, LPIPS, motion metrics, the use of the codebook, a record of how they were made, and a contact
sheet.

    python3 eval/eval_larp_tokenizer.py --tokenizer hywang66/LARP-L-long-tokenizer \\
        --dataset_csv ucf101_train.csv --use_amp --det

Under torchrun the processes share the clips; the results do not depend on their number.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any folder
from common.cli import Parser, Rare, one_line_errors
from training import flags

AMP = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def parse_args():
    parser = Parser(__doc__)
    model = parser.add_argument_group("model")
    model.add_argument("--tokenizer", required=True, metavar="PATH", help="Folder or hub id of config.json and "
                       "model.safetensors, a checkpoint or a folder of them, or a file of the authors' trainer")
    model.add_argument("--version", default="sd", metavar="sd|ema_DECAY", help="Which weights of a checkpoint to use")
    model.add_argument("--det", action="store_true",
                       help="Take the best codes. Otherwise they are drawn, as in training")
    model.add_argument("--num_frames", type=int, help="Frames of a clip (default: as many as in training)")
    model.add_argument("--repeat_to_16", action="store_true", help=Rare(
        "Complete shorter clips by their last frame, as frame prediction does. Only the first NUM_FRAMES frames are "
        "compared"))
    model.add_argument("--use_amp", action="store_true", help="Compute in autocast")
    model.add_argument("--amp_dtype", choices=AMP, default="float16", help="Type of the autocast")
    model.add_argument("--compile", action="store_true", help=Rare("Compile encoder and decoder by torch.compile"))
    data = flags.add_data(parser)
    data.add_argument("--dataset_csv", default="ucf101_train.csv", metavar="LIST",
                      help="Lists of videos, in place of --video_name")
    flags.add_evaluation(parser, protocol="larp_rfvd", batch_size=32)
    parser.set_defaults(video_name=None)
    args = parser.parse_args()
    flags.check_given(parser, args)
    return args


if __name__ == "__main__":
    parse_args()  # before the slow imports: --help and a mistake in a flag are answered at once

import torch
from torch import Tensor

from common import distributed
from common.rng import sample_generators
from data.lists import list_csv, list_folder
from eval.evaluate import evaluate
from models.pretrained import weights_sha256
from training.load import load_larp_tokenizer
from training.optim import Precision
from training.validation import CodeStats


@torch.inference_mode()
def main():
    args = parse_args()
    device = distributed.setup(args.device)
    tokenizer = load_larp_tokenizer(args.tokenizer, args.version).to(device)
    config = tokenizer.config
    num_frames = args.num_frames or config.frame_num
    missing = config.frame_num - num_frames if args.repeat_to_16 else 0
    tokenizer.check_frames(num_frames + missing, config.temporal_patch_size)
    if args.compile:
        tokenizer.encoder.compile()
        tokenizer.decoder.compile()
    precision = Precision(AMP[args.amp_dtype] if args.use_amp else "fp32", device)
    codes = CodeStats(config.bottleneck.args.regularizer.args.codebook_size, device)

    def reconstruct(video: Tensor, positions: list[int]) -> tuple[Tensor, float]:
        video = torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        generators = None if args.det else sample_generators(args.seed, positions, device)
        with precision.autocast():
            found = tokenizer.encode(video, deterministic=args.det, generator=generators)
            output = tokenizer.decode(found, video.shape[2])
        codes.add(found)
        return output[:, :, :num_frames].clamp(0, 1), config.bits

    if args.video_name:
        dataset, files = args.video_name, list_folder(Path(args.data_root) / args.video_name)
    else:
        dataset, files = args.dataset_csv, list_csv(args.dataset_csv)
    evaluate(
        reconstruct, files, args, device, num_frames, config.input_size,
        model=f"LARP tokenizer: {args.tokenizer} {args.version} {weights_sha256(tokenizer)[:12]}",
        settings={"precision": precision.name, "deterministic": args.det, "repeated_frames": missing},
        dataset=dataset, more=codes.summary, patch=config.patch,
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
