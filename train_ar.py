"""Train LARP's generator (arXiv 2410.21264) on the codes of a frozen LARP tokenizer: clips of a class, or clips that
continue a few given frames.

Published:    torchrun --nproc_per_node=8 train_ar.py --config scripts/configs/larp_ar.yaml
Continuing:   torchrun --nproc_per_node=8 train_ar.py --config scripts/configs/larp_ar_fp.yaml
One GPU:      python train_ar.py --config scripts/configs/larp_ar.yaml --batch_size 4
Your own:     ... --tokenizer CKPT --data_root DATA --video_name UCF-101_train
Add --cache_codes 8 to encode eight windows of every video once and never touch video again, and --fsdp to share weights
and optimizer states out among the processes, for models too large for one GPU (--model llama-abs-XXXL).
Runs are written to SAVE_DIR/EXP_NAME and go on with --resume auto.
"""
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common import distributed
from common.cli import Parser, one_line_errors
from common.distributed import on_device, prefetch, to_device
from data.clips import open_quarantine
from data.lists import check_classes, check_labels, class_names
from models.larp_ar import LARPGenerator, code_loss
from models.layers import compile_blocks, set_checkpointing
from models.pretrained import build
from training import checkpoint, flags, fsdp
from training.codes import CodeCache, batches_from_cache, batches_from_video, draw_drops, encode_video
from training.load import check_tokenizer, load_larp_tokenizer, weights_sha256
from training.log import NonFiniteGuard, start_log
from training.optim import EMA, Precision, adamw, cosine_with_warmup, decay_groups, set_rates, update
from training.setup import make_clips, start_run, train_loader, train_sampler, training_files
from training.validation import HeldOut, SampleCheck, caption, held_out_keys, validation_files


def parse_args():
    parser = Parser(__doc__)
    flags.add_data(parser)
    data = flags.add_lists(parser, csv_file="ucf101_train.csv")
    data.add_argument("--tokenizer", default="hywang66/LARP-L-long-tokenizer",
                      help="folder, hub id, checkpoint of ours or file of the authors' trainer")
    data.add_argument("--tokenizer_version", default="sd", metavar="sd|ema_DECAY", help="of a checkpoint's weights")
    flags.add_window_cache(data, "codes")
    flags.add_larp_ar(parser)
    train = flags.add_training(parser, batch_size=64, lr=6e-4, epochs=3000, warmup_epoch=4.0)
    train.add_argument("--weight_decay", type=float, default=0.05, help="of the weights of linear layers")
    train.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95), help="of AdamW")
    train.add_argument("--fsdp", action="store_true", help="share weights and optimizer states out among processes")
    logs = flags.add_logging(parser, log_every=50, save_every=30.0)
    flags.add_validation(logs, eval_every=30.0, num_val=None, batch_size=8)
    logs.add_argument("--sample_every", type=float, default=30.0, help="epochs between sample sheets and FVD, of the "
                      "last average in EMA_DECAYS")
    logs.add_argument("--num_samples", type=int, default=32, help="samples, of or after the first validation clips")
    logs.add_argument("--sample_batch_size", type=int, default=32, help="samples at once in each process")
    logs.add_argument("--cfg_scale", type=float, default=1.0, help="guidance of the samples; 1: none, 0: no condition")
    flags.add_code_draws(logs)
    flags.add_run(parser, save_dir="./logs", exp_name="larp_ar", num_workers=16)
    parser.set_defaults(video_name=None, seed=66667)
    return parser.parse_args()


def main():
    args = parse_args()
    device, folder = start_run(args, group=args.fsdp)

    # The frozen tokenizer, and the generator of its codes.
    tokenizer = load_larp_tokenizer(args.tokenizer, args.tokenizer_version).requires_grad_(False)
    if not args.cache_codes:  # else it comes to the device only to encode what is kept, and to decode samples
        tokenizer.to(device)
    tokenizer_hash, clip_config = weights_sha256(tokenizer), tokenizer.config
    state = checkpoint.find(folder / "checkpoints", args.resume, "larp_ar")
    if state:
        check_tokenizer(state, tokenizer_hash, folder, args, "tokenizer")
    if state and ("shards" in state) != args.fsdp:
        raise ValueError(f"the run in {folder} was saved {'without' if args.fsdp else 'with'} --fsdp: go on likewise")
    options, num_cond_frames = flags.larp_ar_config(args, clip_config, state, f"the run in {folder}")
    if num_cond_frames and args.cfg_scale != 1:
        raise ValueError(f"--cfg_scale is {args.cfg_scale}, but frame prediction has no guidance: leave it out")
    generator = build(LARPGenerator, options, state.path if state else None).train()
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
    start, rng, best, before = 0, None, float("inf"), None
    if state:
        if args.fsdp:  # each process reads its share, into tensors that must be there
            fsdp.allocate(optimizer)
            fsdp.fill(state, checkpoint.state_dicts(parts))
        checkpoint.restore(parts, state)
        start, rng, best, before = state["step"], state["rng"], state["best"], state["data"]
        del state  # frees a copy of it all

    if args.compile:
        compile_blocks(tokenizer)
        if args.fsdp:
            for module in fsdp.between_gathers(generator):
                module.compile(dynamic=False)
        else:
            compile_blocks(generator)

    # Data: clips encoded as they come, or once and for all.
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

    # What training, validation and samples need is looked for before the cache is filled, which may take hours.
    train_sampler(args, len(files), num_iters=0, start=0, order="epoch")
    generator.check_guidance(args.cfg_scale)
    # Validation scores the codes of held-out clips; samples are of the classes of the first of them, or continue them.
    held_out = check = None
    if args.num_val != 0:
        val_files, val_source = validation_files(args)
        if class_cond:
            check_labels(val_files, config.num_classes, val_source)
        if class_cond and args.video_name:
            check_classes(files, val_files, source, val_source)
        keys, val_clips = held_out_keys(len(val_files), args.num_val, args.seed), clips_of(val_files)
        with on_device(tokenizer, device):
            held_out = HeldOut(val_clips, keys, encode, args.val_batch_size, args.num_workers, device)
        keys = keys[: args.num_samples]
        given = f": {num_cond_frames} frames given" if num_cond_frames else ""
        captions = [caption(val_files[key.index]) + given for key in keys]
        if keys:
            check = SampleCheck(val_clips, keys, args.sample_batch_size, args.num_workers, device, not class_cond)
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

    parameters = sum(p.numel() for p in generator.parameters())
    condition = "classes" if class_cond else f"{num_cond_frames} frames given"
    cached = f", {cache.views} cached windows each" if cache else ""
    log = start_log(args, folder, start, num_iters, f"LARP generator, {parameters:,} parameters, {precision.name}, "
                    f"{condition}; {len(usable_files):,} videos in {source}{cached}, {epoch_steps} steps an epoch")
    guard = NonFiniteGuard(device)
    eval_steps, sample_steps, save_steps = (
        max(1, round(epochs * epoch_steps)) for epochs in (args.eval_every, args.sample_every, args.save_every)
    )

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
        averaged.cache = None  # gives back the memory of its keys and values

    scores = [(validate, eval_steps)] if held_out else []
    scores += [(sample, sample_steps)] if check else []
    # Each process drops out units of its own; all other draws are per clip.
    checkpoint.start_rng(args.seed, rng)
    log.make_up(scores)
    for step in range(start + 1, num_iters + 1):
        # The schedule is a pure function of the step, counted from 1 as the released trainer does.
        multiplier = cosine_with_warmup(step, round(args.warmup_epoch * epoch_steps), num_iters, args.min_lr_mult)
        set_rates(optimizer, [args.lr, args.lr], multiplier)
        means = 0
        for micro in range(args.accum_iter):
            batch = log.next(batches, step, save)
            # Whether a clip's label is hidden depends on its position in the run alone, not on how clips are shared.
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
