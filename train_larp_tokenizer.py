"""Train a LARP tokenizer (arXiv 2410.21264): clips of 16 frames as 1,024 discrete codes that a prior finds easy.

Published:  torchrun --nproc_per_node=8 train_larp_tokenizer.py --config scripts/configs/larp_tokenizer.yaml
One GPU:    python train_larp_tokenizer.py --config scripts/configs/larp_tokenizer.yaml --batch_size 8
A folder:   ... --data_root DATA --video_name UCF-101_train     The loop alone: ... --csv_file null128.csv
Runs are written to SAVE_DIR/EXP_NAME and go on with --resume auto.
"""
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.clips import ClipDataset, GlobalBatchSampler, list_csv, list_folder, make_loader
from data.video import to_video
from models.discriminator import Discriminator
from models.gan import GAN_LOSSES, LeCam, discriminator_loss, frozen, generator_loss, r1_penalty
from models.interpolant import sample_generators
from models.larp_tokenizer import LARPTokenizer, TokenizerOutput
from models.layers import compile_blocks, set_checkpointing
from models.losses import Perceptual
from models.released import build
from training import checkpoint, distributed
from training.arguments import (
    Parser,
    add_clip_cache,
    add_data,
    add_larp_tokenizer,
    add_run,
    disc_config,
    larp_config,
    one_line_errors,
)
from training.clip_cache import clip_cache
from training.codes import flip_half
from training.log import NonFiniteGuard, RunLog, StopSignal, check_writable, claim_run, due, open_quarantine, say
from training.optim import EMA, Precision, adam, cosine_with_warmup, groups_by_name, ramp, set_rates, update
from training.validation import CodeStats, Validation, validation_source


class MicroBatch(NamedTuple):
    video: Tensor  # (B, 3, T, H, W) in [0, 1]
    positions: list[int]  # in the run, which all draws for a clip come from
    paths: list[str]


def mean_logits(logits: Tensor) -> Tensor:
    """(2 B,) of real clips and then of fakes -> (2,) float32, the mean of each."""
    return torch.stack([part.float().mean() for part in logits.chunk(2)])


def mean_of(values: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean over micro-batches of each value, detached."""
    return {name: torch.stack([one[name].detach().float() for one in values]).mean(0) for name in values[0]}


def parse_args():
    parser = Parser(__doc__)
    add_data(parser)
    add_clip_cache(parser)
    data = parser.add_argument_group("lists of videos")
    data.add_argument("--csv_file", default="k600_train.csv+ucf101_train.csv",
                      help="lists to train on; null128.csv: random clips. --video_name names a folder instead")
    data.add_argument("--val_csv", help="lists to validate on (default: CSV_FILE with _val for _train)")
    data.add_argument("--flip", action="store_true", help="mirror half of the clips (the published models do not)")
    add_larp_tokenizer(parser)
    train = parser.add_argument_group("training")
    train.add_argument("-b", "--batch_size", type=int, default=128, help="clips a step, over all processes")
    train.add_argument("--accum_iter", type=int, default=1, help="micro-batches a step; the update does not change")
    train.add_argument("--max_epoch", type=int, default=150, help="passes over the videos")
    train.add_argument("--num_iters", type=int, help="steps, instead of --max_epoch")
    train.add_argument("--lr", type=float, default=1e-4, help="highest learning rate of the tokenizer")
    train.add_argument("--disc_lr", type=float, default=3e-5, help="highest learning rate of the discriminator")
    train.add_argument("--warmup_epoch", type=float, default=8.0, help="epochs of linear warm-up")
    train.add_argument("--min_lr_mult", type=float, default=0.01, help="first and last learning rate, as a share")
    train.add_argument("--prior_lr_mult", type=float, default=50.0, help="the prior's learning rate, times LR")
    train.add_argument("--emb_lr_mult", type=float, default=1.0, help="the codebook's learning rate, times LR")
    train.add_argument("--clip_grad_max_norm", type=float, default=0.0, help="largest gradient norm; 0: no clipping")
    train.add_argument("--ema_decays", type=float, nargs="*", default=[], help="moving averages of the weights to keep")
    loss = parser.add_argument_group("losses")
    loss.add_argument("--pixel_weight", type=float, default=1.0, help="of L1")
    loss.add_argument("--perceptual_weight", type=float, default=1.0, help="of LPIPS")
    loss.add_argument("--lpips_weights", default="auto", metavar="auto|random|PATH", help="LPIPS's VGG16 backbone")
    loss.add_argument("--loss_q_weight", type=float, default=0.1, help="of the quantiser's loss")
    loss.add_argument("--loss_q_warmup_from", type=float, default=1.0, help="multiple of it to start from")
    loss.add_argument("--loss_q_warmup_epoch", type=float, default=1.0, help="epochs until it is LOSS_Q_WEIGHT")
    loss.add_argument("--loss_latent_ce_weight", type=float, default=0.06, help="of the prior's loss")
    loss.add_argument("--temperature_to", type=float, help="anneal the temperature of the codes' draws to this")
    loss.add_argument("--temperature_epoch", type=float, default=1.0, help="epochs that takes, in a straight line")
    gan = parser.add_argument_group("adversarial loss")
    gan.add_argument("--disc_weight", type=float, default=0.3, help="of the generator's loss; 0: no discriminator")
    gan.add_argument("--disc_loss", choices=GAN_LOSSES, default="ns_smooth", help="hinge, non-saturating, smoothed")
    gan.add_argument("--disc_start", type=float, default=0.0, help="epochs without it")
    gan.add_argument("--d_update_freq", type=int, default=5, help="steps between steps of the discriminator")
    gan.add_argument("--lecam_weight", type=float, default=0.001, help="of LeCam's regularisation")
    gan.add_argument("--r1_weight", type=float, default=0.0, help="of the R1 gradient penalty")
    logs = parser.add_argument_group("logging")
    logs.add_argument("--log_every", type=int, default=50, help="steps between lines of metrics.jsonl")
    logs.add_argument("--eval_every", type=float, default=1.0, help="epochs between validations")
    logs.add_argument("--save_every", type=float, default=1.0, help="epochs between checkpoints")
    logs.add_argument("--val_name", help="folder to validate on (default: VIDEO_NAME's _test, if there is one)")
    logs.add_argument("--num_val", type=int, help="validation clips (default: one of each video); 0: no validation")
    logs.add_argument("--val_batch_size", type=int, default=8, help="validation clips at once in each process")
    add_run(parser, save_dir="./logs", exp_name="larp_tokenizer", num_workers=16)
    parser.set_defaults(video_name=None, seed=66667)
    return parser.parse_args()


def main():
    args = parse_args()
    device = distributed.setup(args.device)
    rank, world_size = distributed.rank(), distributed.world_size()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high" if args.allow_tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.allow_tf32

    # The tokenizer with its prior, the discriminator, and what each keeps beside its weights.
    folder = Path(args.save_dir) / args.exp_name
    claim_run(folder)
    state = checkpoint.find(folder / "checkpoints", args.resume, "larp_tokenizer")
    carried, source = state or {}, f"the run in {folder}"
    path = state.path if state else None
    tokenizer = build(LARPTokenizer, larp_config(args, carried.get("config"), source), path).to(device).train()
    config = tokenizer.config
    disc_options = disc_config(args, config, carried.get("disc_config"), source)
    discriminator = build(Discriminator, disc_options, path).to(device)
    perceptual = Perceptual(weights=args.lpips_weights).to(device) if args.perceptual_weight > 0 else None
    start_temperature = config.bottleneck.args.regularizer.args.stochastic_temperature
    if args.temperature_to is not None and start_temperature < 0:
        raise ValueError("--temperature_to anneals a fixed temperature, but a negative --stochastic_temperature is "
                         "learned: leave one of them out")
    set_checkpointing(tokenizer, args.gradient_checkpointing)
    set_checkpointing(discriminator, args.gradient_checkpointing)
    emas = {str(decay): EMA(tokenizer, decay) for decay in args.ema_decays}
    lecam = LeCam().to(device)
    # The released schedule overwrites the prior's rate with the others'; prior_lr_mult 1 is what that trains with.
    groups = groups_by_name(tokenizer, args.lr, {
        "prior_model.": args.prior_lr_mult, "bottleneck.regularizer.embedding.": args.emb_lr_mult,
    })
    optimizer = adam(groups, args.lr, betas=(0.5, 0.9))
    disc_optimizer = adam(discriminator.parameters(), args.disc_lr, betas=(0.5, 0.9))
    rates = [group["lr"] for group in optimizer.param_groups]
    precision = Precision(args.precision, device)
    disc_scaler = precision.make_scaler()
    parts = {
        "model": tokenizer, "discriminator": discriminator, "lecam": lecam, "optimizer": optimizer,
        "disc_optimizer": disc_optimizer, "scaler": precision.scaler, "disc_scaler": disc_scaler,
    }
    start, rng, best = 0, None, float("-inf")
    if state:
        checkpoint.restore({**parts, **{f"ema/{decay}": ema.model for decay, ema in emas.items()}}, state)
        start, rng, best = state["step"], state["rng"], state["best"]
        del state, carried  # frees a copy of it all

    # Data: each sample is a pure function of (seed, its position in the run), however many processes and workers.
    files = list_folder(Path(args.data_root) / args.video_name) if args.video_name else list_csv(args.csv_file)
    quarantine = open_quarantine(folder, args.decode_timeout)
    on_gpu = device.type == "cuda"
    resize = args.resize if args.resize != "auto" else "device" if on_gpu else "worker"
    epoch_steps = len(files) // args.batch_size
    num_iters = args.num_iters or args.max_epoch * epoch_steps
    sampler = GlobalBatchSampler(
        len(files), args.batch_size, num_iters, rank, world_size, accum=args.accum_iter, seed=args.seed,
        start_step=start, order="epoch",
    )
    validation = None
    if args.num_val != 0:
        held_out = validation_source(args)
        held_out = list_folder(held_out) if args.video_name else list_csv(held_out)
        validation = Validation(
            held_out, args.num_val, config.frame_num, config.input_size, "larp", device, args.val_batch_size,
            args.num_workers, quarantine, args.lpips_weights, args.decode_timeout,
        )
    check_writable(folder)
    cache = clip_cache(  # after all that a flag may have wrong: it may take hours
        args.cache_dir, files, config.input_size, "larp", quarantine, args.num_workers, args.decode_timeout
    ) if args.cache_clips else None
    clips = ClipDataset(
        files, config.frame_num, config.input_size, "larp", resize=resize, seed=args.seed, short="repeat",
        quarantine=quarantine, timeout=args.decode_timeout, cache=cache,
    )
    batches = iter(make_loader(clips, sampler, args.num_workers, args.prefetch_factor, pin_memory=on_gpu))

    if args.compile:
        compile_blocks(tokenizer)
        compile_blocks(discriminator)
        if perceptual is not None:
            compile_blocks(perceptual)
    # Frozen tables are equal everywhere, and need not be sent again. Nothing is unused, so nothing is searched for.
    model = distributed.wrap(tokenizer, device, args.accum_iter == 1)
    disc_model = distributed.wrap(discriminator, device, static_graph=False)  # it is frozen in between

    def save(step: int) -> None:
        guard.check()
        checkpoint.save(folder / "checkpoints", step, {
            "kind": "larp_tokenizer", "config": asdict(config), "disc_config": asdict(discriminator.config),
            **{name: part.state_dict() for name, part in parts.items()},
            "ema": {decay: ema.model.state_dict() for decay, ema in emas.items()}, "best": best,
            "data": {"position": step * args.batch_size, "files": len(files)}, "args": vars(args),
        }, keep=args.keep_checkpoints)

    def score(net: LARPTokenizer, pictures: Path) -> dict[str, float]:
        codes = CodeStats(config.bottleneck.args.regularizer.args.codebook_size, device)

        def reconstruct(video: Tensor, positions: list[int]) -> Tensor:
            with precision.autocast():
                output = net(video, deterministic=True, generator=sample_generators(args.seed, positions, device))
            codes.add(output.codes, output.logs)
            return output.video

        net.eval()
        scores = validation.run(reconstruct, pictures) | codes.summary()
        net.train(net is tokenizer)
        return scores

    def validate(step: int) -> None:
        nonlocal best
        for kind, net in {"val": tokenizer, **{f"val_ema_{d}": ema.model for d, ema in emas.items()}}.items():
            scores = log.scores(step, kind, partial(score, net, folder / "samples" / kind / f"step_{step:07d}"))
            if net is tokenizer and scores["psnr_clip"] > best:
                best = scores["psnr_clip"]
                checkpoint.mark_best(folder / "checkpoints", step)

    single, is_last = args.accum_iter == 1, [micro == args.accum_iter - 1 for micro in range(args.accum_iter)]

    def reconstruct(
        micro: MicroBatch, ratio: float, temperature: float | None
    ) -> tuple[TokenizerOutput, list[torch.Generator]]:
        # What is drawn for a clip depends on its position in the run alone, and not on how clips are shared.
        generators = sample_generators(args.seed, micro.positions, device)
        with precision.autocast():
            return model(micro.video, ratio, temperature=temperature, generator=generators), generators

    def update_discriminator(step: int, micros: list[MicroBatch], rounds: list) -> dict[str, Tensor]:
        """rounds: of each micro-batch what `reconstruct` returns. Returns what is logged."""
        pairs = [torch.cat([micro.video, output.video.detach().float()])
                 for micro, (output, _) in zip(micros, rounds)]
        if not single:  # LeCam is a function of the whole batch's means
            with torch.no_grad(), precision.autocast():
                whole = distributed.all_mean(torch.stack([mean_logits(discriminator(x)) for x in pairs]).mean(0))
        values = []
        for last, micro, pair, (_, generators) in zip(is_last, micros, pairs, rounds):
            noise = torch.stack([torch.randn(2, generator=one, device=device) for one in generators], dim=1)  # (2, B)
            with distributed.sync_gradients(disc_model, last):
                with precision.autocast():
                    logits = disc_model(pair)
                disc_loss, disc_logs = discriminator_loss(*logits.chunk(2), args.disc_loss, noise)
                means = mean_logits(logits)
                means = distributed.all_mean(means) if single else whole + (means - means.detach())
                disc_logs["lecam"] = lecam(*means)
                disc_loss = disc_loss + args.lecam_weight * disc_logs["lecam"]
                if args.r1_weight > 0:
                    disc_logs["r1"] = r1_penalty(discriminator, micro.video)
                    disc_loss = disc_loss + args.r1_weight * disc_logs["r1"]
                disc_scaler.scale(disc_loss / args.accum_iter).backward()
            guard.watch(step, disc_loss, micro.paths)
            values.append({"disc": disc_loss, **disc_logs})
        lecam.update(*means)
        update(disc_optimizer, disc_scaler, args.clip_grad_max_norm)
        return mean_of(values)

    parameters, disc_parameters = (sum(p.numel() for p in net.parameters()) for net in (tokenizer, discriminator))
    say(f"LARP tokenizer, {parameters:,} parameters, discriminator {disc_parameters:,}, {precision.name}; "
        f"{len(files):,} videos; {world_size} processes x {args.batch_size // world_size} clips; step {start} of "
        f"{num_iters}, {epoch_steps} an epoch")
    log = RunLog(folder, vars(args), start, num_iters, args.batch_size, args.wandb)
    guard, stop = NonFiniteGuard(device), StopSignal()
    eval_steps, save_steps = (max(1, round(n * epoch_steps)) for n in (args.eval_every, args.save_every))
    # Each process drops out units of its own; all other draws are per clip.
    checkpoint.start_rng(args.seed, rng)
    if validation and due(start, eval_steps, num_iters):  # by a run that was stopped before
        validate(start)
    logs = {}
    for step in range(start + 1, num_iters + 1):
        # Schedules are pure functions of the step, counted from 1 as the released trainer does.
        multiplier = cosine_with_warmup(step, round(args.warmup_epoch * epoch_steps), num_iters, args.min_lr_mult)
        set_rates(optimizer, rates, multiplier)
        set_rates(disc_optimizer, [args.disc_lr], multiplier)
        q_mult = ramp(step, round(args.loss_q_warmup_epoch * epoch_steps), args.loss_q_warmup_from, 1.0)
        temperature = None if args.temperature_to is None else ramp(
            step, round(args.temperature_epoch * epoch_steps), start_temperature, args.temperature_to
        )
        adversarial = args.disc_weight > 0 and step - 1 >= args.disc_start * epoch_steps
        ratio = config.prior_model.sampling_ratio(step, num_iters)

        micros = []
        for _ in range(args.accum_iter):
            waiting = time.perf_counter()
            batch = stop.next(batches, step, save)
            log.waited(time.perf_counter() - waiting)
            video, positions = to_video(batch["frames"], config.input_size, "larp", device), batch["position"].tolist()
            video = flip_half(video, args.seed, positions) if args.flip else video
            micros.append(MicroBatch(video, positions, batch["path"]))

        # The discriminator goes first, on detached reconstructions; the generator then sees the updated one. Only a
        # single micro-batch's graph is kept for that: of several, each is reconstructed again.
        rounds = []
        if adversarial and step % args.d_update_freq == 0:
            with torch.set_grad_enabled(single):
                rounds = [reconstruct(micro, ratio, temperature) for micro in micros]
            logs |= update_discriminator(step, micros, rounds)

        # Each term with its weight. Gradients pass through the bare discriminator and leave none on it.
        values = []
        for last, micro in zip(is_last, micros):
            with distributed.sync_gradients(model, last), frozen(discriminator):
                output, _ = rounds[0] if rounds and single else reconstruct(micro, ratio, temperature)
                fake = output.video.float()
                with precision.autocast():
                    terms = {"l1": ((fake - micro.video).abs().mean(), args.pixel_weight),
                             "quantizer": (output.loss_q, args.loss_q_weight * q_mult)}
                    if perceptual is not None:
                        terms["lpips"] = perceptual(fake, micro.video).mean(), args.perceptual_weight
                    if adversarial:
                        terms["generator"] = generator_loss(discriminator(fake), args.disc_loss), args.disc_weight
                    if output.loss_prior is not None:
                        terms["prior"] = output.loss_prior, args.loss_latent_ce_weight
                    loss = sum(weight * term for term, weight in terms.values())
                precision.scaler.scale(loss / args.accum_iter).backward()
            guard.watch(step, loss, micro.paths)
            values.append({"loss": loss, **{name: term for name, (term, _) in terms.items()}, **output.logs})
        update(optimizer, precision.scaler, args.clip_grad_max_norm)
        for ema in emas.values():
            ema.update(tokenizer)
        logs |= mean_of(values)
        log.advance()

        if step % args.log_every == 0 or step == num_iters:
            guard.check()
            means = distributed.all_mean(torch.stack([*logs.values()]))
            log.train(step, device, **dict(zip(logs, means.tolist())), lr=rates[-1] * multiplier)
            logs = {}  # so that the discriminator's values are of its newest step since the last line, or absent
        stopping = stop.anywhere()
        to_validate = validation and due(step, eval_steps, num_iters)
        if stopping or to_validate or due(step, save_steps, num_iters):
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
