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
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data.clips import (
    ClipDataset,
    GlobalBatchSampler,
    class_names,
    list_csv,
    list_folder,
    make_loader,
)
from models.larp_ar import LARPGenerator, code_loss
from models.layers import compile_blocks, set_checkpointing
from models.released import build
from training import checkpoint, distributed, sharding
from training.arguments import Parser, add_data, add_larp_ar, add_run, larp_ar_config, one_line_errors
from training.codes import (
    CodeCache,
    HeldOut,
    batches_from_cache,
    batches_from_video,
    caption,
    check_classes,
    check_labels,
    draw_drops,
    encode_video,
    held_out_keys,
)
from training.generation import SampleCheck
from training.latents import prefetch, to_device
from training.log import NonFiniteGuard, RunLog, StopSignal, check_writable, claim_run, due, open_quarantine, say
from training.optim import EMA, Precision, adamw, cosine_with_warmup, decay_groups, set_rates, update
from training.tokenizers import load_larp_tokenizer, on_device, weights_sha256
from training.validation import validation_source


def parse_args():
    parser = Parser(__doc__)
    add_data(parser)
    data = parser.add_argument_group("lists of videos, and their codes")
    data.add_argument("--csv_file", default="ucf101_train.csv",
                      help="lists to train on; null128.csv: random clips. --video_name names a folder instead")
    data.add_argument("--val_csv", help="lists to validate on (default: CSV_FILE with _val for _train)")
    data.add_argument("--tokenizer", default="hywang66/LARP-L-long-tokenizer",
                      help="folder, hub id, checkpoint of ours or file of the authors' trainer")
    data.add_argument("--tokenizer_version", default="sd", metavar="sd|ema_DECAY", help="of a checkpoint's weights")
    data.add_argument("--cache_codes", type=int, default=0, metavar="K", help="train from K encoded windows a video")
    data.add_argument("--cache_dir", default="data/cache", help="folder of code caches")
    data.add_argument("--flip", action="store_true", help="mirror half of the clips (the published models do not)")
    add_larp_ar(parser)
    train = parser.add_argument_group("training")
    train.add_argument("-b", "--batch_size", type=int, default=64, help="clips a step, over all processes")
    train.add_argument("--accum_iter", type=int, default=1, help="micro-batches a step; the update does not change")
    train.add_argument("--max_epoch", type=int, default=3000, help="passes over the videos")
    train.add_argument("--num_iters", type=int, help="steps, instead of --max_epoch")
    train.add_argument("--lr", type=float, default=6e-4, help="highest learning rate")
    train.add_argument("--weight_decay", type=float, default=0.05, help="of the weights of linear layers")
    train.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95), help="of AdamW")
    train.add_argument("--warmup_epoch", type=float, default=4.0, help="epochs of linear warm-up")
    train.add_argument("--min_lr_mult", type=float, default=0.01, help="first and last learning rate, as a share")
    train.add_argument("--clip_grad_max_norm", type=float, default=0.0, help="largest gradient norm; 0: no clipping")
    train.add_argument("--ema_decays", type=float, nargs="*", default=[],
                       help="moving averages of the weights to keep; samples are of the last")
    train.add_argument("--fsdp", action="store_true", help="share weights and optimizer states out among processes")
    logs = parser.add_argument_group("logging")
    logs.add_argument("--log_every", type=int, default=50, help="steps between lines of metrics.jsonl")
    logs.add_argument("--eval_every", type=float, default=30.0, help="epochs between validations")
    logs.add_argument("--sample_every", type=float, default=30.0, help="epochs between sample sheets and FVD")
    logs.add_argument("--save_every", type=float, default=30.0, help="epochs between checkpoints")
    logs.add_argument("--val_name", help="folder to validate on (default: VIDEO_NAME's _test, if there is one)")
    logs.add_argument("--num_val", type=int, help="validation clips (default: one of each video); 0: no validation")
    logs.add_argument("--val_batch_size", type=int, default=8, help="validation clips at once in each process")
    logs.add_argument("--num_samples", type=int, default=32, help="samples, of or after the first validation clips")
    logs.add_argument("--sample_batch_size", type=int, default=32, help="samples at once in each process")
    logs.add_argument("--cfg_scale", type=float, default=1.0, help="guidance of the samples; 1: none, 0: no condition")
    logs.add_argument("--temperature", type=float, default=1.0, help="of the samples' codes")
    logs.add_argument("--top_k", type=int, default=0, help="draw among the K likeliest codes; 0: among all")
    logs.add_argument("--top_p", type=float, default=1.0, help="draw among the likeliest codes up to this probability")
    add_run(parser, save_dir="./logs", exp_name="larp_ar", num_workers=16)
    parser.set_defaults(video_name=None, seed=66667)
    return parser.parse_args()


def main():
    args = parse_args()
    device = distributed.setup(args.device, group=args.fsdp)
    rank, world_size = distributed.rank(), distributed.world_size()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.allow_tf32

    # The frozen tokenizer, and the generator of its codes.
    tokenizer = load_larp_tokenizer(args.tokenizer, args.tokenizer_version).requires_grad_(False)
    if not args.cache_codes:  # else it comes to the device only to encode what is kept, and to decode samples
        tokenizer.to(device)
    tokenizer_hash, clip_config = weights_sha256(tokenizer), tokenizer.config
    folder = Path(args.save_dir) / args.exp_name
    claim_run(folder)
    state = checkpoint.find(folder / "checkpoints", args.resume, "larp_ar")
    if state and state["tokenizer"] != tokenizer_hash:
        raise ValueError(f"the run in {folder} was trained on another tokenizer than {args.tokenizer}: give "
                         f"{state['args']['tokenizer']}, which it names, or what became of it")
    if state and ("shards" in state) != args.fsdp:
        raise ValueError(f"the run in {folder} was saved {'without' if args.fsdp else 'with'} --fsdp: go on likewise")
    options, num_cond_frames = larp_ar_config(args, clip_config, state, f"the run in {folder}")
    if num_cond_frames and args.cfg_scale != 1:
        raise ValueError(f"--cfg_scale is {args.cfg_scale}, but frame prediction has no guidance: leave it out")
    generator = build(LARPGenerator, options, state.path if state else None).train()
    set_checkpointing(generator, args.gradient_checkpointing)
    config, class_cond = generator.config, not generator.config.frame_prediction
    emas = {str(decay): EMA(generator, decay) for decay in args.ema_decays}
    precision = Precision(args.precision, device)
    place = partial(sharding.shard, precision=precision.name) if args.fsdp else LARPGenerator.to
    for net in (generator, *(ema.model for ema in emas.values())):
        place(net, device)
    optimizer = adamw(decay_groups(generator, args.weight_decay), args.lr, betas=tuple(args.betas))
    parts = {"model": generator, "optimizer": optimizer, "scaler": precision.scaler}
    start, rng, best = 0, None, float("inf")

    def trained() -> dict:
        return {**{name: part.state_dict() for name, part in parts.items()},
                "ema": {decay: ema.model.state_dict() for decay, ema in emas.items()}}

    if state:
        if args.fsdp:  # each process reads its share, into tensors that must be there
            sharding.allocate(optimizer)
            sharding.fill(state, trained())
        checkpoint.restore({**parts, **{f"ema/{decay}": ema.model for decay, ema in emas.items()}}, state)
        start, rng, best = state["step"], state["rng"], state["best"]
        del state  # frees a copy of it all

    if args.compile:
        compile_blocks(tokenizer)
        if args.fsdp:
            for module in sharding.between_gathers(generator):
                module.compile(dynamic=False)
        else:
            compile_blocks(generator)

    # Data: clips encoded as they come, or once and for all.
    source = str(Path(args.data_root) / args.video_name) if args.video_name else args.csv_file
    files = list_folder(source) if args.video_name else list_csv(source)
    names = class_names(files) if class_cond else []
    if class_cond:
        check_labels(files, config.num_classes, source)
    quarantine = open_quarantine(folder, args.decode_timeout)
    on_gpu = device.type == "cuda"
    resize = args.resize if args.resize != "auto" else "device" if on_gpu else "worker"
    make_clips = partial(ClipDataset, num_frames=clip_config.frame_num, size=clip_config.input_size, rule="larp",
                         seed=args.seed, resize=resize, short="repeat", quarantine=quarantine,
                         timeout=args.decode_timeout)

    def encode(video: Tensor) -> Tensor:
        with precision.autocast():
            return encode_video(tokenizer, video, num_cond_frames)

    # What training, validation and samples need is looked for before the cache is filled, which may take hours.
    GlobalBatchSampler(len(files), args.batch_size, 0, rank, world_size, args.accum_iter, order="epoch")
    generator.check_guidance(args.cfg_scale)
    check_writable(folder)
    # Validation scores the codes of held-out clips; samples are of the classes of the first of them, or continue them.
    held_out = check = None
    if args.num_val != 0:
        val_source = validation_source(args)
        val_files = list_folder(val_source) if args.video_name else list_csv(val_source)
        if class_cond:
            check_labels(val_files, config.num_classes, val_source)
        if class_cond and args.video_name:
            check_classes(files, val_files, source, val_source)
        keys, val_clips = held_out_keys(len(val_files), args.num_val, args.seed), make_clips(val_files)
        with on_device(tokenizer, device):
            held_out = HeldOut(val_clips, keys, encode, args.val_batch_size, args.num_workers, device)
        keys = keys[: args.num_samples]
        given = f": {num_cond_frames} frames given" if num_cond_frames else ""
        captions = [caption(val_files[key.index]) + given for key in keys]
        if keys:
            check = SampleCheck(val_clips, keys, args.sample_batch_size, args.num_workers, device, not class_cond)
    numbered, cache = list(range(len(files))), None
    if args.cache_codes:
        cache = CodeCache(Path(args.cache_dir), make_clips(files, damaged="skip"), clip_config, args.cache_codes,
                          num_cond_frames, args.flip, {"tokenizer": tokenizer_hash, "precision": precision.name})
        with on_device(tokenizer, device):
            cache.fill(encode, args.batch_size // world_size, args.num_workers, device)
        numbered = cache.good_files()
    epoch_steps = len(numbered) // args.batch_size
    num_iters = args.num_iters or args.max_epoch * epoch_steps
    sampler = GlobalBatchSampler(
        len(numbered), args.batch_size, num_iters, rank, world_size, accum=args.accum_iter, seed=args.seed,
        start_step=start, order="epoch",
    )
    if cache:
        batches = prefetch(batches_from_cache(cache, sampler, numbered, device), device)
    else:
        loader = make_loader(make_clips(files), sampler, args.num_workers, args.prefetch_factor, on_gpu)
        batches = batches_from_video(loader, encode, args.flip, device)

    model = generator if args.fsdp else distributed.wrap(generator, device, args.accum_iter == 1)

    def save(step: int) -> None:
        guard.check()
        checkpoint.save(folder / "checkpoints", step, {
            "kind": "larp_ar", "config": asdict(config), "num_cond_frames": num_cond_frames, "classes": names,
            "tokenizer": tokenizer_hash, **trained(), "best": best,
            "data": {"position": step * args.batch_size, "files": len(numbered)}, "args": vars(args),
        }, keep=args.keep_checkpoints)

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
                partial(score, sharding.whole(net).eval()), labelled
            ))
            net.train(net is generator)
            if net is generator and scores["loss"] < best:
                best = scores["loss"]
                checkpoint.mark_best(folder / "checkpoints", step)

    def sample(step: int) -> None:
        pictures = folder / "samples" / f"step_{step:07d}"
        with on_device(tokenizer, device):
            log.scores(step, "samples", lambda: check.run(
                partial(generate, sharding.whole(averaged)), captions, pictures
            ))
        averaged.cache = None  # gives back the memory of its keys and values

    say(f"LARP generator, {sum(p.numel() for p in generator.parameters()):,} parameters, {precision.name}, "
        f"{'classes' if class_cond else f'{num_cond_frames} frames given'}; {len(numbered):,} videos in {source}"
        f"{f', {cache.views} cached windows each' if cache else ''}; {world_size} processes x "
        f"{args.batch_size // world_size} clips; step {start} of {num_iters}, {epoch_steps} an epoch")
    log = RunLog(folder, vars(args), start, num_iters, args.batch_size, args.wandb)
    guard, stop = NonFiniteGuard(device), StopSignal()
    eval_steps, sample_steps, save_steps = (
        max(1, round(epochs * epoch_steps)) for epochs in (args.eval_every, args.sample_every, args.save_every)
    )
    # Each process drops out units of its own; all other draws are per clip.
    checkpoint.start_rng(args.seed, rng)
    if held_out and due(start, eval_steps, num_iters):  # by a run that was stopped before
        validate(start)
    if check and due(start, sample_steps, num_iters):
        sample(start)
    for step in range(start + 1, num_iters + 1):
        # The schedule is a pure function of the step, counted from 1 as the released trainer does.
        multiplier = cosine_with_warmup(step, round(args.warmup_epoch * epoch_steps), num_iters, args.min_lr_mult)
        set_rates(optimizer, [args.lr, args.lr], multiplier)
        means = 0
        for micro in range(args.accum_iter):
            waiting = time.perf_counter()
            batch = stop.next(batches, step, save)
            log.waited(time.perf_counter() - waiting)
            # Whether a clip's label is hidden depends on its position in the run alone, not on how clips are shared.
            drop = to_device(draw_drops(args.seed, batch.positions, config.class_dropout_prob), device)
            with distributed.sync_gradients(model, micro == args.accum_iter - 1):
                loss, logs = score(model, batch.codes, batch.cond, drop)
                precision.scaler.scale(loss / args.accum_iter).backward()
            means = means + torch.stack([*logs.values()]) / args.accum_iter
            guard.watch(step, loss, batch.paths)
        update(optimizer, precision.scaler, args.clip_grad_max_norm)
        for ema in emas.values():
            ema.update(generator)
        log.advance()

        if step % args.log_every == 0 or step == num_iters:
            guard.check()
            values = dict(zip(logs, distributed.all_mean(means).tolist()))
            log.train(step, device, **values, lr=args.lr * multiplier)
        stopping = stop.anywhere()
        to_validate = held_out and due(step, eval_steps, num_iters)
        to_sample = check and due(step, sample_steps, num_iters)
        if stopping or to_validate or to_sample or due(step, save_steps, num_iters):
            save(step)
        if stopping:
            log.close()
            stop.leave(step)
        if to_validate:
            validate(step)
        if to_sample:
            sample(step)
    log.close()
    if len(quarantine):
        say(f"{len(quarantine)} damaged files, listed in {quarantine.path}")
    say(f"checkpoints: {folder / 'checkpoints'}")


if __name__ == "__main__":
    with one_line_errors():
        main()
