"""Flags the entry scripts share. configargparse reads the command line, then VT_* variables, then --config FILE."""
import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from common.cli import Parser, check_carried, is_none, run_name, str2bool, word_or_none
from models.coordtok import CoordTokConfig
from models.discriminator import DiscriminatorConfig
from models.larp_ar import SIZES, LARPGeneratorConfig
from models.larp_tokenizer import LARPTokenizerConfig


def add_run(parser: Parser, save_dir: str, exp_name: str, num_workers: int) -> None:
    """Flags of a run: where it writes, how it resumes, precision and speed."""
    run = parser.add_argument_group("run")
    run.add_argument("--save_dir", "--results_dir", "--out_path", dest="save_dir", default=save_dir,
                     help="folder of runs")
    run.add_argument("--exp_name", "--name", dest="exp_name", type=run_name, default=exp_name,
                     help="name of this run's folder")
    run.add_argument("--resume", "--ckpt", dest="resume", nargs="?", const="auto", metavar="auto|CKPT",
                     help="go on from the newest whole checkpoint of this run, or from the one named")
    run.add_argument("--keep_checkpoints", type=int, default=3, help="how many of the newest checkpoints to keep")
    run.add_argument("--seed", "--global_seed", "--manualSeed", dest="seed", type=int, default=0,
                     help="seeds weights and all draws")
    run.add_argument("--wandb", choices=["disabled", "offline", "online"], default="disabled", help="log to wandb too")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    speed.add_argument("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto",
                       help="autocast; auto is bf16 on a GPU that has it, else fp32")
    speed.add_argument("--allow_tf32", action="store_true", help="let float32 matrix products use TF32")
    speed.add_argument("--compile", action="store_true", help="torch.compile the blocks of the model")
    speed.add_argument("--gradient_checkpointing", action="store_true", help="recompute blocks in the backward pass")
    speed.add_argument("-j", "--num_workers", type=int, default=num_workers, help="loader workers of each process")
    speed.add_argument("--prefetch_factor", type=int, default=2, help="micro-batches each worker prepares ahead")


def add_data(parser: Parser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--data_root", default="/data", help="folder that holds the data set's folder")
    data.add_argument("--video_name", default="UCF-101_train", help="the data set's folder: CLASS/VIDEO files")
    data.add_argument("--resize", choices=["auto", "worker", "device"], default="auto",
                      help="where frames are resized; auto is the device on a GPU, the loader's workers on a CPU")
    data.add_argument("--decode_timeout", type=float, default=60.0, help="seconds after which a file counts as damaged")


def add_lists(parser: Parser, csv_file: str) -> argparse._ArgumentGroup:
    """Flags of lists of videos, in place of a folder. Returns their group."""
    lists = parser.add_argument_group("lists of videos")
    lists.add_argument("--csv_file", default=csv_file,
                       help="lists to train on; null128.csv: random clips. --video_name names a folder instead")
    lists.add_argument("--val_csv", help="lists to validate on (default: CSV_FILE with _val for _train)")
    lists.add_argument("--flip", action="store_true", help="mirror half of the clips (the published models do not)")
    return lists


def add_training(parser: Parser, batch_size: int, lr: float, num_iters: int | None = None, epochs: int | None = None,
                 warmup_epoch: float | None = None) -> argparse._ArgumentGroup:
    """Flags of the training loop, which has a length of `num_iters` steps, or of `epochs`. warmup_epoch: epochs of
    warm-up; None is a constant learning rate. Returns their group, for what one script has alone."""
    train = parser.add_argument_group("training")
    train.add_argument("--batch_size", "--num_views", "--global_batch_size", "-b", dest="batch_size", type=int,
                       default=batch_size, help="clips a step, over all processes")
    train.add_argument("--accum_iter", type=int, default=1, help="micro-batches a step; the update does not change")
    if epochs is not None:
        train.add_argument("--max_epoch", "--epochs", dest="max_epoch", type=int, default=epochs,
                           help="passes over the videos")
    train.add_argument("--num_iters", type=int, default=num_iters,
                       help="steps" if epochs is None else "steps, instead of --max_epoch")
    train.add_argument("--lr", type=float, default=lr,
                       help="learning rate, constant" if warmup_epoch is None else "highest learning rate")
    if warmup_epoch is not None:
        train.add_argument("--warmup_epoch", type=float, default=warmup_epoch, help="epochs of linear warm-up")
        train.add_argument("--min_lr_mult", type=float, default=0.01, help="first and last learning rate, as a share")
        train.add_argument("--ema_decays", type=float, nargs="*", default=[],
                           help="moving averages of the weights to keep")
    train.add_argument("--clip_grad", "--clip_grad_max_norm", dest="clip_grad", type=float, default=0.0,
                       help="largest gradient norm; 0 is no clipping")
    return train


def add_logging(parser: Parser, log_every: int, save_every: float) -> argparse._ArgumentGroup:
    """Flags of what a run writes. save_every: an int is in steps, a float in epochs. Returns their group."""
    logs = parser.add_argument_group("logging")
    logs.add_argument("--log_every", type=int, default=log_every, help="steps between lines of metrics.jsonl")
    logs.add_argument("--save_every", "--steps_til_save", "--ckpt_every", dest="save_every", type=type(save_every),
                      default=save_every, help=f"{unit(save_every)} between checkpoints")
    return logs


def add_validation(logs: argparse._ArgumentGroup, eval_every: float, num_val: int | None, batch_size: int) -> None:
    """Flags of validation. eval_every: an int is in steps, a float in epochs. num_val: None is a clip of each video."""
    logs.add_argument("--eval_every", "--steps_til_summary", dest="eval_every", type=type(eval_every),
                      default=eval_every, help=f"{unit(eval_every)} between validations")
    logs.add_argument("--val_name", help="folder to validate on (default: VIDEO_NAME's _test, if there is one)")
    every = " (default: one of each video)" if num_val is None else ""
    logs.add_argument("--num_val", type=int, default=num_val, help=f"validation clips{every}; 0: no validation")
    logs.add_argument("--val_batch_size", type=int, default=batch_size,
                      help="validation clips at once in each process")


def unit(every: float) -> str:
    return "epochs" if isinstance(every, float) else "steps"


def add_clip_cache(parser: Parser) -> None:
    cache = parser.add_argument_group("clip cache")
    cache.add_argument("--cache_clips", action="store_true",
                       help="decode, resize and crop every video once, and train from these frames of 8 bits")
    cache.add_argument("--cache_dir", default="data/cache", help="folder of clip caches")


def add_window_cache(group: argparse._ArgumentGroup, name: str) -> None:
    """Flags of a cache of what a frozen tokenizer makes of each video: its `name` ("codes", "latents")."""
    group.add_argument(f"--cache_{name}", type=int, default=0, metavar="K",
                       help=f"train from the {name} of K windows of every video, encoded once; 0: encode as they come")
    group.add_argument("--cache_dir", default="data/cache", help=f"folder of caches of {name}")


def add_code_draws(group: argparse._ArgumentGroup) -> list[argparse.Action]:
    """Flags of how a sample's codes are drawn."""
    return [
        group.add_argument("--temperature", type=float, default=1.0, help="of the draws of a sample's codes"),
        group.add_argument("--top_k", type=int, default=0, help="draw from the k likeliest codes; 0: all"),
        group.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest codes up to this "
                           "probability"),
    ]


FIELDS = {field.name: field.default for field in dataclasses.fields(CoordTokConfig) if field.name != "video_shape"}


CLIP_FLAGS = {"num_frames": CoordTokConfig.video_shape[0], "img_size": CoordTokConfig.video_shape[1]}


def add_coordtok(parser: Parser) -> None:
    """CoordTok's architecture. Not given, a flag takes the checkpoint's value where there is one, else its default."""
    group = parser.add_argument_group("CoordTok architecture", "our checkpoints carry it: leave out, or give the same")
    for name, default in {**CLIP_FLAGS, **FIELDS}.items():
        group.add_argument(f"--{name}", type=type(default), default=argparse.SUPPRESS, help=f"(default: {default})")
    group.add_argument("--enc_patch_type", choices=["transformer"], default="transformer", help=argparse.SUPPRESS)


def coordtok_config(args: argparse.Namespace, carried: dict | None = None, source: str = "") -> dict:
    """CoordTok's configuration from the flags given and, if there is one, the configuration a checkpoint carries.

    Raises ValueError naming both values where a flag and the checkpoint differ.
    """
    config = {name: getattr(args, name) for name in FIELDS if hasattr(args, name)}
    frames, size = (getattr(args, name, None) for name in CLIP_FLAGS)
    if carried:
        held = {**carried, "num_frames": carried["video_shape"][0], "img_size": carried["video_shape"][1]}
        for name in [*FIELDS, *CLIP_FLAGS]:
            if hasattr(args, name):
                check_carried(name, getattr(args, name), held[name], source)
        return dict(carried)
    frames, size = frames or CLIP_FLAGS["num_frames"], size or CLIP_FLAGS["img_size"]
    return {**config, "video_shape": (frames, size, size)}


def options(kind: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type, Any]]:
    """(path, type, default) of each value in a configuration of nested dataclasses."""
    default = kind()
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from options(hint, (*path, name))
        else:
            yield (*path, name), hint, getattr(default, name)


# Flags of the LARP tokenizer: {name: (path in config.json, type, default)}. A flag has the last name of its path, where
# that says enough; names that can have but one value have none.
LARP_RENAMED = {("prior_model", "name"): "prior_model", ("prior_model", "args", "l2_normalized"): "prior_l2_normalized"}


LARP_FLAGS = {
    LARP_RENAMED.get(path, path[-1]): (path, hint, default)
    for path, hint, default in options(LARPTokenizerConfig)
    if path in LARP_RENAMED or not path[-1].endswith(("name", "in_channels"))
}


DISC_FLAGS = {  # the discriminator sees the clips that the tokenizer sees
    name: default for (name,), _, default in options(DiscriminatorConfig)
    if name not in ("input_size", "frame_num", "in_channels")
}


def add_larp_tokenizer(parser: Parser) -> None:
    """The LARP tokenizer's architecture, and its discriminator's. Not given, a flag takes the checkpoint's value where
    there is one, else its default."""
    group = parser.add_argument_group("LARP tokenizer", "our checkpoints carry it: leave out, or give the same")
    for name, (_, hint, default) in LARP_FLAGS.items():
        kind = {bool: str2bool, int: int, float: float, str | None: word_or_none}.get(hint, str)
        group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"(default: {default})")
    group = parser.add_argument_group("LARP discriminator", "likewise")
    for name, default in DISC_FLAGS.items():
        group.add_argument(f"--disc_{name}", type=int, default=argparse.SUPPRESS, help=f"(default: {default})")


def larp_config(args: argparse.Namespace, carried: dict | None = None, source: str = "") -> dict:
    """The tokenizer's configuration, nested as in config.json, from the flags given and, if there is one, the
    configuration a checkpoint carries. Raises ValueError naming both values where a flag and the checkpoint differ."""
    config = {} if carried is None else carried
    for name, (path, _, _) in LARP_FLAGS.items():
        if not hasattr(args, name):
            continue
        given, inner = getattr(args, name), config
        for key in path[:-1]:
            inner = inner.setdefault(key, {}) if carried is None else inner[key]
        if carried is not None and not (given is None and is_none(inner[path[-1]])):
            check_carried(name, given, inner[path[-1]], source)
        inner[path[-1]] = given
    return config


def disc_config(args: argparse.Namespace, tokenizer: LARPTokenizerConfig, carried: dict | None = None,
                source: str = "") -> dict:
    """The discriminator's configuration, likewise."""
    given = {name: getattr(args, f"disc_{name}") for name in DISC_FLAGS if hasattr(args, f"disc_{name}")}
    if carried is None:
        clip = {name: getattr(tokenizer, name) for name in ("input_size", "frame_num", "in_channels")}
        return given | clip
    for name, value in given.items():
        check_carried(f"disc_{name}", value, carried[name], source)
    return carried


AR_MODEL = "llama-abs-LP"


AR_FLAGS = {  # {name: (type, default)}; the tokenizer says how many codes there are, the task what they continue
    name: (hint, getattr(LARPGeneratorConfig(**SIZES[AR_MODEL]), name))
    for name, hint in get_type_hints(LARPGeneratorConfig).items()
    if name not in ("vocab_size", "max_seq_len", "cls_token_num", "frame_prediction", "model_type", "rope_base",
                    "max_batch_size")
}


NUM_COND_FRAMES = 5


def add_larp_ar(parser: Parser) -> None:
    """Architecture and task of LARP's generator. Not given, a flag takes the checkpoint's value where there is one,
    else its default."""
    group = parser.add_argument_group("LARP generator", "our checkpoints carry it: leave out, or give the same")
    group.add_argument("--model", choices=SIZES, default=argparse.SUPPRESS, help=f"size (default: {AR_MODEL})")
    for name, (hint, default) in AR_FLAGS.items():
        kind = str2bool if hint is bool else next(kind for kind in (int, float) if kind in (hint, *get_args(hint)))
        default = "that of --model" if name in SIZES[AR_MODEL] else default
        group.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"(default: {default})")
    group.add_argument("--frame_prediction", "--fp", dest="frame_prediction", action="store_true",
                       default=argparse.SUPPRESS, help="continue the first frames of a clip, instead of a class label")
    group.add_argument("--num_cond_frames", type=int, default=argparse.SUPPRESS,
                       help=f"how many frames frame prediction is given (default: {NUM_COND_FRAMES})")


def larp_ar_config(args: argparse.Namespace, tokenizer: LARPTokenizerConfig, carried: dict | None = None,
                   source: str = "") -> tuple[dict, int]:
    """The generator's configuration and the number of frames it is given (0: a class label), from the flags given, the
    tokenizer and, if there is one, the checkpoint that goes on, which carries both. Raises ValueError naming both
    values where a flag and the checkpoint differ."""
    given = {name: getattr(args, name) for name in (*AR_FLAGS, "frame_prediction") if hasattr(args, name)}
    size = SIZES[getattr(args, "model", AR_MODEL)]
    frames = getattr(args, "num_cond_frames", None)
    if carried is not None:
        config, held = carried["config"], carried["num_cond_frames"]
        for name, value in ((size if hasattr(args, "model") else {}) | given).items():
            flag = name if name in given else f"model {args.model}, {name}"
            check_carried(flag, value, config[name], source)
        if frames is not None:
            check_carried("num_cond_frames", frames, held, source)
        return config, held
    num_codes, frame_prediction = tokenizer.bottleneck_token_num, "frame_prediction" in given
    if frames is not None and not frame_prediction:
        raise ValueError(f"--num_cond_frames {frames} is for --frame_prediction: add that, or leave it out")
    frames = (NUM_COND_FRAMES if frames is None else frames) if frame_prediction else 0
    if frame_prediction and not 0 < frames < tokenizer.frame_num:
        raise ValueError(f"--num_cond_frames is {frames}, but the tokenizer's clips have {tokenizer.frame_num} frames: "
                         f"give 1 to {tokenizer.frame_num - 1}")
    return {
        **size, **given, "vocab_size": tokenizer.bottleneck.args.regularizer.args.codebook_size,
        "max_seq_len": num_codes, "cls_token_num": num_codes + 1 if frame_prediction else 1,
    }, frames

