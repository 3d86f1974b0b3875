"""Train SiT (arXiv 2401.08740), a generator of long clips, on the planes of a frozen CoordTok
(arXiv 2411.14762).

torchrun --nproc_per_node=8 train_sit.py --data_root DATA --first_model_ckpt CKPT --model SiT-L/2

With --cache_latents 4, four windows of every video are encoded once, and video is not read again.
A run writes to SAVE_DIR/EXP_NAME and continues with --resume.
"""
from common.cli import Parser, Rare, one_line_errors
from models.configs import CoordTokConfig, plain
from training import flags


def parse_args():
    parser = Parser(__doc__)
    data = flags.add_data(parser)
    data.add_argument("--first_model_ckpt", required=True, metavar="CKPT",
                      help="Checkpoint of the CoordTok, of this project or the authors")
    flags.add_window_cache(data, "latents")
    flags.add_sit(parser.add_argument_group("SiT"), carried=False)
    train = flags.add_training(parser, batch_size=64, lr=1e-4, epochs=7500)
    train.add_argument("--ema_decay", type=float, default=0.9999,
                       help="Decay of the averaged weights, which samples are made with")
    train.add_argument("--stat_clips", type=int, default=2048,
                       help=Rare("Clips from which the mean and deviation of the latents are measured"))
    flags.add_sit_samples(flags.add_logging(parser, log_every=100, save_every=10000))
    flags.add_run(parser, save_dir="results", exp_name="coordtok_large", num_workers=6)
    flags.add_flags(parser, CoordTokConfig)
    args = parser.parse_args()
    flags.check_given(parser, args)
    return args


if __name__ == "__main__":
    parse_args()  # before the slow imports: --help and a mistake in a flag are answered at once

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from common import distributed
from common.distributed import on_device, prefetch
from data.clips import ClipKey, open_quarantine
from data.lists import check_num_classes, class_names
from models.interpolant import Interpolant, check_sde
from models.layers import compile_blocks, set_checkpointing
from models.pretrained import weights_sha256
from models.triplane import Planes
from sampling.sit import sample_labels, sample_planes
from training import checkpoint, latents, tune
from training.load import TrainedSiT, coordtok_clips, load_coordtok, sit_config
from training.log import NonFiniteGuard, count_parameters, start_log
from training.optim import EMA, Precision, adamw, update
from training.setup import make_clips, micro_rows, start_run, train_loader, train_sampler, training_files
from training.validation import SampleCheck, evenly_spaced


def main():
    args = parse_args()
    device, folder = start_run(args)
    world_size = distributed.world_size()

    # The frozen tokenizer, and the generator of its planes.
    tokenizer = load_coordtok(args.first_model_ckpt, args).eval().requires_grad_(False)
    if not args.cache_latents:  # with a cache it is moved to the device only to fill it and to render samples
        tokenizer.to(device)
    config, tokenizer_hash = tokenizer.config, weights_sha256(tokenizer)
    state = checkpoint.find(folder / "checkpoints", args.resume, "sit")
    interpolant = Interpolant(args.path_type, args.prediction, args.loss_weight, args.train_eps, args.sample_eps)
    options = {**sit_config(args, config), "condition_on_previous": args.condition_on_previous}
    sit, statistics = tune.start_sit(args, options, interpolant, tokenizer_hash, state, folder)
    tune.freeze(sit, args, state, folder)
    sit.to(device).train()
    set_checkpointing(sit, args.gradient_checkpointing)
    ema = EMA(sit, args.ema_decay)
    precision = Precision(args.precision, device)
    optimizer = adamw(sit.parameters(), lr=args.lr)
    parts = {"model": sit, "ema": ema.model, "optimizer": optimizer, "scaler": precision.scaler}
    start, rng, _, before = checkpoint.resume(parts, state)
    del state  # frees a copy of the model

    # Clips are encoded as they come, or once for the cache.
    files, source, listed = training_files(args, before)
    names = class_names(files)
    check_num_classes(args.num_classes, names, source)
    quarantine = open_quarantine(folder, args.decode_timeout)
    clips_of = partial(make_clips, args, files, *config.video_shape[:2], "coordtok", device, quarantine)

    @torch.inference_mode()
    def encode(batch: dict) -> Planes:
        with precision.autocast():
            planes = tokenizer.encode(*coordtok_clips(batch, config, device))
        return planes.map(torch.Tensor.float)

    windows_of = partial(clips_of, pairs=args.condition_on_previous)
    if args.condition_on_previous:
        encode = partial(latents.encode_pairs, encode, config.video_shape[0], device)
    # Filling the cache may take hours, so mistakes in the flags of training and sampling are found before.
    train_sampler(args, len(files), num_iters=0, start=0, order="epoch")
    check = None
    if args.num_val:
        sit.check_guidance(args.val_cfg_scale)
        check_sde(num_steps=args.val_sampling_steps)
        keys = [ClipKey(i, index) for i, index in enumerate(evenly_spaced(len(files), args.num_val))]
        real = clips_of(damaged="skip", short="repeat")
        check = SampleCheck(real, keys, args.val_batch_size, args.num_workers, device, fvd=not args.no_fvd)
        labels = sample_labels(range(args.num_val), args.num_classes, args.seed)
        captions = [names[label] if args.num_classes > 1 else f"sample {i}" for i, label in enumerate(labels)]
    usable_files, cache = list(range(len(files))), None
    if args.cache_latents:
        cache = latents.LatentCache(Path(args.cache_dir), windows_of(damaged="skip"), config, args.cache_latents,
                                    {"tokenizer": tokenizer_hash, "precision": precision.name})
        with on_device(tokenizer, device):
            cache.fill(encode, args.batch_size // world_size, args.num_workers)
        usable_files = cache.good_files()
    num_iters = args.num_iters or args.max_epoch * (len(usable_files) // args.batch_size)
    sampler = train_sampler(args, len(usable_files), num_iters, start, order="epoch")
    if cache:
        batches = prefetch(latents.batches_from_cache(cache, sampler, usable_files, device), device)
    else:
        batches = latents.batches_from_video(train_loader(args, windows_of(), sampler, device), encode, device)

    # Latents are standardised by statistics that are measured once. Checkpoints and trained models carry them.
    if statistics is None:
        chosen = [usable_files[i] for i in evenly_spaced(len(usable_files), args.stat_clips)]
        windows = cache or windows_of(damaged="skip")
        found = latents.of_videos(chosen, windows, encode, args.val_batch_size, args.num_workers)
        statistics = latents.measure(found, config.latent_n_features, device).state_dict()
    stats = latents.LatentStats.from_state_dict(statistics).to(device)

    if args.compile:
        compile_blocks(device, sit, ema.model)
    model = distributed.wrap(sit, device, args.accum_iter == 1)
    cached = f", {cache.views} cached windows each" if cache else ""
    log = start_log(args, folder, start, num_iters, f"{args.model}, {count_parameters(sit)}, "
                    f"{precision.name}; {len(usable_files):,} videos in {source}{cached}")
    guard = NonFiniteGuard(device)

    def save(step: int) -> None:
        guard.check()
        checkpoint.save_run(
            folder, step, args, parts, listed, kind="sit", config=plain(sit.config),
            interpolant=asdict(interpolant), tokenizer=tokenizer_hash, statistics=stats.state_dict(), classes=names,
        )

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

    scores = [(sample, args.sample_every)] if check else []
    checkpoint.start_rng(args.seed, rng)
    log.make_up(scores)
    for step in range(start + 1, num_iters + 1):
        # Every process draws for the whole batch and takes its rows, so draws do not depend on the number of processes.
        draws = latents.draw_step(args.seed, step, args.batch_size, sit.plane_shapes, device)
        means = 0
        for micro in range(args.accum_iter):
            planes, y, paths = log.next(batches, step, save)
            noise, time, drop, hidden = draws.of(micro_rows(args, micro), args)
            y = y if args.num_classes > 1 else torch.zeros_like(y)
            planes, before = latents.split_pairs(planes, stats, hidden)
            with distributed.sync_gradients(model, micro == args.accum_iter - 1), precision.autocast():
                losses, logs = interpolant.loss(model, stats.standardise(planes), interpolant.training_times(time),
                                                noise, y=y, drop=drop, **before)
                loss = losses.sum() * (world_size / args.batch_size)  # world_size undoes DDP's mean
            precision.scaler.scale(loss).backward()
            logs = {"loss": losses.detach().mean(), **logs}
            if before:
                logs["continued"] = 1 - before["first"].float().mean()  # share of clips with one before
            means = means + torch.stack([*logs.values()]) / (world_size * args.accum_iter)
            guard.watch(step, loss, paths)
        update(optimizer, precision.scaler, args.clip_grad)
        ema.update(sit)
        if step % args.log_every == 0 or step == num_iters:
            guard.check()
            log.train(step, device, **dict(zip(logs, distributed.all_sum(means).tolist())))
        log.end_step(step, save, args.save_every, scores)
    log.finish(quarantine)


if __name__ == "__main__":
    with one_line_errors():
        main()
