"""LARP's generator: a training step from cached codes against one that decodes and encodes its clips, alternating in
one run, and where the time of the latter goes.

    python -m scripts.benchmarks.ar_train [--frame_prediction] [--model llama-abs-S] [--rounds 5]

On a CPU the small tokenizer (clips of 16 frames of 64x64 as 128 codes) and by default the quickstart's generator, on a
GPU the published sizes. The videos are the demo's, 320x240 in XviD, with UCF-101's mean length of 186 frames.
"""
import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from data.clips import ClipDataset
from data.demo import DemoConfig, make_demo
from data.lists import list_folder
from data.loader import GlobalBatchSampler, make_loader
from models.larp_ar import SIZES, LARPGenerator, code_loss
from models.larp_tokenizer import LARPTokenizer
from scripts.benchmarks.common import SMALL_AR, SMALL_LARP, add_record, alternate, device_name, record, wait
from training.codes import CodeBatch, CodeCache, batches_from_cache, batches_from_video, draw_drops, encode_video
from training.optim import Precision, adamw, decay_groups, update


def train_step(
    generator: LARPGenerator, batches: Iterator[CodeBatch], precision: Precision, waiting: list[float]
) -> Callable[[], None]:
    """One step of train_ar.py on the next batch; `waiting` gets the seconds until the batch is there."""
    optimizer, config = adamw(decay_groups(generator, 0.05), 6e-4, betas=(0.9, 0.95)), generator.config

    def step() -> None:
        start = time.perf_counter()
        batch = next(batches)
        wait(batch.codes.device)
        waiting.append(time.perf_counter() - start)
        drop = draw_drops(0, batch.positions, config.class_dropout_prob).to(batch.codes.device)
        cond = generator.frame_condition(batch.cond) if config.frame_prediction else batch.cond
        with precision.autocast():
            loss, _ = code_loss(generator(batch.codes, cond, drop), batch.codes)
        loss.backward()
        update(optimizer, precision.scaler)

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=["quickstart", *SIZES], help="default: quickstart on a CPU, else LP")
    parser.add_argument("--published", action="store_true", help="the published tokenizer on a CPU too")
    parser.add_argument("--frame_prediction", action="store_true", help="5 frames given instead of a label")
    parser.add_argument("--batch", type=int, help="clips a step (default: 8 on a CPU, 16 on a GPU)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind, taken in turn")
    add_record(parser)
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    batch, given = args.batch or (16 if on_gpu else 8), 5 if args.frame_prediction else 0
    model = args.model or ("llama-abs-LP" if on_gpu else "quickstart")
    precision, workers = Precision("auto", device), 8 if on_gpu else 0
    torch.manual_seed(0)
    size = {} if on_gpu or args.published else SMALL_LARP
    tokenizer = LARPTokenizer(**size).to(device).eval().requires_grad_(False)
    config = tokenizer.config
    num_codes = config.bottleneck_token_num
    generator = LARPGenerator(
        **{"quickstart": SMALL_AR, **SIZES}[model], max_seq_len=num_codes, frame_prediction=bool(given),
        cls_token_num=num_codes + 1 if given else 1, vocab_size=config.bottleneck.args.regularizer.args.codebook_size,
    ).to(device).train()
    print(f"{device_name(device)}; torch {torch.__version__}; {model}, "
          f"{sum(p.numel() for p in generator.parameters()):,} parameters, {num_codes} "
          f"codes; batch {batch}, {precision.name}, {f'{given} frames given' if given else 'class-conditional'}")

    def encode(video: torch.Tensor) -> torch.Tensor:
        with precision.autocast():
            return encode_video(tokenizer, video, given)

    with tempfile.TemporaryDirectory() as folder:
        length = 186  # a window is decoded from its video's first frame on
        demo = DemoConfig(groups=(1, 8), clips=-(-batch // 16), min_frames=length, max_frames=length)
        files = list_folder(make_demo(Path(folder), demo))
        clips = ClipDataset(files, config.frame_num, config.input_size, "larp", short="repeat", damaged="skip",
                            resize="device" if on_gpu else "worker")
        cache = CodeCache(Path(folder) / "cache", clips, config, 1, given, False, {})
        start = time.perf_counter()
        cache.fill(encode, batch, workers, device)
        print(f"the cache took {(time.perf_counter() - start) / len(files):.3f} s a window, once")
        keys = GlobalBatchSampler(len(files), batch, args.rounds + 1, order="epoch")
        sources = {
            "video": batches_from_video(make_loader(clips, keys, workers, 4), encode, False, device),
            "cache": batches_from_cache(cache, keys, cache.good_files(), device),
        }
        waiting = {name: [] for name in sources}
        steps = {name: train_step(copy.deepcopy(generator), batches, precision, waiting[name])
                 for name, batches in sources.items()}
        seconds = alternate(steps, args.rounds, device)
    for name in sources:
        data = sorted(waiting[name][1:])[args.rounds // 2]
        print(f"  from {name:<8}{batch / seconds[name]:>10.2f} samples/s{1000 * seconds[name]:>10.1f} ms a step, "
              f"{1000 * data:.1f} of them for the batch")
    print(f"  cache against video: {seconds['video'] / seconds['cache']:.1f}x")
    kind = "larp_ar_fp training" if given else "larp_ar training"
    record(args.record, kind, "cached codes", seconds["video"] / seconds["cache"])


if __name__ == "__main__":
    main()
