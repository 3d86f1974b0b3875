"""Reconstruction of a LARP tokenizer under a named protocol: rFVD, MSE, PSNR, SSIM, LPIPS, use of the codebook, a
record of how, and a contact sheet.

    python3 eval/eval_larp_tokenizer.py --tokenizer hywang66/LARP-L-long-tokenizer --dataset_csv ucf101_train.csv \\
        --use_amp --det

Run it under torchrun to share the clips among GPUs; the result does not depend on how many.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a script from any folder
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from common import distributed  # noqa: E402
from common.cli import Parser, one_line_errors  # noqa: E402
from common.rng import sample_generators  # noqa: E402
from data.lists import list_csv, list_folder  # noqa: E402
from eval.evaluate import add_evaluation, evaluate  # noqa: E402
from training.flags import add_data  # noqa: E402
from training.load import load_larp_tokenizer, weights_sha256  # noqa: E402
from training.optim import Precision  # noqa: E402
from training.validation import CodeStats  # noqa: E402

AMP = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("--tokenizer", required=True, help="folder or hub id of config.json and model.safetensors, a "
                        "checkpoint or a folder of them, or a file of the authors' trainer")
    parser.add_argument("--version", default="sd", metavar="sd|ema_DECAY", help="which weights of a checkpoint")
    parser.add_argument("--det", action="store_true", help="the best codes; else they are drawn, as in training")
    parser.add_argument("--num_frames", type=int, help="frames of a clip (default: as many as were trained)")
    parser.add_argument("--repeat_to_16", action="store_true", help="show the tokenizer shorter clips with their last "
                        "frame repeated, as frame prediction does; compared are the NUM_FRAMES alone")
    parser.add_argument("--use_amp", action="store_true", help="autocast")
    parser.add_argument("--amp_dtype", choices=AMP, default="float16", help="of autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile encoder and decoder")
    add_data(parser)
    parser.add_argument("--dataset_csv", default="ucf101_train.csv",
                        help="lists of videos; --video_name names a folder instead")
    add_evaluation(parser, protocol="larp_rfvd", batch_size=32)
    parser.set_defaults(video_name=None)
    return parser.parse_args()


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
        model=f"{args.tokenizer} {args.version} {weights_sha256(tokenizer)[:12]}",
        settings={"precision": precision.name, "deterministic": args.det, "repeated_frames": missing},
        dataset=dataset, more=codes.summary, patch=config.patch,
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
