"""Train LARP's generator (arXiv 2410.21264) on the codes of a frozen LARP tokenizer. It generates
clips of a class, or continues a few given frames.

Classes:   torchrun --nproc_per_node=8 train_ar.py --config scripts/configs/larp_ar.yaml
Frames:    torchrun --nproc_per_node=8 train_ar.py --config scripts/configs/larp_ar_fp.yaml
One GPU:   python train_ar.py --config scripts/configs/larp_ar.yaml --batch_size 4
Your own:  ... --tokenizer CKPT --data_root DATA --video_name UCF-101_train

With --cache_codes 8, eight windows of every video are encoded once, and video is not read again.
With --fsdp, weights and optimizer states are shared out among the GPUs, for the largest models.
A run writes to SAVE_DIR/EXP_NAME and continues with --resume.
"""
from common.cli import Parser, Rare, one_line_errors
from training import flags


def parse_args():
    parser = Parser(__doc__)
    data = flags.add_data(parser)
    flags.add_lists(data, csv_file="ucf101_train.csv")
    data.add_argument("--tokenizer", default="hywang66/LARP-L-long-tokenizer", metavar="PATH", help="LARP tokenizer: "
                      "a folder, hub id, checkpoint of this project, or file of the authors' trainer")
    data.add_argument("--tokenizer_version", default="sd", metavar="sd|ema_DECAY",
                      help=Rare("Which weights of the tokenizer's checkpoint to use"))
    flags.add_window_cache(data, "codes")
    flags.add_larp_ar(parser)
    train = flags.add_training(parser, batch_size=64, lr=6e-4, epochs=3000, warmup_epoch=4.0)
    train.add_argument("--weight_decay", type=float, default=0.05, help="Weight decay of the linear layers")
    train.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95), help=Rare("Betas of AdamW"))
    train.add_argument("--fsdp", action="store_true", help="Share out weights and optimizer states among processes")
    logs = flags.add_logging(parser, log_every=50, save_every=30.0)
    flags.add_validation(logs, eval_every=30.0, num_val=None, batch_size=8)
    flags.add_larp_samples(logs)
    flags.add_run(parser, save_dir="./logs", exp_name="larp_ar", num_workers=16)
    parser.set_defaults(video_name=None, seed=66667)
    args = parser.parse_args()
    flags.check_given(parser, args)
    return args


if __name__ == "__main__":
    parse_args()  # before the slow imports: --help and a mistake in a flag are answered at once

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common import distributed
from common.distributed import on_device, prefetch, to_device
from data.clips import open_quarantine
from data.lists import check_labels, class_names
from models.larp_ar import LARPGenerator, code_loss
from models.layers import compile_blocks, set_checkpointing
from models.pretrained import weights_sha256
from training import checkpoint, fsdp, tune
from training.codes import CodeCache, batches_from_cache, batches_from_video, draw_drops, encode_video
from training.load import load_larp_tokenizer
from training.log import NonFiniteGuard, count_parameters, start_log
from training.optim import EMA, Precision, adamw, cosine_with_warmup, decay_groups, set_rates, update
from training.setup import make_clips, start_run, train_loader, train_sampler, training_files
from training.validation import held_out_files, make_held_out


def main():
    args = parse_args()
    device, folder = start_run(args, group=args.fsdp)

    # The frozen tokenizer, and the generator of its codes.
    tokenizer = load_larp_tokenizer(args.tokenizer, args.tokenizer_version).requires_grad_(False)
    if not args.cache_codes:  # with a cache it is moved to the device only to fill it and to decode samples
        tokenizer.to(device)
    tokenizer_hash, clip_config = weights_sha256(tokenizer), tokenizer.config
    state = checkpoint.find(folder / "checkpoints", args.resume, "larp_ar")
    generator, num_cond_frames = tune.start_larp_ar(args, clip_config, tokenizer_hash, state, folder)
    tune.freeze(generator.train(), args, state, folder)
    set_checkpointing(generator, args.gradient_checkpointing)
    config, class_cond = generator.config, not generator.config.frame_prediction
    emas = {str(decay): EMA(generator, decay) for decay in args.ema_decays}
    precision = Precision(args.precision, device)
    place = partial(fsdp.shard, precision=precision.name) if args.fsdp else LARPGenerator.to
    for net in (generator, *(ema.model for ema in emas.values())):
        place(net, device)
    optimizer = adamw(decay_groups(generator, args.weight_decay), args.lr, betas=tuple(args.betas))
    parts = {"model": generator, "optimizer": optimizer, "scaler": precision.scaler,
             **{f"ema/{decay}": ema.model for decay, ema in emas.items()}}
    if state and args.fsdp:  # each process reads its share into tensors that are allocated before
        fsdp.allocate(optimizer)
        fsdp.fill(state, checkpoint.state_dicts(parts))
    start, rng, best, before = checkpoint.resume(parts, state, best=float("inf"))
    del state  # frees a copy of the model

    if args.compile:
        compile_blocks(device, tokenizer)
        compile_generator = fsdp.compile_blocks if args.fsdp else partial(compile_blocks, device)
        compile_generator(generator)

    # Clips are encoded as they come, or once for the cache.
    files, source, listed = training_files(args, before)
    names = class_names(files) if class_cond else []
    if class_cond:
        check_labels(files, config.num_classes, source)
    quarantine = open_quarantine(folder, args.decode_timeout)
    clips_of = partial(make_clips, args, num_frames=clip_config.frame_num, size=clip_config.input_size, rule="larp",
                       device=device, quarantine=quarantine, short="repeat")

    def encode(video: Tensor) -> Tensor:
        with precision.autocast():
            return encode_video(tokenizer, video, num_cond_frames)

    # Filling the cache may take hours, so mistakes in the flags of training and validation are found before.
    train_sampler(args, len(files), num_iters=0, start=0, order="epoch")
    generator.check_guidance(args.cfg_scale)
    # Validation scores the codes of held-out clips. Samples take the labels or the first frames of some of them.
    held_out = check = None
    if args.num_val != 0:
        val_files = held_out_files(args, files, source, config.num_classes if class_cond else None)
        with on_device(tokenizer, device):
            held_out, check, captions = make_held_out(args, val_files, clips_of(val_files), encode, num_cond_frames,
                                                      device)
    usable_files, cache = list(range(len(files))), None
    if args.cache_codes:
        cache = CodeCache(Path(args.cache_dir), clips_of(files, damaged="skip"), clip_config, args.cache_codes,
                          num_cond_frames, args.flip, {"tokenizer": tokenizer_hash, "precision": precision.name})
        with on_device(tokenizer, device):
            cache.fill(encode, args.batch_size // distributed.world_size(), args.num_workers, device)
        usable_files = cache.good_files()
    epoch_steps = len(usable_files) // args.batch_size
    num_iters = args.num_iters or args.max_epoch * epoch_steps
    sampler = train_sampler(args, len(usable_files), num_iters, start, order="epoch")
    if cache:
        batches = prefetch(batches_from_cache(cache, sampler, usable_files, device), device)
    else:
        batches = batches_from_video(train_loader(args, clips_of(files), sampler, device), encode, args.flip, device)

    model = generator if args.fsdp else distributed.wrap(generator, device, args.accum_iter == 1)
    condition = "classes" if class_cond else f"{num_cond_frames} frames given"
    cached = f", {cache.views} cached windows each" if cache else ""
    log = start_log(args, folder, start, num_iters, f"LARP generator, {count_parameters(generator)}, "
                    f"{precision.name}, {condition}; {len(usable_files):,} videos in {source}{cached}, {epoch_steps} "
                    "steps per epoch")
    guard = NonFiniteGuard(device)
    eval_steps, sample_steps, save_steps = (max(1, round(n * epoch_steps)) for n in (
        args.eval_every, args.sample_every, args.save_every))

    def save(step: int) -> None:
        guard.check()
        checkpoint.save_run(
            folder, step, args, parts, listed, kind="larp_ar", config=asdict(config),
            num_cond_frames=num_cond_frames, classes=names, tokenizer=tokenizer_hash, best=best,
        )

    def score(net: torch.nn.Module, codes: Tensor, cond: Tensor, drop: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        cond = cond if class_cond else generator.frame_condition(cond)
        with precision.autocast():
            return code_loss(net(codes, cond, drop), codes)

    averaged = list(emas.values())[-1].model if emas else generator

    def generate(net: LARPGenerator, indices: list[int]) -> Tensor:
        cond = held_out.cond(indices)
        codes = net.generate(
            cond if class_cond else generator.frame_condition(cond), cfg_scale=args.cfg_scale,
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seeds=[(args.seed, i) for i in indices],
        )
        with precision.autocast():
            return tokenizer.decode(codes).float()

    def validate(step: int) -> None:
        nonlocal best
        labelled = class_cond and config.class_dropout_prob > 0
        for kind, net in {"val": generator, **{f"val_ema_{d}": ema.model for d, ema in emas.items()}}.items():
            scores = log.scores(step, kind, lambda net=net: held_out.score(
                partial(score, fsdp.unsharded(net).eval()), labelled
            ))
            net.train(net is generator)
            if net is generator and scores["loss"] < best:
                best = scores["loss"]
                checkpoint.mark_best(folder / "checkpoints", step)

    def sample(step: int) -> None:
        pictures = folder / "samples" / f"step_{step:07d}"
        with on_device(tokenizer, device):
            log.scores(step, "samples", lambda: check.run(
                partial(generate, fsdp.unsharded(averaged)), captions, pictures
            ))
        averaged.cache = None  # frees the keys and values of sampling

    scores = [(validate, eval_steps)] if held_out else []
    scores += [(sample, sample_steps)] if check else []
    # Dropout differs between processes; all other draws are made per clip.
    checkpoint.start_rng(args.seed, rng)
    log.make_up(scores)
    for step in range(start + 1, num_iters + 1):
        # The schedule is a function of the step, which counts from 1 as in the released trainer.
        multiplier = cosine_with_warmup(step, round(args.warmup_epoch * epoch_steps), num_iters, args.min_lr_mult)
        set_rates(optimizer, [args.lr, args.lr], multiplier)
        means = 0
        for micro in range(args.accum_iter):
            batch = log.next(batches, step, save)
            # Whether a label is hidden depends on the clip's position in the run alone, not on its process and batch.
            drop = to_device(draw_drops(args.seed, batch.positions, config.class_dropout_prob), device)
            with distributed.sync_gradients(model, micro == args.accum_iter - 1):
                loss, logs = score(model, batch.codes, batch.cond, drop)
                precision.scaler.scale(loss / args.accum_iter).backward()
            means = means + torch.stack([*logs.values()]) / args.accum_iter
            guard.watch(step, loss, batch.paths)
        update(optimizer, precision.scaler, args.clip_grad)
        for ema in emas.values():
            ema.update(generator)
        if step % args.log_every == 0 or step == num_iters:
            guard.check()
            values = dict(zip(logs, distributed.all_mean(means).tolist()))
            log.train(step, device, **values, lr=args.lr * multiplier)
        log.end_step(step, save, save_steps, scores)
    log.finish(quarantine)


if __name__ == "__main__":
    with one_line_errors():
        main()
