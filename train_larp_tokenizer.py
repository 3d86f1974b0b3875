"""Train a LARP tokenizer (arXiv 2410.21264), which encodes a clip of 16 frames as 1,024 discrete
codes that an autoregressive prior predicts well.

Published:   torchrun --nproc_per_node=8 train_larp_tokenizer.py --config CONFIG
                 (CONFIG is scripts/configs/larp_tokenizer.yaml)
One GPU:     python train_larp_tokenizer.py --config CONFIG --batch_size 8
A folder:    ... --data_root DATA --video_name UCF-101_train
Random data: ... --csv_file null128.csv

A run writes to SAVE_DIR/EXP_NAME and continues with --resume.
"""
from common.cli import Parser, Rare, one_line_errors
from models.configs import DiscriminatorConfig, LARPTokenizerConfig
from training import flags


def parse_args():
    parser = Parser(__doc__)
    data = flags.add_data(parser)
    flags.add_lists(data, csv_file="k600_train.csv+ucf101_train.csv")
    flags.add_clip_cache(data)
    train = flags.add_training(parser, batch_size=128, lr=1e-4, epochs=150, warmup_epoch=8.0)
    train.add_argument("--prior_lr_mult", type=float, default=50.0,
                       help=Rare("Factor of the prior's learning rate; the published training has 1 in effect"))
    train.add_argument("--emb_lr_mult", type=float, default=1.0, help=Rare("Factor of the codebook's learning rate"))
    flags.add_larp_losses(parser)
    logs = flags.add_logging(parser, log_every=50, save_every=1.0)
    flags.add_validation(logs, eval_every=1.0, num_val=None, batch_size=8)
    flags.add_run(parser, save_dir="./logs", exp_name="larp_tokenizer", num_workers=16)
    flags.add_flags(parser, LARPTokenizerConfig)
    flags.add_flags(parser, DiscriminatorConfig)
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
from common.rng import sample_generators
from data.augment import flip_half
from data.clips import open_quarantine
from data.video import to_video
from models.gan import frozen, generator_loss
from models.larp_tokenizer import LARPTokenizer
from models.layers import compile_blocks, set_checkpointing
from models.stlpips import perceptual_metric
from training import checkpoint, tune
from training.adversary import Adversary, MicroBatch, Round, mean_of
from training.log import NonFiniteGuard, count_parameters, start_log
from training.optim import EMA, Precision, adam, cosine_with_warmup, groups_by_name, ramp, set_rates, update
from training.setup import cached_clips, start_run, train_loader, train_sampler, training_files
from training.validation import CodeStats, make_validation


def main():
    args = parse_args()
    device, folder = start_run(args)

    # The tokenizer with its prior, the discriminator, their optimizers and averages.
    state = checkpoint.find(folder / "checkpoints", args.resume, "larp_tokenizer")
    tokenizer = tune.start_tokenizer(LARPTokenizer, LARPTokenizerConfig, args, state, folder, args.init_from)
    tune.freeze(tokenizer, args, state, folder)
    tokenizer.to(device).train()
    config = tokenizer.config
    discriminator = tune.start_discriminator(args, config, state, folder).to(device)
    perceptual = None
    if args.perceptual_weight > 0:
        perceptual = perceptual_metric(args.perceptual, weights=args.lpips_weights).to(device)
    start_temperature = config.bottleneck.args.regularizer.args.stochastic_temperature
    if args.temperature_to is not None and start_temperature < 0:
        raise ValueError("--temperature_to anneals a fixed temperature, but a negative --stochastic_temperature is "
                         "learned: leave one of them out")
    set_checkpointing(tokenizer, args.gradient_checkpointing)
    set_checkpointing(discriminator, args.gradient_checkpointing)
    emas = {str(decay): EMA(tokenizer, decay) for decay in args.ema_decays}
    # The released schedule overwrites the prior's learning rate by that of the tokenizer, as if prior_lr_mult were 1.
    groups = groups_by_name(tokenizer, args.lr, {
        "prior_model.": args.prior_lr_mult, "bottleneck.regularizer.embedding.": args.emb_lr_mult,
    })
    optimizer = adam(groups, args.lr, betas=(0.5, 0.9))
    rates = [group["lr"] for group in optimizer.param_groups]
    precision = Precision(args.precision, device)
    adversary = Adversary(discriminator, args, precision, device)
    parts = {"model": tokenizer, "optimizer": optimizer, "scaler": precision.scaler, **adversary.parts,
             **{f"ema/{decay}": ema.model for decay, ema in emas.items()}}
    start, rng, best, before = checkpoint.resume(parts, state, best=float("-inf"))
    del state  # frees a copy of the models

    # Each sample is a function of the seed and its position in the run, whatever the number of processes and workers.
    files, _, listed = training_files(args, before)
    quarantine = open_quarantine(folder, args.decode_timeout)
    epoch_steps = len(files) // args.batch_size
    num_iters = args.num_iters or args.max_epoch * epoch_steps
    sampler = train_sampler(args, len(files), num_iters, start, order="epoch")
    of_clips = (config.frame_num, config.input_size, "larp", device, quarantine)
    validation = make_validation(args, *of_clips)
    clips = cached_clips(args, files, *of_clips, short="repeat")
    batches = iter(train_loader(args, clips, sampler, device))

    if args.compile:
        compile_blocks(device, tokenizer, discriminator, *([perceptual] if perceptual else []))
    model = distributed.wrap(tokenizer, device, args.accum_iter == 1)
    adversary.wrap()
    log = start_log(args, folder, start, num_iters, f"LARP tokenizer, {count_parameters(tokenizer)}, discriminator, "
                    f"{count_parameters(discriminator)}, {precision.name}; {len(files):,} videos, {epoch_steps} steps "
                    "per epoch")
    guard = NonFiniteGuard(device)
    eval_steps, save_steps = (max(1, round(n * epoch_steps)) for n in (args.eval_every, args.save_every))

    def save(step: int) -> None:
        guard.check()
        checkpoint.save_run(folder, step, args, parts, listed, kind="larp_tokenizer", config=asdict(config),
                            disc_config=asdict(discriminator.config), best=best)

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

    def reconstruct(micro: MicroBatch, ratio: float, temperature: float | None) -> Round:
        # Draws for a clip depend on its position in the run alone, not on the process and the batch that it is in.
        generators = sample_generators(args.seed, micro.positions, device)
        with precision.autocast():
            return model(micro.video, ratio, temperature=temperature, generator=generators), generators

    scores = [(validate, eval_steps)] if validation else []
    # Dropout differs between processes; all other draws are made per clip.
    checkpoint.start_rng(args.seed, rng)
    log.make_up(scores)
    logs = {}
    for step in range(start + 1, num_iters + 1):
        # Schedules are functions of the step, which counts from 1 as in the released trainer.
        multiplier = cosine_with_warmup(step, round(args.warmup_epoch * epoch_steps), num_iters, args.min_lr_mult)
        set_rates(optimizer, rates, multiplier)
        set_rates(adversary.optimizer, [args.disc_lr], multiplier)
        q_mult = ramp(step, round(args.loss_q_warmup_epoch * epoch_steps), args.loss_q_warmup_from, 1.0)
        temperature = None if args.temperature_to is None else ramp(
            step, round(args.temperature_epoch * epoch_steps), start_temperature, args.temperature_to
        )
        adversarial = args.disc_weight > 0 and step - 1 >= args.disc_start * epoch_steps
        ratio = config.prior_model.sampling_ratio(step, num_iters)

        micros = []
        for _ in range(args.accum_iter):
            batch = log.next(batches, step, save)
            video, positions = to_video(batch["frames"], config.input_size, "larp", device), batch["position"].tolist()
            video = flip_half(video, args.seed, positions) if args.flip else video
            micros.append(MicroBatch(video, positions, batch["path"]))

        # The discriminator is updated first, on detached reconstructions, and then judges the tokenizer. A single
        # micro-batch keeps its graph for the tokenizer's loss; several are reconstructed again, to save memory.
        rounds, single = [], args.accum_iter == 1
        if adversarial and step % args.d_update_freq == 0:
            with torch.set_grad_enabled(single):
                rounds = [reconstruct(micro, ratio, temperature) for micro in micros]
            logs |= adversary.update(step, micros, rounds, guard)

        # The tokenizer's loss: each term with its weight. Gradients pass through the frozen discriminator.
        values = []
        for i, micro in enumerate(micros, 1):
            with distributed.sync_gradients(model, i == args.accum_iter), frozen(discriminator):
                output, _ = rounds[0] if rounds and single else reconstruct(micro, ratio, temperature)
                fake = output.video.float()
                with precision.autocast():
                    terms = {"l1": ((fake - micro.video).abs().mean(), args.pixel_weight),
                             "quantizer": (output.loss_q, args.loss_q_weight * q_mult)}
                    if perceptual is not None:
                        terms[perceptual.name] = perceptual(fake, micro.video).mean(), args.perceptual_weight
                    if adversarial:
                        terms["generator"] = generator_loss(discriminator(fake), args.disc_loss), args.disc_weight
                    if output.loss_prior is not None:
                        terms["prior"] = output.loss_prior, args.loss_latent_ce_weight
                    loss = sum(weight * term for term, weight in terms.values())
                precision.scaler.scale(loss / args.accum_iter).backward()
            guard.watch(step, loss, micro.paths)
            values.append({"loss": loss, **{name: term for name, (term, _) in terms.items()}, **output.logs})
        update(optimizer, precision.scaler, args.clip_grad)
        for ema in emas.values():
            ema.update(tokenizer)
        logs |= mean_of(values)
        if step % args.log_every == 0 or step == num_iters:
            guard.check()
            means = distributed.all_mean(torch.stack([*logs.values()]))
            log.train(step, device, **dict(zip(logs, means.tolist())), lr=rates[-1] * multiplier)
            logs = {}  # the next line has the discriminator's values only if it is updated before
        log.end_step(step, save, save_steps, scores)
    log.finish(quarantine)


if __name__ == "__main__":
    with one_line_errors():
        main()
