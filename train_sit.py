"""Train SiT (arXiv 2401.08740) on the planes of a frozen CoordTok (arXiv 2411.14762): a generator of long clips.

torchrun --nnodes=1 --nproc_per_node=8 train_sit.py --data_root DATA --first_model_ckpt CKPT --model SiT-L/2
Add --cache_latents 4 to encode four windows of every video once and never touch video again.
Runs are written to RESULTS_DIR/EXP_NAME and go on with --resume auto.
"""
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common import distributed
from common.cli import Parser, config_diff, one_line_errors, word_or_none
from common.distributed import on_device, prefetch
from data.clips import ClipKey, open_quarantine
from data.lists import class_names
from data.loader import make_loader
from models.interpolant import LOSS_WEIGHTS, PATHS, PREDICTIONS, Interpolant, check_sde
from models.layers import compile_blocks, set_checkpointing
from models.sit import SIT_SIZES, SiT
from models.triplane import Planes
from sampling.sit import sample_labels, sample_planes
from training import checkpoint, flags
from training.latents import LatentCache, LatentStats, batches_from_cache, batches_from_video, measure
from training.load import TrainedSiT, check_tokenizer, coordtok_clips, load_coordtok, weights_sha256
from training.log import NonFiniteGuard, start_log
from training.optim import EMA, Precision, adamw, update
from training.setup import make_clips, start_run, train_loader, train_sampler, training_files
from training.validation import SampleCheck, evenly_spaced


def parse_args():
    parser = Parser(__doc__)
    flags.add_data(parser)
    flags.add_coordtok(parser)
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
    train = flags.add_training(parser, batch_size=64, lr=1e-4, epochs=7500)
    train.add_argument("--ema_decay", type=float, default=0.9999, help="of the weights that sampling uses")
    train.add_argument("--stat_clips", type=int, default=2048, help="clips that the latents' mean and std are of")
    flags.add_window_cache(train, "latents")
    logs = flags.add_logging(parser, log_every=100, save_every=10000)
    logs.add_argument("--sample_every", type=int, default=10000, help="steps between sample sheets and FVD")
    logs.add_argument("--num_val", type=int, default=64, help="samples then; 0 is none")
    logs.add_argument("--val_sampling_steps", type=int, default=50, help="SDE time points then")
    logs.add_argument("--val_cfg_scale", type=float, default=1.0, help="guidance then")
    logs.add_argument("--val_batch_size", type=int, default=8, help="samples at once in each process")
    flags.add_run(parser, save_dir="results", exp_name="coordtok_large", num_workers=6)
    return parser.parse_args()


def main():
    args = parse_args()
    device, folder = start_run(args)
    rank, world_size = distributed.rank(), distributed.world_size()

    # The frozen tokenizer, and the generator of its planes.
    tokenizer = load_coordtok(args.first_model_ckpt, args).eval().requires_grad_(False)
    if not args.cache_latents:  # else it comes to the device only to fill the cache, and to render samples
        tokenizer.to(device)
    config, tokenizer_hash = tokenizer.config, weights_sha256(tokenizer)
    state = checkpoint.find(folder / "checkpoints", args.resume, "sit")
    sit = SiT(
        **SIT_SIZES[args.model], input_size=(config.latent_resolution_t, config.latent_resolution_xy),
        in_channels=config.latent_n_features, num_classes=args.num_classes, class_dropout_prob=args.class_dropout_prob,
    ).to(device)
    set_checkpointing(sit, args.gradient_checkpointing)
    interpolant = Interpolant(args.path_type, args.prediction, args.loss_weight, args.train_eps, args.sample_eps)
    if state:
        there, here = {**state["config"], **state["interpolant"]}, {**asdict(sit.config), **asdict(interpolant)}
        if differ := config_diff(there, here):
            raise ValueError(f"the run in {folder} has other settings than the flags ({differ}): give the run's flags")
        check_tokenizer(state, tokenizer_hash, folder, args, "first_model_ckpt")
    ema = EMA(sit, args.ema_decay)
    precision = Precision(args.precision, device)
    optimizer = adamw(sit.parameters(), lr=args.lr)
    parts = {"model": sit, "ema": ema.model, "optimizer": optimizer, "scaler": precision.scaler}
    start, rng = 0, None
    if state:
        checkpoint.restore(parts, state)
        start, rng = state["step"], state["rng"]

    # Data: clips encoded as they come, or once and for all.
    files, source, listed = training_files(args, state["data"] if state else None)
    names = class_names(files)
    if args.num_classes not in (1, len(names)):
        raise ValueError(f"--num_classes is {args.num_classes}, but {source} has {len(names)} classes: give that, or 1 "
                         "for a model without classes")
    quarantine = open_quarantine(folder, args.decode_timeout)
    clips_of = partial(make_clips, args, files, *config.video_shape[:2], "coordtok", device, quarantine)

    @torch.inference_mode()
    def encode(batch: dict) -> Planes:
        with precision.autocast():
            planes = tokenizer.encode(*coordtok_clips(batch, config, device))
        return planes.map(torch.Tensor.float)

    # What training and samples need is looked for before the cache is filled, which may take hours.
    train_sampler(args, len(files), num_iters=0, start=0, order="epoch")
    # Samples during training, from the averaged weights.
    check = None
    if args.num_val:
        sit.check_guidance(args.val_cfg_scale)
        check_sde(num_steps=args.val_sampling_steps)
        keys = [ClipKey(i, index) for i, index in enumerate(evenly_spaced(len(files), args.num_val))]
        real = clips_of(damaged="skip", short="repeat")
        check = SampleCheck(real, keys, args.val_batch_size, args.num_workers, device)
        labels = sample_labels(range(args.num_val), args.num_classes, args.seed)
        captions = [names[label] if args.num_classes > 1 else f"sample {i}" for i, label in enumerate(labels)]
    usable_files, cache = list(range(len(files))), None
    if args.cache_latents:
        key = {"tokenizer": tokenizer_hash, "precision": precision.name}
        cache = LatentCache(Path(args.cache_dir), clips_of(damaged="skip"), config, args.cache_latents, key)
        with on_device(tokenizer, device):
            cache.fill(encode, args.batch_size // world_size, args.num_workers)
        usable_files = cache.good_files()
    num_iters = args.num_iters or args.max_epoch * (len(usable_files) // args.batch_size)
    sampler = train_sampler(args, len(usable_files), num_iters, start, order="epoch")
    if cache:
        batches = prefetch(batches_from_cache(cache, sampler, usable_files, device), device)
    else:
        batches = batches_from_video(train_loader(args, clips_of(), sampler, device), encode, device)

    # Latents are standardised by the statistics of about 2,048 clips, which the checkpoint carries.
    if state:
        stats = LatentStats.from_state_dict(state["statistics"]).to(device)
    else:
        chosen = [usable_files[i] for i in evenly_spaced(len(usable_files), args.stat_clips)]
        keys = [ClipKey(index, index) for index in chosen][rank::world_size]
        few = [keys[i : i + args.val_batch_size] for i in range(0, len(keys), args.val_batch_size)]
        if cache:
            latents = (cache.read(np.array([key.index * cache.views for key in part])) for part in few)
        else:
            loader = make_loader(clips_of(damaged="skip"), few, min(args.num_workers, len(few)))
            latents = (encode(batch) for batch in loader if len(batch["position"]))  # none where all are damaged
        stats = measure(latents, config.latent_n_features, device)
    del state

    if args.compile:
        compile_blocks(sit, ema.model)
    model = distributed.wrap(sit, device, args.accum_iter == 1)
    cached = f", {cache.views} cached windows each" if cache else ""
    log = start_log(args, folder, start, num_iters, f"{args.model}, {sum(p.numel() for p in sit.parameters()):,} "
                    f"parameters, {precision.name}; {len(usable_files):,} videos in {source}{cached}")
    guard, generator = NonFiniteGuard(device), torch.Generator(device)

    def save(step: int) -> None:
        guard.check()
        checkpoint.save_run(
            folder, step, args, parts, listed, kind="sit", config=asdict(sit.config),
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
    batch_size, micro_size = args.batch_size, args.batch_size // (world_size * args.accum_iter)
    for step in range(start + 1, num_iters + 1):
        # Every process draws for the whole batch and takes its rows: the draws do not depend on how it is shared.
        generator.manual_seed(args.seed * 1_000_003 + step)
        draw = partial(torch.randn, generator=generator, device=device)
        all_noise = Planes(*(draw(batch_size, *shape) for shape in sit.plane_shapes))
        all_uniform = torch.rand(2, batch_size, generator=generator, device=device)
        means = 0
        for micro in range(args.accum_iter):
            planes, y, paths = log.next(batches, step, save)
            first = (rank * args.accum_iter + micro) * micro_size
            rows = slice(first, first + micro_size)
            noise, (uniform, label_drop_uniform) = Planes(*(plane[rows] for plane in all_noise)), all_uniform[:, rows]
            y = y if args.num_classes > 1 else torch.zeros_like(y)
            drop = label_drop_uniform < args.class_dropout_prob if args.class_dropout_prob else None
            with distributed.sync_gradients(model, micro == args.accum_iter - 1), precision.autocast():
                losses, logs = interpolant.loss(
                    model, stats.standardise(planes), interpolant.training_times(uniform), noise, y=y, drop=drop
                )
                loss = losses.sum() * (world_size / batch_size)  # DDP's mean over processes is undone
            precision.scaler.scale(loss).backward()
            logs = {"loss": losses.detach().mean(), **logs}
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
