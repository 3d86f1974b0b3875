"""Evaluate how well a CoordTok reconstructs clips, under a named protocol: rFVD, PSNR, SSIM, LPIPS,
motion metrics, a record of how they were made, and a contact sheet.

    python eval/eval_coordtok.py --tokenizer CKPT --data_root DATA --protocol coordtok_rfvd10k_128f

CKPT is a checkpoint of this project or the authors' file. Under torchrun the processes share the
clips; the results do not depend on their number.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from any folder
from common.cli import Parser, one_line_errors
from models.configs import CoordTokConfig
from training import flags


def parse_args():
    parser = Parser(__doc__)
    model = parser.add_argument_group("model")
    model.add_argument("--tokenizer", required=True, metavar="CKPT", help="Checkpoint, or a folder of checkpoints")
    model.add_argument("--slices", type=int, default=1,
                       help="Decode a clip's patches in so many sequences of equal length")
    model.add_argument("--precision", choices=["bf16", "fp16", "fp32"], default="fp32", help="Autocast of the model")
    model.add_argument("--plane_bits", type=int, choices=[8, 16, 32], help="Store each value of the planes in so many "
                       "bits before it is decoded (default: as it is computed)")
    flags.add_data(parser)
    flags.add_evaluation(parser, protocol="coordtok_rfvd10k_128f")
    flags.add_flags(parser, CoordTokConfig, everyday=False)
    return parser.parse_args()


if __name__ == "__main__":
    parse_args()  # before the slow imports: --help and a mistake in a flag are answered at once

import torch

from common import distributed
from data.lists import list_folder
from eval.evaluate import evaluate
from models.pretrained import weights_sha256
from models.triplane import stored
from training.load import load_coordtok
from training.optim import Precision


def main():
    args = parse_args()
    device = distributed.setup(args.device)
    tokenizer = load_coordtok(args.tokenizer, args).to(device).eval()
    precision = Precision(args.precision, device)

    def reconstruct(video: torch.Tensor, _: list[int]) -> tuple[torch.Tensor, int]:
        with precision.autocast():
            planes, bits = stored(tokenizer.encode(video), args.plane_bits)
            return tokenizer.render(planes, slices=args.slices).clamp(0, 1), bits

    evaluate(
        reconstruct, list_folder(Path(args.data_root) / args.video_name), args, device,
        num_frames=tokenizer.config.video_shape[0], size=tokenizer.config.video_shape[1],
        model=f"CoordTok: {args.tokenizer} {weights_sha256(tokenizer)[:12]}",
        settings={"precision": precision.name, "slices": args.slices, "padding": tokenizer.config.padding,
                  "plane_bits": args.plane_bits or "as computed"},
        dataset=args.video_name, patch=tokenizer.config.patch,
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
