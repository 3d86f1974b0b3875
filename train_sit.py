"""Train SiT (arXiv 2401.08740) on the planes of a frozen CoordTok (arXiv 2411.14762): a generator of long clips.

torchrun --nnodes=1 --nproc_per_node=8 train_sit.py --data_root DATA --first_model_ckpt CKPT --model SiT-L/2
Add --cache_latents 4 to encode four windows of every video once and never touch video again.
Runs are written to RESULTS_DIR/EXP_NAME and go on with --resume auto.
"""
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data.clips import (
    ClipDataset,
    ClipKey,
    GlobalBatchSampler,
    class_names,
    list_folder,
    make_loader,
)
from models.interpolant import LOSS_WEIGHTS, PATHS, PREDICTIONS, Interpolant, check_sde
from models.layers import compile_blocks, set_checkpointing
from models.planes import Planes
from models.sit import SIT_SIZES, SiT
from training import checkpoint, distributed
from training.arguments import Parser, add_coordtok, add_data, add_run, one_line_errors, word_or_none
from training.generation import SampleCheck, TrainedSiT, differences, sample_labels, sample_planes
from training.latents import LatentCache, LatentStats, batches_from_cache, batches_from_video, measure, prefetch
from training.log import NonFiniteGuard, RunLog, StopSignal, check_writable, claim_run, due, open_quarantine, say
from training.optim import EMA, Precision, adamw, update
from training.tokenizers import coordtok_clips, load_coordtok, on_device, weights_sha256
from training.validation import spread


def parse_args():
    parser = Parser(__doc__)
    add_data(parser)
    add_coordtok(parser)
    model = parser.add_argument_group("SiT")
    model.add_argument("--first_model_ckpt", required=True, metavar="CKPT", help="CoordTok, ours or the authors'")
    model.add_argument("--model", choices=SIT_SIZES, default="SiT-L/2", help="size / patch")
    model.add_argument("--num_classes", type=int, default=1, help="classes of the data's folders; 1 is unconditional")
    model.add_argument("--class_dropout_prob", type=float, default=0.0, help="labels dropped, for guidance")
    model.add_argument("--path_type", choices=PATHS, default="Linear", help="interpolant")
    model.add_argument("--prediction", choices=PREDICTIONS, default="velocity", help="what the network predicts")
    model.add_argument("--loss_weight", type=word_or_none, choices=LOSS_WEIGHTS, help="of score and noise predictions")
    model.add_argument("--train_eps", type=float, help="margin of training times (default: by path and prediction)")
    model.add_argument("--sample_eps", type=float, help="margin of sampling times (default: likewise)")
    train = parser.add_argument_group("training")
    train.add_argument("--epochs", type=int, default=7500, help="passes over the videos")
    train.add_argument("--num_iters", type=int, help="steps, instead of --epochs")
    train.add_argument("--global_batch_size", type=int, default=64, help="clips a step, over all processes")
    train.add_argument("--accum_iter", type=int, default=1, help="micro-batches a step; the update does not change")
    train.add_argument("--lr", type=float, default=1e-4, help="learning rate, constant")
    train.add_argument("--clip_grad", type=float, default=0.0, help="largest gradient norm; 0 is no clipping")
    train.add_argument("--ema_decay", type=float, default=0.9999, help="of the weights that sampling uses")
    train.add_argument("--stat_clips", type=int, default=2048, help="clips that the latents' mean and std are of")
    train.add_argument("--cache_latents", type=int, default=0, metavar="K", help="train from K encoded windows a video")
    train.add_argument("--cache_dir", default="data/cache", help="folder of latent caches")
    logs = parser.add_argument_group("logging")
    logs.add_argument("--log_every", type=int, default=100, help="steps between lines of metrics.jsonl")
    logs.add_argument("--ckpt_every", type=int, default=10000, help="steps between checkpoints")
    logs.add_argument("--sample_every", type=int, default=10000, help="steps between sample sheets and FVD")
    logs.add_argument("--num_val", type=int, default=64, help="samples then; 0 is none")
    logs.add_argument("--val_sampling_steps", type=int, default=50, help="SDE time points then")
    logs.add_argument("--val_cfg_scale", type=float, default=1.0, help="guidance then")
    logs.add_argument("--val_batch_size", type=int, default=8, help="samples at once in each process")
    add_run(parser, save_dir="results", exp_name="coordtok_large", num_workers=6)
    return parser.parse_args()


def main():
    args = parse_args()
    device = distributed.setup(args.device)
    rank, world_size = distributed.rank(), distributed.world_size()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.allow_tf32

    # The frozen tokenizer, and the generator of its planes.
    tokenizer = load_coordtok(args.first_model_ckpt, args).eval().requires_grad_(False)
    if not args.cache_latents:  # else it comes to the device only to fill the cache, and to render samples
        tokenizer.to(device)
    config, tokenizer_hash = tokenizer.config, weights_sha256(tokenizer)
    folder = Path(args.save_dir) / args.exp_name
    claim_run(folder)
    state = checkpoint.find(folder / "checkpoints", args.resume, "sit")
    sit = SiT(
        **SIT_SIZES[args.model], input_size=(config.latent_resolution_t, config.latent_resolution_xy),
        in_channels=config.latent_n_features, num_classes=args.num_classes, class_dropout_prob=args.class_dropout_prob,
    ).to(device)
    set_checkpointing(sit, args.gradient_checkpointing)
    interpolant = Interpolant(args.path_type, args.prediction, args.loss_weight, args.train_eps, args.sample_eps)
    if state:
        there, here = {**state["config"], **state["interpolant"]}, {**asdict(sit.config), **asdict(interpolant)}
        if differ := differences(there, here):
            raise ValueError(f"the run in {folder} has other settings than the flags ({differ}): give the run's flags")
        if state["tokenizer"] != tokenizer_hash:
            raise ValueError(f"the run in {folder} was trained on another tokenizer than {args.first_model_ckpt}: give "
                             f"{state['args']['first_model_ckpt']}, which it names, or what became of it")
        checkpoint.restore({"model": sit}, state)
    ema = EMA(sit, args.ema_decay)
    precision = Precision(args.precision, device)
    optimizer = adamw(sit.parameters(), lr=args.lr)
    start, rng = 0, None
    if state:
        checkpoint.restore({"ema": ema.model, "optimizer": optimizer, "scaler": precision.scaler}, state)
        start, rng = state["step"], state["rng"]

    # Data: clips encoded as they come, or once and for all.
    root = Path(args.data_root) / args.video_name
    files = list_folder(root)
    names = class_names(files)
    if args.num_classes not in (1, len(names)):
        raise ValueError(f"--num_classes is {args.num_classes}, but {root} has {len(names)} classes: give that, or 1 "
                         "for a model without classes")
    quarantine = open_quarantine(folder, args.decode_timeout)
    on_gpu = device.type == "cuda"
    resize = args.resize if args.resize != "auto" else "device" if on_gpu else "worker"
    make_clips = partial(ClipDataset, files, config.video_shape[0], config.video_shape[1], "coordtok", seed=args.seed,
                         resize=resize, quarantine=quarantine, timeout=args.decode_timeout)

    @torch.inference_mode()
    def encode(batch: dict) -> Planes:
        with precision.autocast():
            planes = tokenizer.encode(*coordtok_clips(batch, config, device))
        return planes.map(torch.Tensor.float)

    # What training and samples need is looked for before the cache is filled, which may take hours.
    GlobalBatchSampler(len(files), args.global_batch_size, 0, rank, world_size, args.accum_iter, order="epoch")
    check_writable(folder)
    # Samples during training, from the averaged weights.
    check = None
    if args.num_val:
        sit.check_guidance(args.val_cfg_scale)
        check_sde(num_steps=args.val_sampling_steps)
        keys = [ClipKey(i, index) for i, index in enumerate(spread(len(files), args.num_val))]
        real = make_clips(damaged="skip", short="repeat")
        check = SampleCheck(real, keys, args.val_batch_size, args.num_workers, device)
        labels = sample_labels(range(args.num_val), args.num_classes, args.seed)
        captions = [names[label] if args.num_classes > 1 else f"sample {i}" for i, label in enumerate(labels)]
    numbered, cache = list(range(len(files))), None
    if args.cache_latents:
        key = {"tokenizer": tokenizer_hash, "precision": precision.name}
        cache = LatentCache(Path(args.cache_dir), make_clips(damaged="skip"), config, args.cache_latents, key)
        with on_device(tokenizer, device):
            cache.fill(encode, args.global_batch_size // world_size, args.num_workers)
        numbered = cache.good_files()
    num_iters = args.num_iters or args.epochs * (len(numbered) // args.global_batch_size)
    sampler = GlobalBatchSampler(
        len(numbered), args.global_batch_size, num_iters, rank, world_size, accum=args.accum_iter, seed=args.seed,
        start_step=start, order="epoch",
    )
    if cache:
        batches = prefetch(batches_from_cache(cache, sampler, numbered, device), device)
    else:
        loader = make_loader(make_clips(), sampler, args.num_workers, args.prefetch_factor, on_gpu)
        batches = batches_from_video(loader, encode, device)

    # Latents are standardised by the statistics of about 2,048 clips, which the checkpoint carries.
    if state:
        stats = LatentStats.from_state_dict(state["statistics"]).to(device)
    else:
        keys = [ClipKey(numbered[i], numbered[i]) for i in spread(len(numbered), args.stat_clips)][rank::world_size]
        few = [keys[i : i + args.val_batch_size] for i in range(0, len(keys), args.val_batch_size)]
        if cache:
            latents = (cache.read(np.array([key.index * cache.views for key in part])) for part in few)
        else:
            latents = map(encode, make_loader(make_clips(damaged="skip"), few, min(args.num_workers, len(few))))
        stats = measure(latents, config.latent_n_features, device)
    del state

    def save(step: int) -> None:
        guard.check()
        checkpoint.save(folder / "checkpoints", step, {
            "kind": "sit", "config": asdict(sit.config), "interpolant": asdict(interpolant),
            "tokenizer": tokenizer_hash, "statistics": stats.state_dict(), "classes": names,
            "model": sit.state_dict(), "ema": ema.model.state_dict(), "optimizer": optimizer.state_dict(),
            "scaler": precision.scaler.state_dict(), "args": vars(args),
            "data": {"position": step * args.global_batch_size, "files": len(numbered)},
        }, keep=args.keep_checkpoints)

    averaged = TrainedSiT(ema.model, interpolant, stats, names)

    def generate(indices: list[int]) -> torch.Tensor:
        with precision.autocast():
            y = torch.tensor([labels[i] for i in indices], device=device)
            planes = sample_planes(averaged, indices, args.seed, y, cfg_scale=args.val_cfg_scale,
                                   num_steps=args.val_sampling_steps)
            return tokenizer.render(planes)

    def sample(step: int) -> None:
        pictures = folder / "samples" / f"step_{step:07d}"
        with on_device(tokenizer, device):
            log.scores(step, "samples", partial(check.run, generate, captions, pictures))

    if args.compile:
        compile_blocks(sit)
        compile_blocks(ema.model)
    model = distributed.wrap(sit, device, args.accum_iter == 1)
    say(f"{args.model}, {sum(p.numel() for p in sit.parameters()):,} parameters, {precision.name}; {len(numbered):,} "
        f"videos in {root}{f', {cache.views} cached windows each' if cache else ''}; {world_size} processes x "
        f"{args.global_batch_size // world_size} clips; step {start} of {num_iters}")
    log = RunLog(folder, vars(args), start, num_iters, args.global_batch_size, args.wandb)
    guard, stop, generator = NonFiniteGuard(device), StopSignal(), torch.Generator(device)
    checkpoint.start_rng(args.seed, rng)
    if check and due(start, args.sample_every, num_iters):  # by a run that was stopped before
        sample(start)
    batch_size, micro_size = args.global_batch_size, args.global_batch_size // (world_size * args.accum_iter)
    for step in range(start + 1, num_iters + 1):
        # Every process draws for the whole batch and takes its rows: the draws do not depend on how it is shared.
        generator.manual_seed(args.seed * 1_000_003 + step)
        draw = partial(torch.randn, generator=generator, device=device)
        all_noise = Planes(*(draw(batch_size, *shape) for shape in sit.plane_shapes))
        all_uniform = torch.rand(2, batch_size, generator=generator, device=device)
        means = 0
        for micro in range(args.accum_iter):
            waiting = time.perf_counter()
            planes, y, paths = stop.next(batches, step, save)
            log.waited(time.perf_counter() - waiting)
            first = (rank * args.accum_iter + micro) * micro_size
            rows = slice(first, first + micro_size)
            noise, (uniform, luck) = Planes(*(plane[rows] for plane in all_noise)), all_uniform[:, rows]
            y = y if args.num_classes > 1 else torch.zeros_like(y)
            drop = luck < args.class_dropout_prob if args.class_dropout_prob else None
            with distributed.sync_gradients(model, micro == args.accum_iter - 1), precision.autocast():
                losses, logs = interpolant.loss(
                    model, stats.standardise(planes), interpolant.training_times(uniform), noise, y=y, drop=drop
                )
                loss = losses.sum() * (world_size / batch_size)  # DDP's mean over processes is undone
            precision.scaler.scale(loss).backward()
            means = means + torch.stack([losses.detach().mean(), *logs.values()]) / (world_size * args.accum_iter)
            guard.watch(step, loss, paths)
        update(optimizer, precision.scaler, args.clip_grad)
        ema.update(sit)
        log.advance()

        if step % args.log_every == 0 or step == num_iters:
            guard.check()
            log.train(step, device, **dict(zip(["loss", *logs], distributed.all_sum(means).tolist())))
        stopping = stop.anywhere()
        to_sample = check and due(step, args.sample_every, num_iters)
        if stopping or to_sample or due(step, args.ckpt_every, num_iters):
            save(step)
        if stopping:
            log.close()
            stop.leave(step)
        if to_sample:
            sample(step)
    log.close()
    say(f"checkpoints: {folder / 'checkpoints'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
