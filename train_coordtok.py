"""Train CoordTok (arXiv 2411.14762), a video tokenizer that encodes a long clip as three planes
and decodes any of its patches from them.

Step 1, pixel loss:       torchrun --nproc_per_node=8 train_coordtok.py --data_root DATA \\
                              --lpips_loss_scale 0.0
Step 2, perceptual loss:  ... --point_per_vid 4096 --is_second_step \\
                              --first_step_ckpt logs/EXP_NAME/checkpoints/best.pt

A run writes to SAVE_DIR/EXP_NAME (step 2: EXP_NAME_second) and continues with --resume.
"""
from common.cli import Parser, one_line_errors
from models.configs import CoordTokConfig
from training import flags


def parse_args():
    parser = Parser(__doc__)
    flags.add_clip_cache(flags.add_data(parser))
    train = flags.add_training(parser, batch_size=256, lr=1e-4, num_iters=1000000)
    flags.add_coordtok_steps(train)
    logs = flags.add_logging(parser, log_every=50, save_every=50000)
    flags.add_validation(logs, eval_every=1000, num_val=32, batch_size=4)
    flags.add_run(parser, save_dir="./logs", exp_name="coordtok_large_step1_1M", num_workers=8)
    flags.add_flags(parser, CoordTokConfig)
    args = parser.parse_args()
    flags.check_coordtok_steps(parser, args)
    flags.check_given(parser, args)
    return args


if __name__ == "__main__":
    parse_args()  # before the slow imports: --help and a mistake in a flag are answered at once

from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from common import distributed
from data.clips import open_quarantine
from models.coordtok import CoordTok, coordtok_loss
from models.layers import compile_blocks, set_checkpointing
from models.patches import gather_patches
from training import checkpoint, coordtok_steps, tune
from training.load import coordtok_clips
from training.log import NonFiniteGuard, count_parameters, start_log
from training.optim import Precision, adamw, cosine_with_warmup, set_rates, update
from training.setup import cached_clips, start_run, train_loader, train_sampler, training_files
from training.validation import make_validation


def main():
    args = parse_args()
    if args.check:
        coordtok_steps.check(args)
        return
    device, folder = start_run(args, suffix="_second" * args.is_second_step)
    world_size = distributed.world_size()

    # Start from the run's own checkpoint, from the weights of step 1 or --init_from, or from fresh weights.
    state = checkpoint.find(folder / "checkpoints", args.resume, "coordtok")
    source = None if state else coordtok_steps.starting_weights(args)
    tokenizer = tune.start_tokenizer(CoordTok, CoordTokConfig, args, state, folder, source)
    tune.freeze(tokenizer, args, state, folder)
    config = tokenizer.config
    tokenizer.to(device).train()
    set_checkpointing(tokenizer, args.gradient_checkpointing)
    perceptual = coordtok_steps.perceptual_loss(args, config)
    if perceptual:
        perceptual.to(device)

    # As published, weight decay applies to every parameter.
    precision = Precision(args.precision, device)
    optimizer = adamw(tokenizer.parameters(), lr=args.lr, weight_decay=1e-3)
    parts = {"model": tokenizer, "optimizer": optimizer, "scaler": precision.scaler}
    start, rng, best, before = checkpoint.resume(parts, state, best=float("-inf"))
    del state  # frees a copy of the model

    # Each sample is a function of the seed and its position in the run, whatever the number of processes and workers.
    files, source, listed = training_files(args, before)
    quarantine = open_quarantine(folder, args.decode_timeout)
    sampler = train_sampler(args, len(files), args.num_iters, start, order="replacement")
    of_clips = (*config.video_shape[:2], "coordtok", device, quarantine)
    validation = make_validation(args, *of_clips)
    points = ("frames" if args.is_second_step else "patches", args.point_per_vid, config.grid, config.dec_patch_size_t)
    clips = cached_clips(args, files, *of_clips, points=points)
    batches = iter(train_loader(args, clips, sampler, device))

    if args.compile:
        compile_blocks(device, tokenizer, *([perceptual] if perceptual else []))
    model = distributed.wrap(tokenizer, device, args.accum_iter == 1)
    log = start_log(args, folder, start, args.num_iters, f"CoordTok, {count_parameters(tokenizer)}, {precision.name}; "
                    f"{len(files):,} videos in {source}")
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
        # A pure function of the step; without the two flags it is 1.
        set_rates(optimizer, [args.lr], cosine_with_warmup(step, args.warmup_iters, args.num_iters, args.min_lr_mult))
        means = 0
        for micro in range(args.accum_iter):
            batch = log.next(batches, step, save)
            video, n_frames = coordtok_clips(batch, config, device)
            index = batch["index"].to(device, non_blocking=True)
            target = gather_patches(video, index, config.dec_patch_size_t, config.dec_patch_size_xy) * 2 - 1

            with distributed.sync_gradients(model, micro == args.accum_iter - 1), precision.autocast():
                patches = model(video, index, n_frames)
                losses, logs = coordtok_loss(patches, target, index, config, perceptual, args.lpips_loss_scale)
                # The loss is a sum over the global batch: micro-batches add up, and world_size undoes DDP's mean.
                loss = losses.sum() * world_size
            precision.scaler.scale(loss).backward()
            # All micro-batches have the same number of videos, so the mean of their means is the mean of the batch.
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
