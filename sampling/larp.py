"""LARP's generator as sample.py samples from it, by class or by frames (frame prediction): the Generator that the flags
make."""
import argparse

import torch
from torch import Tensor

from common.cli import check_carried
from common.rng import sample_generators
from eval.metrics import psnr_frame
from models.pretrained import weights_sha256
from sampling.generator import Generator, check_class_label
from training.codes import hold_last
from training.load import load_larp_ar, load_larp_tokenizer


def larp_generator(args: argparse.Namespace, device: torch.device) -> Generator:
    """A LARP generator, sampled as the flags say."""
    if args.tokenizer is None:
        raise ValueError("--ar_model needs --tokenizer, the LARP tokenizer whose codes it was trained on")
    tokenizer = load_larp_tokenizer(args.tokenizer, args.tokenizer_version)
    trained = load_larp_ar(args.ar_model, args.version)
    model, config = trained.model, trained.model.config
    fp, num_frames = config.frame_prediction, tokenizer.config.frame_num
    if not fp:
        check_class_label(args.class_label, config.num_classes)
    num_cond = larp_condition(args, trained.num_cond_frames, fp, num_frames)
    codes = tokenizer.config.bottleneck_token_num, tokenizer.config.bottleneck.args.regularizer.args.codebook_size
    if codes != (config.max_seq_len, config.vocab_size):
        raise ValueError(f"{args.ar_model} makes {config.max_seq_len} codes of {config.vocab_size}, but clips of the "
                         f"tokenizer {args.tokenizer} have {codes[0]} of {codes[1]}: they belong to different runs")
    sha256, tokenizer_sha256 = weights_sha256(model), weights_sha256(tokenizer)
    if trained.tokenizer not in (None, tokenizer_sha256):
        raise ValueError(f"{args.ar_model} was trained on a tokenizer of SHA-256 {trained.tokenizer[:12]}, and "
                         f"--tokenizer {args.tokenizer} has {tokenizer_sha256[:12]}: give the one it was trained on")
    # As published, all weights are cast, without autocast: those of the generator and, for classes, of the tokenizer.
    dtype, tokenizer_dtype = args.dtype or "bfloat16", args.tokenizer_dtype or ("float32" if fp else "float16")
    model.to(device, getattr(torch, dtype))
    tokenizer.to(device, getattr(torch, tokenizer_dtype))
    draw = {name: getattr(args, name) for name in ("cfg_scale", "cfg_interval", "temperature", "top_k", "top_p")}

    def generate(indices: list[int], labels: list[int], real: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        num = len(indices)
        # The rounding of matrix products depends on the number of rows, and the sampled code can depend on the last
        # bit. So on a GPU a batch is filled up to a fixed size. On a CPU the tokenizer gets one clip at a time; the
        # generator handles this itself (see models.decoding.Linear).
        place = list(range(num)) if device.type == "cpu" else [min(i, num - 1) for i in range(args.sample_batch_size)]
        parts = [slice(i, i + 1) for i in place] if device.type == "cpu" else [slice(None)]
        indices = [indices[i] for i in place]
        if real is not None:
            given = hold_last(real[place], num_cond)
            draws = None if args.det else sample_generators(args.seed, indices, device)
            known = [tokenizer.encode(given[part], args.det, draws and draws[part]) for part in parts]
            cond = model.frame_condition(torch.cat(known))
        else:
            labels = labels if args.class_label is None else [args.class_label] * num
            cond = torch.tensor(labels, device=device)[place]
        codes, nll = model.generate(cond, **draw, seeds=[(args.seed, i) for i in indices], return_nll=True)
        videos = torch.cat([tokenizer.decode(codes[part]) for part in parts])[:num].float()
        values = {"label": torch.full_like(nll, -1, dtype=torch.long) if fp else cond, "nll": nll}
        if real is not None:
            values["psnr_given"] = psnr_frame(real[:, :, :num_cond], videos[:, :, :num_cond].clamp(0, 1))
        return videos, {name: value[:num] for name, value in values.items()}

    settings = {
        **draw, "dtype": dtype, "tokenizer_dtype": tokenizer_dtype, "class_label": args.class_label, "seed": args.seed,
        "num_cond_frames": num_cond, "condition_codes": "best" if args.det else "drawn", "ar_model_sha256": sha256,
        "tokenizer_sha256": tokenizer_sha256,
    }
    if not fp:
        del settings["condition_codes"]
    if device.type == "cuda":  # rounding depends on the size of the batch
        settings["sample_batch_size"] = args.sample_batch_size
    return Generator(
        generate, num_labels=0 if fp or args.class_label is not None else config.num_classes, needs_real=fp,
        num_frames=num_frames, size=tokenizer.config.input_size,
        protocols=["larp_k600fp50k" if fp else "larp_gfvd10k"], settings=settings,
        model=f"LARP generator{', frame prediction' * fp}: {args.ar_model} {args.version} {sha256[:12]}",
        row={"ar_model": args.ar_model, "tokenizer": args.tokenizer},
        class_names=trained.class_names, num_cond_frames=num_cond, patch=tokenizer.config.patch,
    )


def larp_condition(args: argparse.Namespace, carried: int | None, fp: bool, num_frames: int) -> int:
    """The number of frames that the model is given; 0 if it is class-conditional. Raises ValueError if the flags do not
    fit the model.

    carried: the number in its checkpoint, if any. fp: whether the model predicts frames. num_frames: of a clip.
    """
    if not fp:
        if args.frame_prediction or args.num_cond_frames or args.det:
            raise ValueError(f"{args.ar_model} is class-conditional: leave --frame_prediction, --num_cond_frames and "
                             "--det out, or give a model for frame prediction")
        return 0
    if args.class_label is not None or args.cfg_scale != 1:
        raise ValueError(f"{args.ar_model} predicts frames, without classes: leave --class_label and --cfg_scale out")
    if carried is None and not (args.frame_prediction and args.num_cond_frames):
        raise ValueError(f"{args.ar_model} predicts frames: give --frame_prediction and --num_cond_frames (the "
                         "published model's is 5)")
    if carried is not None and args.num_cond_frames is not None:
        check_carried("num_cond_frames", args.num_cond_frames, carried, args.ar_model)
    num_cond = args.num_cond_frames or carried or 0
    if not 0 < num_cond < num_frames:
        raise ValueError(f"--num_cond_frames is {num_cond}, expected 1 to {num_frames - 1}")
    return num_cond
