"""What rendering a clip costs over the decoder alone: 128 frames of 128x128 as 32,768 patches.

    python -m scripts.benchmarks.render [--slices 8] [--rounds 5]

Compares, by turns in one run, the bare decoder on a ready index, CoordTok.render, and a plain reference that copies
patch after patch into the clip. A small model everywhere, and on a GPU the published one too, in bfloat16. The
fraction of the hardware's limit is the decoder's matrix products over those of a large matrix product in this run.
"""
import argparse
import statistics
import time
from collections.abc import Callable

import torch

from models.coordtok import CoordTok
from scripts.benchmarks import flops
from scripts.benchmarks.common import add_record, record

SMALL = {
    "enc_embed_dim": 64,
    "enc_num_heads": 4,
    "enc_num_layers": 1,
    "enc_patch_num_layers": 1,
    "dec_embed_dim": 64,
    "dec_num_layers": 2,
    "dec_num_heads": 4,
}
MODELS = {"cpu": {"small": SMALL}, "cuda": {"small": SMALL, "published": {}}}


def seconds(function: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(name: str, device: str, slices: int, rounds: int, path: str | None) -> None:
    torch.manual_seed(0)
    with torch.device(device):
        tok = CoordTok(**MODELS[device][name]).eval()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tok.to(dtype)
    config = tok.config
    patch_t, patch = config.dec_patch_size_t, config.dec_patch_size_xy
    queries = (tok.weight_tokens_xy, tok.weight_tokens_yt, tok.weight_tokens_xt)
    planes = [plane.detach() for plane in queries]  # shaped as a clip's planes, and as good for a timing
    index = torch.cartesian_prod(*(torch.arange(size, device=device) for size in config.grid))[None]
    places = index[0].tolist()

    def bare() -> list[torch.Tensor]:
        return [tok.decode(planes, part) for part in index.chunk(slices, dim=1)]

    def render() -> torch.Tensor:
        return tok.render(planes, slices=slices)

    def patch_by_patch() -> torch.Tensor:
        patches = torch.cat(bare(), dim=1)[0].float().unflatten(-1, (patch_t, patch, patch, 3)).permute(0, 4, 1, 2, 3)
        video = torch.zeros(1, 3, *config.video_shape, device=device)
        for pixels, (t, h, w) in zip(patches, places):
            t, h, w = t * patch_t, h * patch, w * patch
            video[0, :, t : t + patch_t, h : h + patch, w : w + patch] = (pixels + 1) / 2
        return video

    torch.testing.assert_close(render(), patch_by_patch())  # and warms up
    ways = {"bare decoder": bare, "render": render, "patch by patch": patch_by_patch}
    times = {way: [] for way in ways}
    for _ in range(rounds):
        for way, function in ways.items():
            times[way].append(seconds(function, device))

    size = 8192 if device == "cuda" else 2048
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    peak = 2 * size**3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(5))
    medians = {way: statistics.median(values) for way, values in times.items()}
    work = sum(flops.coordtok_decode(config, part.shape[1]) for part in index.chunk(slices, dim=1))
    achieved = work / medians["bare decoder"]
    print(f"{name} on {device}, {dtype}, {index.shape[1]} patches in {slices} slices, median of {rounds} rounds")
    for way, value in medians.items():
        ratios = [mine / bare for mine, bare in zip(times[way], times["bare decoder"])]
        print(f"  {way:15} {value:9.4f} s  {statistics.median(ratios):6.3f} x the bare decoder")
    print(f"  decoder {achieved / 1e12:.3f} TFLOP/s, {achieved / peak:.0%} of a matrix product's {peak / 1e12:.3f}")
    record(path, f"render {name}", "render", medians["patch by patch"] / medians["render"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    available = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--device", choices=MODELS, nargs="+", default=available)
    add_record(parser)
    args = parser.parse_args()
    for device in args.device:
        for name in MODELS[device]:
            measure(name, device, args.slices, args.rounds, args.record)
