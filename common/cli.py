"""What every command line shares: the parser, its help, the types and ranges of flags, and errors that end a run in
one line. Needs no torch until a run ends, so that --help and a mistake in a flag are answered at once.

A flag takes its value from the command line, otherwise from its VT_* environment variable, otherwise from the file of
--config.
"""
import argparse
import contextlib
import io
import math
import os
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import configargparse
import yaml

from common.errors import MendableError, end, usage_error

# The interval that a numeric flag's value must lie in, in every script that has the flag. "(" and ")" exclude the end.
RANGES = {
    "[1, inf)": (
        "accum_iter", "batch_size", "sample_batch_size", "val_batch_size", "slices", "log_every", "prefetch_factor",
        "num_iters", "max_epoch", "point_per_vid", "stat_clips", "d_update_freq", "num_classes", "num_samples_total",
        "num_clips", "num_cond_frames", "world_size", "stride", "size", "keep_checkpoints", "rollout",
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
        "cache_latents", "cache_codes", "motion", "lr", "disc_lr", "weight_decay", "clip_grad",
        "warmup_epoch", "warmup_iters", "prior_lr_mult", "emb_lr_mult", "lpips_loss_scale", "pixel_weight",
        "perceptual_weight", "loss_q_weight", "loss_q_warmup_from", "loss_q_warmup_epoch", "loss_latent_ce_weight",
        "temperature_epoch", "disc_weight", "disc_start", "lecam_weight", "r1_weight", "cfg_scale", "val_cfg_scale",
        "temperature", "top_k", "diffusion_norm", "commitment_loss_weight", "codebook_loss_weight",
        "entropy_loss_weight", "initializer_range", "query_init_std", "overlap", "frames",
    ),
    "(0, inf)": (
        "eval_every", "sample_every", "save_every", "decode_timeout", "i3d_eps", "bpp", "bitrates", "atol", "rtol",
        "temperature_to", "entropy_loss_temperature", "mix_ss_peak_steps_ratio", "latent_ce_temperature",
        "latent_pe_scale_factor", "ffn_dim_multiplier", "norm_eps",
    ),
    "[0, 1)": (
        "betas", "ema_decay", "ema_decays", "last_step_size", "class_dropout_prob", "token_dropout_p", "attn_dropout_p",
        "resid_dropout_p", "ffn_dropout_p", "drop_path_rate",
    ),
    "(0, 1)": ("previous_dropout_prob",),
    "[0, 1]": ("min_lr_mult", "guidance_interval", "top_p", "mix_ss_max_ratio"),
    "[0, 51]": ("crf",),  # of x264
    "[0, 0.5)": ("train_eps", "sample_eps"),
    "[0, 4294967295]": ("seed", "dataset_split_seed"),  # what numpy and torch take, also times a million
    "[-1, inf)": ("cfg_interval",),
    "(-inf, inf)": ("stochastic_temperature",),  # negative: learned
}

RANGE_OF = {name: interval for interval, names in RANGES.items() for name in names}


def check_range(name: str, value: float) -> None:
    """Raise ValueError if the value of the flag `name` is outside its interval. NaN is outside every interval."""
    interval = RANGE_OF[name]
    low, high = map(float, interval[1:-1].split(","))
    from_low = low < value or (interval[0] == "[" and value == low)
    if not (from_low and (value < high or (interval[-1] == "]" and value == high))):
        words = {"(-inf, inf)": "a finite number", "[0, inf)": "0 or more", "(0, inf)": "more than 0"}
        expected = f"{low:g} or more" if interval[0] == "[" and high == math.inf else f"a number in {interval}"
        raise ValueError(f"--{name} is {value}, expected {words.get(interval, expected)}")


class TextLoader(yaml.SafeLoader):
    """Reads every YAML scalar except null as text, because a name may be 2024_01, 010, 12:30 or no."""


TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag.endswith((":null", ":merge"))]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class ConfigParser(configargparse.YAMLConfigFileParser):
    """Reads a YAML file of flags. Keys are spelt as on the command line, with dashes or underscores."""

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


class Rare(str):
    """The help text of a flag that --help leaves out and --help_all shows."""


class HelpAll(argparse.Action):
    def __call__(self, parser, *_):
        parser.show_rare = True
        parser.print_help()
        parser.exit()


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows a flag by its first name. Its default, choices and other names follow its help text."""

    KINDS: dict[Any, str] = {int: "N", float: "X"}

    def __init__(self, prog: str, **options):
        columns = shutil.get_terminal_size().columns - 2
        super().__init__(prog, max_help_position=28, width=min(columns, 98), **options)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return self.KINDS.get(action.type, "NAME")

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str):
        """The placeholder of a value. Choices are left to the help text."""
        metavar = action.metavar or default_metavar
        return lambda size: metavar if isinstance(metavar, tuple) else (metavar,) * size

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return action.dest
        names = [action.option_strings[0]]
        if action.nargs != 0:
            names.append(self._format_args(action, self._get_default_metavar_for_optional(action)))
        return " ".join(names)

    def _get_help_string(self, action: argparse.Action) -> str:
        notes: list[str] = []
        text, default = action.help or "", action.default
        if action.choices:
            notes.append(", ".join(map(str, action.choices)))
        values = default if isinstance(default, (list, tuple)) else [default]
        if values and values[0] is not None and action.nargs != 0 and default != argparse.SUPPRESS:
            notes.append(f"default: {' '.join(map(str, values))}")
        if len(action.option_strings) > 1 and action.dest != "help":
            notes.append(f"also {', '.join(action.option_strings[1:])}")
        if not notes:
            return text
        head = f"{text[:-1]}; " if text.endswith(")") else f"{text} ("
        return f"{head}{'; '.join(notes)})"


class Parser(configargparse.ArgumentParser):
    """The parser of the entry scripts.

    Flag names take dashes or underscores, and cannot be abbreviated. An unknown key in a file of flags, or a number
    outside its range, ends the script with one line and exit code 2.
    """

    show_rare = False
    given: frozenset[str] = frozenset()  # names of the arguments on the command line that was parsed last

    def __init__(self, description: str, **options):
        super().__init__(
            description=description.strip(),
            allow_abbrev=False,
            auto_env_var_prefix="VT_",
            config_file_parser_class=ConfigParser,
            formatter_class=HelpFormatter,
            add_config_file_help=False,
            add_env_var_help=False,
            **options,
        )
        self._actions[0].help = "Show the flags of everyday use"
        self.add_argument("--help_all", action=HelpAll, nargs=0, default=argparse.SUPPRESS, help="Show all flags")
        self.add_argument("--config", "--cfg", dest="config", metavar="FILE", is_config_file=True,
                          help="YAML file of flags")

    def format_help(self) -> str:
        """The usage in one line, the description, and the flags by group: without those of Rare help, unless --help_all
        asks for them."""
        formatter = self._get_formatter()
        needed = [f"{action.option_strings[0]} {action.metavar}" for action in self._actions
                  if action.option_strings and action.required]
        needed += [action.dest for action in self._actions if not action.option_strings]
        formatter.add_usage(" ".join(["%(prog)s", *needed, "[--FLAG VALUE ...]"]), [], [])
        formatter.add_text(self.description)
        hidden = 0
        for group in self._action_groups:
            shown = [action for action in group._group_actions if self.show_rare or not isinstance(action.help, Rare)]
            hidden += len(group._group_actions) - len(shown)
            formatter.start_section(group.title)
            formatter.add_text(group.description if shown else None)
            formatter.add_arguments(shown)
            formatter.end_section()
        more = f"--help_all shows {hidden} more flags. " if hidden else ""
        formatter.add_text(f"{more}A flag can also be set by its environment variable, VT_FLAG,\n"
                           "or in the file of --config. The command line wins over the variable, that over the file.")
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        usage_error(message)

    def parse_known_args(self, args=None, *rest, **options):
        args = sys.argv[1:] if args is None else args
        args = [re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), arg) for arg in args]
        words = {arg.partition("=")[0] for arg in args}
        self.given = frozenset(action.dest for action in self._actions if words & {*action.option_strings})
        for action in self._actions:  # a variable may have any of a flag's names
            variables = ["VT_" + option[2:].upper() for option in action.option_strings if option.startswith("--")]
            if len(variables) > 1 and not action.is_config_file_arg:
                action.env_var = next((name for name in variables if name in os.environ), variables[0])
        parsed, unknown = super().parse_known_args(args, *rest, **options)
        for action in self._actions:
            if action.type not in (int, float) or action.choices:
                continue
            value = getattr(parsed, action.dest, None)
            for number in value if isinstance(value, (list, tuple)) else [value] * (value is not None):
                try:
                    check_range(action.dest, number)
                except ValueError as error:
                    self.error(str(error))
        return parsed, unknown

    def convert_item_to_command_line_arg(self, action, key, value):
        if value is None:  # the file has null
            if action is not None and action.type is word_or_none:
                value = "none"
            elif action is not None and action.default is None:
                return []
            else:
                self.error(f"{key} is null, which it cannot be: give a value, or leave the line out for its default")
        return super().convert_item_to_command_line_arg(action, key, value)


def word_or_none(word: str) -> str | None:
    """Type of a flag that takes a name, or none in any of its spellings (see `is_none`)."""
    return None if is_none(word) else word


def run_name(name: str) -> str:
    """Type of a flag that names a folder inside the folder of runs."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise argparse.ArgumentTypeError(f"{name!r} is not a folder inside the folder of runs (--save_dir)")
    return name


def str2bool(word: str) -> bool:
    """Type of a flag that is true or false. YAML's yes, no, on and off are accepted too."""
    truths = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if word.lower() not in truths:
        raise argparse.ArgumentTypeError(f"expected true or false, got {word!r}")
    return truths[word.lower()]


def fitting_workers(most: int) -> int:
    """The default number of loader workers of a process: `most`, or fewer where its share of the cores is smaller, as
    more would only wait for one another (torch warns of them)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(most, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def check_carried(flag: str, given: Any, held: Any, source: str) -> None:
    """Raise ValueError if a flag's value `given` differs from the value `held` by the checkpoint `source`."""
    if given != held:
        raise ValueError(
            f"--{flag} {given} was given, but {source} has {held}: leave the flag out, or give the same value"
        )


@contextlib.contextmanager
def one_line_errors():
    """Context around a script's main. Whatever ends the run is reported in one line, the last line of the output.

    The exit code is 1 for an error that a user can mend, and 130 for Ctrl-C. It is 1 for a mistake in this code too,
    whose traceback is printed before the line. VT_TRACEBACK=1 shows the traceback of every error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold any bytes
    try:
        yield
    except Exception as error:
        if os.environ.get("VT_TRACEBACK"):
            raise
        where = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        line = one_line(error)
        if line is None:
            text = (str(error).strip() or "no text").splitlines()[-1]
            end(f"error{where}: {type(error).__name__}: {text} (unexpected: see the traceback above)",
                before=traceback.format_exc())
        end(f"error{where}: {line}")
    except KeyboardInterrupt:
        if os.environ.get("VT_TRACEBACK"):
            raise
        end("error: interrupted by Ctrl-C", 130)
    else:
        from common import distributed  # imported here because it imports torch

        distributed.teardown()  # only here: after an error NCCL would wait for processes that wait for this one


def one_line(error: Exception) -> str | None:
    """The message for an error that a user can mend; None for any other error."""
    import torch  # imported here, so that --help does not wait for it

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
    if (isinstance(error, FileExistsError | NotADirectoryError) and error.filename and error.filename2 is None
            and not os.path.isdir(error.filename)):  # of making a folder
        return f"{error.filename} is a file or lies below one, expected a folder: choose another name"
    if isinstance(error, ValueError | OSError | FloatingPointError | MendableError):
        return last or type(error).__name__
    if broken := re.search(r"Connection (closed|reset) by peer|[Ss]ocket closed|remote process exited", text):
        return f"another process of this run has ended without an error message, perhaps killed ({broken[0]})"
    return None


def add_perceptual(group: argparse._ArgumentGroup) -> None:
    """Add the flags of `models.stlpips.perceptual_metric`."""
    group.add_argument("--perceptual", choices=["lpips", "stlpips"], default="lpips", help=Rare(
        "Perceptual distance: LPIPS on VGG16, or ST-LPIPS, whose weights come with a PyPI package"))
    group.add_argument("--lpips_weights", default="auto", metavar="auto|random|PATH",
                       help="Weights of the perceptual distance; auto downloads them on first use")


def config_diff(there: dict, here: dict) -> str:
    """The settings in which two dicts differ, as text. The text is empty if they are equal."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(f"{name} {there.get(name)} there, {here.get(name)} here" for name in names)


def is_none(name: str | None) -> bool:
    """Whether a name means none. The released files spell none in several ways."""
    return name is None or name.lower() in ("", "none", "no", "null")
