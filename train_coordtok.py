"""Train CoordTok (arXiv 2411.14762): a video tokenizer that decodes any patch of a long clip from three planes.

Step 1, pixels:      torchrun --nnodes=1 --nproc_per_node=8 train_coordtok.py --data_root DATA --lpips_loss_scale 0.0
Step 2, perceptual:  ... --point_per_vid 4096 --is_second_step --first_step_ckpt logs/EXP/checkpoints/best.pt
One process or none of torchrun works too. Runs are written to SAVE_DIR/EXP_NAME and go on with --resume auto.
"""
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data.clips import ClipDataset, GlobalBatchSampler, list_folder, make_loader
from data.points import count_frames
from models.coordtok import CoordTok
from models.layers import compile_blocks, set_checkpointing
from models.losses import Perceptual, coordtok_loss
from models.planes import gather_patches
from models.released import build
from training import checkpoint, distributed
from training.arguments import Parser, add_clip_cache, add_coordtok, add_data, add_run, coordtok_config, one_line_errors
from training.clip_cache import clip_cache
from training.log import NonFiniteGuard, RunLog, StopSignal, check_writable, claim_run, due, open_quarantine, say
from training.optim import Precision, adamw, update
from training.tokenizers import coordtok_clips, load_coordtok
from training.validation import Validation, validation_source


def parse_args():
    parser = Parser(__doc__)
    add_data(parser)
    add_clip_cache(parser)
    add_coordtok(parser)
    train = parser.add_argument_group("training")
    train.add_argument("--num_views", type=int, default=256, help="videos a step, over all processes")
    train.add_argument("--point_per_vid", type=int, default=1024, help="patches of each video that are decoded")
    train.add_argument("--num_iters", type=int, default=1000000, help="steps")
    train.add_argument("--accum_iter", type=int, default=1, help="micro-batches a step; the update does not change")
    train.add_argument("--lr", type=float, default=1e-4, help="learning rate, constant")
    train.add_argument("--clip_grad", type=float, default=0.0, help="largest gradient norm; 0 is no clipping")
    train.add_argument("--is_second_step", action="store_true", help="step 2: whole frames and LPIPS")
    train.add_argument("--first_step_ckpt", help="step 2 starts from this checkpoint, ours or the authors'")
    train.add_argument("--lpips_loss_scale", type=float, default=1.0, help="weight of LPIPS; step 2 only")
    train.add_argument("--lpips_weights", default="auto", metavar="auto|random|PATH", help="LPIPS's VGG16 backbone")
    train.add_argument("--lpips_dropout", action="store_true",
                       help="LPIPS's own dropout of 0.5 in training, as released; else it is off")
    train.add_argument("--world_size", type=int, help="ignored: torchrun says it")
    logs = parser.add_argument_group("logging")
    logs.add_argument("--log_every", type=int, default=50, help="steps between lines of metrics.jsonl")
    logs.add_argument("--steps_til_summary", type=int, default=1000, help="steps between validations")
    logs.add_argument("--steps_til_save", type=int, default=50000, help="steps between checkpoints")
    logs.add_argument("--val_name", help="folder to validate on (default: VIDEO_NAME's _test, if there is one)")
    logs.add_argument("--num_val", type=int, default=32, help="validation clips; 0 is no validation")
    logs.add_argument("--val_batch_size", type=int, default=4, help="validation clips at once in each process")
    add_run(parser, save_dir="./logs", exp_name="coordtok_large_step1_1M", num_workers=8)
    return parser.parse_args()


def main():
    args = parse_args()
    device = distributed.setup(args.device)
    rank, world_size = distributed.rank(), distributed.world_size()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.allow_tf32

    # What to start from: the run's own checkpoint, step 1's weights, or fresh weights.
    folder = Path(args.save_dir) / (args.exp_name + "_second" * args.is_second_step)
    claim_run(folder)
    state = checkpoint.find(folder / "checkpoints", args.resume, "coordtok")
    if state:
        tokenizer = build(CoordTok, coordtok_config(args, state["config"], f"the run in {folder}"), state.path)
        checkpoint.restore({"model": tokenizer}, state)
    elif args.is_second_step:
        if args.first_step_ckpt is None:
            raise ValueError("--is_second_step needs --first_step_ckpt, the checkpoint that step 1 wrote")
        tokenizer = load_coordtok(args.first_step_ckpt, args)
    else:
        tokenizer = CoordTok(**coordtok_config(args))
    config = tokenizer.config
    tokenizer.to(device).train()
    set_checkpointing(tokenizer, args.gradient_checkpointing)
    use_lpips = args.is_second_step and args.lpips_loss_scale > 0
    perceptual = Perceptual(weights=args.lpips_weights, dropout=args.lpips_dropout).to(device) if use_lpips else None
    if args.is_second_step:
        count_frames(args.point_per_vid, config.grid)

    # Data: each sample is a pure function of (seed, its position in the run), however many processes and workers.
    size, patch_t, patch = config.video_shape[1], config.dec_patch_size_t, config.dec_patch_size_xy
    root = Path(args.data_root) / args.video_name
    files = list_folder(root)
    quarantine = open_quarantine(folder, args.decode_timeout)
    resize = args.resize if args.resize != "auto" else "device" if device.type == "cuda" else "worker"
    points = ("frames" if args.is_second_step else "patches", args.point_per_vid, config.grid, patch_t)
    start = state["step"] if state else 0
    sampler = GlobalBatchSampler(
        len(files), args.num_views, args.num_iters, rank, world_size, accum=args.accum_iter, seed=args.seed,
        start_step=start, order="replacement",
    )
    validation = None
    if args.num_val:
        validation = Validation(
            list_folder(validation_source(args)), args.num_val, config.video_shape[0], size, "coordtok", device,
            args.val_batch_size, args.num_workers, quarantine, args.lpips_weights, args.decode_timeout,
        )
    check_writable(folder)
    cache = clip_cache(  # after all that a flag may have wrong: it may take hours
        args.cache_dir, files, size, "coordtok", quarantine, args.num_workers, args.decode_timeout
    ) if args.cache_clips else None
    clips = ClipDataset(
        files, config.video_shape[0], size, rule="coordtok", resize=resize, seed=args.seed, points=points,
        quarantine=quarantine, timeout=args.decode_timeout, cache=cache,
    )
    on_gpu = device.type == "cuda"
    batches = iter(make_loader(clips, sampler, args.num_workers, args.prefetch_factor, pin_memory=on_gpu))

    # Optimiser: weight decay on everything, as published.
    precision = Precision(args.precision, device)
    optimizer = adamw(tokenizer.parameters(), lr=args.lr, weight_decay=1e-3)
    rng, best = None, float("-inf")
    if state:
        checkpoint.restore({"optimizer": optimizer, "scaler": precision.scaler}, state)
        rng, best = state["rng"], state["best"]
        state = None  # frees a copy of the model
    if args.compile:
        compile_blocks(tokenizer)
        if perceptual is not None:
            compile_blocks(perceptual)
    model = distributed.wrap(tokenizer, device, args.accum_iter == 1)

    def save(step: int) -> None:
        guard.check()
        checkpoint.save(folder / "checkpoints", step, {
            "kind": "coordtok", "config": asdict(config), "model": tokenizer.state_dict(),
            "optimizer": optimizer.state_dict(), "scaler": precision.scaler.state_dict(), "best": best,
            "data": {"position": step * args.num_views, "files": len(files)}, "args": vars(args),
        }, keep=args.keep_checkpoints)

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

    parameters = sum(p.numel() for p in tokenizer.parameters())
    say(f"CoordTok, {parameters:,} parameters, {precision.name}; {len(files):,} videos in {root}; "
        f"{world_size} processes x {args.num_views // world_size} videos; step {start} of {args.num_iters}")
    log = RunLog(folder, vars(args), start, args.num_iters, args.num_views, args.wandb)
    guard, stop = NonFiniteGuard(device), StopSignal()
    checkpoint.start_rng(args.seed, rng)
    if validation and due(start, args.steps_til_summary, args.num_iters):  # by a run that was stopped before
        validate(start)
    for step in range(start + 1, args.num_iters + 1):
        means = 0
        for micro in range(args.accum_iter):
            waiting = time.perf_counter()
            batch = stop.next(batches, step, save)
            log.waited(time.perf_counter() - waiting)
            video, n_frames = coordtok_clips(batch, config, device)
            index = batch["index"].to(device, non_blocking=True)
            target = gather_patches(video, index, patch_t, patch) * 2 - 1

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
        log.advance()

        if step % args.log_every == 0 or step == args.num_iters:
            guard.check()
            log.train(step, device, **dict(zip(["loss", *logs], distributed.all_sum(means).tolist())))
        stopping = stop.anywhere()
        to_validate = validation and due(step, args.steps_til_summary, args.num_iters)
        if stopping or to_validate or due(step, args.steps_til_save, args.num_iters):
            save(step)
        if stopping:
            log.close()
            stop.leave(step)
        if to_validate:
            validate(step)
    log.close()
    if len(quarantine):
        say(f"{len(quarantine)} damaged files, listed in {quarantine.path}")
    say(f"checkpoints: {folder / 'checkpoints'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
