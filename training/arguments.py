"""Flags the entry scripts share. configargparse reads the command line, then VT_* variables, then --config FILE."""
import argparse
import contextlib
import dataclasses
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import configargparse

from data.video import VideoError
from models.coordtok import CoordTokConfig
from models.discriminator import DiscriminatorConfig
from models.larp_ar import SIZES, LARPGeneratorConfig
from models.larp_tokenizer import LARPTokenizerConfig
from training import distributed

FROM_ONE = ("accum_iter", "batch_size", "global_batch_size", "num_views", "sample_batch_size", "val_batch_size",
            "slices", "log_every", "steps_til_save", "steps_til_summary", "ckpt_every", "prefetch_factor")


class Parser(configargparse.ArgumentParser):
    """Dashes and underscores alike in flag names; no abbreviations; unknown keys of a file are errors."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            auto_env_var_prefix="VT_",
            config_file_parser_class=configargparse.YAMLConfigFileParser,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        self.add_argument("--config", "--cfg", dest="config", is_config_file=True, help="YAML file of flags")

    def parse_known_args(self, args=None, *rest, **options):
        args = sys.argv[1:] if args is None else args
        args = [re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), arg) for arg in args]
        parsed, unknown = super().parse_known_args(args, *rest, **options)
        for name in FROM_ONE:
            if (value := getattr(parsed, name, None)) is not None and value < 1:
                raise ValueError(f"--{name} is {value}, expected 1 or more")
        return parsed, unknown


def word_or_none(word: str) -> str | None:
    """For flags whose choices include None, spelt None or none."""
    return None if word in ("None", "none") else word


def add_run(parser: Parser, save_dir: str, exp_name: str, num_workers: int) -> None:
    """Flags of a run: where it writes, how it resumes, precision and speed."""
    run = parser.add_argument_group("run")
    run.add_argument("--save_dir", "--results_dir", "--out_path", dest="save_dir", default=save_dir,
                     help="folder of runs")
    run.add_argument("--exp_name", "--name", dest="exp_name", default=exp_name, help="name of this run's folder")
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


def add_perceptual(group: argparse._ArgumentGroup) -> None:
    """Flags of `models.stlpips.perceptual_metric`."""
    group.add_argument("--perceptual", choices=["lpips", "stlpips"], default="lpips",
                       help="learned distance: LPIPS on VGG16, or ST-LPIPS, whose weights PyPI carries")
    group.add_argument("--lpips_weights", default="auto", metavar="auto|random|PATH",
                       help="its weights: of LPIPS's VGG16, or of ST-LPIPS")


def add_clip_cache(parser: Parser) -> None:
    cache = parser.add_argument_group("clip cache")
    cache.add_argument("--cache_clips", action="store_true",
                       help="decode, resize and crop every video once, and train from these frames of 8 bits")
    cache.add_argument("--cache_dir", default="data/cache", help="folder of clip caches")


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


def truth(word: str) -> bool:
    """For flags that are true or false."""
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"true or false, got {word!r}")
    return word.lower() == "true"


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
        kind = {bool: truth, int: int, float: float}.get(hint, str)
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
            inner = inner.setdefault(key, {})
        if carried is not None:
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
        kind = truth if hint is bool else next(kind for kind in (int, float) if kind in (hint, *get_args(hint)))
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


def check_carried(flag: str, given: Any, held: Any, source: str) -> None:
    if given != held:
        raise ValueError(
            f"--{flag} {given} was given, but {source} has {held}: leave the flag out, or give the same value"
        )


@contextlib.contextmanager
def one_line_errors():
    """End with exit code 1 and one line for errors a user can mend; VT_TRACEBACK=1 shows where they arose."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, VideoError) as error:
        if os.environ.get("VT_TRACEBACK"):
            raise
        # An error that crossed a loader worker carries its traceback: the message is the last line.
        line = str(error).strip().splitlines()[-1]
        line = re.sub(r"^[\w.]*(Error|Exception): ", "", line)
        where = f" (rank {distributed.rank()})" if distributed.world_size() > 1 else ""
        print(f"error{where}: {line}", file=sys.stderr, flush=True)
        # os._exit would lose what other threads hold; a plain exit lets loaders close.
        sys.exit(1)
    except KeyboardInterrupt:
        print("error: interrupted by Ctrl-C", file=sys.stderr, flush=True)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        lines = [line for line in str(error).splitlines() if re.search("out of memory|allocate memory", line)]
        if os.environ.get("VT_TRACEBACK") or not (lines or isinstance(error, MemoryError)):
            raise
        print(f"error: not enough memory: {lines[-1] if lines else error}: lower the batch size or --num_workers",
              file=sys.stderr, flush=True)
        sys.exit(1)
    else:
        distributed.teardown()  # not after an error: by NCCL it would wait for processes that wait for this one
