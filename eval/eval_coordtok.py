"""Reconstruction of CoordTok under a named protocol: rFVD, PSNR, SSIM, LPIPS, a record of how, and a contact sheet.

    python eval/eval_coordtok.py --tokenizer CKPT --data_root DATA --protocol coordtok_rfvd10k_128f

CKPT is a checkpoint of this project or the authors' file. Run it under torchrun to share the clips among GPUs; the
result does not depend on how many.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs as a script from any folder
import torch  # noqa: E402

from common import distributed  # noqa: E402
from common.cli import Parser, one_line_errors  # noqa: E402
from data.lists import list_folder  # noqa: E402
from eval.evaluate import add_evaluation, evaluate  # noqa: E402
from models.triplane import stored  # noqa: E402
from training.flags import add_coordtok, add_data  # noqa: E402
from training.load import load_coordtok, weights_sha256  # noqa: E402
from training.optim import Precision  # noqa: E402


def parse_args():
    parser = Parser(__doc__)
    parser.add_argument("--tokenizer", required=True, metavar="CKPT", help="checkpoint, or a folder of them")
    parser.add_argument("--slices", type=int, default=1, help="equal sequences the patches of a clip are decoded in")
    parser.add_argument("--precision", choices=["bf16", "fp16", "fp32"], default="fp32", help="of the tokenizer")
    parser.add_argument("--plane_bits", type=int, metavar="8|16|32", help="bits in which a value of the planes is "
                        "stored before it is decoded (default: as it is computed)")
    add_data(parser)
    add_evaluation(parser, protocol="coordtok_rfvd10k_128f")
    add_coordtok(parser)
    return parser.parse_args()


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
        model=f"{args.tokenizer} {weights_sha256(tokenizer)[:12]}",
        settings={"precision": precision.name, "slices": args.slices, "padding": tokenizer.config.padding,
                  "plane_bits": args.plane_bits or "as computed"},
        dataset=args.video_name, patch=tokenizer.config.patch,
    )


if __name__ == "__main__":
    with one_line_errors():
        main()
