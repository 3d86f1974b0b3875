"""Flags the entry scripts share. configargparse reads the command line, then VT_* variables, then --config FILE."""
import argparse
import contextlib
import dataclasses
import io
import math
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import configargparse
import torch
import yaml

from common.errors import end
from data.usage import usage_error
from data.video import VideoError
from models.coordtok import CoordTokConfig
from models.discriminator import DiscriminatorConfig
from models.larp_ar import SIZES, LARPGeneratorConfig
from models.larp_tokenizer import LARPTokenizerConfig
from models.quantizer import is_none
from training import distributed

# What each numeric flag may be, in every script that has it: a number in the interval. "(" and ")" exclude their end.
RANGES = {
    "[1, inf)": (
        "accum_iter", "batch_size", "global_batch_size", "num_views", "sample_batch_size", "val_batch_size", "slices",
        "log_every", "steps_til_save", "steps_til_summary", "ckpt_every", "prefetch_factor", "num_iters", "epochs",
        "max_epoch", "point_per_vid", "stat_clips", "d_update_freq", "num_classes", "num_samples_total", "num_clips",
        "num_cond_frames", "world_size", "stride", "size", "keep_checkpoints",
        # architecture
        "num_frames", "img_size", "enc_embed_dim", "enc_num_layers", "enc_num_heads", "enc_patch_size_xy",
        "enc_patch_size_t", "enc_patch_num_layers", "latent_resolution_xy", "latent_resolution_t", "latent_n_features",
        "latent_patch_size_xy", "latent_patch_size_t", "dec_embed_dim", "dec_num_layers", "dec_num_heads",
        "dec_patch_size_xy", "dec_patch_size_t", "bottleneck_dim", "bottleneck_token_num", "input_size", "frame_num",
        "temporal_patch_size", "patch_size", "decoder_temporal_patch_size", "decoder_patch_size", "encoder_hidden_size",
        "decoder_hidden_size", "encoder_num_heads", "decoder_num_heads", "encoder_depth", "decoder_depth", "n_rounds",
        "disc_hidden_size", "disc_n_heads", "disc_n_layers", "disc_temporal_patch_size", "disc_patch_size", "dim",
        "n_layer", "n_head", "n_kv_head", "multiple_of",
    ),
    "[2, inf)": ("num_sampling_steps", "val_sampling_steps", "codebook_size"),
    "[0, inf)": (
        "num_workers", "num_val", "num_samples", "starting_index", "class_label", "sit_ckpt_iter",
        "cache_latents", "cache_codes", "lr", "disc_lr", "weight_decay", "clip_grad", "clip_grad_max_norm",
        "warmup_epoch", "prior_lr_mult", "emb_lr_mult", "lpips_loss_scale", "pixel_weight", "perceptual_weight",
        "loss_q_weight", "loss_q_warmup_from", "loss_q_warmup_epoch", "loss_latent_ce_weight", "temperature_epoch",
        "disc_weight", "disc_start", "lecam_weight", "r1_weight", "cfg_scale", "val_cfg_scale", "temperature", "top_k",
        "diffusion_norm", "commitment_loss_weight", "codebook_loss_weight", "entropy_loss_weight", "initializer_range",
        "query_init_std",
    ),
    "(0, inf)": (
        "eval_every", "sample_every", "save_every", "decode_timeout", "i3d_eps", "atol", "rtol", "temperature_to",
        "entropy_loss_temperature", "mix_ss_peak_steps_ratio", "latent_ce_temperature", "latent_pe_scale_factor",
        "ffn_dim_multiplier", "norm_eps",
    ),
    "[0, 1)": (
        "betas", "ema_decay", "ema_decays", "last_step_size", "class_dropout_prob", "token_dropout_p", "attn_dropout_p",
        "resid_dropout_p", "ffn_dropout_p", "drop_path_rate",
    ),
    "[0, 1]": ("min_lr_mult", "guidance_interval", "top_p", "mix_ss_max_ratio"),
    "[0, 0.5)": ("train_eps", "sample_eps"),
    "[0, 4294967295]": ("seed", "dataset_split_seed"),  # what numpy and torch take, also times a million
    "[-1, inf)": ("cfg_interval",),
    "(-inf, inf)": ("stochastic_temperature",),  # negative: learned
}
RANGE_OF = {name: interval for interval, names in RANGES.items() for name in names}


def check_range(name: str, value: float) -> None:
    """ValueError where a flag's value is outside its interval, as NaN always is."""
    interval = RANGE_OF[name]
    low, high = map(float, interval[1:-1].split(","))
    from_low = low < value or (interval[0] == "[" and value == low)
    if not (from_low and (value < high or (interval[-1] == "]" and value == high))):
        words = {"(-inf, inf)": "a finite number", "[0, inf)": "0 or more", "(0, inf)": "more than 0"}
        expected = f"{low:g} or more" if interval[0] == "[" and high == math.inf else f"a number in {interval}"
        raise ValueError(f"--{name} is {value}, expected {words.get(interval, expected)}")


class TextLoader(yaml.SafeLoader):
    """YAML's scalars as they are written: 2024_01, 010, 12:30 and no are names to a flag that takes one. Only null is
    not text."""


TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag.endswith((":null", ":merge"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class ConfigParser(configargparse.YAMLConfigFileParser):
    """A YAML file of flags. Keys are spelt as on the command line, with dashes or underscores."""

    def parse(self, stream) -> dict[str, str | list | None]:
        try:
            content = yaml.load(stream, TextLoader)  # noqa: S506 - a SafeLoader
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise configargparse.ConfigFileParserException(f"{stream.name} is not YAML: {error}") from error
        content = {} if content is None else content
        if not isinstance(content, dict):
            raise configargparse.ConfigFileParserException(f"{stream.name} holds no lines of 'flag: value'")
        for key, value in content.items():
            items = value if isinstance(value, list) else [value]
            if not all(isinstance(item, str) for item in items) and value is not None:
                raise configargparse.ConfigFileParserException(
                    f"{key} in {stream.name} is {value}, expected a value or a list of values"
                )
        return {str(key).replace("-", "_"): value for key, value in content.items()}


class Parser(configargparse.ArgumentParser):
    """Dashes and underscores alike in flag names; no abbreviations; unknown keys of a file and values out of their
    range are errors, of one line and exit code 2."""

    def __init__(self, description: str, **options):
        super().__init__(
            description=description,
            allow_abbrev=False,
            auto_env_var_prefix="VT_",
            config_file_parser_class=ConfigParser,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            **options,
        )
        self.add_argument("--config", "--cfg", dest="config", is_config_file=True, help="YAML file of flags")

    def error(self, message: str) -> NoReturn:
        usage_error(message)

    def parse_known_args(self, args=None, *rest, **options):
        args = sys.argv[1:] if args is None else args
        args = [re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), arg) for arg in args]
        parsed, unknown = super().parse_known_args(args, *rest, **options)
        for action in self._actions:
            if action.type not in (int, float):
                continue
            value = getattr(parsed, action.dest, None)
            for number in value if isinstance(value, (list, tuple)) else [value] * (value is not None):
                try:
                    check_range(action.dest, number)
                except ValueError as error:
                    self.error(str(error))
        return parsed, unknown

    def convert_item_to_command_line_arg(self, action, key, value):
        if value is None:  # null in a file
            if action is not None and action.type is word_or_none:
                value = "none"
            elif action is not None and action.default is None:
                return []
            else:
                self.error(f"{key} is null, which it cannot be: give a value, or leave the line out for its default")
        return super().convert_item_to_command_line_arg(action, key, value)


def word_or_none(word: str) -> str | None:
    """For flags that may be without a name: none, in any of the spellings of the released files."""
    return None if is_none(word) else word


def run_name(name: str) -> str:
    """A folder inside the folder of runs."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise argparse.ArgumentTypeError(f"{name!r} is not a folder inside the folder of runs (--save_dir)")
    return name


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
    """For flags that are true or false, also in YAML's other words."""
    truths = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if word.lower() not in truths:
        raise argparse.ArgumentTypeError(f"true or false, got {word!r}")
    return truths[word.lower()]


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
        kind = {bool: truth, int: int, float: float, str | None: word_or_none}.get(hint, str)
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
    """End with one line, the last that is printed, for whatever ends a run; VT_TRACEBACK=1 shows where it arose.

    Errors that a user can mend, exit code 1; Ctrl-C, 130; and mistakes of this code, whose traceback comes before.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files may be of any bytes
    try:
        yield
    except Exception as error:
        if os.environ.get("VT_TRACEBACK"):
            raise
        where = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        line = one_line(error)
        if line is None:
            text = (str(error).strip() or "no text").splitlines()[-1]
            end(f"error{where}: {type(error).__name__}: {text} (not foreseen; see the traceback above)",
                before=traceback.format_exc())
        end(f"error{where}: {line}")
    except KeyboardInterrupt:
        if os.environ.get("VT_TRACEBACK"):
            raise
        end("error: interrupted by Ctrl-C", 130)
    else:
        distributed.teardown()  # not after an error: by NCCL it would wait for processes that wait for this one


def one_line(error: Exception) -> str | None:
    """What to say of an error that a user can mend; None for any other."""
    text = str(error).strip()
    # An error that crossed a loader worker carries its traceback: the message is the last line.
    last = re.sub(r"^[\w.]*(Error|Exception|DamagedFile): ", "", text.splitlines()[-1]) if text else ""
    if isinstance(error, torch.OutOfMemoryError):
        what = text.splitlines()[0].split(". ")[0]
        return f"not enough memory: {what}: lower the batch size, or try --gradient_checkpointing"
    if found := re.search(r".*allocate memory.*", text):  # a RuntimeError of torch's
        return f"not enough memory: {found[0]}: lower the batch size or --num_workers"
    if isinstance(error, MemoryError):
        return f"not enough memory: {last or 'the system has none left'}: lower the batch size or --num_workers"
    if isinstance(error, ValueError | OSError | FloatingPointError | VideoError):
        return last or type(error).__name__
    if broken := re.search(r"Connection (closed|reset) by peer|[Ss]ocket closed|remote process exited", text):
        return f"another process of this run has ended without a word, killed perhaps ({broken[0]})"
    return None
