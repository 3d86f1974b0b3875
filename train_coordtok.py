"""Train CoordTok (arXiv 2411.14762): a video tokenizer that decodes any patch of a long clip from three planes.

Step 1, pixels:      torchrun --nnodes=1 --nproc_per_node=8 train_coordtok.py --data_root DATA --lpips_loss_scale 0.0
Step 2, perceptual:  ... --point_per_vid 4096 --is_second_step --first_step_ckpt logs/EXP/checkpoints/best.pt
One process or none of torchrun works too. Runs are written to SAVE_DIR/EXP_NAME and go on with --resume auto.
"""
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common import distributed
from common.cli import Parser, add_perceptual, one_line_errors
from data.clips import open_quarantine
from data.patch_sampling import count_frames
from models.coordtok import CoordTok, CoordTokConfig, coordtok_loss
from models.layers import compile_blocks, set_checkpointing
from models.lpips import FrameDistance
from models.patches import gather_patches
from models.pretrained import build
from models.stlpips import perceptual_metric
from training import checkpoint, flags
from training.load import coordtok_clips, load_coordtok
from training.log import NonFiniteGuard, start_log
from training.optim import Precision, adamw, update
from training.setup import cached_clips, start_run, train_loader, train_sampler, training_files
from training.validation import make_validation


def parse_args():
    parser = Parser(__doc__)
    flags.add_data(parser)
    flags.add_clip_cache(parser)
    flags.add_coordtok(parser)
    train = flags.add_training(parser, batch_size=256, lr=1e-4, num_iters=1000000)
    train.add_argument("--point_per_vid", type=int, default=1024, help="patches of each video that are decoded")
    train.add_argument("--is_second_step", action="store_true", help="step 2: whole frames and a perceptual loss")
    train.add_argument("--first_step_ckpt", help="step 2 starts from this checkpoint, ours or the authors'")
    train.add_argument("--lpips_loss_scale", type=float, default=1.0, help="weight of the perceptual loss; step 2 only")
    add_perceptual(train)
    train.add_argument("--lpips_dropout", action="store_true",
                       help="LPIPS's own dropout of 0.5 in training, as released; else it is off")
    train.add_argument("--check", action="store_true",
                       help="only look whether what these flags need of step 2 is there, without step 1's checkpoint")
    train.add_argument("--world_size", type=int, help="ignored: torchrun says it")
    logs = flags.add_logging(parser, log_every=50, save_every=50000)
    flags.add_validation(logs, eval_every=1000, num_val=32, batch_size=4)
    flags.add_run(parser, save_dir="./logs", exp_name="coordtok_large_step1_1M", num_workers=8)
    args = parser.parse_args()
    if not args.is_second_step:
        given = [f"--{name}" for name in ("first_step_ckpt", "lpips_dropout", "check") if getattr(args, name)]
        if given:
            parser.error(f"{', '.join(given)} is of step 2: add --is_second_step, or leave it out")
    return args


def second_step(args, config: CoordTokConfig) -> FrameDistance | None:
    """The loss of step 2 beside that of pixels; None with --lpips_loss_scale 0. Raises ValueError or OSError where the
    flags do not fit the tokenizer of `config`, or weights are lacking."""
    count_frames(args.point_per_vid, config.grid)
    if args.lpips_loss_scale == 0:
        return None
    return perceptual_metric(args.perceptual, weights=args.lpips_weights, dropout=args.lpips_dropout)


def main():
    args = parse_args()
    if args.check:
        first = Path(args.first_step_ckpt or "")
        there = first.is_file() or checkpoint.list_checkpoints(first)
        second_step(args, load_coordtok(first, args).config if there else CoordTokConfig(**flags.coordtok_config(args)))
        return
    device, folder = start_run(args, suffix="_second" * args.is_second_step)
    world_size = distributed.world_size()

    # What to start from: the run's own checkpoint, step 1's weights, or fresh weights.
    state = checkpoint.find(folder / "checkpoints", args.resume, "coordtok")
    if state:
        tokenizer = build(CoordTok, flags.coordtok_config(args, state["config"], f"the run in {folder}"), state.path)
    elif args.is_second_step:
        if args.first_step_ckpt is None:
            raise ValueError("--is_second_step needs --first_step_ckpt, the checkpoint that step 1 wrote")
        tokenizer = load_coordtok(args.first_step_ckpt, args)
    else:
        tokenizer = CoordTok(**flags.coordtok_config(args))
    config = tokenizer.config
    tokenizer.to(device).train()
    set_checkpointing(tokenizer, args.gradient_checkpointing)
    perceptual = second_step(args, config) if args.is_second_step else None
    if perceptual:
        perceptual.to(device)

    # Weight decay on everything, as published.
    precision = Precision(args.precision, device)
    optimizer = adamw(tokenizer.parameters(), lr=args.lr, weight_decay=1e-3)
    parts = {"model": tokenizer, "optimizer": optimizer, "scaler": precision.scaler}
    start, rng, best, before = 0, None, float("-inf"), None
    if state:
        checkpoint.restore(parts, state)
        start, rng, best, before = state["step"], state["rng"], state["best"], state["data"]
        del state  # frees a copy of the model

    # Data: each sample is a pure function of (seed, its position in the run), however many processes and workers.
    files, source, listed = training_files(args, before)
    quarantine = open_quarantine(folder, args.decode_timeout)
    sampler = train_sampler(args, len(files), args.num_iters, start, order="replacement")
    of_clips = (*config.video_shape[:2], "coordtok", device, quarantine)
    validation = make_validation(args, *of_clips)
    points = ("frames" if args.is_second_step else "patches", args.point_per_vid, config.grid, config.dec_patch_size_t)
    clips = cached_clips(args, files, *of_clips, points=points)
    batches = iter(train_loader(args, clips, sampler, device))

    if args.compile:
        compile_blocks(tokenizer, *([perceptual] if perceptual else []))
    model = distributed.wrap(tokenizer, device, args.accum_iter == 1)
    parameters = sum(p.numel() for p in tokenizer.parameters())
    log = start_log(args, folder, start, args.num_iters, f"CoordTok, {parameters:,} parameters, "
                    f"{precision.name}; {len(files):,} videos in {source}")
    guard = NonFiniteGuard(device)

    def save(step: int) -> None:
        guard.check()
        checkpoint.save_run(folder, step, args, parts, listed, kind="coordtok", config=asdict(config), best=best)

    def reconstruct(video: Tensor, _: list[int]) -> Tensor:
        tokenizer.eval()
        with precision.autocast():
            output = tokenizer.render(tokenizer.encode(video))
        tokenizer.train()
        return output

    def validate(step: int) -> None:
        nonlocal best
        pictures = folder / "samples" / f"step_{step:07d}"
        scores = log.scores(step, "val", partial(validation.run, reconstruct, pictures))
        if scores["psnr_frame"] > best:
            best = scores["psnr_frame"]
            checkpoint.mark_best(folder / "checkpoints", step)

    scores = [(validate, args.eval_every)] if validation else []
    checkpoint.start_rng(args.seed, rng)
    log.make_up(scores)
    for step in range(start + 1, args.num_iters + 1):
        means = 0
        for micro in range(args.accum_iter):
            batch = log.next(batches, step, save)
            video, n_frames = coordtok_clips(batch, config, device)
            index = batch["index"].to(device, non_blocking=True)
            target = gather_patches(video, index, config.dec_patch_size_t, config.dec_patch_size_xy) * 2 - 1

            with distributed.sync_gradients(model, micro == args.accum_iter - 1), precision.autocast():
                patches = model(video, index, n_frames)
                losses, logs = coordtok_loss(patches, target, index, config, perceptual, args.lpips_loss_scale)
                # The sum over the global batch: micro-batches add up, and DDP's mean over processes is undone.
                loss = losses.sum() * world_size
            precision.scaler.scale(loss).backward()
            # Every micro-batch has the same number of videos, so that the mean of means is the mean over the batch.
            means = means + torch.stack([losses.detach().mean(), *logs.values()]) / (world_size * args.accum_iter)
            guard.watch(step, loss, batch["path"])
        update(optimizer, precision.scaler, args.clip_grad)
        if step % args.log_every == 0 or step == args.num_iters:
            guard.check()
            log.train(step, device, **dict(zip(["loss", *logs], distributed.all_sum(means).tolist())))
        log.end_step(step, save, args.save_every, scores)
    log.finish(quarantine)


if __name__ == "__main__":
    with one_line_errors():
        main()
